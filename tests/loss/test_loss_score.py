"""A reported loss covers the text tokens that have a real predecessor in the bare input, EOS apart, in any batching."""

import pytest
import torch
from support.slow_truth import plain_nats
from support.tiny_bases import BOS, EOS, random_ids, random_prompt

from softprompt.families import forward_of
from softprompt.loss import score_examples, target_nlls
from softprompt.splice import Row
from softprompt.types import Example


def example(base, text, has_eos=True, context=0):
    ids = (*base.bos_ids, *text, *((EOS,) if has_eos else ()))
    special = len(base.bos_ids)
    mask = tuple(index >= special + context for index in range(len(ids)))
    return Example(ids=ids, target_mask=mask, num_special=special, has_eos=has_eos, row=0)


def examples_of(base):
    return [
        example(base, random_ids(9, 1)),
        example(base, random_ids(1, 2)),
        example(base, random_ids(30, 3), has_eos=False),
        example(base, random_ids(6, 4), context=3),
    ]


def true_score(base, item, prompt):
    """Summed nats of the text mask and of EOS, each by plain concatenation."""
    text = plain_nats(base, item.ids, item.text_mask, prompt).sum() if any(item.text_mask) else 0.0
    eos = plain_nats(base, item.ids, item.eos_mask, prompt).sum() if any(item.eos_mask) else 0.0
    return float(text), float(eos)


@pytest.mark.parametrize("length", [None, 1, 6])
@pytest.mark.parametrize("base_name", ["tiny_llama", "tiny_gpt2"])
def test_scores_equal_plain_concatenation(request, base_name, length):
    base = request.getfixturevalue(base_name)
    prompt = None if length is None else random_prompt(base, length)
    items = examples_of(base)
    scores = score_examples(base, forward_of(base), items, prompt)
    for item, score in zip(items, scores, strict=True):
        with torch.no_grad():
            text, eos = true_score(base, item, prompt)
        assert score.text_nats == pytest.approx(text, rel=1e-5)
        assert score.eos_nats == pytest.approx(eos, rel=1e-5)
        assert (score.num_text, score.num_eos) == (sum(item.text_mask), int(item.has_eos))


def test_a_tokenizer_with_bos_counts_the_first_word_and_one_without_does_not(tiny_llama, tiny_gpt2):
    with_bos, without = example(tiny_llama, (5, 6, 7)), example(tiny_gpt2, (5, 6, 7))
    assert with_bos.ids == (BOS, 5, 6, 7, EOS)
    assert with_bos.text_mask == (False, True, True, True, False)
    assert without.text_mask == (False, True, True, False)
    assert without.target_mask == (True, True, True, True)  # training does count it: the prompt precedes it
    assert without.eos_mask == (False, False, False, True)


def test_scores_with_and_without_a_prompt_cover_the_same_tokens(tiny_gpt2):
    forward, items = forward_of(tiny_gpt2), examples_of(tiny_gpt2)
    bare = score_examples(tiny_gpt2, forward, items, None)
    prompted = score_examples(tiny_gpt2, forward, items, random_prompt(tiny_gpt2, 4))
    assert [(s.num_text, s.num_eos) for s in bare] == [(s.num_text, s.num_eos) for s in prompted]
    assert all(abs(a.text_nats - b.text_nats) > 1e-2 for a, b in zip(bare, prompted, strict=True) if a.num_text)


@pytest.mark.parametrize("slots", [1, 20, 100_000])
def test_scores_do_not_depend_on_the_batching(tiny_llama64, monkeypatch, slots):
    base = tiny_llama64
    prompt = random_prompt(base, 5)
    truth = score_examples(base, forward_of(base), examples_of(base), prompt)
    monkeypatch.setattr("softprompt.loss.score.SLOTS_PER_BATCH", slots)
    for ours, theirs in zip(score_examples(base, forward_of(base), examples_of(base), prompt), truth, strict=True):
        assert ours.text_nats == pytest.approx(theirs.text_nats, rel=1e-13)
        assert ours.eos_nats == pytest.approx(theirs.eos_nats, rel=1e-13)


def test_each_row_is_scored_under_its_own_prompt_or_none(tiny_llama):
    prompts = [random_prompt(tiny_llama, 2, 1), random_prompt(tiny_llama, 7, 2)]
    rows = [Row(random_ids(5, i), owner, (False, True, False, True, True)) for i, owner in enumerate((1, None, 0, 1))]
    for row, losses in zip(rows, target_nlls(tiny_llama, forward_of(tiny_llama), rows, prompts), strict=True):
        with torch.no_grad():
            truth = plain_nats(tiny_llama, row.ids, row.targets, None if row.prompt is None else prompts[row.prompt])
        assert list(losses) == [1, 3, 4]
        assert list(losses.values()) == pytest.approx(truth.tolist(), rel=1e-5)


def test_scoring_leaves_no_gradient_on_the_prompt(tiny_llama):
    prompt = random_prompt(tiny_llama, 2).requires_grad_(True)
    score_examples(tiny_llama, forward_of(tiny_llama), examples_of(tiny_llama), prompt)
    assert prompt.grad is None
