"""Whether a base runs packed rows: its attention is given them, and they are compared with rows that run alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families.forward import Packing
from softprompt.families.patches import install_attention, remove_attention
from softprompt.families.probes import is_close

NOT_OURS = Packing(None, "rows run padded by length: this family's attention cannot be given packed rows")


def checked_packing(base: Base, note: str, alone: Callable[[], Tensor], packed: Callable[[Packing], Tensor]) -> Packing:
    """Let the base's attention compute packed rows if they have the results of rows run alone; on failure undo it.

    `note` describes the packing where it works.
    """
    if is_spread(base):
        return Packing(None, "rows run padded by length: the base is spread over devices")
    truth = alone()
    carrier = install_attention(base.model)
    if carrier is None:
        return NOT_OURS
    packing, failure = Packing(carrier, note), "its answers differ"
    try:
        if not torch.equal(alone(), truth):
            failure = "its plain answers changed"
        elif is_close(packed(packing), truth):
            return packing
    except Exception as error:  # whatever a model that nobody knew does with rows that it does not understand
        failure = f"{type(error).__name__}: {error}".split("\n")[0]
    remove_attention(base.model)
    return Packing(None, f"rows run padded by length: packed rows failed their check on this base ({failure})")


def is_spread(base: Base) -> bool:
    """Whether Accelerate has spread the base over devices."""
    return any(hasattr(module, "_hf_hook") for module in base.model.modules())
