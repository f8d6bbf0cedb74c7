"""The header of a GGUF file, read within bounds before any library reads the file.

A file may claim any count and length. Each is compared with what the file can still have behind it, so that reading
stops at the first wrong number, and neither time nor memory depends on what is claimed. Sizes of storage types are
those of the package gguf, which has to be there.

Source: the specification, docs/gguf.md of ggml-org/ggml. Knows no torch.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from softprompt.errors import BaseModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_FIELDS = 65_536
_MOST_TENSORS = 1_048_576
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_LONGEST_NAME = 65_535  # bytes of a key; the specification's bound
_MOST_READ = 1_024  # items of an array of numbers that are kept: one for each layer of a base
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8  # of its entry in the table: name's length, dimensions, type, offset


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]  # in torch's order
    kind: int  # ggml's number of its storage type
    offset: int  # from the start of the data

    @property
    def num_values(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    architecture: str  # in ggml's words, "llama"
    fields: dict[str, Any]  # texts, numbers, short lists of numbers; a longer array or one of texts is its length
    tensors: tuple[GgufTensor, ...]
    data_start: int  # where the first tensor's bytes may begin

    @property
    def num_values(self) -> int:
        """Of all tensors together."""
        return sum(tensor.num_values for tensor in self.tensors)

    @property
    def largest(self) -> int:
        """Values of the largest tensor."""
        return max(tensor.num_values for tensor in self.tensors)


def is_gguf(file: Path) -> bool:
    """Whether the file begins as a GGUF does."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(file: Path, base: str) -> GgufHeader:
    """The header of a file that `is_gguf`. Raises BaseModelError where it is cut off or claims what it cannot have."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(data)
    except OSError as error:
        raise BaseModelError(f"base {base!r} cannot be loaded: {file} cannot be read ({error})") from error
    except _HeaderError as error:
        raise BaseModelError(f"base {base!r} cannot be loaded: {file} {error}; copy or download it again") from None


class _HeaderError(Exception):
    """What is wrong with the header, as the end of a sentence about the file."""


class _Cursor:
    """A position in the file that never passes its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.pos = data, len(MAGIC)

    @property
    def remaining(self) -> int:
        return len(self._data) - self.pos

    def number(self, form: str) -> Any:  # Any: int, float or bool
        (value,) = struct.unpack(form, self.bytes(struct.calcsize(form), "its header"))
        return value

    def bytes(self, count: int, what: str) -> bytes:
        self.skip(count, what)
        return self._data[self.pos - count : self.pos]

    def skip(self, count: int, what: str) -> None:
        if count > self.remaining:
            raise _HeaderError(
                f"is cut off or damaged ({what} needs {count:,} bytes at {self.pos:,}, and {self.remaining:,} follow)"
            )
        self.pos += count

    def text(self, most: int | None = None) -> str:
        length = self.number("<Q")
        if most is not None and length > most:
            raise _HeaderError(f"is damaged (a name at {self.pos:,} has {length:,} bytes; {most:,} are allowed)")
        try:
            return self.bytes(length, "a text").decode()
        except UnicodeDecodeError:
            raise _HeaderError(f"is damaged (a text that ends at {self.pos:,} is no UTF-8)") from None


def _header(data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data)
    version = cursor.number("<I")
    if version not in _VERSIONS:
        byte_order = " (or is big-endian)" if version & 0xFFFF == 0 else ""
        raise _HeaderError(f"is of GGUF version {version:,}{byte_order}; versions 2 and 3 can be read")
    num_tensors, num_fields = cursor.number("<Q"), cursor.number("<Q")
    if num_fields > _MOST_FIELDS or num_tensors > min(_MOST_TENSORS, cursor.remaining // _LEAST_TENSOR_BYTES):
        raise _HeaderError(f"is cut off or damaged (it claims {num_tensors:,} tensors and {num_fields:,} fields)")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.text(_LONGEST_NAME)
        if key in fields:
            raise _HeaderError(f"is damaged (it has the field {key[:80]!r} twice)")
        fields[key] = _value(cursor, cursor.number("<I"))
    tensors = tuple(_tensor(cursor) for _ in range(num_tensors))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise _HeaderError(f"is damaged (general.alignment is {alignment!r})")
    start = -(-cursor.pos // alignment) * alignment
    _check_tensors(tensors, len(data) - start)
    return GgufHeader(_architecture(fields), fields, tensors, start)


def _architecture(fields: dict[str, Any]) -> str:
    found = fields.get("general.architecture")
    if not isinstance(found, str):
        raise _HeaderError("names no architecture (general.architecture)")
    return found


def _value(cursor: _Cursor, kind: int) -> Any:  # Any: text, number, list of numbers
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text()
    if kind == _ARRAY:
        return _array(cursor, cursor.number("<I"), cursor.number("<Q"))
    raise _HeaderError(f"is damaged (a field at {cursor.pos:,} has the unknown type {kind:,})")


def _array(cursor: _Cursor, kind: int, length: int) -> Any:  # Any: a list of numbers, or the length
    if kind == _STRING:
        if length > cursor.remaining // 8:
            raise _HeaderError(f"is cut off or damaged (an array at {cursor.pos:,} claims {length:,} texts)")
        for _ in range(length):
            cursor.skip(cursor.number("<Q"), "a text")
        return length
    if kind not in _SCALARS:
        raise _HeaderError(f"has an array of type {kind:,} at {cursor.pos:,}, which cannot be read")
    if length <= _MOST_READ:
        return [cursor.number(_SCALARS[kind]) for _ in range(length)]
    cursor.skip(length * struct.calcsize(_SCALARS[kind]), "an array")
    return length


def _tensor(cursor: _Cursor) -> GgufTensor:
    name = cursor.text(_LONGEST_NAME)
    num_dimensions = cursor.number("<I")
    if num_dimensions > _MOST_DIMENSIONS:
        raise _HeaderError(f"is damaged (tensor {name[:80]!r} has {num_dimensions:,} dimensions)")
    sizes = [cursor.number("<Q") for _ in range(num_dimensions)]
    return GgufTensor(name, tuple(reversed(sizes)), cursor.number("<I"), cursor.number("<Q"))


def _check_tensors(tensors: tuple[GgufTensor, ...], data_bytes: int) -> None:
    """Every tensor has to lie in the file as a whole."""
    from gguf.constants import GGML_QUANT_SIZES

    blocks = {int(kind): block for kind, block in GGML_QUANT_SIZES.items()}
    if not tensors:
        raise _HeaderError("has no tensors (it is a vocabulary, or cut off)")
    for tensor in tensors:
        if tensor.kind not in blocks:
            raise _HeaderError(
                f"stores {tensor.name[:80]!r} as type {tensor.kind:,}, which the package gguf does not know "
                "(pip install -U gguf)"
            )
        num_values, block_bytes = blocks[tensor.kind]
        needed = tensor.num_values // num_values * block_bytes
        if tensor.offset + needed > data_bytes:
            raise _HeaderError(
                f"is cut off or damaged (tensor {tensor.name[:80]!r} needs {needed:,} bytes at {tensor.offset:,} of "
                f"the data, which has {max(data_bytes, 0):,})"
            )
