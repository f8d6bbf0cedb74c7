"""Answers generated with int8 weights: those of a base whose weights are the rounded ones."""

from __future__ import annotations

import pytest
import torch
from support.tiny_bases import build_base, build_model, build_tokenizer, random_ids, random_prompt

from softprompt.base import Base, freeze_base
from softprompt.config import EngineConfig, SamplingConfig
from softprompt.engine import Engine, Request, generate
from softprompt.errors import ConfigError
from softprompt.families import forward_of
from softprompt.families.frozen_linear import linear_weights
from softprompt.families.native import native_library
from softprompt.families.thin_linear import quantised
from softprompt.prompt import SoftPrompt

pytestmark = pytest.mark.skipif(native_library() is None, reason="the C library was not compiled")
INT8 = EngineConfig(weights="int8")
SAMPLING = SamplingConfig(max_new_tokens=10)
# nn.Linear, Conv1D, biases and tied heads, of whole groups of inputs
SIZES = {"llama": {"hidden_size": 64, "intermediate_size": 96}, "gpt2": {"n_embd": 64}, "bloom": {"hidden_size": 64}}


def wide_base(family: str = "llama") -> Base:
    return build_base(family, **SIZES[family])


def rounded_base(family: str) -> Base:
    """The base of `build_base`, with each linear weight replaced by its int8 values; the embeddings stay."""
    base = freeze_base(build_model(family, **SIZES[family]), build_tokenizer())
    model = base.model
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(quantised(head.weight.detach()).dequantised(), requires_grad=False)  # untied
    for weight, matrix in linear_weights(model.base_model):
        matrix.copy_(quantised(matrix.contiguous()).dequantised())
        assert weight.data_ptr() == matrix.data_ptr()
    return base


def requests(base: Base) -> list[Request]:
    prompts = [None, *(SoftPrompt(random_prompt(base, 3, seed)) for seed in (1, 2))]
    return [Request(random_ids(5, seed), prompt) for seed, prompt in enumerate(prompts)]


@pytest.mark.parametrize("family", SIZES)
def test_int8_answers_are_those_of_a_base_with_the_rounded_weights(family: str) -> None:
    base, truth = wide_base(family), rounded_base(family)
    found = generate(base, requests(base), SAMPLING, config=INT8)
    wanted = generate(truth, requests(truth), SAMPLING)
    plain = generate(base, requests(base), SAMPLING)
    for mine, theirs, loaded in zip(found, wanted, plain, strict=True):
        assert mine.ids == theirs.ids
        assert mine.log_probs == pytest.approx(theirs.log_probs, abs=2e-5)
        assert mine.log_probs != pytest.approx(loaded.log_probs, abs=2e-5)  # the control: not those of the base


def test_int8_weights_leave_the_base_and_other_engines_as_they_were() -> None:
    base = wide_base()
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    loaded = generate(base, requests(base), SAMPLING)
    engine = Engine(base, INT8)
    again = generate(base, requests(base), SAMPLING)
    assert [(each.ids, each.log_probs) for each in again] == [(each.ids, each.log_probs) for each in loaded]
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.named_parameters())
    assert forward_of(base).int8_bytes == 0
    assert engine.forward.int8_bytes == Engine(base, INT8).forward.int8_bytes > 0


def test_a_long_text_is_read_with_the_loaded_weights() -> None:
    base = wide_base()
    forward = forward_of(base)
    rows = torch.randn(33, base.hidden_size, generator=torch.Generator().manual_seed(0))
    int8 = forward.with_int8()
    with torch.inference_mode():
        assert torch.equal(int8.logits(rows), forward.logits(rows))
        assert not torch.equal(int8.logits(rows[:32]), forward.logits(rows[:32]))


def test_an_engine_notes_that_its_answers_are_those_of_int8_weights() -> None:
    base = wide_base()
    assert any("those of int8 weights" in note and "MiB more" in note for note in Engine(base, INT8).notes)
    assert not any("int8" in note for note in Engine(base).notes)


def test_int8_weights_of_a_base_without_whole_groups_are_refused() -> None:
    base = build_base("llama", hidden_size=24, num_attention_heads=2, num_key_value_heads=2, intermediate_size=40)
    with pytest.raises(ConfigError, match=r"none of the weights of base .* whole groups of 32"):
        Engine(base, INT8)
    with pytest.raises(ConfigError, match="weights is 'int4'"):
        EngineConfig(weights="int4")  # type: ignore[arg-type]  # the mistake that is tested
