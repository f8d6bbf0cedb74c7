"""A head starts as the linear probe of its rows behind the first prompt: scikit-learn's on plain states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support.encoders import build_encoder
from support.headed_prompts import WORDS, records_of, rows_of
from support.ready import ready_run
from support.tiny_bases import build_base, random_prompt

from softprompt.config import TrainConfig
from softprompt.data import build_task_examples
from softprompt.errors import ConfigError
from softprompt.families import forward_of
from softprompt.loss import objective
from softprompt.training import Alone, train
from softprompt.training.head_start import MOST_ROWS, fitted_head, logistic_regression

SETTINGS = {"task": "classify", "virtual_tokens": 3, "epochs": 1, "seed": 4}


@dataclass
class Second:
    """The second of two ranks, whose sums are the first one's weights."""

    first: dict[str, torch.Tensor]
    rank, count, num_on_this_machine, in_step = 1, 2, 1, False

    def sum(self, tensors):
        for tensor, of_first in zip(tensors, self.first.values(), strict=True):
            assert not tensor.any()
            tensor += of_first


@pytest.fixture(scope="module")
def bert():
    return build_encoder("bert", words=WORDS, part="bare", dtype=torch.float64)


def fitted(base, rows, ranks=None, length=3):
    """The head, what it is fitted to, and the prompt that stands in front."""
    examples = build_task_examples(base, rows, max_length=40).examples
    trained, start = objective(base, forward_of(base), rows.form), random_prompt(base, length, 7)
    weights = fitted_head(base, forward_of(base), trained, examples, start, 0, ranks or Alone())
    return trained, weights, examples, start


def mean_states(base, examples, start):
    """By plain transformers, a row at a time: [CLS], virtual tokens, text; the mean leaves the virtual ones out."""
    found = []
    for example in examples:
        text = base.embedding(torch.tensor(example.ids))
        whole = torch.cat([text[:1], start.to(text.dtype), text[1:]])
        states = base.model(inputs_embeds=whole[None]).last_hidden_state[0]
        found.append(torch.cat([states[:1], states[1 + len(start) :]])[list(example.columns)].mean(dim=0))
    return torch.stack(found).detach()


def test_the_fit_is_scikit_learns_on_the_states_of_plain_transformers(bert):
    """Of two labels one weight stands for both with opposite signs, so that half of its penalty is paid by each."""
    rows = rows_of(bert, "classify", 40)
    assert rows.form.pooling == "mean"
    trained, weights, examples, start = fitted(bert, rows)
    states, labels = mean_states(bert, examples, start), [each.labels[0] for each in examples]
    centred = states - states.mean(dim=0)
    unit = centred / centred.square().sum(dim=1).mean().sqrt()
    with_one = torch.cat([unit, torch.ones(len(unit), 1, dtype=unit.dtype)], dim=1)  # the bias has a penalty too
    theirs = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(with_one, labels)
    ours = trained.head.logits(weights, states)
    np.testing.assert_allclose((ours[:, 1] - ours[:, 0]).numpy(), theirs.decision_function(with_one), atol=1e-4)
    drawn = trained.head.logits(trained.head.start(0), states)
    assert abs((drawn[:, 1] - drawn[:, 0]).numpy() - theirs.decision_function(with_one)).max() > 0.1


def test_of_more_labels_the_minimum_is_found_and_a_layer_without_bias_has_none():
    draws = np.random.default_rng(0)
    features, labels = draws.normal(size=(60, 5)), draws.integers(0, 4, 60)
    weight, bias = logistic_regression(features, labels, 4, has_bias=False)
    theirs = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(features, labels)
    np.testing.assert_allclose(weight, theirs.coef_, atol=1e-4)
    assert not bias.any()


@pytest.mark.parametrize("family", ["roberta", "deberta-v2", "gpt2"])
def test_heads_of_several_layers_and_of_decoders_begin_with_a_lower_loss_than_drawn_ones(family):
    base = build_base("gpt2") if family == "gpt2" else build_encoder(family, words=WORDS)
    rows = rows_of(base, "classify", 40)
    trained, weights, _, start = fitted(base, rows)
    trained.head.check(weights, "the fitted head")
    losses = []
    for own in (weights, trained.head.start(0)):
        config = TrainConfig(**SETTINGS, max_steps=1, learning_rate=1e-9, head_learning_rate=1e-9, batch_rows=40)
        prompt = train(base, rows, config).prompt
        prompt = type(prompt)(start.float(), prompt.record, {name: weight.float() for name, weight in own.items()})
        losses.append(train(base, rows, config, start=prompt).losses[0])
    assert losses[0] < losses[1] - 0.01


def test_training_starts_from_the_fit_unless_a_random_head_is_asked_for(bert):
    rows = rows_of(bert, "classify", 20)
    losses = {
        init: train(bert, rows, TrainConfig(**SETTINGS, head_init=init, batch_rows=20)).losses[0]
        for init in (None, "fit", "random")
    }
    assert losses[None] == losses["fit"] < losses["random"]
    ready = ready_run(bert, rows, TrainConfig(**SETTINGS))
    assert "a fitted head over the mean over the text at rate 0.0001" in ready.task_lines[0]
    random = ready_run(bert, rows, TrainConfig(**SETTINGS, head_init="random"))
    assert "a head over the mean over the text at rate 0.001" in random.task_lines[0]


def test_of_many_rows_some_are_looked_at_and_ranks_have_the_first_ones_head(bert, monkeypatch):
    rows = rows_of(bert, "classify", 24)
    _, weights, *_ = fitted(bert, rows)
    _, second, *_ = fitted(bert, rows, ranks=Second(weights))
    assert all(torch.equal(second[name], weight) for name, weight in weights.items())
    monkeypatch.setattr("softprompt.training.head_start.MOST_ROWS", 12)
    _, of_half, *_ = fitted(bert, rows)
    every_other = rows_of(bert, "classify", 24).select(range(0, 24, 2))
    assert MOST_ROWS == 2_000 and len(records_of("classify", 24)) == 24
    _, expected, *_ = fitted(bert, every_other)
    assert all(torch.equal(of_half[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("task", ["answer", "embed"])
def test_a_fit_is_refused_where_no_layer_can_be_fitted(bert, task):
    config = TrainConfig(task=task, head_init="fit", virtual_tokens=2)
    with pytest.raises(ConfigError, match=f"head_init is 'fit', but task '{task}' has no head"):
        train(bert, records_of(task), config)
