"""softprompt info"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from softprompt.cli.command import Command, config_of, options_of
from softprompt.cli.console import load, print_json, print_table, print_words, say
from softprompt.config import BaseConfig
from softprompt.errors import ConfigError

if TYPE_CHECKING:
    from softprompt.families import KernelTable

_EXAMPLES = (
    "softprompt info",
    "softprompt info --base smollm2 --dtype float32",
    "softprompt info --base BASE --measure-again",
    "softprompt info --json",
)


@click.command("info", cls=Command, sections={"Base": BaseConfig}, examples=_EXAMPLES)
@options_of(BaseConfig, optional=True)
@click.option(
    "--measure-again", is_flag=True, help="Measure the matrix kernels of --base anew, and replace those of the cache."
)
@click.option("--json", "as_json", is_flag=True, help="Print it all as JSON on stdout.")
def command(measure_again: bool, as_json: bool, **flags: Any) -> None:
    """Show versions, this machine, the cache, and which matrix kernels were measured to be the fastest.

    With --base: the kernels of that base, which are measured first if they never were.
    """
    if measure_again and flags["base"] is None:
        raise ConfigError("--measure-again is for the products of one base; give --base")
    if measure_again and flags["kernels"] == "fixed":
        raise ConfigError("--measure-again measures, and --kernels is 'fixed'; give one of the two")
    tables = _tables_of_cache() if flags["base"] is None else [_table_of_base(flags, measure_again)]
    found = _machine(flags["device"], flags["dtype"])
    if as_json:
        print_json({**found, "kernels": [table.to_json() for table in tables]})
        return
    print_table(
        "This machine",
        ["what", "found"],
        [(name.replace("_", " "), _cell(name, value)) for name, value in found.items()],
    )
    for table in tables:
        _show(table)
    if not tables:
        print_words("No matrix kernels are measured yet; softprompt info --base BASE measures those of a base.")


def _tables_of_cache() -> list[KernelTable]:
    from softprompt.families.kernel_choice import cached_machines

    return list(cached_machines())


def _table_of_base(flags: dict[str, Any], again: bool) -> KernelTable:
    from softprompt.families import kernel_table

    base = load(config_of(BaseConfig, flags), training=True, measure=not again)
    return kernel_table(base, training=True, again=again, say=say)


def _machine(device_name: str, dtype_name: Any) -> dict[str, Any]:
    from softprompt.base import free_bytes
    from softprompt.base.cache import cache_folder
    from softprompt.base.device import resolve_device, resolve_dtype
    from softprompt.families import this_machine
    from softprompt.families.native import native_library
    from softprompt.training.plan import versions

    device, machine, folder = resolve_device(device_name), this_machine(), cache_folder()
    return {
        **versions(), "python": platform.python_version(), "processor": machine.processor,
        "instructions": machine.capability, "threads": machine.threads, "device": str(device),
        "dtype": str(resolve_dtype(dtype_name, device)).removeprefix("torch."),
        "free_memory": None if device.type == "mps" else free_bytes(device),
        "cache": None if folder is None else str(folder), "compiled_extension": native_library() is not None,
    }  # fmt: skip


def _cell(name: str, value: Any) -> str:
    if name == "free_memory":
        return "unknown" if value is None else f"{value / 2**30:.1f} GiB"
    if isinstance(value, bool):
        return "present" if value else "absent: torch computes the same"
    return "none" if value is None else str(value)


def _show(table: KernelTable) -> None:
    machine = table.machine
    where = f"{machine.processor}, {machine.capability}, torch {machine.torch}, {machine.threads} threads"
    if not table.choices:
        why = "--kernels is fixed" if table.kind == "fixed" else "the base is too small, or on no CPU"
        print_words(f"Nothing is measured ({why}): products follow fixed rules.")
        return
    rows = [[name, _by_rows(ways)] for name, ways in sorted(table.choices.items())]
    print_table(f"Fastest ways to multiply: {where}", ["product", "by rows"], rows)


def _by_rows(ways: Mapping[int, str]) -> str:
    """`1 onednn, 2-4 transposed`: neighbours that go one way together."""
    groups = [(way, [rows for rows, _ in pairs]) for way, pairs in groupby(ways.items(), key=lambda pair: pair[1])]
    return ", ".join(f"{rows[0]}{f'-{rows[-1]}' if len(rows) > 1 else ''} {way}" for way, rows in groups)
