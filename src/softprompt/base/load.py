"""Load a base from the Hub, a folder or a GGUF file, freeze it, and refuse what is not a language model.

Loading from the Hub goes through transformers and huggingface_hub (revision pinning, HF_TOKEN, HF_ENDPOINT, offline);
it is tested on folders and against an HTTP double, never yet on the real Hub.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from softprompt.base.architecture import (
    auto_class_of,
    embedding_scale_of,
    kind_of,
    kind_of_model,
    refuse_adapter,
    refuse_incomplete,
    refuse_other_architectures,
    without_new_pooler,
)
from softprompt.base.device import resolve_device, resolve_dtype
from softprompt.base.folder import (
    CONFIG_NAME,
    broken_weights,
    check_files,
    check_numbers,
    check_size,
    read_settings,
    weights_bytes,
)
from softprompt.base.generation import rules_of
from softprompt.base.gguf_model import read_gguf
from softprompt.base.model import Base
from softprompt.base.source import BaseSource, find_base
from softprompt.base.tokens import bos_ids_of, check_tokenizer, end_ids_of, eos_id_of, stop_ids_of
from softprompt.config import BaseConfig, Kernels
from softprompt.errors import BaseModelError, ConfigError, MissingDependencyError
from softprompt.guard import one_sentence
from softprompt.openmp import adapt_waiting_to_load
from softprompt.types import BaseKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

UNLIMITED_LENGTH = 2_048  # for families without a limit of their own (ALiBi), unless --max-length says otherwise
_LIMIT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")


def load_base(base: str | BaseConfig, **settings: Any) -> Base:
    """A frozen base from a Hub id, a folder, a GGUF file, `"embedded"`, `"smollm2"` or `"minilm"`.

    `settings` are the fields of BaseConfig. Raises BaseModelError for every error of transformers on the files, for a
    tokenizer that does not fit the model and for a model larger than the free memory; ConfigError for a dtype, device,
    device map or length that is not available; MissingDependencyError where a package that reads the base is not there.
    """
    config = base if isinstance(base, BaseConfig) else BaseConfig(base=base, **settings)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    spread = _device_map_options(config)
    with one_sentence(f"base {config.base!r} cannot be loaded"):
        source = find_base(config.base)
        read = _read_files if source.gguf is None else _read_gguf
        model, tokenizer, checkpoint = read(source, config, {**spread, "dtype": dtype}, None if spread else device)
        loaded = freeze_base(
            model if spread else _moved(model, device),
            tokenizer,
            name=source.name,
            folder=checkpoint,
            max_length=config.max_length,
            source=source.reload,
            kernels=config.kernels,
        )
    if loaded.rules.note is not None:
        _log.info("base %r: %s", loaded.name, loaded.rules.note)
    return loaded


def _read_gguf(
    source: BaseSource, config: BaseConfig, how: dict[str, Any], device: torch.device | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Model, tokenizer, and the file that the fingerprint may have to read again."""
    assert source.gguf is not None, source
    model, tokenizer = read_gguf(source.gguf, source.given, device=device, **how)
    return model, tokenizer, str(source.gguf)


def _read_files(
    source: BaseSource, config: BaseConfig, how: dict[str, Any], device: torch.device | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Model, tokenizer and folder of the checkpoint, of a folder or the Hub."""
    where: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": config.offline or source.folder is not None,
    }
    path = source.given if source.folder is None else str(source.folder)
    if config.offline:  # by its id, transformers would still ask the Hub whether an adapter lies beside the base
        path = _folder(path, **where)
    model, tokenizer = _read(path, where, how, source.given, device)
    return model, tokenizer, _folder(path, **{**where, "local_files_only": True})


def _read(
    source: str, where: dict[str, Any], how: dict[str, Any], base: str, device: torch.device | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; the files of each are checked before transformers builds it."""
    folder = Path(source) if Path(source).is_dir() else None
    if folder is not None:
        check_files(folder, base)
    subject = f"base {base!r} cannot be loaded"
    with one_sentence(f"{subject}: its config.json"):
        settings = folder or _folder(source, **where)
        check_numbers(read_settings(Path(settings), CONFIG_NAME, base), f"{subject}: config.json")
        config = AutoConfig.from_pretrained(source, **where)
        refuse_other_architectures(config, base)
    with one_sentence(f"{subject}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    with _naming_broken_weights(folder, base):
        stored_bytes = 0 if folder is None else weights_bytes(folder, base)
        check_size(config, base, dtype=how["dtype"], device=device, stored_bytes=stored_bytes)
        options = {**where, **how, "output_loading_info": True}
        with _without_report(kind_of(config)):
            loaded: Any = auto_class_of(config).from_pretrained(source, **options)  # Any: annotated as the model alone
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    refuse_incomplete(info, base)
    without_new_pooler(model, info)
    refuse_adapter(model, base)
    return model, tokenizer


@contextmanager
def _without_report(kind: BaseKind) -> Iterator[None]:
    """Without transformers' table of what an encoder's checkpoint has besides, another task's head, or lacks, a pooler.

    Weights that it should not lack are refused.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    if kind == "encoder":
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _moved(model: Any, device: torch.device) -> PreTrainedModel:  # Any: `to` of transformers is annotated wrongly
    moved: PreTrainedModel = model.to(device)
    return moved


@contextmanager
def _naming_broken_weights(folder: Path | None, base: str) -> Iterator[None]:
    """Replace an error that a broken weight file caused by one that names the file."""
    try:
        with one_sentence(f"base {base!r} cannot be loaded"):
            yield
    except BaseModelError as error:
        problem = None if folder is None else broken_weights(folder, base)
        if problem is None:
            raise
        raise BaseModelError(f"base {base!r} cannot be loaded: {problem}") from error


def freeze_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "base",
    folder: str | None = None,
    max_length: int | None = None,
    source: str | None = None,
    kernels: Kernels = "measured",
) -> Base:
    """A Base from a model already in memory: eval mode, every parameter frozen. The model is not copied.

    `source` is the Hub id or path that adapters record as their base; without one, `name`. `kernels`: as in
    BaseConfig.

    Raises BaseModelError where its input embeddings are not an embedding table or the tokenizer does not fit them.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        kind = type(embedding).__name__
        raise BaseModelError(f"base {name!r}: its input embeddings are a {kind}, not a table; it cannot take a prompt")
    check_tokenizer(tokenizer, name, embedding.num_embeddings)
    adapt_waiting_to_load()
    model.eval()
    model.requires_grad_(False)
    kind = kind_of_model(model)
    return Base(
        kind=kind,
        model=model,
        tokenizer=tokenizer,
        name=name,
        folder=folder,
        max_length=_max_length(model, max_length, name),
        bos_ids=bos_ids_of(tokenizer),
        end_ids=() if kind == "causal" else end_ids_of(tokenizer),
        embedding_scale=embedding_scale_of(model),
        eos_id=eos_id_of(tokenizer),
        stop_ids=stop_ids_of(model, tokenizer, name),
        source=source,
        kernels=kernels,
        rules=rules_of(getattr(model, "generation_config", None), name, embedding.num_embeddings),
    )


def _device_map_options(config: BaseConfig) -> dict[str, Any]:  # Any: loading options
    """Options that make transformers spread the base with Accelerate; none for a base on one device."""
    if config.device_map is None:
        return {}
    if config.device != "auto":
        raise ConfigError(
            f"device_map {config.device_map!r} spreads the base over all devices, but device is {config.device!r}; "
            "give one of the two"
        )
    if find_spec("accelerate") is None:
        raise MissingDependencyError("device_map needs accelerate; pip install 'softprompt[distributed]'")
    return {"device_map": config.device_map}


def _folder(
    source: str,
    *,
    revision: str | None,
    local_files_only: bool = True,
    **_: Any,  # Any: the other loading options
) -> str:
    """The folder of the checkpoint: itself, or the Hub's snapshot in the cache; config.json is fetched if needed."""
    if Path(source).is_dir():
        return source
    config_file = cached_file(source, CONFIG_NAME, revision=revision, local_files_only=local_files_only)
    assert config_file is not None  # cached_file raises OSError where there is none
    return str(Path(config_file).parent)


def _max_length(model: PreTrainedModel, wanted: int | None, name: str) -> int:
    limit = None if _positions_are_relative(model.config) else _own_limit(model.config)
    if limit is not None:
        limit -= _positions_before_first(model)
    if wanted is not None and (wanted < 2 or (limit is not None and wanted > limit)):
        raise ConfigError(f"max_length is {wanted}; base {name!r} has {limit or 'no fixed number of'} positions")
    return wanted or limit or UNLIMITED_LENGTH


def _positions_are_relative(config: PretrainedConfig) -> bool:
    """ALiBi: Bloom always, Falcon by a switch. MPT's is a table that transformers builds for max_seq_len positions.

    T5's buckets of distances.
    """
    has_buckets = config.is_encoder_decoder and getattr(config, "relative_attention_num_buckets", None) is not None
    return config.model_type == "bloom" or bool(getattr(config, "alibi", False)) or has_buckets


def _positions_before_first(model: PreTrainedModel) -> int:
    """RoBERTa's position table begins after the pad's id; earlier entries are used for pads only."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _own_limit(config: PretrainedConfig) -> int | None:
    text = config.get_text_config()
    limits = [getattr(text, field, None) for field in _LIMIT_FIELDS]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def describe(base: Base) -> str:
    """One line: name, size, dtype, device, positions."""
    dtype = str(base.dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if base.device.type == "cpu" else ""
    head = "; no head for masked words" if base.kind == "encoder" and base.mask_id is None else ""
    return (
        f"{base.name}: {base.model.config.model_type}, {base.num_parameters:,} parameters, all frozen; "
        f"{dtype} on {_device_names(base)}{threads}; {base.max_length:,} positions{head}"
    )


def _device_names(base: Base) -> str:
    """Its device, or all devices that it is spread over; a number is a GPU."""
    spread: dict[str, Any] = getattr(base.model, "hf_device_map", None) or {}
    names = dict.fromkeys(f"cuda:{device}" if isinstance(device, int) else str(device) for device in spread.values())
    return ", ".join(names) or str(base.device)


def trainable_line(base: Base, num_virtual_tokens: int, num_head_parameters: int = 0) -> str:
    """The notebook's line, counted as PEFT counts it (prompt and head are among all parameters)."""
    trainable = num_virtual_tokens * base.hidden_size + num_head_parameters
    total = base.num_parameters + trainable
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
