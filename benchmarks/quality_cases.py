"""The sets and settings of `benchmarks/quality.py`: which rows, on which base, under which recipes."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import quality_generated as generated

from softprompt import Base, DataConfig, load_base, read_rows, rows_from_records
from softprompt.data import Rows
from softprompt.data.rows import with_labels
from softprompt.demo.tasks import REVIEW_COMPLETION, REVIEW_TEMPLATE, WRITTEN_TEMPLATES
from softprompt.embedded import data_file

Settings = dict[str, Any]

SST2_NAMES = {"0": "negative", "1": "positive"}
LENGTHS = (4, 20)  # of the grid
HELD_OUT = 200  # rows that choose among the grid, and as many again that score, where there are so many
REAL_TEXTS, REAL_LABELS = 100, 400  # test rows of the real base


@dataclass(frozen=True)
class Case:
    """Rows that are trained on, that choose, and that score; no row is in two of them."""

    name: str
    base: Base
    train: Rows
    validation: Rows
    test: Rows
    instruction: str  # what a written start would say
    templates: tuple[str, ...] = ()  # what a person would write instead of a prompt; none for plain texts and chats

    @property
    def has_labels(self) -> bool:
        return bool(self.train.form.labels)

    @property
    def has_exact_answers(self) -> bool:
        """Whether each row has the one right answer, which is no label."""
        return self.train.form.kind == "template" and not self.has_labels


def make_case(name: str, material: Path, scratch: Path) -> Case:
    """A case by name; `material` is the folder with the real model and data."""
    kind, _, count = name.rpartition("-")
    return _MAKERS[kind](name, int(count), material, scratch)


def _quotes(name: str, count: int, material: Path, scratch: Path) -> Case:
    rows = _plain(material / "english-quotes" / "quotes.jsonl", "quote")
    return _cut(name, _stories(material), rows, count, "Here is a wise quote about life and love:")


def _roles(name: str, count: int, material: Path, scratch: Path) -> Case:
    rows = _plain(material / "awesome-chatgpt-prompts" / "prompts.csv", "prompt")
    return _cut(name, _stories(material), rows, count, "I want you to act as a")


def _sst2(name: str, count: int, material: Path, scratch: Path) -> Case:
    train = _labelled(_sst2_csv(material / "sst2" / "train.txt", scratch / "train.csv", count + HELD_OUT))
    test = _labelled(_sst2_csv(material / "sst2" / "dev.txt", scratch / "dev.csv", HELD_OUT))
    return Case(
        name, _stories(material), train.select(range(count)), train.select(range(count, count + HELD_OUT)), test,
        "Say whether the review is positive or negative.",
    )  # fmt: skip


def _embedded_quotes(name: str, count: int, material: Path, scratch: Path) -> Case:
    train, held_out = _plain(data_file("quotes.jsonl"), "quote"), _plain(data_file("quotes-heldout.jsonl"), "quote")
    return _halved(name, train, held_out, count, "Here is a wise quote about life and love:")


def _coach(name: str, count: int, material: Path, scratch: Path) -> Case:
    train = _plain(data_file("coach-prompts.csv"), "prompt")
    held_out = _plain(data_file("coach-prompts-heldout.csv"), "prompt")
    return _halved(name, train, held_out, count, "I want you to act as a")


def _reviews(name: str, count: int, material: Path, scratch: Path) -> Case:
    train, held_out = _labelled(data_file("reviews.csv")), _labelled(data_file("reviews-heldout.csv"))
    return _halved(name, train, held_out, count, "Say whether the review is positive or negative.")


class RealSet(NamedTuple):
    """The rows of a set of the real base; no row's text is in both parts."""

    train: Rows
    test: Rows
    instruction: str
    templates: tuple[str, ...] = ()


def make_real_case(name: str, material: Path, num_test: int | None = None, dtype: str = "float32") -> Case:
    """A set of the real base by name; what chooses is the contender's own part of the training rows."""
    train, test, instruction, templates = real_set(name, material)
    scored = test.select(range(min(len(test), num_test or len(test))))
    return Case(f"smollm2-{name}", _smollm2(dtype), train, train.select(()), scored, instruction, templates)


def real_set(name: str, material: Path) -> RealSet:
    """By kind and number of training rows, such as "sst2-200". Raises SystemExit for another name."""
    kind, _, count = name.rpartition("-")
    if kind not in _REAL_SETS or not count.isdecimal() or not int(count):
        raise SystemExit(f"{name!r} is no set; give a kind and a number of rows ({'-N, '.join(_REAL_SETS)}-N)")
    return _REAL_SETS[kind](material, int(count))


def _real_quotes(material: Path, count: int) -> RealSet:
    return RealSet(
        *_ends(material / "english-quotes" / "quotes.jsonl", "quote", count), "A wise quote about life and love:\n"
    )


def _real_roles(material: Path, count: int) -> RealSet:
    return RealSet(
        *_ends(material / "awesome-chatgpt-prompts" / "prompts.csv", "prompt", count), "I want you to act as a"
    )


def _ends(source: Path, column: str, count: int) -> tuple[Rows, Rows]:
    """The first rows to train on, the last ones to score."""
    rows = read_rows(DataConfig(data=str(source), text_column=column))
    return rows.select(range(count)), rows.select(range(len(rows) - REAL_TEXTS, len(rows)))


def _real_sst2(material: Path, count: int) -> RealSet:
    train = _sst2_rows(material / "sst2" / "train.txt", 5).select(range(count))
    test = _sst2_rows(material / "sst2" / "test.txt", 3).select(range(REAL_LABELS))
    return RealSet(train, test, "Say whether the review is positive or negative.\n", WRITTEN_TEMPLATES)


def _topics(material: Path, count: int) -> RealSet:
    parts = generated.tickets(count, REAL_LABELS)
    form = {"template": generated.TICKET_TEMPLATE, "completion": generated.TICKET_COMPLETION}
    train, test = (with_labels(rows_from_records(part, source="tickets", **form)) for part in parts)
    return RealSet(train, test, generated.TICKET_INSTRUCTION, generated.TICKET_TEMPLATES)


def _records(material: Path, count: int) -> RealSet:
    parts = generated.records(count, REAL_TEXTS)
    form = {"template": generated.RECORD_TEMPLATE, "completion": generated.RECORD_COMPLETION}
    train, test = (rows_from_records(part, source="notes", **form) for part in parts)
    return RealSet(train, test, generated.RECORD_INSTRUCTION, generated.RECORD_TEMPLATES)


def _chat(material: Path, count: int) -> RealSet:
    parts = generated.chats(count, REAL_TEXTS)
    train, test = (rows_from_records(part, source="chats", messages_column="messages") for part in parts)
    return RealSet(train, test, generated.CHAT_INSTRUCTION)


def _sst2_rows(source: Path, seed: int) -> Rows:
    """The rows of a file, shuffled."""
    lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    random.Random(seed).shuffle(lines)
    pairs = [line.partition(" ")[::2] for line in lines]
    records = [{"text": text, "label": SST2_NAMES[label]} for label, text in pairs]
    return with_labels(
        rows_from_records(records, source=str(source), template=REVIEW_TEMPLATE, completion=REVIEW_COMPLETION)
    )


def _halved(name: str, train: Rows, held_out: Rows, count: int, instruction: str) -> Case:
    """The embedded sets: of the held-out rows, whose classes take turns, the first half chooses, the second scores."""
    half = len(held_out) // 2
    chooses, scores = held_out.select(range(half)), held_out.select(range(half, len(held_out)))
    return Case(name, _embedded(), train.select(range(count)), chooses, scores, instruction)


def _cut(name: str, base: Base, rows: Rows, count: int, instruction: str) -> Case:
    held_out = min(HELD_OUT, (len(rows) - count) // 2)
    ends = itertools.accumulate([0, count, held_out, held_out])
    train, validation, test = (rows.select(range(a, b)) for a, b in itertools.pairwise(ends))
    return Case(name, base, train, validation, test, instruction)


def _plain(source: Path, column: str) -> Rows:
    return read_rows(DataConfig(data=str(source), text_column=column, shuffle=True))


def _labelled(source: Path) -> Rows:
    config = DataConfig(data=str(source), template=REVIEW_TEMPLATE, completion=REVIEW_COMPLETION)
    return with_labels(read_rows(config))


@cache
def _stories(material: Path) -> Base:
    return load_base(str(material / "models" / "stories260K-llama"), dtype="float32")


@cache
def _embedded() -> Base:
    return load_base("embedded", dtype="float32")


@cache
def _smollm2(dtype: str) -> Base:
    return load_base("smollm2", dtype=dtype, device="cpu")


def _sst2_csv(source: Path, target: Path, num_rows: int) -> Path:
    """The first rows of each class, in turn, so that both are as many."""
    rows: dict[str, list[str]] = {"0": [], "1": []}
    for line in source.read_text(encoding="utf-8", errors="replace").splitlines():
        label, _, text = line.partition(" ")
        rows[label].append(text)
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for pair in list(zip(rows["0"], rows["1"], strict=False))[: num_rows // 2]:
            writer.writerows([[text, SST2_NAMES[label]] for label, text in zip("01", pair, strict=True)])
    return target


_MAKERS = {
    "quotes": _quotes,
    "roles": _roles,
    "sst2": _sst2,
    "embedded-quotes": _embedded_quotes,
    "embedded-coach": _coach,
    "embedded-reviews": _reviews,
}
_REAL_SETS = {
    "quotes": _real_quotes, "roles": _real_roles, "sst2": _real_sst2, "topics": _topics, "records": _records,
    "chat": _chat,
}  # fmt: skip


def peers(instruction: str) -> dict[str, Settings]:
    """Other people's recipes at the notebook's length; the Trainer's linear decay and clipping at 1."""
    trainer = {
        "virtual_tokens": 4, "schedule": "linear", "loss": "tokens", "reparameterisation": "none", "max_grad_norm": 1.0,
        "eos": False,
    }  # fmt: skip
    return {
        "PEFT's defaults (20 tokens)": {**trainer, "virtual_tokens": 20, "init": "peft", "learning_rate": 5e-5},
        "the notebook's settings": {**trainer, "init": "peft", "learning_rate": 3e-3},
        "PEFT, vocabulary start, 3e-3": {**trainer, "init": "vocab", "learning_rate": 3e-3},
    }


def grid(instruction: str) -> Iterator[tuple[str, Settings]]:
    """The fixed grid: start x rate x schedule x length of a plain prompt; EOS as by default."""
    starts = {
        "vocab": {"init": "vocab"},
        "data": {"init": "data"},
        "text": {"init": "text", "init_text": instruction},
        "peft": {"init": "peft"},
    }
    rates = {f"{rate:g} x RMS": {"relative_learning_rate": rate} for rate in (0.03, 0.1, 0.3, 1.0, 3.0)}
    rates["3e-3"] = {"learning_rate": 3e-3}
    for (start, a), (rate, b), schedule, length in itertools.product(
        starts.items(), rates.items(), ("constant", "linear"), LENGTHS
    ):
        plain = {"loss": "tokens", "reparameterisation": "none"}
        settings = {**a, **b, **plain, "schedule": schedule, "virtual_tokens": length}
        yield f"{start}, {rate}, {schedule}, P={length}", settings
