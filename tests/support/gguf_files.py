"""Tiny GGUF files: a seeded two-layer Llama with a byte-level tokenizer and a chat template, and broken copies."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as hf
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "Ġ th", "i n", "e r", "Ġth e"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
END = 2
POSITIONS = 96
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_HEADS, _KV_HEADS = 4, 2
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def build_llama(seed: int = 0, **changes: Any) -> hf.PreTrainedModel:
    """The model of `write_gguf`, as transformers makes it."""
    settings = {
        "vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": _HEADS, "num_key_value_heads": _KV_HEADS, "max_position_embeddings": POSITIONS,
        "initializer_range": 0.25, "bos_token_id": 1, "eos_token_id": END, "tie_word_embeddings": True,
    }  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**settings, **changes}))
    torch.random.set_rng_state(state)
    return model.eval()


def write_gguf(
    file: Path, seed: int = 0, *, kind: str = "Q8_0", fields: dict[str, Any] | None = None, without: str = ""
) -> Path:
    """A GGUF file of `build_llama`: weights as `kind`, norms in float32, without one tensor if named."""
    model = build_llama(seed)
    writer = gguf.GGUFWriter(str(file), "llama")
    _write_settings(writer, model.config)
    _write_tokenizer(writer)
    for key, value in (fields or {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key, value)
    for name, value in model.state_dict().items():
        own = _gguf_name(name)
        if own != without and own != "output.weight":  # tied
            _write_tensor(writer, own, value.numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_name("tiny")
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(END)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{kind}"
    _, _, number, rest = stem.split(".", 3)
    return f"blk.{number}.{_NAMES[rest]}.{kind}"


def _write_tensor(writer: gguf.GGUFWriter, name: str, value: np.ndarray, kind: str) -> None:
    if "attn_q" in name or "attn_k" in name:
        value = _permuted(value, _HEADS if "attn_q" in name else _KV_HEADS)
    stored = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), stored), raw_dtype=stored)


def _permuted(value: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rotary dimensions."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)


def cut(file: Path, to: Path, share: float) -> Path:
    data = file.read_bytes()
    to.write_bytes(data[: int(len(data) * share)])
    return to


def with_number(file: Path, to: Path, at: int, form: str, number: int) -> Path:
    """A copy with one number of its header replaced."""
    data = bytearray(file.read_bytes())
    struct.pack_into(form, data, at, number)
    to.write_bytes(data)
    return to
