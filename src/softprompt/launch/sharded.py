"""Split a big base over the ranks: each holds a part of every decoder layer, which come together as they run (FSDP2).

The choice and its options are those of Accelerate's configuration (`accelerate launch --use_fsdp --fsdp_version 2`). A
base is frozen, so there are no gradients to scatter, and the prompts and their optimiser stay whole on every rank.
Embeddings, final norm and head stay whole too: rows are spliced, and losses taken, outside of the model's own forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from softprompt.base import Base
from softprompt.errors import BaseModelError, ConfigError
from softprompt.families.checkpoint import decoder_layers
from softprompt.launch.accelerated import AcceleratedRanks
from softprompt.training import Ranks

if TYPE_CHECKING:
    from accelerate import FullyShardedDataParallelPlugin


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
