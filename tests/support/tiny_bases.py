"""Tiny seeded bases of every family, with untied heads and weights wide enough that a wrong input shows.

Nothing is downloaded. `LIMIT` positions, `VOCAB` tokens, two layers.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from softprompt.base import Base, freeze_base

VOCAB = 97
LIMIT = 96
UNK, BOS, EOS = 0, 1, 2
_COMMON = {
    "vocab_size": VOCAB,
    "initializer_range": 0.25,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
_COMMON["tie_word_embeddings"] = False
_LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": LIMIT,
}  # fmt: skip
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LIMIT}
_OPT = {
    "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": LIMIT, "word_embed_proj_dim": 16,
}  # fmt: skip
_NEOX = {**_LLAMA, "num_key_value_heads": None}
_FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": LIMIT}
_GEMMA = {**_LLAMA, "head_dim": 8}
_NEO = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24,
    "attention_types": [[["global", "local"], 1]], "window_size": 6, "max_position_embeddings": LIMIT,
}  # fmt: skip

# name -> (config class, model class, settings)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bloom": (hf.BloomConfig, hf.BloomForCausalLM, {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, _LLAMA),
    "gptj": (hf.GPTJConfig, hf.GPTJForCausalLM, {**_GPT, "rotary_dim": 4}),
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, _GPT),
    "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, _NEOX),
    "opt": (hf.OPTConfig, hf.OPTForCausalLM, _OPT),
    "opt_projected": (hf.OPTConfig, hf.OPTForCausalLM, {**_OPT, "word_embed_proj_dim": 12}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, _LLAMA),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {**_LLAMA, "head_dim": 8}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {**_LLAMA, "sliding_window": None}),
    "mistral_window": (hf.MistralConfig, hf.MistralForCausalLM, {**_LLAMA, "sliding_window": 6}),
    "phi": (hf.PhiConfig, hf.PhiForCausalLM, _NEOX),
    "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM, _LLAMA),
    "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM, _GEMMA),
    "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, {**_GEMMA, "sliding_window": 6, "final_logit_softcapping": 5.0}),
    "falcon": (hf.FalconConfig, hf.FalconForCausalLM, {**_FALCON, "alibi": False}),
    "falcon_alibi": (hf.FalconConfig, hf.FalconForCausalLM, {**_FALCON, "alibi": True}),
    "gpt_neo": (hf.GPTNeoConfig, hf.GPTNeoForCausalLM, _NEO),
    "mpt": (hf.MptConfig, hf.MptForCausalLM, {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": LIMIT}),
}  # fmt: skip

# Not on the tested list: these have to pass the check that a base meets when it is first used.
OTHERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "stablelm": (hf.StableLmConfig, hf.StableLmForCausalLM, _LLAMA),
    "cohere": (hf.CohereConfig, hf.CohereForCausalLM, {**_LLAMA, "logit_scale": 0.25}),
    "granite": (
        hf.GraniteConfig,
        hf.GraniteForCausalLM,
        {**_LLAMA, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    ),
    "olmo": (hf.OlmoConfig, hf.OlmoForCausalLM, _LLAMA),
    "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, {**_GEMMA, "sliding_window": 6}),
}


def build_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> hf.PreTrainedModel:
    config_class, model_class, settings = {**FAMILIES, **OTHERS}[family]
    config = config_class(**{**_COMMON, **settings, **changes})
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model: hf.PreTrainedModel = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1, and would hide what they do
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.random.set_rng_state(state)
    model.generation_config = hf.GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)
    return model.eval().to(dtype)


def build_tokenizer(has_bos: bool = True, has_eos: bool = True, vocab: int = VOCAB) -> hf.PreTrainedTokenizerFast:
    """One word per id: `w7` is 7. No pad token."""
    words = {"<unk>": UNK, "<s>": BOS, "</s>": EOS, **{f"w{index}": index for index in range(3, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if has_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>"} if has_bos else {}
    special |= {"eos_token": "</s>"} if has_eos else {}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def build_closed_tokenizer() -> hf.PreTrainedTokenizerFast:
    """A few words and no unknown token: a text with any other word cannot be encoded."""
    words = Tokenizer(models.WordLevel({"the": 0, "<s>": BOS, "</s>": EOS, "dog": 3, "ran": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")


def build_base(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Base:
    model = build_model(family, seed, dtype, **changes)
    return freeze_base(model, build_tokenizer(has_bos=family == "llama"), name=f"tiny-{family}")


def random_prompt(base: Base, length: int, seed: int = 0) -> torch.Tensor:
    """[P, H], the size of the base's own embeddings."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(length, base.hidden_size, generator=generator, dtype=torch.float64) * base.embedding_rms
    return values.to(torch.promote_types(base.dtype, torch.float32))


def random_ids(count: int, seed: int = 0, vocab: int = VOCAB) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return tuple(torch.randint(3, vocab, (count,), generator=generator).tolist())
