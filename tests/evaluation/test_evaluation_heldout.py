"""Held-out losses: the plain model's own, on the same tokens for all, and an interval that covers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.slow_truth import plain_nats
from support.tiny_bases import random_ids, random_prompt

from softprompt.data import build_examples, rows_from_records, rows_from_texts
from softprompt.evaluation import held_out_losses, mean_loss
from softprompt.evaluation.heldout import paired_interval
from softprompt.families import forward_of
from softprompt.loss import RowScore
from softprompt.prompt import SoftPrompt


def sentences(count, seed=0):
    return [" ".join(f"w{token}" for token in random_ids(2 + (5 * i) % 11, seed + i)) for i in range(count)]


def losses_of(base, prompts, rows, **settings):
    examples = build_examples(base, rows, eos=True, max_length=60)
    return examples, held_out_losses(base, forward_of(base), prompts, {"set": examples}, **settings)


def soft(base, seed=0, length=4):
    return SoftPrompt(random_prompt(base, length, seed))


def true_losses(base, examples, tensor):
    """Text and EOS nats of every row, by the plain model."""
    text, eos = [], []
    for example in examples.examples:
        text.append(float(plain_nats(base, example.ids, example.text_mask, tensor).sum()))
        eos.append(float(plain_nats(base, example.ids, example.eos_mask, tensor).sum()))
    return text, eos


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_the_loss_is_the_plain_models_over_the_same_tokens(request, family):
    """tiny_llama's tokenizer puts BOS in front, tiny_gpt2's does not: there the first text token is not counted."""
    base = request.getfixturevalue(family)
    prompt = soft(base)
    examples, (bare, ours) = losses_of(base, {"p": prompt}, rows_from_texts(sentences(9)))
    counted = sum(len(e.ids) - e.num_special - 1 for e in examples.examples) - (0 if base.bos_ids else 9)
    assert bare.num_tokens == ours.num_tokens == counted
    assert (bare.num_rows, ours.num_rows) == (9, 9)
    for loss, tensor in ((bare, None), (ours, prompt.tensor)):
        text, eos = true_losses(base, examples, tensor)
        assert loss.loss == pytest.approx(sum(text) / counted, rel=1e-5)
        assert loss.eos_loss == pytest.approx(sum(eos) / 9, rel=1e-5)
        assert loss.perplexity == pytest.approx(math.exp(sum(text) / counted), rel=1e-5)


def test_difference_and_better_and_worse_rows_are_relative_to_the_base(tiny_llama):
    prompt = soft(tiny_llama)
    examples, (bare, ours) = losses_of(tiny_llama, {"p": prompt}, rows_from_texts(sentences(9)))
    assert (bare.prompt, bare.difference, bare.interval, bare.better_rows, bare.worse_rows) == (
        None,
        None,
        None,
        (),
        (),
    )
    gaps = np.subtract(*(true_losses(tiny_llama, examples, tensor)[0] for tensor in (prompt.tensor, None)))
    assert ours.difference == pytest.approx(gaps.sum() / ours.num_tokens, rel=1e-4)
    assert ours.worse_rows == tuple(int(i) for i in np.flatnonzero(gaps > 0))
    assert ours.better_rows == tuple(int(i) for i in np.flatnonzero(gaps < 0))
    assert ours.interval.low < ours.difference < ours.interval.high


def test_another_or_a_shuffled_prompt_gives_other_figures(tiny_llama):
    prompt = soft(tiny_llama)
    contenders = {
        "ours": prompt,
        "again": SoftPrompt(prompt.tensor.clone()),
        "shuffled": SoftPrompt(prompt.tensor.flip(0)),
        "other": soft(tiny_llama, seed=1),
    }
    _, losses = losses_of(tiny_llama, contenders, rows_from_texts(sentences(5)))
    by_name = {loss.prompt: loss.loss for loss in losses}
    assert by_name["again"] == by_name["ours"]
    for other in (None, "shuffled", "other"):
        assert abs(by_name[other] - by_name["ours"]) > 1e-3


def test_the_loss_of_a_template_counts_completions_only(tiny_llama):
    rows = rows_from_records(
        [{"text": text, "label": f"w{90 + i % 2}"} for i, text in enumerate(sentences(6))],
        template="w5 {text}", completion=" {label}",
    )  # fmt: skip
    _, (bare, _) = losses_of(tiny_llama, {"p": soft(tiny_llama)}, rows)
    assert bare.num_tokens == 6


class TestDegenerate:
    def test_a_single_row_has_no_interval(self, tiny_llama):
        _, (_, ours) = losses_of(tiny_llama, {"p": soft(tiny_llama)}, rows_from_texts(["w5 w6 w7"]))
        assert ours.interval is None
        assert ours.difference is not None

    def test_rows_without_text_tokens_have_a_loss_of_nan(self, tiny_gpt2):
        """Rows of one word have no predecessor on a base without BOS; only their EOS is read."""
        _, (bare, ours) = losses_of(tiny_gpt2, {"p": soft(tiny_gpt2)}, rows_from_texts(["w5", "w6", "w7"]))
        assert bare.num_tokens == 0
        assert math.isnan(bare.loss)
        assert math.isnan(bare.perplexity)
        assert (ours.difference, ours.interval) == (None, None)
        assert ours.eos_loss > 0

    def test_rows_with_equal_gaps_have_an_interval_without_width(self):
        scores = [RowScore(text_nats=6.0, num_text=3, eos_nats=0.0, num_eos=0)] * 5
        interval = paired_interval(scores, scores, seed=0)
        assert (interval.low, interval.high) == (0.0, 0.0)

    def test_the_mean_loss_of_no_rows_is_nan(self):
        assert math.isnan(mean_loss([]))


def scored(nats, counts):
    return [
        RowScore(text_nats=float(n), num_text=int(c), eos_nats=0.0, num_eos=0)
        for n, c in zip(nats, counts, strict=True)
    ]


def test_the_interval_covers_the_truth_about_95_times_in_100():
    """Rows of ragged length, a true gap of -0.2 nats a token; the bare losses vary far more than the gaps."""
    draw = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        counts = draw.integers(5, 60, size=80)
        bare = counts * draw.normal(3.0, 1.0, size=80)
        ours = bare + counts * -0.2 + draw.normal(0, 0.5, size=80) * np.sqrt(counts)
        interval = paired_interval(scored(ours, counts), scored(bare, counts), seed=trial)
        hits += interval.low <= -0.2 <= interval.high
    assert 0.90 <= hits / 200 <= 0.985


def test_the_interval_is_paired_and_has_a_seed():
    """Unpaired, rows as unequal as these would hide a gap that every row shows."""
    draw = np.random.default_rng(1)
    counts = draw.integers(5, 60, size=40)
    bare = counts * draw.normal(3.0, 1.0, size=40)
    ours = bare - 0.1 * counts
    first, again, other = (paired_interval(scored(ours, counts), scored(bare, counts), seed) for seed in (0, 0, 1))
    assert first == again
    assert first.high - first.low < 1e-6
    assert first.low == pytest.approx(-0.1)
    noisy = ours + draw.normal(0, 3, size=40)
    assert paired_interval(scored(noisy, counts), scored(bare, counts), 0) != paired_interval(
        scored(noisy, counts), scored(bare, counts), 1
    )
    assert other.low == pytest.approx(-0.1)


def test_the_base_is_not_changed_by_a_bit(tiny_llama):
    before = torch.cat([parameter.flatten().clone() for parameter in tiny_llama.model.parameters()])
    losses_of(tiny_llama, {"p": soft(tiny_llama)}, rows_from_texts(sentences(5)))
    assert torch.equal(before, torch.cat([parameter.flatten() for parameter in tiny_llama.model.parameters()]))
