"""Which way each product of a base goes: measured once per machine, stored in the cache, recorded with every run.

The fastest way to multiply a few rows differs between processors by up to three times, and no name of a processor says
it. So a base's products are timed when it is first used on a machine. Whoever uses a base of these shapes later reads
the result: a timing that was repeated could come out otherwise, and two runs would then differ in bits. Where the cache
cannot be written the fixed rules of `softprompt.families.frozen_linear` apply.

T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.base.cache import cache_folder, read_cached, update_cached
from softprompt.base.device import processor
from softprompt.compute_share import yield_point
from softprompt.errors import StorageError
from softprompt.families.frozen_linear import (
    BACKWARD,
    FORWARD,
    HEAD_BLOCK,
    MEASURED_ROWS,
    PREPACKED,
    WAYS,
    Choices,
    Direction,
    PackedWeight,
    can_prepack,
    can_prepack_float32,
    linear_weights,
    packed_weight,
    product_name,
)
from softprompt.families.native import VERSION, native_library

FILE_NAME = "kernels.json"  # in the cache
MEASURING = "measuring which matrix kernels this processor runs fastest (once)..."
_VERSION = 1  # of the ways and of how they are measured: another one is measured anew
LEAST_NUMBERS = 2**16  # of a weight: a smaller product is mostly the call
LEAST_NUMBERS_OF_BASE = 2**24  # together: a smaller base runs for less time than measuring it would take
_CLEARLY = 0.95  # of the time of torch's own product: a way that takes more does not replace it
_WORTH_COPIES = 0.85  # of the time without: float32 weights are prepacked for less
_HOPELESS = 1.5  # times the best time of the first round: not measured again
_FEW = 32  # rows at most that decoding has; more are prefill and training
_FEW_ROWS = tuple(rows for rows in MEASURED_ROWS if rows <= _FEW)
_MANY_ROWS = tuple(rows for rows in MEASURED_ROWS if rows > _FEW)
_SAMPLE_BYTES = 2**24  # of weights that are read for one time: they come from memory, as in use
_SAMPLE_FLOP = 2e9
_ROUNDS = 3
_BUDGET_S = 8.0  # what is not measured by then follows the fixed rules; a base of 135 million parameters takes 2
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # environment

_LOG = logging.getLogger(__name__)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Machine:
    """All that a choice depends on, besides the product itself."""

    processor: str  # its name and a digest of what it can do
    capability: str  # what torch uses of it, limits set in the environment, and whether our own C is there
    torch: str
    version: int
    ways: tuple[str, ...]
    threads: int

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def differences(self, other: Machine) -> str:
        """What is another one on `other`."""
        pairs = [(each.name, getattr(self, each.name), getattr(other, each.name)) for each in fields(self)]
        changed = [(name, mine, theirs) for name, mine, theirs in pairs if mine != theirs]
        return "; ".join(f"{name} was {_shown(mine)}, is {_shown(theirs)}" for name, mine, theirs in changed)


def _shown(value: Any) -> str:  # Any: a Machine's field
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def this_machine() -> Machine:
    own = [f"own C, version {VERSION}"] if native_library() is not None else []
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    return Machine(
        processor=processor(),
        capability=", ".join([torch.backends.cpu.get_cpu_capability(), *own, *limits]),
        torch=torch.__version__,
        version=_VERSION,
        ways=tuple(WAYS),
        threads=torch.get_num_threads(),
    )


@dataclass(frozen=True)
class KernelTable:
    """The choices for one base on one machine: data, and no code."""

    kind: Literal["measured", "fixed"]
    machine: Machine
    choices: Choices  # none where the kind is fixed, or where nothing is worth measuring

    def for_training(self) -> KernelTable:
        """Without the choices that depend on whether a weight is prepacked, so that a run does not depend on it."""
        kept = {name: ways for name, ways in self.choices.items() if not name.startswith(PREPACKED)}
        return KernelTable(self.kind, self.machine, kept)

    def to_json(self) -> dict[str, Any]:
        choices = {name: {str(rows): way for rows, way in ways.items()} for name, ways in self.choices.items()}
        machine = {**asdict(self.machine), "ways": list(self.machine.ways)}
        return {"kind": self.kind, "machine": machine, "choices": choices}

    @classmethod
    def from_json(cls, record: Any) -> KernelTable:  # Any: data of a file
        """Raises: StorageError for what is no table."""
        try:
            known = {**record["machine"], "ways": tuple(record["machine"]["ways"])}
            machine = Machine(**{each.name: known[each.name] for each in fields(Machine)})
            kind: Literal["measured", "fixed"] = "fixed" if record["kind"] == "fixed" else "measured"
            choices = record["choices"]
            valid = _valid(choices)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"the record of the matrix kernels is malformed ({error!r})") from error
        if machine.ways == tuple(WAYS) and len(valid) < len(choices):
            raise StorageError("the record of the matrix kernels names products or ways that there are not")
        return cls(kind, machine, valid)


def kernel_table(
    base: Base, *, training: bool = False, again: bool = False, say: Say = _LOG.info,
    clock: Callable[[], float] = time.perf_counter,
) -> KernelTable:  # fmt: skip
    """The table of a base here, from the cache; what is not in it is measured and added, after `say` has said so.

    `training`: with the products of a backward pass. `again` measures all of it anew.
    """
    machine = this_machine()
    products = _products(base, training) if base.kernels == "measured" else {}
    if not products:
        return KernelTable("fixed" if base.kernels == "fixed" else "measured", machine, {})
    known = {} if again else cached_choices(machine)
    if not products.keys() <= known.keys():
        if not _cache_can_be_written():
            say("the cache cannot be written, so matrix kernels follow fixed rules by the kind of processor")
            return KernelTable("fixed", machine, {})
        say(MEASURING)
        _measure_into_cache(machine, products, again, clock)
        known = cached_choices(machine)
    if not products.keys() <= known.keys():
        say("the cache could not be written, so matrix kernels follow fixed rules by the kind of processor")
        return KernelTable("fixed", machine, {})
    own = {name: ways for name, ways in known.items() if name.replace(PREPACKED, FORWARD, 1) in products}
    return KernelTable("measured", machine, own)


def cached_choices(machine: Machine) -> Choices:
    """What the cache has for a machine; a product whose entry is not valid is left out, and so measured again."""
    return _valid(_entry(read_cached(FILE_NAME), machine))


def cached_machines() -> Iterator[KernelTable]:
    """Every valid table in the cache."""
    machines = read_cached(FILE_NAME).get("machines")
    for record in machines.values() if isinstance(machines, dict) else ():
        try:
            yield KernelTable.from_json({"kind": "measured", **record})
        except (StorageError, TypeError):
            continue


def _entry(known: Mapping[str, Any], machine: Machine) -> Any:  # Any: data of a file
    machines = known.get("machines")
    entry = machines.get(machine.key) if isinstance(machines, dict) else None
    return entry.get("choices") if isinstance(entry, dict) else None


def _valid(choices: Any) -> dict[str, dict[int, str]]:  # Any: data of a file
    """The entries that are choices among the ways that there are."""
    rows = {str(count): count for count in MEASURED_ROWS}
    return {
        name: dict(sorted((rows[count], way) for count, way in ways.items()))
        for name, ways in (choices.items() if isinstance(choices, dict) else ())
        if isinstance(ways, dict)
        and all(count in rows and isinstance(way, str) and way in WAYS for count, way in ways.items())
    }


def _measure_into_cache(
    machine: Machine, products: Mapping[str, Product], again: bool, clock: Callable[[], float]
) -> None:
    """Another process may have measured meanwhile; under the cache's lock only what is missing is."""

    def change(known: dict[str, Any]) -> dict[str, Any]:
        own = _valid(_entry(known, machine))
        missing = {name: product for name, product in products.items() if again or name not in own}
        own = {name: ways for name, ways in own.items() if name.replace(PREPACKED, FORWARD, 1) not in missing}
        table = KernelTable("measured", machine, {**own, **measure(missing, clock)})
        machines = known.get("machines")
        return {"machines": {**(machines if isinstance(machines, dict) else {}), machine.key: table.to_json()}}

    update_cached(FILE_NAME, change)


def _cache_can_be_written() -> bool:
    folder = cache_folder()
    if folder is None:
        return False
    there = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@dataclass(frozen=True)
class Product:
    """One product to measure: by weights of one shape [O, I], with so many rows."""

    weights: Sequence[Tensor]
    rows: tuple[int, ...]


def _products(base: Base, training: bool) -> dict[str, Product]:
    """Each product of a base that is worth measuring, by name."""
    matrices = list(
        {matrix.data_ptr(): matrix for _, matrix in linear_weights(base.model) if _is_worth(matrix)}.values()
    )
    if sum(matrix.numel() for matrix in matrices) < LEAST_NUMBERS_OF_BASE:
        return {}
    weight = getattr(base.model.get_output_embeddings(), "weight", None)
    head = None if weight is None else weight.data_ptr()
    found: dict[str, Product] = {}
    for name, own in _by_name([matrix for matrix in matrices if matrix.data_ptr() != head]).items():
        found[f"{FORWARD} {name}"] = Product(own, MEASURED_ROWS)
        if training:
            found[f"{BACKWARD} {name}"] = Product(own, _MANY_ROWS)
    for whole in [matrix for matrix in matrices if matrix.data_ptr() == head]:
        found[product_name(whole, FORWARD)] = Product([whole], _FEW_ROWS)
        if training:  # which multiplies by the head in blocks
            blocks = whole.split(HEAD_BLOCK)
            found[product_name(whole, FORWARD, HEAD_BLOCK)] = Product(blocks, MEASURED_ROWS)
            found[product_name(whole, BACKWARD, HEAD_BLOCK)] = Product(blocks, _MANY_ROWS)
    return found


def _by_name(matrices: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for matrix in matrices:
        found.setdefault(product_name(matrix, FORWARD).removeprefix(f"{FORWARD} "), []).append(matrix)
    return found


def _is_worth(matrix: Tensor) -> bool:
    is_plain = type(matrix) is Tensor and matrix.device.type == "cpu" and not matrix.requires_grad
    return is_plain and matrix.dtype in (torch.float32, torch.bfloat16) and matrix.numel() >= LEAST_NUMBERS


Seconds = Mapping[str, float]  # of one product, by way; "prepacked" is oneDNN's with a copy


@torch.no_grad()
def measure(products: Mapping[str, Product], clock: Callable[[], float] = time.perf_counter) -> Choices:
    """The fastest way of each product for each number of rows, by name; the biggest are measured first."""
    deadline = clock() + _BUDGET_S
    found: dict[str, dict[int, str]] = {}
    for name in sorted(products, key=lambda each: -sum(matrix.numel() for matrix in products[each].weights)):
        seconds: dict[int, Seconds] = {}
        for num_rows in products[name].rows:
            yield_point()
            if clock() < deadline:
                seconds[num_rows] = _seconds(name, _sample(products[name].weights, num_rows), num_rows, clock)
        found[name], prepacked = fastest(seconds)
        if prepacked and name.startswith(FORWARD):
            found[name.replace(FORWARD, PREPACKED, 1)] = prepacked
    return found


def fastest(seconds: Mapping[int, Seconds]) -> tuple[dict[int, str], dict[int, str]]:
    """By rows: the way to choose, and what to choose in its place where the weight is prepacked and that is faster."""
    chosen, prepacked, gains = {}, {}, [1.0]
    for rows, measured in seconds.items():
        times = dict(measured)
        with_copy = times.pop("prepacked", None)
        own = "linear" if "linear" in times else "onednn"
        if rows > _FEW and with_copy is not None and times["onednn"] <= times[own] / _CLEARLY:
            times["onednn"] = min(times["onednn"], with_copy)  # the same bits, and faster once there are copies
        best = min(times, key=lambda way: times[way])
        chosen[rows] = best if times[best] < _CLEARLY * times[own] else own
        if rows <= _FEW and with_copy is not None and with_copy < _CLEARLY * times[chosen[rows]]:
            prepacked[rows] = "prepacked"
            gains.append(with_copy / times[chosen[rows]])
    return chosen, prepacked if min(gains) < _WORTH_COPIES else {}


def _sample(matrices: Sequence[Tensor], num_rows: int) -> list[Tensor]:
    """Weights of one shape to measure with, or parts of them: for few rows enough to come from memory each time."""
    first = matrices[0]
    fitting = _SAMPLE_BYTES // (first.shape[1] * first.element_size())
    if num_rows > _FEW:
        fitting = max(int(_SAMPLE_FLOP / (2 * num_rows * first.shape[1])), 256)
    outputs = min(max(fitting, 1), first.shape[0])
    count = _ROUNDS if num_rows > _FEW else _ROUNDS * max(fitting // outputs, 1)
    parts = (part for matrix in matrices for part in matrix.split(outputs) if len(part) == outputs)
    return list(islice(parts, count))


def _seconds(name: str, matrices: Sequence[Tensor], num_rows: int, clock: Callable[[], float]) -> Seconds:
    """The median time of a product with these matrices in each way; one that is far behind is tried once."""
    is_backward = name.startswith(BACKWARD)
    first = matrices[0]
    inputs = torch.randn(num_rows, first.shape[0 if is_backward else 1], generator=torch.Generator().manual_seed(0))
    rows = inputs.to(first.dtype)
    weights = _weights_by_way(matrices, BACKWARD if is_backward else FORWARD, rows)
    weights = {way: own for way, own in weights.items() if _works(way, own[0], rows, is_backward)}
    times: dict[str, list[float]] = {way: [] for way in weights}
    for number in range(_ROUNDS):
        best = min((median(found) for found in times.values() if found), default=float("inf"))
        for way in [each for each, found in times.items() if not found or median(found) < _HOPELESS * best]:
            chunk = weights[way][number::_ROUNDS] or weights[way]
            began = clock()
            for weight in chunk:
                _multiply(way, weight, rows, is_backward)
            times[way].append((clock() - began) / len(chunk))
    return {way: median(found) for way, found in times.items()}


def _works(way: str, weight: PackedWeight, rows: Tensor, is_backward: bool) -> bool:
    """Whether this torch has the way for this product; the first call compiles, and wakes the threads."""
    try:
        _multiply(way, weight, rows, is_backward)
    except RuntimeError:
        return way == "linear"
    return True


def _multiply(way: str, weight: PackedWeight, rows: Tensor, is_backward: bool) -> Tensor:
    return WAYS[way].back(weight, rows) if is_backward else WAYS[way].times(weight, rows, None)


def _weights_by_way(matrices: Sequence[Tensor], direction: Direction, rows: Tensor) -> dict[str, list[PackedWeight]]:
    """The weights as each way multiplies by them."""
    plain = [PackedWeight(matrix) for matrix in matrices]
    ways = [way for way in WAYS if way != "prepacked" and WAYS[way].applies(plain[0], direction, len(rows))]
    is_bfloat16 = can_prepack(matrices[0])
    found = {way: plain for way in ways if way != "linear" or not is_bfloat16}  # for which torch's own is oneDNN's
    if is_bfloat16 or (direction == FORWARD and can_prepack_float32(matrices[0])):
        copies = [packed_weight(matrix, both_ways=direction == BACKWARD) for matrix in matrices]
        if len(rows) <= _FEW or is_bfloat16 or _same_bits(plain[0], copies[0], rows):
            found["prepacked"] = copies
    return found


def _same_bits(plain: PackedWeight, copy: PackedWeight, rows: Tensor) -> bool:
    """Else the bits of a run would depend on whether there was memory for copies."""
    return torch.equal(WAYS["onednn"].times(plain, rows, None), WAYS["onednn"].times(copy, rows, None))
