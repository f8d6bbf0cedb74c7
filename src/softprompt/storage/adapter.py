"""A soft prompt's folder, read: exactly what PEFT writes for prompt tuning, with our record beside.

A folder from outside is data: JSON and one tensor, checked before use. Nothing in it is ever run: a pickle is read by
torch's weights-only reader alone. `softprompt.storage.save` writes such folders.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from softprompt.base import Base
from softprompt.errors import AdapterError, PromptError, WrongBaseError
from softprompt.guard import is_lfs_pointer, lfs_pointer_sentence
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
from softprompt.types import PromptRecord

PEFT_TYPE = "PROMPT_TUNING"
TASK_TYPE = "CAUSAL_LM"
KEY = "prompt_embeddings"
FORMAT_VERSION = 1  # of softprompt.json
_TEXT_FIELDS = ("base_name", "base_source", "base_fingerprint", "parent", "created")
_MAX_VALUE = 1e15  # trained prompts stay below 1e4
_HEADER_LENGTH_BYTES = 8  # a safetensors file opens with the length of its header
_MAX_ZIP_RECORDS = 64  # torch.save writes seven for one tensor


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
        _config_from_bytes(config, None, f"{where}/{CONFIG_NAME}")  # another kind is named first
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
        config_where, weights_where = f"{self.where}/{CONFIG_NAME}", f"{self.where}/{self.weights_name}"
        config = None if self.config is None else _config_from_bytes(self.config, task_type, config_where)
        tensor_PH = _tensor_from_bytes(self.weights_name, self.weights, weights_where)
        if config is None:
            _check_task_of_weights_alone(list(tensor_PH.shape), task_type, self.where)
        else:
            _check_shape(config, tensor_PH, config_where)
        try:
            prompt = SoftPrompt(tensor_PH, self._record(config or {}, base_name))
        except PromptError as error:
            raise AdapterError(f"{weights_where}: {error}") from error
        self._check_content(prompt)
        if base is not None:
            check_base(prompt, base, force=force, where=self.where)
        return prompt

    def _record(self, config: dict[str, Any], base_name: str | None) -> PromptRecord:
        record = PromptRecord() if self.stored is None else self.stored.record
        named = record.base_name or config.get("base_model_name_or_path") or None
        if named is not None and not isinstance(named, str):
            raise AdapterError(f"{self.where}/{CONFIG_NAME}: base_model_name_or_path is {named!r}; it must be text")
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
    """The soft prompt [P, H] of an adapter folder, ours or PEFT's; any stored float dtype becomes float32.

    With `base`, the width and the fingerprint are checked; a folder without a fingerprint (PEFT's own) gives one
    UnknownBaseWarning. `force` loads a prompt of another base of the same width. `task_type` and `base_name` stand in
    for what the folder leaves out: with task_type "CAUSAL_LM" even a missing adapter_config.json is accepted.

    Raises: AdapterError for a folder that is refused, WrongBaseError for a prompt of another base.
    """
    files = AdapterFiles.read(Path(folder))
    return files.parse(base, force=force, task_type=task_type, base_name=base_name)


def check_base(prompt: SoftPrompt, base: Base, *, force: bool = False, where: str = "the soft prompt") -> None:
    """Check that the prompt fits `base` and was trained on it.

    Raises: AdapterError for another width, WrongBaseError for another base.
    """
    shape, made_for = list(prompt.tensor.shape), prompt.record.base_name
    if prompt.hidden_size != base.hidden_size:
        raise AdapterError(
            f"{where} is {shape}, made for {made_for or 'an unknown base'}; the input embeddings of {base.name} are "
            f"[{base.vocab_size}, {base.hidden_size}]: load it on the base that it was trained on"
        )
    _check_range(prompt, base, where)
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


def _check_task_of_weights_alone(shape: list[int], task_type: str | None, where: str) -> None:
    if task_type is None:
        raise AdapterError(
            f"{where} has no {CONFIG_NAME}, so its kind, task and base are unknown; its weights are {shape}. If they "
            f"are a soft prompt of a causal language model, say so: task_type={TASK_TYPE!r} (--task-type {TASK_TYPE})"
        )
    _check_task(task_type, where)


def _nested_hint(folder: Path) -> str:
    """PEFT puts an adapter that is not called "default" into a sub-folder; an unfinished run has checkpoints."""
    configs = [*folder.glob(f"*/{CONFIG_NAME}"), *folder.glob(f"checkpoints/*/{CONFIG_NAME}")]
    nested = sorted(str(config.parent.relative_to(folder)) for config in configs)
    if not nested:
        return "; it is not an adapter: give the folder that PEFT or softprompt wrote"
    if len(nested) == 1:
        return f", but {nested[0]!r} below it has: give {folder / nested[0]}"
    return f", but these folders below it have: {', '.join(nested[:5])}; give one of them"


def _config_from_bytes(data: bytes, task_type: str | None, where: str) -> dict[str, Any]:
    """The config of a prompt for a causal language model; `task_type` stands in where it names none.

    Raises: AdapterError.
    """
    config = parse_object(data, where)
    kind = config.get("peft_type")
    if kind != PEFT_TYPE:
        raise AdapterError(f"{where} has the peft_type {kind!r}; only {PEFT_TYPE} adapters are soft prompts")
    stated = config.get("task_type")
    if stated is not None and task_type is not None and stated != task_type:
        raise AdapterError(f"{where} has the task_type {stated!r} and {task_type!r} was given; leave it out")
    _check_task(task_type if stated is None else stated, where)
    return config


def _check_task(task: object, where: str) -> None:
    """Raises: AdapterError for every task but CAUSAL_LM."""
    if task is None:
        raise AdapterError(
            f"{where} names no task_type; if it was trained on a causal language model, "
            f"say so: task_type={TASK_TYPE!r} (--task-type {TASK_TYPE})"
        )
    if task == "SEQ_2_SEQ_LM":
        raise AdapterError(f"{where} is for an encoder-decoder base (2 x P rows); those come later, not yet supported")
    if task != TASK_TYPE:
        raise AdapterError(f"{where} has the task_type {task!r}; only {TASK_TYPE} is supported now")


def _check_shape(config: dict[str, Any], tensor: Tensor, where: str) -> None:
    """Check what the config states about the tensor [P, H].

    Raises: AdapterError.
    """
    num_rows, hidden_size = tensor.shape
    parts = config.get("num_transformer_submodules")
    if parts not in (None, 1):
        raise AdapterError(f"{where}: num_transformer_submodules is {parts!r}; a causal language model has 1")
    if config.get("num_virtual_tokens") != num_rows:
        raise AdapterError(
            f"{where}: num_virtual_tokens is {config.get('num_virtual_tokens')!r}, but the tensor is "
            f"[{num_rows}, {hidden_size}]; the two files do not belong together"
        )
    if config.get("token_dim") not in (None, hidden_size):
        raise AdapterError(
            f"{where}: token_dim is {config['token_dim']!r}, but the tensor is [{num_rows}, {hidden_size}]; "
            "the two files do not belong together"
        )


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
    return StoredRecord(record=record, content_hash=value["content_hash"], created=value.get("created"))


def _check_texts(value: dict[str, Any], where: str) -> None:
    if not isinstance(value.get("content_hash"), str):
        raise AdapterError(f"{where} has no content_hash; delete it to load the folder as a PEFT adapter")
    for name in _TEXT_FIELDS:
        if not isinstance(value.get(name), str | None):
            raise AdapterError(f"{where}: {name} is {value[name]!r}; it must be text or null")


def _tensor_from_bytes(name: str, data: bytes, where: str) -> Tensor:
    """The one tensor [rows, H] of a weights file called `name`, as float32.

    Raises: AdapterError for anything else than one floating-point matrix under the key `prompt_embeddings`.
    """
    try:
        tensors = _read_safetensors(data, where) if name == SAFETENSORS_NAME else _read_pickle(data, where)
    except AdapterError:
        if is_lfs_pointer(data):
            raise AdapterError(lfs_pointer_sentence(where)) from None
        raise
    tensor = _only_tensor(tensors, where)
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise AdapterError(f"{where}: {KEY} has the shape {list(tensor.shape)}; it must be [P, H], neither of them 0")
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise AdapterError(f"{where}: {KEY} is {tensor.dtype}, {tensor.layout}; it must be plain floating point")
    if tensor.numel() > len(data):  # an expanded view claims what is not there
        raise AdapterError(f"{where}: {KEY} claims {list(tensor.shape)} from {len(data):,} bytes; it is not sound")
    return _of_usable_size(tensor.to(torch.float32), where)


def _of_usable_size(tensor_PH: Tensor, where: str) -> Tensor:
    """The same tensor, unless its values are so large that their squares, which each norm of a base takes, overflow."""
    largest = float(tensor_PH.abs().nan_to_num(0, 0, 0).max())
    if largest > _MAX_VALUE:
        raise AdapterError(
            f"{where}: {KEY} has values up to {largest:.3g}; a base computes NaN or infinity from any beyond "
            f"{_MAX_VALUE:.0e}: train it again, with a lower learning rate"
        )
    return tensor_PH


def _only_tensor(tensors: dict[str, Any], where: str) -> Tensor:
    names = sorted(map(str, tensors))
    if names != [KEY]:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise AdapterError(f"{where} holds {len(names)} tensors ({shown}); a soft prompt is exactly one, {KEY!r}")
    tensor = tensors[KEY]
    if not isinstance(tensor, Tensor):
        raise AdapterError(f"{where}: {KEY} is a {type(tensor).__name__}; it must be a tensor")
    return tensor.detach()


def _read_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    header_bytes = int.from_bytes(data[:_HEADER_LENGTH_BYTES], "little")
    if len(data) < _HEADER_LENGTH_BYTES or header_bytes > len(data) - _HEADER_LENGTH_BYTES:
        raise AdapterError(f"{where} is cut off or no safetensors file ({len(data):,} bytes); take a whole copy")
    if header_bytes > MAX_TEXT_BYTES:
        raise AdapterError(f"{where} has a header of {header_bytes:,} bytes; the limit is {MAX_TEXT_BYTES:,}")
    try:
        return safetensors_torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{where} is not a sound safetensors file ({error}); take a whole copy") from error


def _read_pickle(data: bytes, where: str) -> dict[str, Any]:
    _check_zip(data, where)
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can make the reader raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(
            f"{where} holds more than tensors, or is damaged, and was not loaded ({reason[:160]}); "
            "ask its author for a safetensors file"
        ) from error
    if not isinstance(value, dict):
        raise AdapterError(f"{where} holds a {type(value).__name__}; it must be a dictionary of tensors")
    return value


def _check_zip(data: bytes, where: str) -> None:
    """torch.save stores its records unpacked; packed ones could unfold to any size."""
    try:
        records = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except Exception as error:  # zipfile raises half a dozen kinds on damaged input
        raise AdapterError(
            f"{where} is cut off, or a bare pickle, which may hold code; ask its author for a safetensors file"
        ) from error
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or len(records) > _MAX_ZIP_RECORDS or sum(record.file_size for record in records) > len(data):
        raise AdapterError(f"{where} is a packed archive, not what torch.save writes; ask for a safetensors file")
