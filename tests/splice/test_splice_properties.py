"""Splicing ragged rows with ragged prompts: every vector, position, mask bit and target lies where it should."""

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_bases import VOCAB, build_base, random_prompt

from softprompt.errors import DataError
from softprompt.families import forward_of
from softprompt.splice import Row, TokenSpan, concatenate, embed, embed_spans, run, run_prompts, target_states

concatenate_module = sys.modules["softprompt.splice.concatenate"]  # the package has its function by that name
BASE = build_base("llama")
ALIGNMENTS = st.sampled_from(["left", "right"])


@st.composite
def batches(draw):
    """Prompts of 1 to 5 vectors, and rows of 0 to 6 tokens that name one of them or none."""
    prompts = [random_prompt(BASE, draw(st.integers(1, 5)), seed) for seed in range(draw(st.integers(1, 3)))]
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        owner = draw(st.none() | st.integers(0, len(prompts) - 1))
        ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=int(owner is None), max_size=6))
        targets = [draw(st.booleans()) and (owner is not None or index > 0) for index in range(len(ids))]
        rows.append(Row(ids, owner, targets))
    return rows, prompts


def pieces(rows, prompts):
    """Each row's own vectors, [P + T, H]."""
    texts = [BASE.embedding(torch.tensor(row.ids, dtype=torch.long)) for row in rows]
    return [t if r.prompt is None else torch.cat([prompts[r.prompt], t]) for r, t in zip(rows, texts, strict=True)]


@settings(deadline=None, max_examples=60)
@given(batches(), ALIGNMENTS)
def test_concatenated_rows_are_whole_between_pads_of_zero(batch, align):
    rows, prompts = batch
    spliced = concatenate(BASE, rows, prompts, align)
    num_slots = spliced.embeds_BSH.shape[1]
    for index, own in enumerate(pieces(rows, prompts)):
        first = 0 if align == "left" else num_slots - len(own)
        real = slice(first, first + len(own))
        assert torch.equal(spliced.embeds_BSH[index, real], own)
        assert spliced.positions_BS[index, real].tolist() == list(range(len(own)))
        assert spliced.mask_BS[index, real].all()
        assert spliced.mask_BS[index, :first].sum() == 0  # what a causal row would otherwise see
        assert spliced.embeds_BSH[index].count_nonzero() == own.count_nonzero()
        assert spliced.positions_BS[index].sum() == sum(range(len(own)))
    assert num_slots == max(spliced.lengths) == max(len(own) for own in pieces(rows, prompts))


@settings(deadline=None, max_examples=60)
@given(batches(), ALIGNMENTS)
def test_the_slot_of_a_target_is_the_one_before_its_vector(batch, align):
    rows, prompts = batch
    spliced = concatenate(BASE, rows, prompts, align)
    targets, num_slots = spliced.targets, spliced.embeds_BSH.shape[1]
    wanted = [(i, c) for i, row in enumerate(rows) for c, counted in enumerate(row.targets) if counted]
    assert list(zip(targets.rows.tolist(), targets.columns.tolist(), strict=True)) == wanted
    assert targets.ids.tolist() == [rows[i].ids[c] for i, c in wanted]
    flat = spliced.embeds_BSH.flatten(0, 1)
    for (i, c), token, slot in zip(wanted, targets.ids.tolist(), targets.slots.tolist(), strict=True):
        num_virtual = 0 if rows[i].prompt is None else len(prompts[rows[i].prompt])
        assert slot // num_slots == i
        assert torch.equal(flat[slot + 1], BASE.embedding.weight[token])
        assert spliced.positions_BS.flatten()[slot] == num_virtual + c - 1


@settings(deadline=None, max_examples=30)
@given(batches(), ALIGNMENTS)
def test_a_gradient_reaches_only_the_prompts_that_rows_name(batch, align):
    rows, prompts = batch
    leaves = [prompt.clone().requires_grad_(True) for prompt in prompts]
    spliced = concatenate(BASE, rows, leaves, align)
    named = {row.prompt for row in rows} - {None}
    if named:
        spliced.embeds_BSH.sum().backward()
    assert BASE.embedding.weight.grad is None
    for number, leaf in enumerate(leaves):
        uses = sum(row.prompt == number for row in rows)
        assert (leaf.grad is None) == (number not in named)
        assert leaf.grad is None or torch.equal(leaf.grad, torch.full_like(leaf, uses))


def concatenated(base, prompt):
    return concatenate(base, [Row([5], 0)], [prompt]).embeds_BSH


def spanned(base, prompt):
    return embed_spans(base, [TokenSpan(prompt, [5], 0, 3)])[0]


def packed(base, prompt):
    return target_states(base, forward_of(base), [Row([5, 6], 0, [True, True])], [prompt])[0]


def packed_behind_a_prefix(base, prompt):
    prefix = run_prompts(base, forward_of(base), [prompt])
    return target_states(base, forward_of(base), [Row([5, 6], 0, [True, True])], [prompt], prefix)[0]


@pytest.mark.parametrize("layout", [concatenated, spanned, packed, packed_behind_a_prefix])
def test_every_layout_casts_a_prompt_to_the_dtype_of_the_base_and_its_gradient_stays_float32(layout):
    base = build_base("llama", dtype=torch.bfloat16)
    prompt = random_prompt(base, 2).requires_grad_(True)
    found = layout(base, prompt)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert prompt.grad.dtype == torch.float32


@pytest.mark.parametrize("layout", [concatenated, spanned, packed, packed_behind_a_prefix])
def test_every_layout_embeds_prompts_in_one_function(layout, monkeypatch):
    base, seen = build_base("llama"), []
    prompt, embed_with_prompt = random_prompt(base, 2), embed.embed_with_prompt

    def watched(base, pieces):
        seen.extend(vectors for vectors, _ in pieces if vectors is not None)
        return embed_with_prompt(base, [(None if vectors is None else 0 * vectors, ids) for vectors, ids in pieces])

    layout_of_zeros = layout(base, torch.zeros_like(prompt)).detach()
    assert not torch.equal(layout(base, prompt), layout_of_zeros)
    for module in (concatenate_module, embed, run):
        monkeypatch.setattr(module, "embed_with_prompt", watched)
    assert torch.equal(layout(base, prompt), layout_of_zeros)
    assert torch.equal(torch.cat(seen), prompt)


@settings(deadline=None, max_examples=60)
@given(batches(), st.data())
def test_the_spans_of_a_row_are_the_row_whatever_the_cuts(batch, data):
    rows, prompts = batch
    for row, own in zip(rows, pieces(rows, prompts), strict=True):
        cuts = sorted({0, len(own), *data.draw(st.lists(st.integers(0, len(own)), max_size=3))})
        prompt = None if row.prompt is None else prompts[row.prompt]
        spans = [TokenSpan(prompt, row.ids, a, b - a) for a, b in pairwise(cuts)]
        embeds, positions = embed_spans(BASE, spans)
        assert torch.equal(embeds, own)
        assert positions.tolist() == list(range(len(own)))


def test_an_empty_text_on_the_bare_base_is_refused():
    with pytest.raises(DataError, match="empty text has no token to continue from"):
        Row(())
    Row((), prompt=0)  # behind a soft prompt there is something to continue from
