"""A GGUF file becomes a plain model: read by transformers, unpacked into the dtype, nothing of the format left.

transformers parses the header three times and builds its table of names once for each module of the model; while it
reads, both are remembered, which changes no value (docs/decisions/2026-11-29-gguf.md has the times). It is given an
empty folder beside the file: a tokenizer or an adapter that lies next to a GGUF file belongs to another model.
"""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from softprompt.base.architecture import auto_class_of, refuse_incomplete, refuse_other_architectures
from softprompt.base.folder import check_memory, check_numbers, check_size
from softprompt.base.gguf_header import GgufHeader, read_header
from softprompt.base.source import INSTALL_GGUF
from softprompt.errors import BaseModelError, MissingDependencyError
from softprompt.guard import cause_of, one_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_substituting = threading.Lock()
_WHILE_UNPACKING = 2 * 4  # bytes for each value of the tensor that is being unpacked: float32, twice


def read_gguf(
    file: Path, base: str, *, dtype: torch.dtype, device: torch.device | None, **spread: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:  # Any: options of from_pretrained
    """Model in plain `dtype` weights, and its tokenizer with the file's chat template.

    `device` is None where Accelerate spreads the base by the options `spread`. Raises BaseModelError for a file that
    cannot be read or does not fit into memory, MissingDependencyError without gguf and accelerate.
    """
    _require_packages(base)
    header = read_header(file, base)
    _check_header(header, file, base)
    read_in = torch.float32 if _is_unpacked_in_dtype(header.architecture) else dtype
    check_memory(header.num_values, base, dtype=read_in, device=device, extra_bytes=_WHILE_UNPACKING * header.largest)
    with tempfile.TemporaryDirectory() as empty, _remembering():
        where: dict[str, Any] = {"gguf_file": str(file.absolute()), "local_files_only": True}
        config = _read_config(empty, where, header, base)
        with one_sentence(f"base {base!r} cannot be loaded: its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(empty, **where)
        check_size(config, base, dtype=read_in, device=device, stored_bytes=file.stat().st_size)
        options = {**where, **spread, **_dense(), "dtype": read_in, "config": config, "output_loading_info": True}
        loaded: Any = auto_class_of(config).from_pretrained(empty, **options)  # Any: annotated as the model alone
    refuse_incomplete(loaded[1], base)
    model: Any = _as_plain(loaded[0], file)  # Any: `to` of transformers is annotated wrongly
    tokenizer.name_or_path = str(file.absolute())
    return model.to(dtype), tokenizer


def gguf_values(file: Path) -> dict[str, torch.Tensor]:
    """Every parameter of the file in float32, by its name in the model: all of it in memory."""
    model, _ = read_gguf(file, file.name, dtype=torch.float32, device=torch.device("cpu"))
    return dict(model.named_parameters())


def _require_packages(base: str) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"base {base!r} is a GGUF file; reading it needs {' and '.join(missing)}: "
                                     f"{INSTALL_GGUF}")  # fmt: skip


def _check_header(header: GgufHeader, file: Path, base: str) -> None:
    subject = f"base {base!r} cannot be loaded: {file}"
    kind, num_parts = header.fields.get("general.type", "model"), header.fields.get("split.count", 1)
    if kind != "model":
        raise BaseModelError(f"{subject} holds no model (its general.type is {kind!r}); give the model's own file")
    if num_parts != 1:
        raise BaseModelError(
            f"{subject} is one of {num_parts} parts, and transformers reads whole files; join them with "
            "llama-gguf-split --merge"
        )
    check_numbers(header.fields, subject)


def _read_config(empty: str, where: dict[str, Any], header: GgufHeader, base: str) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(empty, **where)
    except Exception as error:
        raise BaseModelError(
            f"base {base!r} cannot be loaded: transformers {transformers.__version__} cannot read a GGUF file of "
            f"architecture {header.architecture[:40]!r} ({cause_of(error)}); give the model's folder in Hugging Face "
            "form, or update transformers"
        ) from error
    refuse_other_architectures(config, base)
    return config


def _dense() -> dict[str, Any]:
    """Options that unpack every weight also where a kernel for packed ones is installed."""
    config = getattr(transformers, "GgufConfig", None)  # since transformers 5.23
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _is_unpacked_in_dtype(architecture: str) -> bool:
    """Whether transformers unpacks this architecture's blocks in the arithmetic of the dtype that it loads.

    A bfloat16 weight is then not the float32 weight rounded once, so such a file is read in float32.
    """
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:
        return False
    return architecture in GGUF_ARCHS


def _as_plain(model: PreTrainedModel, file: Path) -> PreTrainedModel:
    """Without the traces of the format, over which saving and PEFT would trip."""
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    setattr(model, "is_quantized", False)  # noqa: B010  # torch annotates what a module may be assigned
    model.name_or_path = model.config.name_or_path = str(file.absolute())
    return model


@contextmanager
def _remembering() -> Iterator[None]:
    """While transformers reads one file: its header parsed once, its table of names built once, no progress bar."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    substitutes: tuple[tuple[Any, str, Any], ...] = (
        (gguf, "GGUFReader", functools.lru_cache(_quick_reader(gguf.GGUFReader))),
        (gguf, "get_tensor_name_map", functools.lru_cache(gguf.get_tensor_name_map)),
        (reading, "tqdm", lambda items, **_: items),
    )
    with _substituting:
        before = [getattr(owner, name) for owner, name, _ in substitutes]
        for owner, name, substitute in substitutes:
            setattr(owner, name, substitute)
        try:
            yield
        finally:
            for (owner, name, _), own in zip(substitutes, before, strict=True):
                setattr(owner, name, own)


def _quick_reader(reader: Any) -> Any:  # Any: the class GGUFReader of gguf
    """The same reader over a plain array: the header is some 250,000 slices, and those of np.memmap cost twice."""

    class QuickReader(reader):  # type: ignore[misc]  # a class of an untyped package
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    return QuickReader
