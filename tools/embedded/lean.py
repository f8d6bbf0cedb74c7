"""Bloom's forward pass for pretraining on few CPU cores: the same function as the Hugging Face module, in bfloat16.

It reads the module's float32 weights, casts them on the way, and takes rows padded on the right, so that a causal
mask is all the masking they need. Shapes: B batch, T tokens, H hidden, N heads, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import BloomForCausalLM


def _half(parameter: Tensor) -> Tensor:
    return parameter.to(torch.bfloat16)


def _linear(layer: nn.Module, states: Tensor) -> Tensor:
    return functional.linear(states, _half(layer.weight), _half(layer.bias))


def _norm(layer: nn.LayerNorm, states: Tensor) -> Tensor:
    return functional.layer_norm(states, layer.normalized_shape, _half(layer.weight), _half(layer.bias), layer.eps)


def attention_bias(num_heads: int, num_tokens: int) -> Tensor:
    """ALiBi and the causal mask in one, [1, N, T, T]; the number of heads is a power of two."""
    slopes = 2.0 ** (-8.0 / num_heads * torch.arange(1, num_heads + 1))
    positions = torch.arange(num_tokens)
    distances = positions[None, :] - positions[:, None]
    bias = slopes[:, None, None] * distances
    return bias.masked_fill(distances > 0, float("-inf"))[None].to(torch.bfloat16)


def _attend(attention: nn.Module, states_BTH: Tensor, bias: Tensor) -> Tensor:
    num_rows, num_tokens, hidden = states_BTH.shape
    num_heads = bias.shape[1]
    fused = _linear(attention.query_key_value, states_BTH).view(num_rows, num_tokens, num_heads, 3, -1)
    query, key, value = fused.permute(3, 0, 2, 1, 4).contiguous()
    scores = torch.matmul(query * (hidden // num_heads) ** -0.5, key.transpose(-1, -2)) + bias
    mixed = torch.matmul(torch.softmax(scores, dim=-1), value)
    return _linear(attention.dense, mixed.transpose(1, 2).reshape(num_rows, num_tokens, hidden))


def hidden_states(model: BloomForCausalLM, ids_BT: Tensor) -> Tensor:
    """The states that the head reads, [B, T, H]."""
    bloom = model.transformer
    bias = attention_bias(model.config.n_head, ids_BT.shape[1])
    states = _norm(bloom.word_embeddings_layernorm, _half(bloom.word_embeddings(ids_BT)))
    for block in bloom.h:
        states = states + _attend(block.self_attention, _norm(block.input_layernorm, states), bias)
        wide = _linear(block.mlp.dense_h_to_4h, _norm(block.post_attention_layernorm, states))
        states = states + _linear(block.mlp.dense_4h_to_h, functional.gelu(wide, approximate="tanh"))
    return _norm(bloom.ln_f, states)


def loss_sum(model: BloomForCausalLM, ids_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Weighted sum of the negative log-likelihood of the tokens with a predecessor; pads on the right weigh 0."""
    states = hidden_states(model, ids_BT)[:, :-1]
    logits = functional.linear(states, _half(model.lm_head.weight)).flatten(0, 1)
    losses = functional.cross_entropy(logits.float(), ids_BT[:, 1:].flatten(), reduction="none")
    return losses @ weights_BT[:, 1:].flatten()
