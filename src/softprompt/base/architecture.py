"""What kind of model a base is, the class of transformers that loads it, and the models that cannot be a base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from softprompt.errors import BaseModelError
from softprompt.types import BaseKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_XLM = ("XLMWithLMHeadModel", "FlaubertWithLMHeadModel")  # masked language models unless `config.causal` is set
_WITH_MASKED_LM_HEAD = ("ForMaskedLM", "ForPreTraining", *_OF_XLM)
_NO_MASKED_LM_HEAD = ("ElectraForPreTraining",)  # the discriminator
_POOLER = "pooler."  # weights that a checkpoint of a masked language model lacks, and the encoder can do without


def kind_of(config: PretrainedConfig) -> BaseKind:
    """What kind of base a model with this configuration is.

    A family that masks words (BERT's) is an encoder unless its checkpoint is a decoder of that family.
    """
    if config.is_encoder_decoder:
        return "seq2seq"
    is_of_encoders = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    kinds = tuple(config.architectures or ())
    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    is_causal = is_decoder or any(map(_is_causal_class, kinds))
    return "encoder" if is_of_encoders and not is_causal else "causal"


def _is_causal_class(kind: str) -> bool:
    return kind.endswith(("ForCausalLM", "LMHeadModel")) and kind not in _OF_XLM


def kind_of_model(model: PreTrainedModel) -> BaseKind:
    """The same of a model in memory, whose class says whether it is causal."""
    is_causal = _is_causal_class(type(model).__name__) and not model.config.is_encoder_decoder
    return "causal" if is_causal else kind_of(model.config)


def embedding_scale_of(model: PreTrainedModel) -> float:
    """What an encoder multiplies the embeddings of its token ids by; 1.0 where their table does, or nothing.

    Embeddings that are given to it as such are not multiplied (Pegasus, Marian).
    """
    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    scale = getattr(encoder, "embed_scale", None)
    return float(scale) if isinstance(scale, int | float) and kind_of_model(model) == "seq2seq" else 1.0


def auto_class_of(config: PretrainedConfig) -> Any:  # Any: one of transformers' Auto classes
    """The class that loads the base. An encoder whose checkpoint has no head for masked words is loaded without one."""
    kind = kind_of(config)
    if kind != "encoder":
        return AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM
    kinds = tuple(config.architectures or ())
    has_head = any(each.endswith(_WITH_MASKED_LM_HEAD) and each not in _NO_MASKED_LM_HEAD for each in kinds)
    return AutoModelForMaskedLM if has_head else AutoModel


def refuse_other_architectures(config: PretrainedConfig, base: str) -> None:
    """Raises BaseModelError for encoder-decoders of other things than text, and for encoders of none."""
    kinds = tuple(config.architectures or ())
    if config.is_encoder_decoder and config.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise BaseModelError(
            f"base {base!r} is an encoder-decoder model ({config.model_type}) that is no language model of text to "
            "text; give one such as T5 or BART"
        )
    if kind_of(config) == "causal" and any(kind.endswith("ForMaskedLM") for kind in kinds):
        raise BaseModelError(
            f"base {base!r} is a masked language model ({', '.join(kinds)}) of a family that cannot be used; give a "
            "BERT-like encoder that transformers has a masked language model for"
        )


def refuse_incomplete(info: dict[str, Any], base: str) -> None:
    """`info` is transformers' loading report. Raises BaseModelError where weights are missing."""
    missing = sorted(name for name in info.get("missing_keys") or () if not is_of_pooler(name))
    if missing:
        raise BaseModelError(
            f"base {base!r}: its checkpoint lacks {len(missing)} of the model's weights, {missing[0]!r} first; "
            "it was saved for another architecture"
        )


def is_of_pooler(name: str) -> bool:
    """Whether a weight belongs to the pooler of an encoder."""
    return name.startswith(_POOLER) or f".{_POOLER}" in name


def without_new_pooler(model: Any, info: dict[str, Any]) -> None:  # Any: a PreTrainedModel with or without a pooler
    """Take off the pooler whose weights are not in the checkpoint: they would be random, and other ones each time."""
    if any(is_of_pooler(name) for name in info.get("missing_keys") or ()):
        model.base_model.pooler = None


def refuse_adapter(model: PreTrainedModel, base: str) -> None:
    """transformers loads an adapter beside a config; the base would then not be the bare base."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BaseModelError(
            f"base {base!r} has an adapter_config.json beside its weights, so it would load with that adapter; "
            "give the bare base, or merge the adapter into it first"
        )
