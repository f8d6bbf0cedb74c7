"""softprompt prompts"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from softprompt.cli.console import load, print_json, print_table, say, warnings_as_lines
from softprompt.cli.options import config_of, options_of
from softprompt.config import BaseConfig
from softprompt.prompt import SoftPrompt, nearest_tokens
from softprompt.storage import Library, load_prompt, pull_prompt, push_prompt, resolve_prompt

_library = click.option("--library", type=click.Path(), required=True, help="Folder of adapters.")
_maybe_library = click.option("--library", type=click.Path(), help="Folder of adapters that names refer to.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_force = click.option("--force", is_flag=True, help="Accept a prompt of another base of the same width.")


@click.group("prompts")
def command() -> None:
    """List, show, check, import, export, remove, push or pull prompts."""


@command.command("list")
@_library
@_json
def list_prompts(library: str, as_json: bool) -> None:
    """Every prompt of a library; a broken one is listed with its problem."""
    entries = Library(library).list()
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    rows = [
        [entry.name, _shape(entry.num_virtual_tokens, entry.hidden_size), entry.base_name or "", entry.created or "",
         f"{entry.num_bytes:,}", (entry.content_hash or "")[:12], entry.problem or "ok"]
        for entry in entries
    ]  # fmt: skip
    print_table(f"{library}: {len(rows)} prompts", ["name", "shape", "base", "created", "bytes", "hash", "state"], rows)


@command.command("show")
@click.argument("prompt")
@_maybe_library
@options_of(BaseConfig, optional=True)
@_force
@_json
def show(prompt: str, library: str | None, force: bool, as_json: bool, **flags: Any) -> None:
    """A prompt's record and norms and, with --base, the nearest tokens of each virtual token."""
    base = load(config_of(BaseConfig, flags)) if flags["base"] is not None else None
    with warnings_as_lines():
        soft = load_prompt(resolve_prompt(prompt, library), base, force=force)
    near = nearest_tokens(soft, base) if base is not None else []
    norms = soft.tensor.norm(dim=1).tolist()
    if as_json:
        facts = {"content_hash": soft.content_hash, "shape": list(soft.tensor.shape), "norms": norms}
        print_json({**facts, "record": soft.record.to_json(), "nearest": [asdict(item) for item in near]})
        return
    print_table(prompt, ["fact", "value"], _facts(soft))
    tokens = ["  ".join(f"{text!r} {similarity:.2f}" for text, similarity in item.tokens) for item in near]
    rows = [[f"{i}", f"{norm:.3f}", tokens[i] if tokens else "(give --base)"] for i, norm in enumerate(norms)]
    print_table("Virtual tokens", ["", "norm", "nearest tokens (cosine similarity)"], rows)


@command.command("check")
@_library
@options_of(BaseConfig, optional=True)
@_json
def check(library: str, as_json: bool, **flags: Any) -> None:
    """Load every prompt of a library, against --base if given; exit code 1 if one has a problem."""
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
    base = load(config_of(BaseConfig, flags)) if flags["base"] is not None else None
    with warnings_as_lines():
        place = Library(library).import_folder(
            folder, name, overwrite=overwrite, base=base, force=force, task_type=task_type, base_name=base_name
        )
    say(f"imported to {place}")


@command.command("export")
@click.argument("name")
@click.argument("folder", type=click.Path())
@_library
@click.option("--overwrite", is_flag=True, help="Replace the adapter in FOLDER.")
def export(name: str, folder: str, library: str, overwrite: bool) -> None:
    """Write a library's prompt to FOLDER as an adapter that PEFT loads."""
    say(f"exported to {Library(library).export(name, folder, overwrite=overwrite)}")


@command.command("remove")
@click.argument("name")
@_library
def remove(name: str, library: str) -> None:
    """Delete a prompt from a library."""
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
    with warnings_as_lines():
        place = pull_prompt(
            repo_id, Library(library).place(name), revision=revision, offline=offline, overwrite=overwrite
        )
    say(f"pulled to {place}")


def _shape(num_virtual_tokens: int | None, hidden_size: int | None) -> str:
    return "" if num_virtual_tokens is None else f"{num_virtual_tokens} x {hidden_size}"


def _facts(soft: SoftPrompt) -> list[list[str]]:
    record, run = soft.record, soft.record.run
    facts = {
        "shape": _shape(soft.num_virtual_tokens, soft.hidden_size),
        "hash": soft.content_hash,
        "base": record.base_name or "unknown",
        "base fingerprint": record.base_fingerprint or "unknown",
        "input form": record.form.kind if record.form.template is None else repr(record.form.template),
        "trained further from": record.parent or "",
        "data": Path(str(run.get("source", ""))).name,
        "steps": str(run.get("kept_step", "")),
        "training loss": _curve(run.get("losses")),
    }
    return [[name, value] for name, value in facts.items() if value]


def _curve(losses: Any) -> str:  # Any: a record is JSON, and may be a stranger's
    known = [loss for loss in losses if isinstance(loss, float)] if isinstance(losses, list) else []
    return f"{known[0]:.3f} at the first step, {known[-1]:.3f} at the last (nats per target)" if known else ""
