"""Tables of matrix kernels that a test writes to the cache, in place of a measurement: no test depends on a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from softprompt.base import Base
from softprompt.families import KernelTable, kernel_choice, this_machine
from softprompt.families.frozen_linear import BACKWARD, FORWARD, MEASURED_ROWS, linear_weights, product_name


def own_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """An empty cache, for bases of any size; returns the file of the tables."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(folder))
    monkeypatch.setattr(kernel_choice, "LEAST_NUMBERS", 1)
    monkeypatch.setattr(kernel_choice, "LEAST_NUMBERS_OF_BASE", 1)
    return folder / kernel_choice.FILE_NAME


def table_of(base: Base, way: str) -> KernelTable:
    """Every product of a base goes one way, forward and backward."""
    names = [
        product_name(matrix, direction, outputs)
        for _, matrix in linear_weights(base.model)
        for direction in (FORWARD, BACKWARD)
        for outputs in (None, kernel_choice.HEAD_BLOCK)
    ]
    return KernelTable("measured", this_machine(), {name: dict.fromkeys(MEASURED_ROWS, way) for name in names})


def write_table(file: Path, table: KernelTable) -> None:
    write(file, {"machines": {table.machine.key: table.to_json()}})


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
