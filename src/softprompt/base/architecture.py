"""Models that cannot be a base: other architectures, incomplete checkpoints, bases that come with an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from softprompt.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BIDIRECTIONAL = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification")


def refuse_other_architectures(config: PretrainedConfig, base: str) -> None:
    """Raises BaseModelError for encoder-decoder and BERT-like models."""
    kinds = tuple(config.architectures or ())
    if config.is_encoder_decoder:
        raise BaseModelError(
            f"base {base!r} is an encoder-decoder model ({config.model_type}); only decoder-only causal language "
            "models can be used so far, encoder-decoder ones come later"
        )
    if any(kind.endswith(_BIDIRECTIONAL) for kind in kinds) and not getattr(config, "is_decoder", False):
        raise BaseModelError(
            f"base {base!r} is a BERT-like model ({', '.join(kinds)}); only decoder-only causal language models can "
            "be used so far, BERT-like ones come later"
        )


def refuse_incomplete(info: dict[str, Any], base: str) -> None:
    """`info` is transformers' loading report. Raises BaseModelError where weights are missing."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise BaseModelError(
            f"base {base!r}: its checkpoint lacks {len(missing)} of the model's weights, {missing[0]!r} first; "
            "it was saved for another architecture"
        )


def refuse_adapter(model: PreTrainedModel, base: str) -> None:
    """transformers loads an adapter beside a config; the base would then not be the bare base."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BaseModelError(
            f"base {base!r} has an adapter_config.json beside its weights, so it would load with that adapter; "
            "give the bare base, or merge the adapter into it first"
        )
