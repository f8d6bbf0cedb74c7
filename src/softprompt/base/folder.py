"""The files of a base's folder, checked before transformers reads them, and named when it cannot.

Only small parts are read: sizes, the JSON of settings, the heads of weight files. Nothing is run. Numbers in
config.json that a config class counts up to are bounded first; then the model is built on torch's meta device, which
takes no memory, and its bytes are compared with the weight files and with the free memory.
"""

from __future__ import annotations

import json
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from safetensors import safe_open
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from softprompt.base.architecture import auto_class_of
from softprompt.base.device import free_bytes
from softprompt.errors import BaseModelError, SoftpromptError
from softprompt.guard import cause_of, is_nested_deeper, lfs_pointer_problem

CONFIG_NAME = "config.json"
_SETTINGS = (CONFIG_NAME, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_VOCABULARIES = ("tokenizer.json", "added_tokens.json", "vocab.json")
_OTHER_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "merges.txt", "vocab.txt")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("model.safetensors", _INDEXES[0], "pytorch_model.bin", _INDEXES[1])  # as transformers prefers them
_MAX_BYTES = {
    **dict.fromkeys(_SETTINGS, 16 * 2**20),  # a tokenizer's settings list its added tokens: megabytes, not more
    **dict.fromkeys(_VOCABULARIES, 512 * 2**20),
    **dict.fromkeys(_INDEXES, 64 * 2**20),
}
_DEEPEST = 64  # levels of lists and objects in settings


def check_files(folder: Path, base: str) -> None:
    """Raises BaseModelError for a file that is no JSON object, too large, too deep, empty, or a Git LFS pointer."""
    for name in (*_SETTINGS, *_VOCABULARIES, *_OTHER_TOKENIZER_FILES):
        _refuse_pointer(folder / name, base)
    for name, most in _MAX_BYTES.items():
        _check_size(folder / name, most, base)
    for name in _SETTINGS:
        read_settings(folder, name, base)
    for file in weight_files(folder, base):
        _refuse_pointer(file, base)
        if file.is_file() and file.stat().st_size == 0:
            raise BaseModelError(f"base {base!r} cannot be loaded: {file} is empty; copy or download it again")


def read_settings(folder: Path, name: str, base: str) -> dict[str, Any]:  # Any: whatever JSON holds
    """The JSON object in one of the folder's small files; empty where the file is not there. Raises BaseModelError."""
    file = folder / name
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(
            f"base {base!r} cannot be loaded: {file} cannot be read ({cause_of(error)}); copy it again"
        ) from error
    if not isinstance(value, dict):
        raise BaseModelError(
            f"base {base!r} cannot be loaded: {file} holds a JSON {type(value).__name__}; it must be an object"
        )
    if is_nested_deeper(value, _DEEPEST):
        raise BaseModelError(
            f"base {base!r} cannot be loaded: {file} is nested deeper than {_DEEPEST} levels; copy it again"
        )
    return value


def weight_files(folder: Path, base: str) -> list[Path]:
    """The files that transformers would read the weights from; none where the folder has none by the usual names."""
    for name in _WEIGHTS:
        if not (folder / name).is_file():
            continue
        if name not in _INDEXES:
            return [folder / name]
        _refuse_pointer(folder / name, base)
        shards = read_settings(folder, name, base).get("weight_map")
        return [folder / shard for shard in sorted(_texts(shards)) if Path(shard).name == shard]
    return []


def weights_bytes(folder: Path, base: str) -> int:
    """The size of its weight files, 0 where there are none by the usual names."""
    return sum(file.stat().st_size for file in weight_files(folder, base) if file.is_file())


def broken_weights(folder: Path, base: str) -> str | None:
    """Which of the weight files cannot be opened, and why; None where all can. For a base that did not load."""
    for file in weight_files(folder, base):
        if not file.is_file():
            return f"{file} is not there; copy it too"
        try:
            _open_weights(file)
        except BaseException as error:  # a Rust panic too
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{file} is cut off or damaged ({cause_of(error)}); copy or download it again"
    return None


def _open_weights(file: Path) -> None:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):
            return
    if not zipfile.is_zipfile(file):
        torch.load(file, map_location="cpu", weights_only=True)  # of torch before 1.6, or broken
    else:
        torch.load(file, map_location="meta", weights_only=True)


def _refuse_pointer(file: Path, base: str) -> None:
    problem = lfs_pointer_problem(file)
    if problem is not None:
        raise BaseModelError(f"base {base!r} cannot be loaded: {problem}")


def _check_size(file: Path, most: int, base: str) -> None:
    try:
        size = file.stat().st_size
    except OSError:  # missing, or unreadable, which its reader reports
        return
    if file.is_file() and size > most:
        raise BaseModelError(
            f"base {base!r} cannot be loaded: {file} has {size:,} bytes; the limit is {most:,}: is it the right file?"
        )
    if file.is_file() and size == 0:
        raise BaseModelError(f"base {base!r} cannot be loaded: {file} is empty; copy or download it again")


def _texts(value: Any) -> set[str]:
    return {item for item in value.values() if isinstance(item, str)} if isinstance(value, dict) else set()


# Numbers that transformers makes lists of: one entry per layer, label, head or expert.
_COUNTED = re.compile(r"layer|label|head|expert|block|attention_types|depth|stage", re.IGNORECASE)
_MEASURED = re.compile(r"size|dim|embd|hidden|inner|position|ctx|seq_len|width|rank|state|vocab|d_model", re.IGNORECASE)
_MOST_COUNTED = 65_536
_MOST_MEASURED = 2**31 - 1
LONGEST_BUILD_S = 20.0  # bases of 126 layers need less than one
_MOST_PARAMETERS_PER_BYTE = 16  # weights of half a bit are packed denser than any that are known


def check_numbers(settings: dict[str, Any], where: str) -> None:
    """Raises BaseModelError for a number in a config.json that no base can have; `where` is the file."""
    for key, number in _numbers(settings, ""):
        most = _most(key)
        if most is not None and abs(number) > most:
            raise BaseModelError(f"{where}: {key} is {_short(number)}; more than {most:,} cannot be right")


def check_size(
    config: PretrainedConfig, base: str, *, dtype: torch.dtype, device: torch.device | None, stored_bytes: int
) -> None:
    """Raises BaseModelError where the model of this config is larger than its weights or than the free memory.

    `device` is None where Accelerate spreads the base. A model that cannot be built on the meta device is not checked:
    loading it reports the reason.
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
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    check_memory(num_parameters, base, dtype=dtype, device=device, extra_bytes=buffers)


def check_memory(
    num_parameters: int, base: str, *, dtype: torch.dtype, device: torch.device | None, extra_bytes: int
) -> None:
    """Raises BaseModelError where so many parameters and the extra bytes are more than the free memory."""
    needed = num_parameters * dtype.itemsize + extra_bytes
    free = None if device is None else _free(device)
    if free is not None and needed > free:
        raise BaseModelError(
            f"base {base!r} needs {_gigabytes(needed)} for {num_parameters:,} parameters in "
            f"{str(dtype).removeprefix('torch.')}, and {_gigabytes(free)} are free on {device}; "
            "use a smaller base or dtype, or free some memory"
        )


class _BuildTimeError(Exception):
    """The model has too many parts to be built in time."""


class _Deadline(TorchFunctionMode):
    """Stops building a model after so many seconds; each of its tensors is made by a torch function."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end = time.monotonic() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # Any: torch's
        if time.monotonic() > self._end:
            raise _BuildTimeError
        return func(*args, **(kwargs or {}))


def _build(config: PretrainedConfig, base: str) -> nn.Module | None:
    try:
        with torch.device("meta"), _Deadline(LONGEST_BUILD_S):
            model: nn.Module = auto_class_of(config).from_config(config)
            return model
    except _BuildTimeError:
        _refuse_endless(config, base)
    except (SoftpromptError, MemoryError):
        raise
    except Exception:  # from_pretrained raises it again, and that error is reported
        return None


def _refuse_endless(config: PretrainedConfig, base: str) -> NoReturn:
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    raise BaseModelError(
        f"base {base!r}: a model as its config.json describes it ({_short(num_layers)} layers) could not even be laid "
        f"out in {LONGEST_BUILD_S:.0f} seconds; is config.json right?"
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
