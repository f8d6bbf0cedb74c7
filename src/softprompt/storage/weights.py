"""The tensor [P, H] as bytes: safetensors written, safetensors and PEFT's older `.bin` read.

Bytes from outside are data: a pickle is read by torch's weights-only reader alone, so nothing in it is ever run.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from softprompt.errors import AdapterError
from softprompt.guard import is_lfs_pointer, lfs_pointer_sentence
from softprompt.storage.files import MAX_TEXT_BYTES, SAFETENSORS_NAME

KEY = "prompt_embeddings"
MAX_VALUE = 1e15  # trained prompts stay below 1e4
_HEADER_LENGTH_BYTES = 8  # a safetensors file opens with the length of its header
_MAX_ZIP_RECORDS = 64  # torch.save writes seven for one tensor


def tensor_to_bytes(tensor_PH: Tensor) -> bytes:
    """A safetensors file as PEFT writes it: one key, float32, metadata {"format": "pt"}."""
    return safetensors_torch.save({KEY: tensor_PH.to(torch.float32).contiguous()}, metadata={"format": "pt"})


def tensor_from_bytes(name: str, data: bytes, where: str) -> Tensor:
    """The one tensor [rows, H] of a weights file called `name`, as float32.

    Raises: AdapterError for anything else than one floating-point matrix under the key `prompt_embeddings`.
    """
    if is_lfs_pointer(data):
        raise AdapterError(lfs_pointer_sentence(where))
    tensors = _read_safetensors(data, where) if name == SAFETENSORS_NAME else _read_pickle(data, where)
    tensor = _only_tensor(tensors, where)
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise AdapterError(f"{where}: {KEY} has the shape {list(tensor.shape)}; it must be [P, H], neither of them 0")
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise AdapterError(f"{where}: {KEY} is {tensor.dtype}, {tensor.layout}; it must be plain floating point")
    if tensor.numel() > len(data):  # an expanded view claims what is not there
        raise AdapterError(f"{where}: {KEY} claims {list(tensor.shape)} from {len(data):,} bytes; it is not sound")
    return _of_usable_size(tensor.to(torch.float32), where)


def _of_usable_size(tensor_PH: Tensor, where: str) -> Tensor:
    """The same tensor. Squares of larger values, which every norm of a base takes, overflow float32."""
    largest = float(tensor_PH.abs().nan_to_num(0, 0, 0).max())
    if largest > MAX_VALUE:
        raise AdapterError(
            f"{where}: {KEY} has values up to {largest:.3g}; a base computes NaN or infinity from any beyond "
            f"{MAX_VALUE:.0e}: train it again, with a lower learning rate"
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
