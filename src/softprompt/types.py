"""Values that several packages exchange: plain integers, strings and tuples, without torch."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

FormKind = Literal["plain", "template", "chat"]
BaseKind = Literal["causal", "encoder", "seq2seq"]
# generate: text to text; cloze: label words at a mask; classify, tag, answer: a trained head for whole texts, words, or
# the span of a context that answers a question; embed: one vector per text
Task = Literal["generate", "cloze", "classify", "tag", "answer", "embed"]
HEADED_TASKS: tuple[Task, ...] = ("classify", "tag", "answer")  # a head is trained beside the soft prompt
Placement = Literal["front", "after-cls"]  # of the virtual tokens: before all tokens, or behind [CLS]
# Of the hidden states of a text, what a head reads: [CLS]'s, the mean over the real tokens, the last token's, or the
# one that PEFT reads, which in front of a BERT is the first virtual token's.
Pooling = Literal["cls", "mean", "last", "peft"]
# What the loss of a task is counted over; of "generate" it is tokens.
COUNTED: Mapping[str, str] = {"cloze": "label", "classify": "label", "tag": "tag", "answer": "answer", "embed": "pair"}
NO_VALIDATION = "none"  # of `DataConfig.validation`; None there is the default


class _Short(reprlib.Repr):
    """Long text, lists and mappings cut, a tensor as its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 120
        self.maxtuple = self.maxlist = self.maxdict = 3

    def repr_Tensor(self, value: Any, level: int) -> str:  # noqa: N802  # reprlib's name; Any: torch is not known here
        return f"tensor{list(value.shape)}"


_SHORT = _Short()


def brief_repr(value: Any) -> str:  # Any: an instance of any dataclass
    """One line: fields at their defaults left out, whatever is long cut. For a class's own `__repr__`."""
    shown = [(item.name, getattr(value, item.name)) for item in fields(value) if item.repr]
    defaults = {item.name: _default(item) for item in fields(value)}
    parts = [f"{name}={_SHORT.repr(found)}" for name, found in shown if not _is_same(found, defaults[name])]
    return f"{type(value).__name__}({', '.join(parts)})"


def _default(item: Field[Any]) -> object:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _is_same(found: object, default: object) -> bool:
    """Compares types first: a tensor compares entry by entry."""
    return type(found) is type(default) and bool(found == default)


@dataclass(frozen=True, kw_only=True)
class InputForm:
    """How a prompt's training inputs were written. Kept in the prompt's record, so that inference writes them alike."""

    kind: FormKind = "plain"
    template: str | None = None  # kind "template": the prompt text with {column} fields
    completion: str | None = None  # kind "template": the completion text with {column} fields, e.g. " {label}"
    labels: tuple[str, ...] = ()  # the set's distinct completions when it is a classification set, sorted
    task: Task = "generate"
    placement: Placement = "front"
    pooling: Pooling | None = None  # tasks "classify" and "embed"
    label_words: tuple[tuple[str, ...], ...] = ()  # task "cloze": the words that stand for each label, by average
    has_decoder_prompt: bool = False  # the second half of the vectors stands in front of the decoder's tokens

    def to_json(self) -> dict[str, Any]:
        """Fields that only other tasks than "generate" need are left out at their defaults."""
        later = ("task", "placement", "pooling", "label_words", "has_decoder_prompt")
        default = InputForm()
        return {
            name: value for name, value in asdict(self).items() if name not in later or value != getattr(default, name)
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> InputForm:
        words = tuple(tuple(own) for own in record.get("label_words", ()))
        return cls(**{**record, "labels": tuple(record.get("labels", ())), "label_words": words})


class Branch(NamedTuple):
    """Where a row's label could become another one: the ids that come next in the labels that begin as it does."""

    column: int  # of the id among the row's ids
    ids: tuple[int, ...]  # sorted; the row's own is one of them


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training row as token ids.

    `ids` are what the tokenizer adds in front (BOS, `num_special` of them), the text, and EOS if `has_eos`.
    `target_mask` has one entry per id: True where training counts the loss. BOS is never a target.
    """

    __repr__ = brief_repr

    ids: tuple[int, ...]
    target_mask: tuple[bool, ...]
    num_special: int
    has_eos: bool  # the last id is EOS; its loss is trained on but reported apart
    row: int  # zero-based index of the row in its source
    branches: tuple[Branch, ...] = ()  # of its label, in order; none where the rows have no labels
    num_before: int = 0  # ids in front of the virtual tokens: [CLS], where a prompt stands behind it
    source: tuple[int, ...] = ()  # of an encoder-decoder: what the encoder reads; `ids` are then the decoder's targets
    has_decoder_prompt: bool = False  # half of the vectors stand in front of the decoder's tokens
    num_decoder_tokens: int | None = None  # how many do, where it is not half of them: one is left out
    columns: tuple[int, ...] = ()  # of the ids: whose hidden states a head reads; -1 is the first virtual token
    labels: tuple[int, ...] = ()  # what the head should find: one per column, or one for all of them, or a span's two
    others: tuple[tuple[int, ...], ...] = ()  # task "embed": further texts, the positive one and then negative ones
    num_first: int | None = None  # of two texts in one row (a question and its context): ids before the second one
    other_columns: tuple[tuple[int, ...], ...] = ()  # of each of them, as `columns`; empty: by the rule that those show
    is_span: bool = False  # the two labels are the first and the last column of an answer

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.target_mask), (len(self.ids), len(self.target_mask))
        assert not any(self.target_mask[: self.num_special]), "a special token in front is never a target"

    @property
    def num_tokens(self) -> int:
        """Real tokens of all its texts, virtual ones not counted."""
        return len(self.ids) + len(self.source) + sum(map(len, self.others))

    @property
    def text_mask(self) -> tuple[bool, ...]:
        """The targets that every reported loss covers: no EOS, and a real predecessor in the bare input."""
        last = len(self.ids) - 1
        first = 0 if self.source else 1  # a decoder's start token precedes its first target
        return tuple(
            counted and index >= first and not (self.has_eos and index == last)
            for index, counted in enumerate(self.target_mask)
        )

    @property
    def eos_mask(self) -> tuple[bool, ...]:
        """True at a supervised EOS only."""
        last = len(self.ids) - 1
        return tuple(self.has_eos and index == last and counted for index, counted in enumerate(self.target_mask))


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What was read, for the user to check before the training starts."""

    __repr__ = brief_repr

    source: str
    num_read: int  # rows seen in the source (after --rows)
    num_used: int
    empty_rows: tuple[int, ...] = ()  # source indices skipped because there was nothing to learn
    truncated_rows: tuple[int, ...] = ()  # source indices cut at the length limit; these get no EOS
    truncated_sources: tuple[int, ...] = ()  # those of an encoder-decoder of which only what the encoder reads was cut
    num_tokens: int = 0  # all ids, special ones included
    num_targets: int = 0  # ids that training counts
    min_tokens: int = 0  # of one example
    max_tokens: int = 0
    example: str = ""  # the first example as the model sees it, targets marked
    notes: tuple[str, ...] = field(default=(), compare=False)  # how the rows were read: a guess, columns not used
    task: Task = "generate"  # of others, `num_targets` are labels


@dataclass(frozen=True, kw_only=True)
class ExampleSet:
    """Examples of one data set, ready to be batched."""

    __repr__ = brief_repr

    examples: tuple[Example, ...]
    form: InputForm
    report: DataReport
    data_hash: str  # sha256 of the rows' rendered text, in order

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True, kw_only=True)
class PromptRecord:
    """Where a soft prompt comes from. Every field may be unknown: PEFT's own folders carry none of it."""

    __repr__ = brief_repr

    base_name: str | None = None
    base_source: str | None = None  # how it is loaded, the Hub id or folder that was given; None: as its name says
    base_fingerprint: str | None = None
    base_kind: BaseKind | None = None
    form: InputForm = field(default_factory=InputForm)
    parent: str | None = None  # content hash of the prompt that this one was trained on from
    run: dict[str, Any] = field(default_factory=dict)  # resolved plan, data hash, versions, curve, seed

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "form": self.form.to_json()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> PromptRecord:
        form = InputForm.from_json(record.get("form") or {})
        texts = ("base_name", "base_source", "base_fingerprint", "base_kind", "parent")
        known = {key: record.get(key) for key in texts}
        return cls(form=form, run=dict(record.get("run") or {}), **known)


def finite(value: Any) -> Any:  # Any: whatever JSON holds
    """The same value with None for NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def is_number(text: str) -> bool:
    """Whether a text is one number, as Python reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_row_count(part: str) -> bool:
    """Whether a `validation` or `test` is a share of the rows, their number or none, and no file."""
    return part == NO_VALIDATION or is_number(part)
