"""A soft prompt's folder, read: exactly what PEFT writes for prompt tuning, with our record beside.

A folder from outside is data: JSON and tensors, checked before use. Nothing in it is ever run.
`softprompt.storage.save` writes such folders.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.errors import AdapterError, BaseModelError, PromptError, WrongBaseError
from softprompt.prompt import SoftPrompt
from softprompt.storage.files import (
    CONFIG_NAME,
    MAX_RECORD_BYTES,
    MAX_TEXT_BYTES,
    MAX_WEIGHTS_BYTES,
    PICKLE_NAME,
    RECORD_NAME,
    SAFETENSORS_NAME,
    parse_object,
    read_file,
)
from softprompt.storage.peft_config import (
    TASK_TYPE,
    Stated,
    check_record,
    check_task_type,
    parse_config,
    pefts_form,
    stated_by,
)
from softprompt.storage.weights import read_weights
from softprompt.types import HEADED_TASKS, BaseKind, InputForm, Placement, Pooling, PromptRecord, Task

FORMAT_VERSION = 1  # of softprompt.json
_TEXT_FIELDS = ("base_name", "base_source", "base_fingerprint", "parent", "created")


class UnknownBaseWarning(UserWarning):
    """An adapter does not say which base it was trained on; only its width could be checked."""


@dataclass(frozen=True, kw_only=True)
class StoredRecord:
    """The content of `softprompt.json`."""

    record: PromptRecord
    content_hash: str  # of the tensor that it was written with
    created: str | None  # when the folder was written, ISO 8601 in UTC


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """The bytes of an adapter folder: their sizes are checked, nothing else yet."""

    where: str  # for messages: the folder or the repository
    weights_name: str  # SAFETENSORS_NAME or PICKLE_NAME
    weights: bytes
    config: bytes | None
    record: bytes | None

    @classmethod
    def read(cls, folder: Path, *, where: str | None = None, follow_links: bool = False) -> AdapterFiles:
        """The folder's files; safetensors where both kinds of weights are there.

        Raises: AdapterError where the folder or its weights are missing, or a file may not be read.
        """
        where = str(folder) if where is None else where
        if not folder.is_dir():
            raise AdapterError(f"{where} is {'a file' if folder.exists() else 'not there'}; give an adapter's folder")
        config = read_file(folder, CONFIG_NAME, MAX_TEXT_BYTES, follow_links=follow_links)
        for name in (SAFETENSORS_NAME, PICKLE_NAME):
            weights = read_file(folder, name, MAX_WEIGHTS_BYTES, follow_links=follow_links)
            if weights is not None:
                record = read_file(folder, RECORD_NAME, MAX_RECORD_BYTES, follow_links=follow_links)
                return cls(where=where, weights_name=name, weights=weights, config=config, record=record)
        if config is None:
            raise AdapterError(f"{where} has no {CONFIG_NAME} and no {SAFETENSORS_NAME}{_nested_hint(folder)}")
        parse_config(config, None, f"{where}/{CONFIG_NAME}")  # another kind is named first
        raise AdapterError(
            f"{where} has a {CONFIG_NAME} but neither {SAFETENSORS_NAME} nor {PICKLE_NAME}; copy them too"
        )

    @cached_property
    def stored(self) -> StoredRecord | None:
        """Our record; None for a folder that PEFT wrote. Raises: AdapterError."""
        return None if self.record is None else _record_from_bytes(self.record, f"{self.where}/{RECORD_NAME}")

    def parse(
        self,
        base: Base | None = None,
        *,
        force: bool = False,
        task_type: str | None = None,
        base_name: str | None = None,
    ) -> SoftPrompt:
        """The soft prompt, as `load_prompt` gives it."""
        weights_where = f"{self.where}/{self.weights_name}"
        config = None if self.config is None else parse_config(self.config, task_type, f"{self.where}/{CONFIG_NAME}")
        rows, head = read_weights(self.weights_name, self.weights, weights_where)
        if config is None:
            stated = _stated_by_weights_alone(rows, task_type, self.where)
        else:
            stated = stated_by(config, rows, f"{self.where}/{CONFIG_NAME}")
        record = self._record(stated, head, base_name)
        _check_has_head(record.form, head, self.where)
        kept = rows if record.form.has_decoder_prompt else rows[: stated.num_virtual_tokens]
        try:
            prompt = SoftPrompt(kept, record, head)
        except PromptError as error:
            raise AdapterError(f"{weights_where}: {error}") from error
        self._check_content(prompt)
        if base is not None:
            check_base(prompt, base, force=force, where=self.where)
        return prompt

    def _record(self, stated: Stated, head: Mapping[str, Tensor], base_name: str | None) -> PromptRecord:
        if self.stored is None:
            record = PromptRecord(form=pefts_form(stated.task, head, self.where), base_kind=stated.base_kind)
        else:
            record = self.stored.record
            check_record(record, stated, self.where)
            is_seq2seq = record.base_kind is None and stated.base_kind == "seq2seq"
            record = replace(record, base_kind=stated.base_kind) if is_seq2seq else record
        named = record.base_name or stated.base_name
        if named is not None and base_name is not None and named != base_name:
            raise AdapterError(f"{self.where} names its base {named!r} and {base_name!r} was given; leave the name out")
        return replace(record, base_name=base_name if named is None else named)

    def _check_content(self, prompt: SoftPrompt) -> None:
        """When PEFT saves into our folder it replaces the weights and leaves our record, which is then of others."""
        if self.stored is not None and self.stored.content_hash != prompt.content_hash:
            raise AdapterError(
                f"{self.where}: the weights ({prompt.content_hash[:12]}) are not those that {RECORD_NAME} describes "
                f"({self.stored.content_hash[:12]}); they were changed later: delete {RECORD_NAME} to load the rest as "
                "PEFT's"
            )


def load_prompt(
    folder: str | os.PathLike[str],
    base: Base | None = None,
    *,
    force: bool = False,
    task_type: str | None = None,
    base_name: str | None = None,
) -> SoftPrompt:
    """The soft prompt [P, H] of an adapter folder, ours or PEFT's, with its head; any float dtype becomes float32.

    Of PEFT's 2P vectors for an encoder-decoder it is the first P, since PEFT reads no others; of ours with a prompt for
    the decoder all of them.

    With `base`, width, head and fingerprint are checked; a folder without a fingerprint (PEFT's own) gives one
    UnknownBaseWarning. `force` loads a prompt of another base of the same width. `task_type` and `base_name` stand in
    for what the folder leaves out: with task_type "CAUSAL_LM" even a missing adapter_config.json is accepted.

    Raises: AdapterError for a folder that is refused, WrongBaseError for a prompt of another base.
    """
    files = AdapterFiles.read(Path(folder))
    return files.parse(base, force=force, task_type=task_type, base_name=base_name)


def check_base(prompt: SoftPrompt, base: Base, *, force: bool = False, where: str = "the soft prompt") -> None:
    """Check that the prompt fits `base` and was trained on it.

    Raises: AdapterError for another width or kind of base, or another head, WrongBaseError for another base.
    """
    shape, made_for = list(prompt.tensor.shape), prompt.record.base_name
    if prompt.hidden_size != base.hidden_size:
        raise AdapterError(
            f"{where} is {shape}, made for {made_for or 'an unknown base'}; the input embeddings of {base.name} are "
            f"[{base.vocab_size}, {base.hidden_size}]: load it on the base that it was trained on"
        )
    _check_range(prompt, base, where)
    _check_kind(prompt.record, base, where)
    _check_head(prompt, base, where)
    if force:
        return
    if prompt.record.base_fingerprint is None:
        named = "names no base" if made_for is None else f"names its base {made_for!r} without a fingerprint"
        warnings.warn(
            f"{where} {named}; its width {prompt.hidden_size} fits {base.name!r}, more could not be checked",
            UnknownBaseWarning,
            stacklevel=4,
        )
    elif prompt.record.base_fingerprint != base.fingerprint:
        raise WrongBaseError(other_base_problem(prompt.record, base, where))


def _check_range(prompt: SoftPrompt, base: Base, where: str) -> None:
    """float16, which a base on a GPU may have, ends at 65,504."""
    largest = float(prompt.tensor.abs().max())
    if largest > torch.finfo(base.dtype).max:
        raise AdapterError(
            f"{where} has values up to {largest:.3g}, beyond the {str(base.dtype).removeprefix('torch.')} of "
            f"{base.name}; load the base in another dtype"
        )


def other_base_problem(record: PromptRecord, base: Base, where: str) -> str:
    assert record.base_fingerprint is not None
    return (
        f"{where} was trained on {record.base_name!r} (fingerprint {record.base_fingerprint[:12]}), "
        f"not on {base.name!r} (fingerprint {base.fingerprint[:12]}); "
        "take its own base, or force it if you know that both compute the same"
    )


def _check_kind(record: PromptRecord, base: Base, where: str) -> None:
    if record.base_kind not in (None, base.kind):
        raise AdapterError(
            f"{where} was trained on a base of kind {record.base_kind!r}; {base.name!r} is of kind {base.kind!r}: load "
            "it on the base that it was trained on"
        )


def _check_head(prompt: SoftPrompt, base: Base, where: str) -> None:
    """That the base has such a head: its weights' names and shapes are those of transformers' class."""
    if not prompt.head:
        return
    from softprompt.families.task_head import task_head  # a second to import, which plain prompts need not wait

    try:
        head = task_head(base, prompt.record.form)
    except BaseModelError as error:
        raise AdapterError(f"{where} does not fit: {error}") from error
    assert head is not None, prompt.record.form.task  # checked when it was read
    head.check(prompt.head, where)


def _check_has_head(form: InputForm, head: Mapping[str, Tensor], where: str) -> None:
    if form.task in HEADED_TASKS and not head:
        raise AdapterError(f"{where} is of the task {form.task!r}, but has no weights of a head; it is not whole")
    if head and form.task not in HEADED_TASKS:
        raise AdapterError(
            f"{where} has weights besides the prompt's, {next(iter(head))!r} first; the task {form.task!r} has no head"
        )


def _stated_by_weights_alone(rows: Tensor, task_type: str | None, where: str) -> Stated:
    if task_type is None:
        raise AdapterError(
            f"{where} has no {CONFIG_NAME}, so its kind, task and base are unknown; its weights are "
            f"{list(rows.shape)}. If they are a soft prompt of a causal language model, say so: "
            f"task_type={TASK_TYPE!r} (--task-type {TASK_TYPE})"
        )
    check_task_type(task_type, where)
    if task_type == "SEQ_2_SEQ_LM":
        raise AdapterError(
            f"{where} has no {CONFIG_NAME}; of an encoder-decoder's {len(rows)} vectors it says how many are the "
            "decoder's: copy that file too"
        )
    return Stated(task_type, len(rows), 1, None)


def _nested_hint(folder: Path) -> str:
    """PEFT puts an adapter that is not called "default" into a sub-folder; an unfinished run has checkpoints."""
    configs = [*folder.glob(f"*/{CONFIG_NAME}"), *folder.glob(f"checkpoints/*/{CONFIG_NAME}")]
    nested = sorted(str(config.parent.relative_to(folder)) for config in configs)
    if not nested:
        return "; it is not an adapter: give the folder that PEFT or softprompt wrote"
    if len(nested) == 1:
        return f", but {nested[0]!r} below it has: give {folder / nested[0]}"
    return f", but these folders below it have: {', '.join(nested[:5])}; give one of them"


def _record_from_bytes(data: bytes, where: str) -> StoredRecord:
    """Raises: AdapterError for a record that is malformed or of a newer release."""
    value = parse_object(data, where)
    version = value.get("format_version")
    if type(version) is not int or version < 1:
        raise AdapterError(f"{where} has the format_version {version!r}; it must be from 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{where} has the format_version {version}; this release reads up to {FORMAT_VERSION}: upgrade softprompt"
        )
    _check_texts(value, where)
    try:
        record = PromptRecord.from_json(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{where} is malformed ({error}); delete it to load the folder as a PEFT adapter") from error
    _check_form(record, where)
    return StoredRecord(record=record, content_hash=value["content_hash"], created=value.get("created"))


def _check_texts(value: dict[str, Any], where: str) -> None:
    if not isinstance(value.get("content_hash"), str):
        raise AdapterError(f"{where} has no content_hash; delete it to load the folder as a PEFT adapter")
    for name in _TEXT_FIELDS:
        if not isinstance(value.get(name), str | None):
            raise AdapterError(f"{where}: {name} is {value[name]!r}; it must be text or null")


def _check_form(record: PromptRecord, where: str) -> None:
    """That a stranger's form has values of ours. Texts and labels are checked where they are used."""
    form = record.form
    allowed: dict[str, tuple[Any, ...]] = {
        "task": get_args(Task),
        "placement": get_args(Placement),
        "pooling": (None, *get_args(Pooling)),
        "has_decoder_prompt": (False, True),
    }
    for name, values in allowed.items():
        found = getattr(form, name)
        if type(found) not in (str, bool, type(None)) or found not in values:
            raise AdapterError(f"{where}: {name} is {found!r}; it must be one of {', '.join(map(str, values))}")
    if record.base_kind not in (None, *get_args(BaseKind)):
        raise AdapterError(f"{where}: base_kind is {record.base_kind!r}; it must be {', '.join(get_args(BaseKind))}")
    are_words = all(isinstance(word, str) for words in form.label_words for word in words)
    if not are_words or (form.task == "cloze" and len(form.label_words) != len(form.labels)):
        raise AdapterError(f"{where}: label_words has to have a list of words for each label")
    if form.has_decoder_prompt and form.task != "generate":
        raise AdapterError(f"{where}: a prompt of the task {form.task!r} has no decoder's half")
