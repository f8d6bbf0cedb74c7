"""Tiny seeded encoder-decoders of six families with tokenizers of words, and the slow truth of a pair of texts.

The tokenizers put around a text what the families' own do: `</s>` behind it (T5, Pegasus), `<s>` and `</s>` (BART),
`</s>` and a language (mBART).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from softprompt.base import Base, freeze_base
from support.tiny_bases import BOS, EOS, LIMIT, VOCAB

PAD = 0  # and what T5's and Pegasus' decoders start with
LANGUAGE = 96
_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_T5 = {
    "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "initializer_factor": 2.0,
}  # fmt: skip
_GATED = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": LIMIT, "init_std": 0.25,
    "decoder_start_token_id": EOS, "forced_eos_token_id": None,
}  # fmt: skip
_SCALED = {**_BART, "scale_embedding": True}

# name -> (config class, model class, settings, ids before and behind a text)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "t5": (hf.T5Config, hf.T5ForConditionalGeneration, _T5, "$A </s>"),
    "flan_t5": (hf.T5Config, hf.T5ForConditionalGeneration, _GATED, "$A </s>"),
    "mt5": (hf.MT5Config, hf.MT5ForConditionalGeneration, _GATED, "$A </s>"),
    "umt5": (hf.UMT5Config, hf.UMT5ForConditionalGeneration, _GATED, "$A </s>"),
    "bart": (hf.BartConfig, hf.BartForConditionalGeneration, _BART, "<s> $A </s>"),
    "mbart": (
        hf.MBartConfig, hf.MBartForConditionalGeneration, {**_SCALED, "decoder_start_token_id": LANGUAGE},
        f"$A </s> w{LANGUAGE}",
    ),
    "mbart50": (
        hf.MBartConfig, hf.MBartForConditionalGeneration, {**_SCALED, "forced_bos_token_id": LANGUAGE},
        f"w{LANGUAGE} $A </s>",
    ),
    "pegasus": (
        hf.PegasusConfig, hf.PegasusForConditionalGeneration, {**_SCALED, "decoder_start_token_id": PAD}, "$A </s>",
    ),
}  # fmt: skip


def build_tokenizer(around: str = "$A </s>") -> hf.PreTrainedTokenizerFast:
    """One word per id: `w7` is 7."""
    words = {"<unk>": PAD, "<s>": BOS, "</s>": EOS, **{f"w{index}": index for index in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<s>", BOS), ("</s>", EOS), (f"w{LANGUAGE}", LANGUAGE)]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<unk>", bos_token="<s>"
    )


def build_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> hf.PreTrainedModel:
    """Its head has weights of its own: a tied tiny model mostly repeats its last token."""
    config_class, model_class, settings, _ = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: hf.PreTrainedModel = model_class(config_class(**{**_COMMON, **settings, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms start at 0 and 1, and would hide what they do
                parameter.add_(0.05 * torch.randn_like(parameter))
            if hasattr(model, "final_logits_bias"):
                model.final_logits_bias.normal_()
            model.lm_head.weight = torch.nn.Parameter(0.4 * torch.randn_like(model.lm_head.weight))
    return model.eval().to(dtype)


def build_seq2seq(family: str = "t5", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Base:
    tokenizer = build_tokenizer(FAMILIES[family][3])
    return freeze_base(build_model(family, seed, dtype, **changes), tokenizer, name=f"tiny-{family}")


def plain_pair_logits(
    base: Base, source: Sequence[int], ids: Sequence[int], prompt: Tensor | None, decoder_prompt: Tensor | None = None
) -> Tensor:
    """[T, V]: what the model predicts for each of `ids`, one pair alone, prompts concatenated on both sides.

    A family that scales its decoder's embeddings outside of their table does so to those that it is given.
    """
    scale = getattr(base.model.get_encoder(), "embed_scale", 1.0)
    before = base.decoder_start_ids
    embeds = base.embedding(torch.tensor(list(source), dtype=torch.long)) * scale
    written = base.embedding(torch.tensor([*before, *ids[:-1]]))
    if prompt is not None:
        embeds = torch.cat([prompt.to(embeds.dtype), embeds])
    if decoder_prompt is not None:
        written = torch.cat([decoder_prompt.to(embeds.dtype) / scale, written])
    logits: Tensor = base.model(inputs_embeds=embeds[None], decoder_inputs_embeds=written[None], use_cache=False).logits
    return logits[0, -len(ids) :]
