"""A hash of what a base computes, independent of how it was loaded.

Hashed: the model type, the number of heads, and for every parameter its name, shape and 64 evenly spaced values rounded
to bfloat16; the tokenizer's vocabulary, merges and special ids. Values come from memory where the loaded dtype rounds
to bfloat16 like the checkpoint does (float32, float64, bfloat16), else from the checkpoint (float16: rounding twice
is not rounding once). Of a GGUF file they are those of its weights unpacked in float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from softprompt.base.gguf_model import gguf_values

_SAMPLES_PER_PARAMETER = 64
_ROUNDS_ALIKE = (torch.float32, torch.float64, torch.bfloat16)
_FORMER_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_SHAPE_FIELDS = ("num_attention_heads", "num_key_value_heads")


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | None) -> str:
    """64 hexadecimal digits; equal for .bin and safetensors, every dtype and device."""
    digest = hashlib.sha256()
    digest.update(_canonical({"model_type": model.config.model_type, **_shape_fields(model)}))
    for name, shape, sample in sorted(_samples(model, folder)):
        digest.update(_canonical([name, shape, sample]))
    digest.update(_canonical(_tokenizer_summary(tokenizer)))
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:  # Any: whatever JSON holds
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _shape_fields(model: PreTrainedModel) -> dict[str, int | None]:
    text = model.config.get_text_config()
    return {field: getattr(text, field, None) for field in _SHAPE_FIELDS}


def _samples(model: PreTrainedModel, folder: str | None) -> Iterator[tuple[str, list[int], list[float]]]:
    stored = _StoredTensors(folder, model.base_model_prefix)
    for name, parameter in model.named_parameters():  # a tied parameter comes once
        short = _short_name(name, model.base_model_prefix)
        is_at_hand = parameter.dtype in _ROUNDS_ALIKE and not parameter.is_meta  # meta: offloaded by Accelerate
        source = parameter if is_at_hand else stored.find(short, parameter)
        yield short, list(parameter.shape), _sample(source)


def _short_name(name: str, prefix: str) -> str:
    """A parameter's name without the backbone's, and as it is called today: older checkpoints of BERT have others."""
    for former, today in _FORMER_NAMES.items():
        if name.endswith(former):
            name = name.removesuffix(former) + today
    return name.removeprefix(f"{prefix}.")


def _sample(tensor: Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    count = min(_SAMPLES_PER_PARAMETER, flat.numel())
    where = torch.linspace(0, max(flat.numel() - 1, 0), count, dtype=torch.float64).round().long()
    values: list[float] = flat[where.to(flat.device)].cpu().to(torch.bfloat16).float().tolist()
    return [round(value, 12) + 0.0 for value in values]  # + 0.0: -0.0 and 0.0 are one


class _StoredTensors:
    """The tensors of a checkpoint folder by their short names, read one at a time; those of a GGUF file all at once."""

    def __init__(self, folder: str | None, prefix: str) -> None:
        self._prefix = prefix
        root = Path(folder) if folder is not None else Path()
        self._gguf = root if folder is not None and root.is_file() else None
        found = sorted(root.glob("*.safetensors")) or sorted(root.glob("pytorch_model*.bin"))
        self._files = found if folder is not None else []

    @cached_property
    def _unpacked(self) -> dict[str, Tensor]:
        values = {} if self._gguf is None else gguf_values(self._gguf)
        return {_short_name(name, self._prefix): value for name, value in values.items()}

    def find(self, short: str, otherwise: Tensor) -> Tensor:
        if self._gguf is not None:
            return self._unpacked[short]
        for file in self._files:
            value = (_in_safetensors if file.suffix == ".safetensors" else _in_bin)(file, short, self._prefix)
            if value is not None:
                return value
        return otherwise


def _in_safetensors(file: Path, short: str, prefix: str) -> Tensor | None:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a mapping
            if _short_name(name, prefix) == short:
                value: Tensor = tensors.get_tensor(name)
                return value
    return None


def _in_bin(file: Path, short: str, prefix: str) -> Tensor | None:
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return next((value for name, value in tensors.items() if _short_name(name, prefix) == short), None)


def _tokenizer_summary(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    special = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk")}
    return {"vocabulary": vocabulary, "merges": _merges(tokenizer), "special": special}


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    return [" ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges") or ()]
