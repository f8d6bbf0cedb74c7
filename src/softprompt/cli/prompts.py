"""softprompt prompts"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from softprompt.cli.command import Group, Setting, config_of, options_of
from softprompt.cli.console import load, print_json, print_list, print_table, print_words, say, warnings_as_lines
from softprompt.config import BaseConfig, DataConfig

_library = click.option("--library", type=click.Path(), required=True, help="Folder of adapters.")
_maybe_library = click.option("--library", type=click.Path(), help="Folder of adapters that names refer to.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_force = click.option("--force", is_flag=True, help="Accept a prompt of another base of the same width.")


@click.group("prompts", cls=Group)
def command() -> None:
    """List, show, check, import, export, remove, push or pull prompts."""


@command.command("list")
@_library
@_json
def list_prompts(library: str, as_json: bool) -> None:
    """Every prompt of a library; a broken one is listed with its problem."""
    from softprompt.cli.prompt_report import shape_text
    from softprompt.storage import Library

    entries = Library(library).list()
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    has_tasks = any(entry.task not in (None, "generate") for entry in entries)
    rows = [
        [entry.name, shape_text(entry.num_virtual_tokens, entry.hidden_size),
         *([entry.task or ""] if has_tasks else []), entry.base_name or "",
         (entry.created or "")[:10], f"{entry.num_bytes:,}", (entry.content_hash or "")[:8],
         "ok" if entry.problem is None else "broken"]
        for entry in entries
    ]  # fmt: skip
    columns = ["name", "shape", *(["task"] if has_tasks else []), "base", "created", "bytes", "hash", "state"]
    title = f"{library}: {len(rows)} prompt{'' if len(rows) == 1 else 's'}"
    print_list(title, columns, rows, whole=("shape", "task", "created", "bytes", "hash", "state"))
    for entry in entries:
        if entry.problem is not None:
            print_words(f"{entry.name} is broken: {entry.problem}")


@command.command("show")
@click.argument("prompt")
@_maybe_library
@options_of(BaseConfig, optional=True)
@click.option("--leave-out", is_flag=True, help="With --base: the held-out loss without each virtual token.")
@click.option(
    "--leave-out-rows", type=Setting(int, least=1), default=100, show_default=True,
    help="Held-out rows to score at most.",
)  # fmt: skip
@options_of(DataConfig, optional=True, leave_out=("validation", "test", "shuffle"))
@_force
@_json
def show(
    prompt: str, library: str | None, leave_out: bool, leave_out_rows: int, force: bool, as_json: bool, **flags: Any
) -> None:
    """A prompt's record, norms and drift from its start and, with --base, the nearest tokens of each virtual token.

    --leave-out reads the rows that the prompt's training set aside; --data names another set to read instead.
    """
    from softprompt.cli.prompt_report import check_flags, held_out_rows, inspect, show_inspection, with_leave_out
    from softprompt.storage import load_prompt, resolve_prompt

    check_flags(flags, leave_out=leave_out)
    base = load(config_of(BaseConfig, flags)) if flags["base"] is not None else None
    with warnings_as_lines():
        soft = load_prompt(resolve_prompt(prompt, library), base, force=force)
    found = inspect(soft, base)
    if leave_out and base is not None:
        found = with_leave_out(found, base, held_out_rows(soft, prompt, flags, leave_out_rows))
    show_inspection(prompt, found, as_json=as_json)


@command.command("similarity")
@click.argument("names", nargs=-1)
@_library
@options_of(BaseConfig, optional=True)
@_force
@_json
def show_similarities(names: tuple[str, ...], library: str, force: bool, as_json: bool, **flags: Any) -> None:
    """How alike the prompts of a library are, or those of NAMES, whatever the order of their virtual tokens.

    Each virtual token is matched with the most similar one of the other prompt; 1 is the same set of vectors. With
    --base the mean embedding of its vocabulary is subtracted first.
    """
    from softprompt.cli.prompt_report import note_other_bases, prompts_of, show_similarity, similarity_json
    from softprompt.prompt import mean_embedding, similar_pairs
    from softprompt.storage import Library

    base = load(config_of(BaseConfig, flags)) if flags["base"] is not None else None
    with warnings_as_lines():
        prompts = prompts_of(Library(library), names, base, force=force)
    note_other_bases(prompts)
    pairs = similar_pairs(prompts, mean_embedding(base) if base is not None else None)
    print_json(similarity_json(prompts, pairs, base)) if as_json else show_similarity(prompts, pairs, base)


@command.command("check")
@_library
@options_of(BaseConfig, optional=True)
@_json
def check(library: str, as_json: bool, **flags: Any) -> None:
    """Load every prompt of a library, against --base if given; exit code 1 if one has a problem."""
    from softprompt.storage import Library

    base = load(config_of(BaseConfig, flags)) if flags["base"] is not None else None
    with warnings_as_lines():
        verdicts = Library(library).check(base)
    if as_json:
        print_json([verdict._asdict() for verdict in verdicts])
    else:
        print_table(library, ["name", "state"], [[verdict.name, verdict.problem or "ok"] for verdict in verdicts])
    if any(verdict.problem is not None for verdict in verdicts):
        raise click.exceptions.Exit(1)


@command.command("import")
@click.argument("folder", type=click.Path())
@click.argument("name")
@_library
@options_of(BaseConfig, optional=True)
@click.option("--task-type", help="For weights without a config: the task, CAUSAL_LM.")
@click.option("--base-name", help="For weights without a config: the base that they were trained on.")
@click.option("--overwrite", is_flag=True, help="Replace the prompt of that name.")
@_force
def import_prompt(
    folder: str, name: str, library: str, task_type: str | None, base_name: str | None, overwrite: bool, force: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Copy the adapter in FOLDER (PEFT's or ours) into a library under NAME."""
    from softprompt.storage import Library

    base = load(config_of(BaseConfig, flags)) if flags["base"] is not None else None
    with warnings_as_lines():
        path = Library(library).import_folder(
            folder, name, overwrite=overwrite, base=base, force=force, task_type=task_type, base_name=base_name
        )
    say(f"imported to {path}")


@command.command("export")
@click.argument("name")
@click.argument("folder", type=click.Path())
@_library
@click.option("--overwrite", is_flag=True, help="Replace the adapter in FOLDER.")
def export(name: str, folder: str, library: str, overwrite: bool) -> None:
    """Write a library's prompt to FOLDER as an adapter that PEFT loads."""
    from softprompt.storage import Library

    say(f"exported to {Library(library).export(name, folder, overwrite=overwrite)}")


@command.command("remove")
@click.argument("name")
@_library
def remove(name: str, library: str) -> None:
    """Delete a prompt from a library."""
    from softprompt.storage import Library

    Library(library).remove(name)
    say(f"removed {name} from {library}")


@command.command("push")
@click.argument("prompt")
@click.argument("repo_id")
@_maybe_library
@click.option("--private", is_flag=True, help="Make the repository private when it is created.")
@click.option("--revision", help="Branch to push to.")
def push(prompt: str, repo_id: str, library: str | None, private: bool, revision: str | None) -> None:
    """Upload a prompt to REPO_ID on the Hub; the token is huggingface_hub's own (HF_TOKEN or its login)."""
    from softprompt.storage import push_prompt, resolve_prompt

    with warnings_as_lines():
        url = push_prompt(resolve_prompt(prompt, library), repo_id, private=private, revision=revision)
    say(f"pushed: {url}")


@command.command("pull")
@click.argument("repo_id")
@click.argument("name")
@_library
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--offline", is_flag=True, help="Take it from the local cache only.")
@click.option("--overwrite", is_flag=True, help="Replace the prompt of that name.")
def pull(repo_id: str, name: str, library: str, revision: str | None, offline: bool, overwrite: bool) -> None:
    """Download REPO_ID from the Hub into a library under NAME."""
    from softprompt.storage import Library, pull_prompt

    with warnings_as_lines():
        path = pull_prompt(
            repo_id, Library(library).place(name), revision=revision, offline=offline, overwrite=overwrite
        )
    say(f"pulled to {path}")
