"""Similarity does not ask for order: symmetric, bounded, 1 for the same vectors, and equal to two plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_bases import build_base, build_model, build_tokenizer

from softprompt.base import freeze_base
from softprompt.errors import PromptError
from softprompt.prompt import SoftPrompt, mean_embedding, nearest_tokens, similar_pairs, similarity
from softprompt.types import PromptRecord

WIDTH = 3
VALUES = st.floats(-100, 100, width=32).map(lambda value: 0.0 if abs(value) < 1e-3 else value)
VECTORS = st.lists(VALUES, min_size=WIDTH, max_size=WIDTH).filter(any)
PROMPTS = st.lists(VECTORS, min_size=1, max_size=5).map(lambda rows: SoftPrompt(torch.tensor(rows)))
CENTRES = st.none() | st.lists(VALUES, min_size=WIDTH, max_size=WIDTH).map(torch.tensor)


def slow(one, other, centre=None):
    """Cosine by cosine."""
    shift = [0.0] * one.hidden_size if centre is None else centre.tolist()
    rows = [[[x - c for x, c in zip(row, shift, strict=True)] for row in p.tensor.tolist()] for p in (one, other)]

    def cosine(a, b):
        norms = math.hypot(*a) * math.hypot(*b)
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0

    def one_way(some, others):
        return sum(max(cosine(a, b) for b in others) for a in some) / len(some)

    return (one_way(*rows) + one_way(*reversed(rows))) / 2


@settings(deadline=None)
@given(PROMPTS, PROMPTS, CENTRES)
def test_similarity_is_symmetric_bounded_and_equal_to_a_slow_loop(one, other, centre):
    found = similarity(one, other, centre)
    assert -1 <= found <= 1
    assert found == pytest.approx(similarity(other, one, centre), abs=1e-12)
    if not torch.equal(one.tensor, other.tensor):
        assert found == pytest.approx(slow(one, other, centre), abs=1e-9)


@settings(deadline=None)
@given(PROMPTS, st.randoms(use_true_random=False))
def test_a_prompt_is_like_itself_however_its_tokens_are_ordered_or_repeated(prompt, draw):
    order = list(range(prompt.num_virtual_tokens))
    draw.shuffle(order)
    assert similarity(prompt, SoftPrompt(prompt.tensor.clone())) == 1.0
    assert similarity(prompt, SoftPrompt(prompt.tensor[order])) == pytest.approx(1, abs=1e-12)
    assert similarity(prompt, SoftPrompt(prompt.tensor[[*order, order[0]]])) == pytest.approx(1, abs=1e-12)


@settings(deadline=None)
@given(PROMPTS, PROMPTS, st.floats(1e-3, 1e3))
def test_lengths_of_vectors_do_not_count_without_a_centre(one, other, scale):
    scaled = SoftPrompt(scale * one.tensor)
    assert similarity(scaled, other) == pytest.approx(similarity(one, other), abs=1e-5)  # float32 rounds the scaling


def test_the_similarity_is_that_computed_by_hand():
    one = SoftPrompt(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    other = SoftPrompt(torch.tensor([[3.0, 0.0]]))
    assert similarity(one, other) == pytest.approx(((1 + 0) / 2 + 1) / 2)
    assert similarity(SoftPrompt(-other.tensor), other) == -1
    assert similarity(one, other, torch.tensor([2.0, 0.0])) == pytest.approx(((-1 - math.sqrt(0.5)) / 2 - 0.5**0.5) / 2)


def test_the_centre_removes_a_common_direction():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(4, 50, generator=generator) for _ in range(2))
    common = torch.full((50,), 5.0)
    prompts = SoftPrompt(one + common), SoftPrompt(other + common)
    assert similarity(*prompts) > 0.9
    assert similarity(*prompts, common) == pytest.approx(similarity(SoftPrompt(one), SoftPrompt(other)), abs=1e-5)
    assert similarity(*prompts, common) < 0.4


def test_prompts_of_different_widths_are_refused():
    with pytest.raises(PromptError, match="these have 2 and 3 numbers"):
        similarity(SoftPrompt(torch.ones(1, 2)), SoftPrompt(torch.ones(1, 3)))
    with pytest.raises(PromptError, match=r"the centre has the shape \[3\]; the prompts need \[2\]"):
        similarity(SoftPrompt(torch.ones(1, 2)), SoftPrompt(torch.ones(1, 2)), torch.ones(3))


def test_pairs_are_sorted_leave_other_widths_out_and_know_copies():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 8, generator=generator)
    prompts = {
        "a": SoftPrompt(base),
        "far": SoftPrompt(torch.randn(2, 8, generator=generator)),
        "copy": SoftPrompt(base, PromptRecord(base_name="elsewhere")),
        "turned": SoftPrompt(base.flip(0)),
        "wide": SoftPrompt(torch.ones(3, 9)),
    }
    pairs = similar_pairs(prompts)
    assert {(pair.one, pair.other) for pair in pairs} == {
        ("a", "far"), ("a", "copy"), ("a", "turned"), ("far", "copy"), ("far", "turned"), ("copy", "turned"),
    }  # fmt: skip
    assert [pair.similarity for pair in pairs] == sorted((pair.similarity for pair in pairs), reverse=True)
    assert [(pair.one, pair.other) for pair in pairs if pair.is_identical] == [("a", "copy")]
    assert {(pair.one, pair.other) for pair in pairs if pair.similarity > 0.999} == {
        ("a", "copy"), ("a", "turned"), ("copy", "turned"),
    }  # fmt: skip


def test_the_mean_embedding_leaves_out_embeddings_without_a_token():
    base = build_base("llama")
    padded = build_base("llama", vocab_size=120)
    for some in (base, padded):
        truth = some.embedding.weight[:97].double().mean(dim=0)
        assert torch.allclose(mean_embedding(some), truth, rtol=0, atol=1e-12)
    scaled = build_base("gemma3")
    assert torch.allclose(mean_embedding(scaled), scaled.embedding(torch.arange(97)).double().mean(dim=0), atol=1e-9)


def test_a_vocabulary_of_several_chunks_is_compared_whole():
    base = freeze_base(build_model("llama", vocab_size=20_000), build_tokenizer(vocab=20_000), name="wide")
    truth = base.embedding.weight.double().mean(dim=0)
    assert torch.allclose(mean_embedding(base), truth, rtol=0, atol=1e-12)
    tokens = torch.tensor([10, 16_383, 16_384, 19_999])
    found = nearest_tokens(SoftPrompt(3 * base.embed(tokens)), base, count=2)  # the angle counts, not the length
    assert [item.tokens[0][0] for item in found] == [f"w{token}" for token in tokens]
    for item, vector in zip(found, base.embed(tokens), strict=True):
        assert item.tokens[0][1] == pytest.approx(1, abs=1e-6)
        assert item.tokens[1][1] < 0.95
        assert item.norm == pytest.approx(3 * float(vector.norm()), rel=1e-6)
