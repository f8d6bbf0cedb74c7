"""Keys and values that stay in memory from one forward to the next: one row per sequence, one slot per position.

All rows of a `KVBuffer` have one capacity, so that a step reads whole tensors and copies nothing.

R rows of a buffer, C its capacity in positions, k key heads, d width of a head.
"""

from __future__ import annotations

from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # each [k, tokens, d]


class KVBuffer:
    """Keys and values [R, k, C, d] of each attention module; a module's are made when it first writes."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.num_rows = num_rows
        self.capacity = capacity
        self.tensors: dict[nn.Module, KeysValues] = {}

    def of(self, module: nn.Module, key: Tensor, value: Tensor) -> KeysValues:
        """The module's keys and values; `key` and `value` [tokens, k, d] show their shape."""
        found = self.tensors.get(module)
        if found is None:
            found = self.tensors[module] = (self._empty(key), self._empty(value))
        return found

    def like(self, num_rows: int, capacity: int) -> KVBuffer:
        """An empty buffer of another size for the same modules, its memory taken."""
        made = KVBuffer(num_rows, capacity)
        for module, (keys, values) in self.tensors.items():
            made.of(module, keys[0].transpose(0, 1), values[0].transpose(0, 1))
        return made

    def resize(self, num_rows: int) -> None:
        """Add or drop rows at the end. If memory runs out half-way, only as many rows as before may be used."""
        kept = self.num_rows = min(num_rows, self.num_rows)
        for module, pair in self.tensors.items():
            keys, values = (part.new_zeros(num_rows, *part.shape[1:]) for part in pair)
            keys[:kept], values[:kept] = pair[0][:kept], pair[1][:kept]
            self.tensors[module] = (keys, values)
        self.num_rows = num_rows

    def read(self, row: int, length: int) -> dict[nn.Module, KeysValues]:
        """A copy of a row's first positions, [k, length, d] of each module."""
        return {
            module: (keys[row, :, :length].clone(), values[row, :, :length].clone())
            for module, (keys, values) in self.tensors.items()
        }

    def write(self, row: int, states: dict[nn.Module, KeysValues], length: int) -> None:
        """Copy the first `length` positions of what `read` returned into a row."""
        for module, (key, value) in states.items():
            keys, values = self.of(module, key.transpose(0, 1), value.transpose(0, 1))
            keys[row, :, :length] = key[:, :length]
            values[row, :, :length] = value[:, :length]

    def copy_row(self, source: int, target: KVBuffer, row: int, length: int) -> None:
        """Copy the first `length` positions of a row into a row of this or another buffer."""
        states = {module: (keys[source], values[source]) for module, (keys, values) in self.tensors.items()}
        target.write(row, states, length)

    def num_bytes(self) -> int:
        return sum(part.nbytes for pair in self.tensors.values() for part in pair)

    def clear(self, row: int) -> None:
        """Fill a row with zeros: slots beyond a row's end have weight 0, but 0 times a leftover infinity is NaN."""
        for pair in self.tensors.values():
            for part in pair:
                part[row].zero_()

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.num_rows, like.shape[1], self.capacity, like.shape[2])
