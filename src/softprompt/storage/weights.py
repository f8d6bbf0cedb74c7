"""The weights file of an adapter, read: `prompt_embeddings` [rows, H] and, beside it, the weights of a head.

A pickle is read by torch's weights-only reader alone. Sizes, shapes and values are checked before anything is used.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from softprompt.errors import AdapterError
from softprompt.guard import is_lfs_pointer, lfs_pointer_sentence
from softprompt.storage.files import MAX_TEXT_BYTES, SAFETENSORS_NAME
from softprompt.storage.peft_config import HEAD_PREFIX

KEY = "prompt_embeddings"
_MAX_VALUE = 1e15  # trained prompts stay below 1e4
_HEADER_LENGTH_BYTES = 8  # a safetensors file opens with the length of its header
_MAX_ZIP_RECORDS = 64  # torch.save writes seven for one tensor
_MAX_HEAD_TENSORS = 32  # transformers' heads have up to eight
_HEAD_NAME = re.compile(r"[A-Za-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64}){1,8}")


class Weights(NamedTuple):
    """All float32."""

    prompt: Tensor  # [rows, H]
    head: dict[str, Tensor]  # by transformers' names; empty without a head


def read_weights(name: str, data: bytes, where: str) -> Weights:
    """The weights in the bytes of a file called `name`.

    Raises: AdapterError for anything else than one floating-point matrix under the key `prompt_embeddings`, and
    matrices or vectors under `base_model.`.
    """
    try:
        tensors = _read_safetensors(data, where) if name == SAFETENSORS_NAME else _read_pickle(data, where)
    except AdapterError:
        if is_lfs_pointer(data):
            raise AdapterError(lfs_pointer_sentence(where)) from None
        raise
    sound = {str(key): _checked(str(key), value, len(data), where) for key, value in _known(tensors, where).items()}
    if sum(tensor.numel() for tensor in sound.values()) > len(data):
        raise AdapterError(f"{where}: its tensors claim more numbers than its {len(data):,} bytes; it is not sound")
    found = {key: _of_usable_size(key, tensor.to(torch.float32), where) for key, tensor in sorted(sound.items())}
    prompt = found.pop(KEY)
    return Weights(prompt, {key.removeprefix(HEAD_PREFIX): tensor for key, tensor in found.items()})


def weights_to_bytes(prompt: Tensor, head: Mapping[str, Tensor]) -> bytes:
    """A safetensors file as PEFT writes it: float32, metadata {"format": "pt"}."""
    tensors = {KEY: prompt, **{f"{HEAD_PREFIX}{name}": weight for name, weight in head.items()}}
    plain = {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
    return safetensors_torch.save(plain, metadata={"format": "pt"})


def _known(tensors: dict[str, Any], where: str) -> dict[str, Any]:
    """The same, if its keys are those of a prompt and perhaps a head."""
    names = sorted(map(str, tensors))
    of_head = [name for name in names if name.startswith(HEAD_PREFIX)]
    if [name for name in names if name not in of_head] != [KEY]:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise AdapterError(f"{where} holds {len(names)} tensors ({shown}); a soft prompt is exactly one, {KEY!r}")
    if len(of_head) > _MAX_HEAD_TENSORS:
        raise AdapterError(f"{where} holds {len(of_head)} tensors of a head; the limit is {_MAX_HEAD_TENSORS}")
    for name in of_head:
        if not _HEAD_NAME.fullmatch(name.removeprefix(HEAD_PREFIX)):
            raise AdapterError(f"{where}: {name[:80]!r} is no name of a head's weight")
    return tensors


def _checked(name: str, tensor: Any, num_bytes: int, where: str) -> Tensor:  # Any: whatever a pickle holds
    """One tensor of a usable kind and shape."""
    if not isinstance(tensor, Tensor):
        raise AdapterError(f"{where}: {name} is a {type(tensor).__name__}; it must be a tensor")
    tensor = tensor.detach()
    assert isinstance(tensor, Tensor)
    if tensor.dim() not in ((2,) if name == KEY else (1, 2)) or 0 in tensor.shape:
        wanted = "[P, H], neither of them 0" if name == KEY else "a matrix or a vector, and not empty"
        raise AdapterError(f"{where}: {name} has the shape {list(tensor.shape)}; it must be {wanted}")
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise AdapterError(f"{where}: {name} is {tensor.dtype}, {tensor.layout}; it must be plain floating point")
    if tensor.numel() > num_bytes:  # an expanded view claims what is not there
        raise AdapterError(f"{where}: {name} claims {list(tensor.shape)} from {num_bytes:,} bytes; it is not sound")
    return tensor


def _of_usable_size(name: str, tensor: Tensor, where: str) -> Tensor:
    """The same tensor, unless its values are so large that their squares, which each norm of a base takes, overflow."""
    largest = float(tensor.abs().nan_to_num(0, 0, 0).max())
    if largest > _MAX_VALUE:
        raise AdapterError(
            f"{where}: {name} has values up to {largest:.3g}; a base computes NaN or infinity from any beyond "
            f"{_MAX_VALUE:.0e}: train it again, with a lower learning rate"
        )
    return tensor


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
