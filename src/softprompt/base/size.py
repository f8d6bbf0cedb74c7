"""How large a base is by its config.json, judged before any memory is asked for.

Numbers that a config class counts up to are bounded first; then the model is built on torch's meta device, which takes
no memory, and its bytes are compared with the weight files and with the memory that is free.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import psutil
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from softprompt.base.free_memory import free_bytes
from softprompt.errors import BaseModelError, SoftpromptError

# What transformers makes lists of: one entry per layer, label, head or expert.
_COUNTED = re.compile(r"layer|label|head|expert|block|attention_types|depth|stage", re.IGNORECASE)
_MEASURED = re.compile(r"size|dim|embd|hidden|inner|position|ctx|seq_len|width|rank|state|vocab|d_model", re.IGNORECASE)
_MOST_COUNTED = 65_536
_MOST_MEASURED = 2**31 - 1
_LONGEST_BUILD_S = 20.0  # bases of 126 layers take less than one
_MOST_PARAMETERS_PER_BYTE = 16  # weights of half a bit are packed denser than any that are known


def check_numbers(settings: dict[str, Any], where: str) -> None:
    """Raises BaseModelError for a number in a config.json that no base can mean; `where` is the file."""
    for key, number in _numbers(settings, ""):
        most = _most(key)
        if most is not None and abs(number) > most:
            raise BaseModelError(f"{where}: {key} is {_short(number)}; more than {most:,} cannot be meant")


def check_size(
    config: PretrainedConfig, base: str, *, dtype: torch.dtype, device: torch.device | None, stored_bytes: int
) -> None:
    """Raises BaseModelError where the model of this config is larger than its weights or than the free memory.

    `device` is None where Accelerate spreads the base. What cannot be built on the meta device is not judged: loading
    it says why.
    """
    if getattr(config, "quantization_config", None) is not None:
        return  # the model as it is built is not the one that is loaded
    model = _build(config, base)
    if model is None:
        return
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if stored_bytes and num_parameters > _MOST_PARAMETERS_PER_BYTE * stored_bytes:
        raise BaseModelError(
            f"base {base!r}: its config.json describes {num_parameters:,} parameters, but its weight files have "
            f"{stored_bytes:,} bytes; they do not belong together"
        )
    needed = num_parameters * dtype.itemsize + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    free = None if device is None else _free(device)
    if free is not None and needed > free:
        raise BaseModelError(
            f"base {base!r} needs {_gigabytes(needed)} for {num_parameters:,} parameters in "
            f"{str(dtype).removeprefix('torch.')}, and {_gigabytes(free)} are free on {device}; "
            "take a smaller base or dtype, or free some memory"
        )


class _BuildTimeError(Exception):
    """The model has too many parts to be built in time."""


class _Deadline(TorchFunctionMode):
    """Ends the building of a model that goes on too long; each of its tensors is made by a torch function."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end = time.monotonic() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # Any: torch's
        if time.monotonic() > self._end:
            raise _BuildTimeError
        return func(*args, **(kwargs or {}))


def _build(config: PretrainedConfig, base: str) -> nn.Module | None:
    try:
        with torch.device("meta"), _Deadline(_LONGEST_BUILD_S):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
            return model
    except _BuildTimeError:
        _refuse_endless(config, base)
    except (SoftpromptError, MemoryError):
        raise
    except Exception:  # whatever it is, from_pretrained raises it again, and then it is passed on
        return None


def _refuse_endless(config: PretrainedConfig, base: str) -> NoReturn:
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    raise BaseModelError(
        f"base {base!r}: a model as its config.json describes it ({_short(num_layers)} layers) could not even be laid "
        f"out in {_LONGEST_BUILD_S:.0f} seconds; is config.json right?"
    ) from None


def _free(device: torch.device) -> int:
    swap = int(psutil.swap_memory().free) if device.type == "cpu" else 0
    return free_bytes(device) + swap


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int | float]]:
    """Every number with the nearest name above it."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def _most(key: str) -> int | None:
    if _COUNTED.search(key) and not re.search(r"dim|size", key):
        return _MOST_COUNTED
    return _MOST_MEASURED if _MEASURED.search(key) else None


def _short(number: Any) -> str:
    if isinstance(number, int):
        return f"{number:,}" if abs(number) < 10**18 else "a number of more than 18 digits"
    return str(number)[:40]


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
