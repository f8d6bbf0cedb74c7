"""A tiny configuration of every causal class that the installed transformers has.

One list of small sizes serves most families: a field is set where the family has it. What a family wants otherwise
stands in `CHANGES`; what cannot be built small, or is no language model by itself, in `NOT_BUILT` with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.tiny_bases import BOS, EOS, LIMIT, VOCAB

# One family for each way that a model is patched, counts positions and scores keys; the others are repetitions.
REPRESENTATIVES = ("bloom", "cohere", "gemma2", "gpt2", "gpt_neo", "llama", "mpt")
KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_MOST_PARAMETERS = 5_000_000
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "initializer_range": 0.25, "init_std": 0.25,
    "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS, "is_decoder": True, "tie_word_embeddings": False,
    "hidden_size": 16, "d_model": 16, "n_embd": 16, "dim": 16, "embedding_size": 16, "attention_hidden_size": 16,
    "lru_width": 16, "hidden_size_per_layer_input": 4,
    "intermediate_size": 24, "ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_ffn_dim": 24, "d_inner": 24, "dff": 24,
    "dim_ff": 24, "ffn_hidden_size": 24, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "rotary_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 4, "max_position_embeddings": LIMIT, "n_positions": LIMIT, "max_seq_len": LIMIT,
    "sliding_window": 6, "attention_window_size": 6, "attention_chunk_size": 6, "sliding_window_size": 6,
    "local_attention": 6, "keep_window_size": 4, "index_topk": 4, "index_topk_blocks": 1, "index_block_size": 4,
    "index_n_heads": 4, "index_head_dim": 8, "block_size": 4, "floor_scale": 4, "log_scaling_n_floor": 4,
    "use_sliding_window": True, "max_window_layers": 0,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "moe_k": 2, "n_group": 1, "topk_group": 1,
    "mamba_n_heads": 8, "mamba_d_head": 4, "mamba_d_state": 8, "mamba_d_ssm": 32, "mamba_n_groups": 1,
    "mamba_chunk_size": 4, "mamba_num_heads": 8, "mamba_head_dim": 4, "mamba_dt_rank": 4, "mamba_expand": 2,
    "ssm_state_size": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4, "time_step_rank": 4, "expand": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}  # fmt: skip
DROP = object()  # a field of `_SIZES` that a family shall not be given
_LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": DROP}  # DeepSeek's attention
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 28, "patch_size": 14}  # fmt: skip
_PLACES = {"boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92}  # of images in a text
_PLACES |= {"boi_token_id": 90, "eoi_token_id": 91, "image_token_id": 92, "video_token_id": 93, "boa_token_id": 94,
            "eoa_token_index": 95, "audio_token_id": 96}  # fmt: skip
_CONV = {"layer_types": ["conv", "full_attention"]}
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), _LATENT),
    "granitemoehybrid": _LINEAR,
    **dict.fromkeys(("lfm2", "lfm2_moe"), _CONV),
    "bailing_hybrid": {**_LATENT, **_LINEAR, "linear_head_dim": 4, "linear_num_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROTARY)},
    "deepseek_v4": {"head_dim": 16, "qk_rope_head_dim": 8},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {**_LATENT, "head_dim": 8, "n_shared_experts": 1, "shared_experts_intermediate_size": 8,
                        "per_layer_config": {1: {"sliding_window": 6}}},
    "gemma3": {"vision_config": _VISION, "mm_tokens_per_image": 4, **_PLACES},
    "gemma4": _PLACES,
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 16, "output_proj_dims": 16, "mm_posemb_size": 8},
                       "audio_config": {"audio_embed_dim": 16}, **_PLACES},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": None, "laurel_rank": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**_LATENT, **_LINEAR, "linear_head_dim": 4, "linear_num_heads": 4},
    "longcat_flash": {**_LATENT, "head_dim": 4, "expert_ffn_hidden_size": 8, "moe_topk": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 4},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 2, "indexer_head_dim": 4, "indexer_budget": 4,
                       "indexer_compress_ratio": 2, "hc_lowrank": 4, "hc_count": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "reformer": {"axial_pos_shape": [8, 12], "axial_pos_embds_dim": [8, 8], "attn_layers": ["local", "local"]},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8},
    "xlm": {"emb_dim": 16, "n_words": VOCAB, "causal": True},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "attention_head_dim": 8, "num_key_value_heads": 4,
              "attention_hidden_size": 32},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "attention_head_dim": 8, "mamba_headdim": 4,
               "n_mamba_heads": 8, "num_mem_blocks": 1},
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"], "num_experts_per_tok": 1, "router_hidden_size": 8},
}  # fmt: skip
_ASSISTANT = "it drafts over another model's cache, and is no language model by itself"
NOT_BUILT: dict[str, str] = {
    "blt": "its byte patcher, encoder and decoder are three models whose sizes hang together",
    "dbrx": "transformers' class does not build: its attention's configuration lacks a field that the class reads",
    "fuyu": "its text model has no small form that its configuration takes",
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is the language model",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "got_ocr2": "its image encoder has no small form here; its language model is qwen2's",
    "qwen4_exp": "its sparse attention's configuration takes no small form",
    "qwen4_exp_text": "its sparse attention's configuration takes no small form",
    "moss_transcribe_diarize": "a transcriber whose audio encoder has no small form here",
}


def each_of(families: Iterable[str], unmarked: Collection[str] = REPRESENTATIVES) -> list[Any]:
    """Parameters for a test: what is not in `unmarked` is a repetition, which `make test` leaves out."""
    return [one if one in unmarked else pytest.param(one, marks=pytest.mark.medium) for one in families]


def class_of(kind: str, mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING) -> Any:  # Any: a model class; an Auto mapping
    found = mapping[hf.CONFIG_MAPPING[kind]]
    return found[0] if isinstance(found, tuple) else found


def tiny_config(kind: str, mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING, **changes: Any) -> hf.PreTrainedConfig:
    """Of the model class's own configuration: a composite one may build its text part only."""
    config_class = class_of(kind, mapping).config_class
    own = kind if config_class is hf.CONFIG_MAPPING[kind] else config_class.model_type
    return _built(config_class, own, **changes)


def _built(config_class: Any, kind: str, **changes: Any) -> hf.PreTrainedConfig:
    wanted = {**_fitting(config_class), **CHANGES.get(kind, {}), **changes}
    parts = {name: _built(part, part.model_type) for name, part in config_class.sub_configs.items() if _is_one(part)}
    return config_class(**{**parts, **{name: value for name, value in wanted.items() if value is not DROP}})


def _is_one(config_class: Any) -> bool:
    return getattr(config_class, "model_type", None) in hf.CONFIG_MAPPING  # not AutoConfig


def _fitting(config_class: Any) -> dict[str, Any]:
    fields = config_class.__dataclass_fields__
    found = {name: value for name, value in _SIZES.items() if name in fields}
    if "layer_types" in fields:
        with suppress(Exception):  # one that has no defaults
            kinds = list(dict.fromkeys(config_class().layer_types))  # one layer of each kind, at least two
            found["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
            found["num_hidden_layers"] = len(found["layer_types"])
    return found


def tiny_model(kind: str, mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING, **changes: Any) -> hf.PreTrainedModel:
    """Seeded, in eval mode, with weights wide enough that a wrong input shows."""
    config, model_class = tiny_config(kind, mapping, **changes), class_of(kind, mapping)
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    assert num_parameters <= _MOST_PARAMETERS, f"{kind} has {num_parameters:,} parameters"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: hf.PreTrainedModel = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms start at 0 and 1, and would hide what they do
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.generation_config = hf.GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)
    return model.eval()
