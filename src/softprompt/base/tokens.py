"""What a tokenizer adds to a text, and which tokens end one."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROBE = "a"


def bos_ids_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text; empty for GPT-2 or Bloom, BOS for Llama."""
    with_special = list(tokenizer(_PROBE)["input_ids"])
    plain = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    for first in range(len(with_special) - len(plain) + 1):
        if with_special[first : first + len(plain)] == plain:
            return tuple(with_special[:first])
    return ()


def eos_id_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that ends a text, or None where the tokenizer names none."""
    eos_id = tokenizer.eos_token_id
    assert eos_id is None or isinstance(eos_id, int)
    return eos_id


def stop_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends an answer: the tokenizer's EOS and those of the model's generation settings."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = {eos_id_of(tokenizer), *(named if isinstance(named, (list, tuple)) else (named,))}
    return tuple(sorted(i for i in ids if i is not None))
