"""A step with the loss among labels equals a walk through the labels' tree over plain logits, row by row."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.ready import ready_run
from support.slow_truth import TrueDouble, plain_logits, relative_error
from support.tiny_bases import EOS, build_base, random_ids, random_prompt

from softprompt.config import TrainConfig
from softprompt.data import build_examples, rows_from_records, rows_from_texts
from softprompt.errors import ConfigError, StorageError
from softprompt.families import Packing, forward_of
from softprompt.training import Candidate, ResumePoint, StepDone, train, train_together
from softprompt.training.step import accumulate_gradient
from softprompt.training.trial import training_row

# One begins another, two share their first words, one stands apart.
LABELS = ("w90 w91", "w90 w91 w92", "w90 w93", "w94 w91 w92")
FORM = {"template": "w5 {text} w6", "completion": " {label}"}
CONFIG = TrainConfig(loss="labels", virtual_tokens=4, batch_rows=9, max_steps=2, reparameterisation="none")


def records(count=9):
    return [
        {"text": " ".join(f"w{token}" for token in random_ids(2 + seed % 5, seed)), "label": LABELS[seed % len(LABELS)]}
        for seed in range(count)
    ]


def labelled(**changes):
    return rows_from_records(records(), **{**FORM, **changes})


def slow_row(base, text, own, labels, vector, *, eos=True):
    """Nats among the labels, and those of the tokens with their weights, by plain logits and a walk through the tree.

    Words of the tiny bases are one token each, whatever stands before them.
    """
    end = [EOS] if eos else []
    context = [*base.bos_ids, *base.encode(f"w5 {text} w6")]
    paths = [[*base.encode(label), *end] for label in labels]
    path = [*base.encode(own), *end]
    log_probs = torch.log_softmax(plain_logits(base, context + path, vector).double(), dim=-1)
    log_probs = log_probs[vector.shape[0] + len(context) - 1 :]
    among = torch.zeros((), dtype=torch.float64)
    for depth, token in enumerate(path):
        children = {other[depth] for other in paths if other[:depth] == path[:depth] and len(other) > depth}
        if len(children) > 1:
            among = among - log_probs[depth, token] + torch.logsumexp(log_probs[depth, sorted(children)], dim=0)
    weights = [CONFIG.eos_weight if token == EOS else 1.0 for token in path]
    tokens = -sum(
        weight * log_probs[depth, token] for depth, (token, weight) in enumerate(zip(path, weights, strict=True))
    )
    return among, tokens, sum(weights)


def slow_step(base, vector, labels=LABELS, *, eos=True):
    """The loss that a step reports, and the gradient of what it trains."""
    among, tokens, weights = zip(
        *(slow_row(base, row["text"], row["label"], labels, vector, eos=eos) for row in records()), strict=True
    )
    loss = sum(among) / len(among)
    (loss + sum(tokens) / sum(weights)).backward()
    return float(loss.detach()), vector.grad


def fast_step(base, rows, vector, config=CONFIG, micro_batch_rows=9, **changes):
    examples = build_examples(base, rows, eos=config.eos, max_length=90).examples
    ours = [training_row(example, config) for example in examples]
    forward = dataclasses.replace(forward_of(base), **changes)
    nats = sum(accumulate_gradient(base, forward, [vector], ours, micro_batch_rows))
    return float(nats) / len(ours), vector.grad


def fresh(base):
    return random_prompt(base, 4).requires_grad_(True)


@pytest.mark.parametrize("micro_batch_rows", [2, 9])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "gptj"])
def test_a_step_equals_a_walk_through_the_tree_of_labels(family, eos, micro_batch_rows):
    """With a soft cap (gemma2) and a bias (gptj) too."""
    base = build_base(family, dtype=torch.float64)
    config = TrainConfig(loss="labels", eos=eos)
    with TrueDouble():
        loss, gradient = fast_step(base, labelled(), fresh(base), config, micro_batch_rows)
        true_loss, true_gradient = slow_step(base, fresh(base), eos=eos)
        other_loss, other_gradient = slow_step(base, fresh(base), (*LABELS, "w90 w80"), eos=eos)  # the control
    assert loss == pytest.approx(true_loss, rel=1e-12)
    assert relative_error(gradient, true_gradient) < 1e-9
    assert abs(other_loss - true_loss) > 1e-3
    assert relative_error(other_gradient, true_gradient) > 1e-3


@pytest.mark.parametrize(
    "changes", [{"packing": Packing(None, "for this test")}, {"max_batchable_length": 5}], ids=["padded", "one by one"]
)
def test_rows_that_cannot_run_packed_have_the_same_loss_among_labels(changes):
    base = build_base("llama", dtype=torch.float64)
    with TrueDouble():
        loss, gradient = fast_step(base, labelled(), fresh(base), micro_batch_rows=4, **changes)
        true_loss, true_gradient = slow_step(base, fresh(base))
    assert loss == pytest.approx(true_loss, rel=1e-12)
    assert relative_error(gradient, true_gradient) < 1e-9


def test_the_labels_likelihoods_add_up_to_one(tiny_llama64):
    """As guided decoding chooses among them: each step between the ids that some label has next."""
    text, vector = records(1)[0]["text"], random_prompt(tiny_llama64, 4)
    rows = rows_from_records([{"text": text, "label": label} for label in LABELS for _ in range(2)], **FORM)
    examples = build_examples(tiny_llama64, rows, eos=True, max_length=90).examples
    likelihoods = []
    for example in examples[::2]:
        row = training_row(example, CONFIG)
        (nats,) = accumulate_gradient(tiny_llama64, forward_of(tiny_llama64), [vector.requires_grad_(True)], [row], 1)
        likelihoods.append(float(torch.exp(-nats)))
    assert sum(likelihoods) == pytest.approx(1.0, rel=1e-9)
    assert max(likelihoods) < 0.999


def test_training_reports_the_mean_over_the_rows_and_steps_by_that_gradient(tiny_llama64):
    seen = []
    train(tiny_llama64, labelled(), CONFIG, sink=seen.append)
    start = ready_run(tiny_llama64, labelled(), CONFIG).trial.start.double().requires_grad_(True)
    loss, gradient = slow_step(tiny_llama64, start)
    first = next(event for event in seen if isinstance(event, StepDone))
    assert (first.loss, first.num_targets) == (pytest.approx(loss, rel=1e-6), 9)
    assert first.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-6)


def test_candidates_of_either_loss_become_together_what_they_become_alone():
    base = build_base("bloom", dtype=torch.float64)
    candidates = [
        Candidate(name="labels", data=labelled(), config=CONFIG),
        Candidate(name="tokens", data=labelled(), config=TrainConfig(loss="tokens", virtual_tokens=3, max_steps=3)),
        Candidate(
            name="text", data=rows_from_texts([row["text"] for row in records()]), config=TrainConfig(max_steps=2)
        ),
        Candidate(name="few", data=labelled(), config=TrainConfig(loss="labels", batch_rows=2, max_steps=4)),
    ]
    for candidate, found in zip(candidates, train_together(base, candidates), strict=True):
        (alone,) = train_together(base, [candidate])
        assert relative_error(found.prompt.tensor, alone.prompt.tensor) < 1e-6
        assert found.losses == pytest.approx(alone.losses, rel=1e-6)
    other = train(base, labelled(), TrainConfig(loss="tokens", virtual_tokens=4, batch_rows=9, max_steps=2))
    assert relative_error(other.prompt.tensor, train(base, labelled(), CONFIG).prompt.tensor) > 1e-3


def test_the_shares_of_several_processes_add_up_to_the_whole(tiny_llama64):
    rows = [training_row(each, CONFIG) for each in ready_run(tiny_llama64, labelled(), CONFIG).trial.examples]
    whole, parts = fresh(tiny_llama64), fresh(tiny_llama64)
    nats = sum(accumulate_gradient(tiny_llama64, forward_of(tiny_llama64), [whole], rows, 4))
    shares = [[0, 3, 6, 7], [1, 4], [2, 5, 8]]
    some = [
        sum(accumulate_gradient(tiny_llama64, forward_of(tiny_llama64), [parts], rows, 4, mine=mine, least_batches=2))
        for mine in shares
    ]
    assert float(sum(some)) == pytest.approx(float(nats), rel=1e-12)
    assert relative_error(parts.grad, whole.grad) < 1e-6


def test_a_run_with_the_loss_among_labels_resumes_to_the_bit(tiny_llama):
    config, seen = dataclasses.replace(CONFIG, batch_rows=4, max_steps=None, epochs=2), []
    straight = train(tiny_llama, labelled(), config, sink=seen.append)
    state = next(event.state for event in seen if isinstance(event, ResumePoint))
    resumed = train(tiny_llama, labelled(), config, resume=state)
    assert torch.equal(resumed.prompt.tensor, straight.prompt.tensor)
    assert resumed.losses == straight.losses
    with pytest.raises(StorageError, match="of another run"):
        train(tiny_llama, labelled(), dataclasses.replace(config, loss="tokens"), resume=state)


def test_a_row_that_is_cut_counts_what_is_left_of_its_label(tiny_llama64):
    examples = build_examples(tiny_llama64, labelled(), eos=True, max_length=3).examples  # BOS and two tokens
    assert [len(example.ids) for example in examples] == [3] * 9
    assert all(branch.column < 3 for example in examples for branch in example.branches)
    assert [branch.column for branch in examples[0].branches] == [1, 2]
    longer = build_examples(tiny_llama64, labelled(), eos=True, max_length=5).examples[1]  # "w90 w91 w92" without EOS
    assert [branch.column - len(longer.ids) for branch in longer.branches] == [-3, -2, -1]


def test_rows_without_labels_have_no_loss_among_them(tiny_llama):
    with pytest.raises(ConfigError, match=r"loss is 'labels', but texts has no labels .* use loss 'tokens'"):
        train(tiny_llama, rows_from_texts(["w5 w6", "w7"]), CONFIG)
    alike = [{"text": row["text"], "label": label} for row in records() for label in ("unknown", "words")]
    with pytest.raises(ConfigError, match="labels that all have the same tokens, ' unknown', ' words'"):
        train(tiny_llama, rows_from_records(alike, **FORM), CONFIG)
