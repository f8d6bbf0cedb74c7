"""What `compare`, `generate` and `prompts` read: inputs and prompts as they are named on a command line, and the rows
that each prompt's training set aside, found again through the prompts' records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from softprompt.cli.console import say
from softprompt.config import DataConfig
from softprompt.data import Rows, held_out_record, split_rows
from softprompt.errors import ConfigError, DataError, SoftpromptError
from softprompt.prompt import Judgement, SoftPrompt
from softprompt.settings import typed_text
from softprompt.types import NO_VALIDATION, InputForm, is_row_count

if TYPE_CHECKING:
    from softprompt.base import Base


def parse_fields(fields: Sequence[str]) -> dict[str, str]:
    r"""`name=text` pairs as a mapping, with `\n` in a text a line break.

    Raises ConfigError for one without a name or given twice.
    """
    parsed: dict[str, str] = {}
    for item in fields:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"--field {item!r} is not of the form name=text")
        if name in parsed:
            raise ConfigError(f"--field {name!r} is given twice")
        parsed[name] = typed_text(text)
    return parsed


def parse_messages(messages: Sequence[str]) -> list[dict[str, str]]:
    """A conversation from `role=text` items; an item without a role is a message of the user."""
    from softprompt.data.messages import ROLES

    parsed = []
    for item in messages:
        role, equals, text = item.partition("=")
        is_role = bool(equals) and role in ROLES
        parsed.append({"role": role, "content": text} if is_role else {"role": "user", "content": item})
    return parsed


def named_prompts(prompts: Sequence[str], library: str | None) -> dict[str, Path]:
    """Each prompt's folder by its name: the folder's own, or the whole path where two have the same name."""
    from softprompt.evaluation import BARE
    from softprompt.storage import resolve_prompt

    folders = [resolve_prompt(prompt, library) for prompt in prompts]
    paths = [folder.resolve() for folder in folders]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ConfigError(f"prompt {prompts[index]!r} is given twice; give each once")
    names = [path.name for path in paths]
    return {
        name if names.count(name) == 1 and name != BARE else str(path): folder
        for name, path, folder in zip(names, paths, folders, strict=True)
    }


def stop_notes(base: Base, stop: Sequence[str]) -> list[str]:
    """A note for each stop string that no answer of this base can contain."""
    reasons = ((text, _why_never(base, text)) for text in stop)
    return [f"--stop {text!r} can never match: {reason}" for text, reason in reasons if reason is not None]


def _why_never(base: Base, text: str) -> str | None:
    control = next((token for token in base.tokenizer.all_special_tokens if token in text), None)
    if control is not None:
        token_id = base.tokenizer.convert_tokens_to_ids(control)
        return f"{control} is a control token, which answers leave out; --stop-ids {token_id} ends there"
    if text in base.decode(base.encode(text)):
        return None
    ids = range(min(len(base.tokenizer), base.vocab_size))  # read only where the text itself does not come back
    known = set(" ").union(*base.tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=True))
    lacking = next((character for character in text if character not in known), None)
    return None if lacking is None else f"no token of the base writes {lacking!r}"


def say_judgements(prompts: Mapping[str, SoftPrompt]) -> None:
    """What each prompt's training found on its validation rows, where it measured that."""
    for name, prompt in prompts.items():
        judgement = Judgement.from_json(prompt.record.run.get("held_out"))
        if judgement is not None:
            say(f"note: {name}, when it was trained: {judgement.text}")


class _Recorded(NamedTuple):
    """The held-out rows of a training, by its record."""

    config: DataConfig
    seed: int
    rows_hash: str


def recorded_sets(prompts: Mapping[str, SoftPrompt], *, offline: bool = False) -> dict[str, Rows]:
    """Held-out sets by name, each once; a set that is missing or has changed is reported and left out.

    A set has the name of its file or data set, with the prompt's name added where two sets of that name differ.
    """
    found: dict[str, tuple[object, Rows]] = {}
    for name, prompt in prompts.items():
        if not prompt.record.run.get("test"):
            say(f"note: {name} has no record of held-out rows; give --data for a held-out loss")
            continue
        try:
            recorded = _recorded(prompt.record.run)
            form = replace(prompt.record.form, has_decoder_prompt=False)  # of the prompt alone; the rows are the same
            key = (recorded.rows_hash, form)
            if key not in [known for known, _ in found.values()]:
                rows = _read(recorded, prompt.record.form, offline)
                title = Path(rows.source).name
                found[title if title not in found else f"{title} ({name})"] = (key, rows)
        except SoftpromptError as error:
            say(f"note: the held-out rows of {name} cannot be read: {error}")
    return {title: rows for title, (_, rows) in found.items()}


def _recorded(run: Mapping[str, Any]) -> _Recorded:  # Any: a record is JSON, and may be a stranger's
    known = {item.name for item in dataclass_fields(DataConfig)}
    try:
        settings = {key: value for key, value in run["data"].items() if key in known}
        settings["validation"] = settings.get("validation") or NO_VALIDATION  # None: by an earlier release
        seed = run["data"].get("seed", run["plan"]["config"]["seed"])
        folder = Path(run["data"]["folder"])
        moved = {key: _from_folder(settings.get(key), folder) for key in ("data", "test", "validation")}
        return _Recorded(DataConfig(**{**settings, **moved}), seed, run["test"]["hash"])
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DataError("its record does not name their source; give --data") from error


def _from_folder(path: str | None, folder: Path) -> str | None:
    """A relative path of the training, resolved in the folder where the training ran, if it still exists."""
    if path is None or is_row_count(path) or not (folder / path).exists():
        return path
    return str(folder / path)


def _read(recorded: _Recorded, form: InputForm, offline: bool) -> Rows:
    rows = split_rows(recorded.config, seed=recorded.seed, offline=offline, form=form).test
    if rows is not None and form.task != "generate":
        rows = replace(rows, form=form)  # the template was given before its task was known
    if rows is None or held_out_record(rows)["hash"] != recorded.rows_hash:
        raise DataError(f"{recorded.config.data} has changed since the training")
    return rows
