"""The ranks of a run over Accelerate: who this process is, its device, how sums are made, who prints, and a split base.

Which rows are whose, and what is summed, is the training room's business. Accelerate is optional and is imported only
where a launcher started more than one process.

A big base may be split over the ranks: each holds a part of every decoder layer, which come together as they run
(FSDP2). The choice and its options are those of Accelerate's configuration (`accelerate launch --use_fsdp
--fsdp_version 2`). A base is frozen, so there are no gradients to scatter, and the prompts and their optimiser stay
whole on every rank. Embeddings, final norm and head stay whole too: rows are spliced, and losses taken, outside of the
model's own forward.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from softprompt.base import Base
from softprompt.base.device import resolve_dtype
from softprompt.config import BaseConfig
from softprompt.errors import BaseModelError, ConfigError, MissingDependencyError, RankError
from softprompt.families import decoder_layers
from softprompt.launch.processes import (
    PEERS_LEFT,
    RENDEZVOUS,
    local_rank,
    local_world_size,
    rank,
    wants_cpu,
    wants_fsdp,
    world_size,
)
from softprompt.training import Alone, Ranks

if TYPE_CHECKING:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin


_LONGEST_WAIT = timedelta(hours=2)  # of a rank for the slowest one


class AcceleratedRanks:
    """`Ranks` over an Accelerator: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.in_step = wants_fsdp()  # the base is to be split, by `shard_base`

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def num_on_this_machine(self) -> int:
        return local_world_size()

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        found = torch.device(self.accelerator.device)
        return torch.device("cpu") if found.type == "cpu" else found

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, in one collective of the widest dtype among them.

        A ring adds each number on one rank and passes the result round, so all ranks have the same bits.

        Raises RankError where another rank has ended.
        """
        if not tensors or self.count == 1:
            return
        wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        flat = torch.cat([tensor.detach().flatten().to(self.device, wide) for tensor in tensors])
        try:
            torch.distributed.all_reduce(flat)
        except RuntimeError as error:
            raise RankError(f"another process of this run has ended early: {str(error).splitlines()[0]}") from error
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))


def ranks_of_environment(device: str = "auto") -> Ranks:
    """The ranks that a launcher started, meeting them; `Alone` where there is but this process.

    `device` is the base's: auto, cpu or cuda. Raises ConfigError where it cannot be had by each rank, and
    MissingDependencyError without accelerate.
    """
    if world_size() == 1:
        return Alone()
    require_accelerate()
    from accelerate import Accelerator

    on_cpu = _on_cpu(device)
    _meet(on_cpu)
    if on_cpu:
        _share_threads()
    return AcceleratedRanks(Accelerator(cpu=on_cpu))


def config_of_rank(config: BaseConfig, ranks: Ranks) -> BaseConfig:
    """The settings to load the base with on this rank: its own device, the dtype of that device.

    A base that is to be split is loaded on the CPU first, by every rank. Raises ConfigError for a device map.
    """
    if not isinstance(ranks, AcceleratedRanks):
        return config
    if config.device_map is not None:
        raise ConfigError(
            f"device_map {config.device_map!r} spreads one process over all devices, but {ranks.count} processes were "
            "started; use one process, or no device_map"
        )
    if not ranks.in_step:
        return replace(config, device=str(ranks.device))
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # with it transformers loads nothing on other ranks
    dtype = str(resolve_dtype(config.dtype, ranks.device)).removeprefix("torch.")
    return replace(config, device="cpu", dtype=dtype)  # type: ignore[arg-type]  # one of Dtype's, resolved


@contextmanager
def one_voice(ranks: Ranks) -> Iterator[None]:
    """Inside it only the first rank prints and gets Ctrl-C; afterwards the process group is closed.

    A rank whose peers have ended exits with the code `PEERS_LEFT`; the one that failed reports the error.
    """
    if ranks.count == 1:
        yield
        return
    try:
        with _silence() if ranks.rank > 0 else nullcontext():
            yield
            ranks.sum([torch.zeros(1)])  # the others stay until the first has written all
    except RankError:
        raise SystemExit(PEERS_LEFT) from None
    finally:
        part()


def part() -> None:
    """Leave the other ranks; nothing where there are none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def require_accelerate() -> None:
    """Raises MissingDependencyError without it."""
    if find_spec("accelerate") is None:
        raise MissingDependencyError("several processes need accelerate; pip install 'softprompt[distributed]'")


@contextmanager
def _silence() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def _on_cpu(device: str) -> bool:
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or index:
        raise ConfigError(
            f"device is {device!r}, but {world_size()} processes take a device each; use auto, cpu or "
            "cuda, or one process"
        )
    if kind == "cpu" or wants_cpu() or (kind == "auto" and not torch.cuda.is_available()):
        return True
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"{local_world_size()} processes were started, but this machine has "
            f"{torch.cuda.device_count()} CUDA device(s); start as many, or use device cpu"
        )
    return False


def _meet(on_cpu: bool) -> None:
    """Join the other processes: through our launcher's file, else as the environment says (`env://`)."""
    file = os.environ.get(RENDEZVOUS)
    if not on_cpu:
        torch.cuda.set_device(local_rank())
    try:
        torch.distributed.init_process_group(
            "gloo" if on_cpu else "nccl",
            init_method=f"file://{file}" if file else "env://",
            rank=rank(),
            world_size=world_size(),
            timeout=_LONGEST_WAIT,
        )
    except ValueError as error:  # a variable that is not there
        raise ConfigError(
            f"WORLD_SIZE is {world_size()}, but this was not started by a launcher ({error}); unset it, "
            "or use --processes or accelerate launch"
        ) from error


def _share_threads() -> None:
    """Between the processes of this machine, unless the user has."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // local_world_size(), 1))


def shard_base(base: Base, ranks: Ranks) -> None:
    """Split the decoder layers of a base on the CPU over the ranks, where Accelerate's configuration asks for it.

    Raises ConfigError for FSDP of version 1, and BaseModelError where no decoder layers are found.
    """
    if not isinstance(ranks, AcceleratedRanks) or not ranks.in_step:
        return
    plugin = _plugin(ranks)
    layers = decoder_layers(base.model)
    if not layers:
        raise BaseModelError(f"base {base.name!r} cannot be split by FSDP: its decoder layers are in no list of theirs")
    _remember_what_needs_all_weights(base)
    _shard(layers, plugin, ranks)
    _move_the_rest(base.model, ranks.device)


def _plugin(ranks: AcceleratedRanks) -> FullyShardedDataParallelPlugin:
    from accelerate import FullyShardedDataParallelPlugin

    found = getattr(ranks.accelerator.state, "fsdp_plugin", None)  # Accelerate leaves it out on CPUs
    plugin: FullyShardedDataParallelPlugin = found or FullyShardedDataParallelPlugin()
    version = getattr(plugin, "fsdp_version", 1)  # an older Accelerate knows no other
    if version != 2:
        raise ConfigError(
            f"Accelerate is configured for FSDP of version {version}; set fsdp_version 2 "
            "(accelerate launch --use_fsdp --fsdp_version 2)"
        )
    return plugin


def _remember_what_needs_all_weights(base: Base) -> None:
    assert base.fingerprint
    assert base.embedding_rms


def _shard(layers: list[nn.Module], plugin: FullyShardedDataParallelPlugin, ranks: AcceleratedRanks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for layer in layers:
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=bool(plugin.reshard_after_forward),
            offload_policy=plugin.cpu_offload,
        )


def _move_the_rest(model: nn.Module, device: torch.device) -> None:
    """Whatever is whole goes to this rank's device; the parts are there."""
    from torch.distributed.tensor import DTensor

    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
