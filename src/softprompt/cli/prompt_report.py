"""What `softprompt prompts show` and `similarity` print: one prompt from inside, and how alike several are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import click

from softprompt.base import Base
from softprompt.cli.command import config_of, given_flags
from softprompt.cli.console import print_json, print_list, print_table, say
from softprompt.cli.inputs import recorded_sets
from softprompt.config import DataConfig, PredictConfig
from softprompt.data import Rows, build_examples, build_task_examples, read_rows
from softprompt.errors import ConfigError, SoftpromptError
from softprompt.evaluation import Interval, LeaveOneOut, leave_one_out
from softprompt.evaluation.calibrate import threshold_line
from softprompt.families import forward_of
from softprompt.prompt import (
    Drift,
    Judgement,
    NearestTokens,
    SimilarPair,
    SoftPrompt,
    drift_from_json,
    nearest_tokens,
)
from softprompt.storage import Library
from softprompt.types import InputForm

_LARGEST_MATRIX = 10  # prompts
_MOST_PAIRS = 20

Groups = Mapping[Any, Sequence[str]]  # Any: a width or a hash -> the names that share it


class HeldOut(NamedTuple):
    """The rows that a prompt is read on."""

    title: str  # the name of their file or data set
    rows: Rows


@dataclass(frozen=True)
class Inspection:
    """One prompt from inside. What needs a base, a record or held-out rows is None or empty without."""

    prompt: SoftPrompt
    norms: tuple[float, ...]  # Euclidean, one per virtual token
    relative_norms: tuple[float, ...]  # the same over the RMS norm of the base's embeddings
    drift: tuple[Drift, ...]  # from where training started
    nearest: tuple[NearestTokens, ...]
    held_out: str | None = None  # the set that the tokens were left out on
    leave_out: LeaveOneOut | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values only, but for losses that are not finite."""
        return {
            "content_hash": self.prompt.content_hash,
            "shape": list(self.prompt.tensor.shape),
            "head": {name: list(weight.shape) for name, weight in self.prompt.head.items()},
            "norms": self.norms,
            "relative_norms": self.relative_norms,
            "drift": [token.to_json() for token in self.drift],
            "nearest": [asdict(item) for item in self.nearest],
            "leave_out": {"held_out": self.held_out, **asdict(self.leave_out)} if self.leave_out is not None else None,
            "record": self.prompt.record.to_json(),
        }


def inspect(prompt: SoftPrompt, base: Base | None) -> Inspection:
    """Everything but the held-out losses."""
    norms = tuple(prompt.tensor.norm(dim=1).tolist())
    usual = base.embedding_rms * math.sqrt(base.hidden_size) if base is not None else None
    return Inspection(
        prompt=prompt,
        norms=norms,
        relative_norms=tuple(norm / usual for norm in norms) if usual else (),
        drift=drift_from_json(prompt.record.run.get("drift"), len(prompt.tensor)),
        nearest=tuple(nearest_tokens(prompt, base)) if base is not None else (),
    )


def with_leave_out(found: Inspection, base: Base, held_out: HeldOut) -> Inspection:
    """The same with the held-out loss without each virtual token. Raises DataError, LengthError."""
    max_length = base.max_length - found.prompt.num_virtual_tokens
    rows = held_out.rows
    if rows.form.task == "generate":
        examples = build_examples(base, rows, eos=True, max_length=max_length).examples
    else:
        examples = build_task_examples(base, rows, max_length=max_length).examples
    say(f"scoring {1 + len(found.norms)} prompts on {len(examples):,} rows of {held_out.title}")
    worth = leave_one_out(base, forward_of(base), examples, found.prompt)
    return replace(found, held_out=held_out.title, leave_out=worth)


def check_flags(flags: Mapping[str, Any], *, leave_out: bool) -> None:
    """Raises ConfigError for flags about held-out rows that would have no effect."""
    if leave_out and flags["base"] is None:
        raise ConfigError("--leave-out computes losses and needs the base; give --base")
    about_rows = {item.name for item in dataclass_fields(DataConfig)} & given_flags()
    idle = about_rows if flags["data"] is None else set()
    if not leave_out:
        idle = about_rows | ({"leave_out_rows"} & given_flags())
    if idle:
        needed = "--data" if leave_out else "--leave-out"
        raise ConfigError(f"--{min(idle).replace('_', '-')} has no meaning without {needed}; add {needed}")


def held_out_rows(prompt: SoftPrompt, name: str, flags: Mapping[str, Any], max_rows: int) -> HeldOut:
    """The first `max_rows` rows of --data, else of those that the prompt's training set aside.

    Raises ConfigError where there are neither, DataError for rows that cannot be used.
    """
    if flags["data"] is not None:
        rows = _given_rows(flags, prompt)
        sets = {Path(rows.source).name: rows}
    else:
        sets = recorded_sets({name: prompt}, offline=flags["offline"])
    if not sets:
        raise ConfigError(f"--leave-out has no rows: the record of {name} leads to no held-out set; give --data")
    ((title, rows),) = sets.items()
    return HeldOut(title, rows.select(range(min(max_rows, len(rows)))))


def _given_rows(flags: Mapping[str, Any], prompt: SoftPrompt) -> Rows:
    """In the prompt's own template unless another form is asked for."""
    form = prompt.record.form
    rows = read_rows(config_of(DataConfig, flags), offline=flags["offline"], form=form)
    return rows if form.task == "generate" else replace(rows, form=form)


def show_inspection(name: str, found: Inspection, *, as_json: bool) -> None:
    """The inspection on stdout, as tables or as JSON."""
    if as_json:
        print_json(found.to_json())
        return
    print_list(name, ["fact", "value"], _record_rows(found.prompt), whole=("fact",))
    columns = _token_columns(found)
    rows = [[str(token), *cells] for token, cells in enumerate(zip(*columns.values(), strict=True))]
    print_list("Virtual tokens", ["", *columns], rows, whole=("", *list(columns)[:-1]))
    if found.leave_out is not None:
        _show_leave_out(found.leave_out, found.held_out or "")


def shape_text(num_virtual_tokens: int | None, hidden_size: int | None) -> str:
    """A prompt's shape as text; nothing where it is unknown."""
    return "" if num_virtual_tokens is None else f"{num_virtual_tokens} x {hidden_size}"


def _record_rows(prompt: SoftPrompt) -> list[list[str]]:
    record, run = prompt.record, prompt.record.run
    rows = {
        "shape": shape_text(prompt.num_virtual_tokens, prompt.hidden_size) + _for_decoder(prompt),
        "hash": prompt.content_hash,
        "base": record.base_name or "unknown",
        "base fingerprint": record.base_fingerprint or "unknown",
        "input form": record.form.kind if record.form.template is None else repr(record.form.template),
        "task": record.form.task if record.form.task != "generate" else "",
        "labels": ", ".join(label.strip() or repr(label) for label in record.form.labels),
        "label words": _label_words(record.form),
        "pooling": record.form.pooling or "",
        "placement": _placement(record.form),
        "head": _head_text(prompt),
        "trained further from": record.parent or "",
        "data": Path(str(run.get("source", ""))).name,
        "steps": str(run.get("kept_step", "")),
        "training loss": _curve(run.get("losses")),
        "confidence": _confidence(run.get("held_out")),
        "does it help": "" if (judgement := Judgement.from_json(run.get("held_out"))) is None else judgement.text,
    }
    return [[name, value] for name, value in rows.items() if value]


def _for_decoder(prompt: SoftPrompt) -> str:
    return f", and {prompt.num_decoder_tokens} more for the decoder" if prompt.num_decoder_tokens else ""


def _label_words(form: InputForm) -> str:
    pairs = zip(form.labels, form.label_words, strict=False)
    return "; ".join(f"{label}: {', '.join(words)}" for label, words in pairs if words != (label,))


def _placement(form: InputForm) -> str:
    behind = "behind [CLS]" if form.placement == "after-cls" else ""
    if form.has_decoder_prompt:
        return "in front of the encoder's text, and of the decoder's"
    return behind or ("in front of the text" if form.task != "generate" else "")


def _head_text(prompt: SoftPrompt) -> str:
    """The head's weights and their number."""
    if not prompt.head:
        return ""
    count = sum(weight.numel() for weight in prompt.head.values())
    listed = ", ".join(f"{name} {'x'.join(map(str, weight.shape))}" for name, weight in prompt.head.items())
    return f"{count:,} parameters beside {prompt.tensor.numel():,} of the vectors: {listed}"


def _confidence(held_out: Any) -> str:  # Any: a record is JSON, and may be a stranger's
    judgement = Judgement.from_json(held_out)
    if judgement is None or judgement.calibration is None:
        return ""
    return threshold_line(judgement.calibration, PredictConfig().target_accuracy)


def _curve(losses: Any) -> str:  # Any: a record is JSON, and may be a stranger's
    known = [loss for loss in losses if isinstance(loss, float)] if isinstance(losses, list) else []
    return f"{known[0]:.3f} at the first step, {known[-1]:.3f} at the last (nats per target)" if known else ""


def _token_columns(found: Inspection) -> dict[str, list[str]]:
    """Column title -> one cell per virtual token; empty columns are left out."""
    nearest = ["  ".join(f"{text!r} {cosine:.2f}" for text, cosine in item.tokens) for item in found.nearest]
    columns = {
        "norm": [f"{norm:.3f}" for norm in found.norms],
        "x embedding": [f"{norm:.2f}" for norm in found.relative_norms],
        "moved by": [_moved(token) for token in found.drift],
        "cosine to start": [f"{token.cosine:.3f}" for token in found.drift],
        "nearest tokens (cosine similarity)": nearest or ["(give --base)"] * len(found.norms),
    }
    return {title: cells for title, cells in columns.items() if cells}


def _moved(token: Drift) -> str:
    return f"{token.distance:.3f}" + (f" ({token.relative:.1%})" if token.relative is not None else "")


def _show_leave_out(worth: LeaveOneOut, held_out: str) -> None:
    rows = [["none", f"{worth.loss:.3f}", "", ""]]
    rows += [
        [f"{item.token}", f"{item.loss:.3f}", f"{item.difference:+.3f}", _interval(item.interval)]
        for item in worth.left_out
    ]
    columns = ["left out", "nats/token", "change", "95 % interval"]
    print_table("Loss without each virtual token", columns, rows, figures=True)
    click.echo(
        f"Held-out loss on {held_out}: {worth.num_rows:,} rows, {worth.num_tokens:,} text tokens; "
        "a change above 0 is what the token is worth"
    )


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low:+.3f} to {interval.high:+.3f}"


def prompts_of(library: Library, names: Sequence[str], base: Base | None, *, force: bool) -> dict[str, SoftPrompt]:
    """The prompts named, or all of a library; without names, those that cannot be loaded are named and left out.

    Raises StorageError and what `load_prompt` raises for prompts named, ConfigError for fewer than two.
    """
    prompts = {name: library.load(name, base, force=force) for name in names}
    for name in library.names() if not names else ():
        try:
            prompts[name] = library.load(name, base, force=force)
        except SoftpromptError as error:
            say(f"skipped {name}: {error}")
    if len(prompts) < 2:
        there = ", ".join(prompts) or "none"
        raise ConfigError(f"similarity needs two prompts of {library.folder}, and has {there}; import or name others")
    return prompts


def note_other_bases(prompts: Mapping[str, SoftPrompt]) -> None:
    """A note where the prompts come from different bases."""
    known = {prompt.record.base_fingerprint for prompt in prompts.values()} - {None}
    if len(known) > 1:
        say(f"note: these prompts were trained on {len(known)} different bases; across bases a similarity means little")


def similarity_json(
    prompts: Mapping[str, SoftPrompt], pairs: Sequence[SimilarPair], base: Base | None
) -> dict[str, Any]:  # Any: JSON
    """The similarities as JSON values, most similar first."""
    compared = {frozenset((pair.one, pair.other)) for pair in pairs}
    return {
        "centred_on": base.name if base is not None else None,
        "prompts": {
            name: {"shape": list(prompt.tensor.shape), "content_hash": prompt.content_hash}
            for name, prompt in prompts.items()
        },
        "pairs": [asdict(pair) for pair in pairs],
        "not_comparable": [list(two) for two in combinations(prompts, 2) if frozenset(two) not in compared],
    }


def show_similarity(prompts: Mapping[str, SoftPrompt], pairs: Sequence[SimilarPair], base: Base | None) -> None:
    """A matrix of few prompts, or the most similar pairs of many, on stdout."""
    if len(prompts) <= _LARGEST_MATRIX:
        _show_matrix(f"Similarity of {len(prompts)} prompts", list(prompts), pairs)
    else:
        _show_pairs(f"Most similar of {len(prompts):,} prompts", pairs)
    if base is not None:
        click.echo(f"Cosines after subtracting the mean embedding of {base.name}'s vocabulary")
    widths = _grouped({name: prompt.hidden_size for name, prompt in prompts.items()})
    if len(widths) > 1:
        groups = "; ".join(f"{width}: {', '.join(names)}" for width, names in widths.items())
        click.echo(f"Not comparable, being of different widths: {groups}")
    for names in _grouped({name: prompt.content_hash for name, prompt in prompts.items()}).values():
        if len(names) > 1:
            click.echo(f"Identical (the same content hash): {', '.join(names)}")


def _show_matrix(title: str, names: Sequence[str], pairs: Sequence[SimilarPair]) -> None:
    known = {frozenset((pair.one, pair.other)): f"{pair.similarity:.3f}" for pair in pairs}
    known |= {frozenset((name,)): f"{1:.3f}" for name in names}
    numbers = [str(number) for number in range(1, len(names) + 1)]
    rows = [
        [f"{number} {one}", *(known.get(frozenset((one, other)), "-") for other in names)]
        for number, one in zip(numbers, names, strict=True)
    ]
    print_table(title, ["prompt", *numbers], rows, figures=True)


def _show_pairs(title: str, pairs: Sequence[SimilarPair]) -> None:
    rows = [[pair.one, pair.other, f"{pair.similarity:.3f}"] for pair in pairs[:_MOST_PAIRS]]
    print_table(title, ["prompt", "and", "similarity"], rows)
    click.echo(f"{len(rows)} of {len(pairs):,} pairs")


def _grouped(keys: Mapping[str, Any]) -> Groups:
    groups: dict[Any, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return groups
