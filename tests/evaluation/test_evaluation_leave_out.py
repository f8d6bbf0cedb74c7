"""The loss without each virtual token: the plain model's own with that row deleted, for every length of prompt."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.slow_truth import TrueDouble, plain_nats
from support.tiny_bases import build_base, random_ids, random_prompt

from softprompt.data import build_examples, rows_from_texts
from softprompt.errors import DataError
from softprompt.evaluation import held_out_losses, leave_one_out
from softprompt.evaluation.heldout import paired_interval
from softprompt.families import forward_of
from softprompt.loss import score_examples
from softprompt.prompt import SoftPrompt


def examples_of(base, count=5):
    texts = [" ".join(f"w{token}" for token in random_ids(2 + (5 * i) % 11, i)) for i in range(count)]
    return build_examples(base, rows_from_texts(texts), eos=True, max_length=60)


def soft(base, length, seed=0):
    return SoftPrompt(random_prompt(base, length, seed))


def accuracy_from_labels(base, prompt, examples=None):
    chosen = (examples or examples_of(base)).examples
    return leave_one_out(base, forward_of(base), chosen, prompt)


@torch.no_grad()
def true_loss(base, tensor):
    """By plain concatenation, one row at a time; `tensor` None is the bare base."""
    nats = [plain_nats(base, e.ids, e.text_mask, tensor) for e in examples_of(base).examples]
    return float(torch.cat(nats).sum() / len(torch.cat(nats)))


def without(tensor, token):
    kept = [i for i in range(len(tensor)) if i != token]
    return tensor[kept] if kept else None


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mpt"])
@pytest.mark.parametrize("length", [1, 2, 5, 11])
def test_each_loss_is_that_of_plain_concatenation_with_the_row_deleted(family, length):
    """11 and the whole prompt are more than one pass; 1 leaves the bare base; the families are packed and padded."""
    base = build_base(family, dtype=torch.float64)
    prompt = soft(base, length)
    with TrueDouble():
        found = accuracy_from_labels(base, prompt)
        assert found.loss == pytest.approx(true_loss(base, prompt.tensor), rel=1e-9)
        truths = [true_loss(base, without(prompt.tensor, token)) for token in range(length)]
    assert [item.token for item in found.left_out] == list(range(length))
    for item, truth in zip(found.left_out, truths, strict=True):
        assert item.loss == pytest.approx(truth, rel=1e-9)
        assert item.difference == pytest.approx(truth - found.loss, abs=1e-9)
    apart = sorted([found.loss, *truths])
    assert min(b - a for a, b in itertools.pairwise(apart)) > 1e-6, "another token's loss would not show"


@pytest.mark.parametrize("num_prompts", [1, 3, 100])
def test_the_number_of_prompts_in_a_pass_changes_nothing(tiny_llama64, monkeypatch, num_prompts):
    prompt = soft(tiny_llama64, 4)
    truth = accuracy_from_labels(tiny_llama64, prompt)
    monkeypatch.setattr("softprompt.evaluation.heldout.MAX_PROMPTS_PER_PASS", num_prompts)
    found = accuracy_from_labels(tiny_llama64, prompt)
    assert found.loss == pytest.approx(truth.loss, rel=1e-12)
    assert [item.loss for item in found.left_out] == pytest.approx([item.loss for item in truth.left_out], rel=1e-12)


def test_no_pass_has_more_prompts_than_the_limit(tiny_llama, monkeypatch):
    taken = []

    def counted(base, forward, examples, prompts):
        taken.append(len(prompts))
        return [score_examples(base, forward, [e], None if i is None else prompts[i])[0] for e, i in examples]

    monkeypatch.setattr("softprompt.evaluation.heldout.score_under", counted)
    found = accuracy_from_labels(tiny_llama, soft(tiny_llama, 20))
    assert len(found.left_out) == 20
    assert taken == [8, 8, 5]


def test_the_whole_prompts_loss_and_the_bare_one_are_those_of_a_comparison(tiny_llama):
    examples, prompt = examples_of(tiny_llama), soft(tiny_llama, 1)
    bare, ours = held_out_losses(tiny_llama, forward_of(tiny_llama), {"p": prompt}, {"set": examples})
    found = accuracy_from_labels(tiny_llama, prompt, examples)
    assert found.loss == pytest.approx(ours.loss, rel=1e-6)
    assert found.left_out[0].loss == pytest.approx(bare.loss, rel=1e-6)
    assert (found.num_rows, found.num_tokens) == (ours.num_rows, ours.num_tokens)
    assert found.left_out[0].difference == pytest.approx(-ours.difference, rel=1e-4)


def test_the_interval_of_a_left_out_token_is_the_paired_one(tiny_llama):
    examples, prompt = examples_of(tiny_llama).examples, soft(tiny_llama, 3)
    forward = forward_of(tiny_llama)
    found = leave_one_out(tiny_llama, forward, examples, prompt, seed=4)
    whole = score_examples(tiny_llama, forward, examples, prompt.tensor)
    for item in found.left_out:
        scores = score_examples(tiny_llama, forward, examples, without(prompt.tensor, item.token))
        truth = paired_interval(scores, whole, seed=4)
        assert (item.interval.low, item.interval.high) == pytest.approx((truth.low, truth.high), abs=1e-5)
        assert item.interval.low < item.difference < item.interval.high


def test_leaving_out_either_of_two_equal_neighbours_costs_the_same(tiny_llama64):
    tensor = random_prompt(tiny_llama64, 3)
    first, second, _, last = accuracy_from_labels(tiny_llama64, SoftPrompt(tensor[[0, 0, 1, 2]])).left_out
    assert first.loss == pytest.approx(second.loss, rel=1e-12)
    assert first.loss != pytest.approx(last.loss, rel=1e-3)


class TestDegenerate:
    def test_a_single_example_has_no_interval(self, tiny_llama):
        found = accuracy_from_labels(tiny_llama, soft(tiny_llama, 2), examples_of(tiny_llama, 1))
        assert [item.interval for item in found.left_out] == [None, None]
        assert all(math.isfinite(item.loss) for item in found.left_out)

    def test_rows_of_one_word_have_no_predecessor_without_bos(self, tiny_gpt2):
        examples = build_examples(tiny_gpt2, rows_from_texts(["w5", "w6"]), eos=False, max_length=60)
        with pytest.raises(DataError, match="none of the 2 held-out rows has a text token"):
            accuracy_from_labels(tiny_gpt2, soft(tiny_gpt2, 2), examples)

    def test_rows_without_a_predecessor_are_not_counted(self, tiny_gpt2):
        def of(texts):
            rows = build_examples(tiny_gpt2, rows_from_texts(texts), eos=False, max_length=60)
            return accuracy_from_labels(tiny_gpt2, soft(tiny_gpt2, 2), rows)

        assert of(["w5", "w6 w7 w8", "w9 w10"]) == of(["w6 w7 w8", "w9 w10"])
        assert of(["w5", "w6 w7 w8"]).num_rows == 1


def test_the_base_is_not_changed_by_a_bit(tiny_llama):
    before = torch.cat([parameter.flatten().clone() for parameter in tiny_llama.model.parameters()])
    accuracy_from_labels(tiny_llama, soft(tiny_llama, 3))
    assert torch.equal(before, torch.cat([parameter.flatten() for parameter in tiny_llama.model.parameters()]))
