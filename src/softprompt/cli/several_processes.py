"""`--processes N` and launchers: one command in several processes that train together and speak with one voice."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from softprompt.config import BaseConfig
from softprompt.launch.processes import run_processes

if TYPE_CHECKING:
    from softprompt.base import Base
    from softprompt.training import Ranks


def in_processes(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--processes N`, and `ranks`: this process among those that a launcher or we have started."""

    @click.option("--processes", type=click.IntRange(min=1), help="Train in so many processes on this machine.")
    @functools.wraps(function)
    def command(processes: int | None, **flags: Any) -> None:
        if processes is not None and processes > 1:
            raise click.exceptions.Exit(run_processes(processes, sys.argv[1:]))
        from softprompt.launch.accelerated import one_voice, ranks_of_environment

        ranks = ranks_of_environment(flags["device"])
        with one_voice(ranks):
            function(ranks=ranks, **flags)

    return command


def load_among(config: BaseConfig, ranks: Ranks) -> Base:
    """The base on this rank's device, or its part of it where Accelerate's configuration shards it."""
    from softprompt.cli.console import load
    from softprompt.launch.accelerated import config_of_rank
    from softprompt.launch.sharded import shard_base

    base = load(config_of_rank(config, ranks))
    shard_base(base, ranks)
    return base
