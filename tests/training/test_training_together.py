"""Several prompts in one pass: each becomes what it becomes alone, and rivals are dropped by their validation."""

import math

import pytest
import torch
from support.ready import ready_run
from support.slow_truth import relative_error
from support.tiny_bases import build_base, random_ids

from softprompt.config import TrainConfig
from softprompt.errors import ConfigError, DivergedError
from softprompt.prompt import SoftPrompt
from softprompt.training import Candidate, Dropped, ResumePoint, StepDone, prepare, train, train_together
from softprompt.training.loop import losers

SHORT = {"virtual_tokens": 4, "epochs": 2, "batch_rows": 8}


def config(**changes):
    return TrainConfig(**{**SHORT, **changes})


@pytest.fixture(scope="module")
def other_texts():
    return [" ".join(f"w{token}" for token in random_ids(2 + seed % 7, 300 + seed)) for seed in range(9)]


def mixed_candidates(texts, other_texts, held_out):
    """Two clients' rows; other lengths, starts, rates, schedules, batches, patience and parameters."""
    return [
        Candidate(name="a", data=texts, config=config(), validation=held_out),
        Candidate(name="b", data=texts, config=config(seed=3, init="vocab", virtual_tokens=7, schedule="constant")),
        Candidate(name="c", data=other_texts, config=config(batch_rows=2, relative_learning_rate=1.0, epochs=3)),
        Candidate(name="d", data=other_texts, validation=held_out, config=config(reparameterisation="residual-mlp")),
        Candidate(name="e", data=texts, config=config(reparameterisation="low-rank", bottleneck=2, weight_decay=0.1)),
        Candidate(
            name="f",
            data=texts,
            validation=held_out,
            score=lambda prompt: -float(prompt.tensor.norm()),
            config=config(patience=1, validate_every=1, learning_rate=50.0),
        ),
    ]


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
@pytest.mark.parametrize("micro_batch_rows", [None, 3])
def test_each_of_many_becomes_what_it_becomes_alone(family, micro_batch_rows, texts, other_texts, held_out):
    base = build_base(family, dtype=torch.float64)
    candidates = mixed_candidates(texts, other_texts, held_out)
    if micro_batch_rows is not None:
        some = {"micro_batch_rows": micro_batch_rows}
        candidates[0] = Candidate(name="a", data=texts, config=config(**some), validation=held_out)
    together = train_together(base, candidates)
    for candidate, found in zip(candidates, together, strict=True):
        (alone,) = train_together(base, [candidate])
        assert relative_error(found.prompt.tensor, alone.prompt.tensor) < 1e-6
        assert found.losses == pytest.approx(alone.losses, rel=1e-6)
        assert [step for step, _ in found.validation_losses] == [step for step, _ in alone.validation_losses]
        assert found.kept_step == alone.kept_step
    assert len(together[5].losses) < together[5].plan.num_steps  # its patience ran out
    start = ready_run(base, texts, candidates[0].config).trial.start
    assert relative_error(together[0].prompt.tensor, start) > 0.02  # the controls: it moved, and another seed differs
    assert relative_error(together[0].prompt.tensor, train(base, texts, config(seed=9)).prompt.tensor) > 0.02


def test_events_name_their_candidate_and_a_single_run_names_none(tiny_llama, texts):
    seen = []
    train_together(
        tiny_llama, [Candidate(name=name, data=texts, config=config(epochs=1)) for name in "ab"], sink=seen.append
    )
    steps = [event for event in seen if isinstance(event, StepDone)]
    assert [(step.candidate, step.step) for step in steps[:4]] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert steps[0].to_json()["candidate"] == "a"
    seen.clear()
    train(tiny_llama, texts, config(epochs=1), sink=seen.append)
    assert all("candidate" not in event.to_json() for event in seen if isinstance(event, StepDone))
    assert list(seen[-1].prompts) == [None]


def test_names_are_needed_to_tell_candidates_apart(tiny_llama, texts):
    with pytest.raises(ConfigError, match="a name each"):
        train_together(tiny_llama, [Candidate(data=texts, config=config())] * 2)
    with pytest.raises(ConfigError, match="no candidate"):
        train_together(tiny_llama, [])


def test_halving_drops_the_weaker_half_again_and_again(tiny_llama, texts, held_out):
    rates = [0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2]
    candidates = [
        Candidate(name=f"{rate}", data=texts, validation=held_out, config=config(epochs=8, relative_learning_rate=rate))
        for rate in rates
    ]
    seen = []
    results = train_together(tiny_llama, candidates, halving=True, sink=seen.append)
    dropped = [event for event in seen if isinstance(event, Dropped)]
    assert len(dropped) == 7
    assert [result.dropped_after for result in results].count(None) == 1
    by_step = [sum(1 for event in dropped if event.step == step) for step in sorted({e.step for e in dropped})]
    assert by_step == [4, 2, 1]
    first = min(event.step for event in dropped)
    after_first = {result.name: dict(result.validation_losses)[first] for result in results}
    losers_then = {event.candidate for event in dropped if event.step == first}
    assert min(after_first[name] for name in losers_then) >= sorted(after_first.values())[3]
    (survivor,) = (result for result in results if result.dropped_after is None)
    (alone,) = train_together(tiny_llama, [next(c for c in candidates if c.name == survivor.name)])
    assert relative_error(survivor.prompt.tensor, alone.prompt.tensor) < 1e-3


def test_rivals_are_of_one_group_and_have_validation_rows(tiny_llama, texts, held_out):
    kinds = [(0, held_out), (0, held_out), (1, held_out), (2, None), (2, None)]
    candidates = [
        Candidate(name=f"{i}", data=texts, validation=rows, group=group, config=config(epochs=4, seed=i))
        for i, (group, rows) in enumerate(kinds)
    ]
    results = train_together(tiny_llama, candidates, halving=True)
    assert [result.dropped_after is not None for result in results].count(True) == 1
    assert all(result.dropped_after is None for result in results[2:])


def test_nothing_is_dropped_before_it_is_validated(tiny_llama, texts, held_out):
    ready = prepare(
        tiny_llama,
        [Candidate(name=f"{i}", data=texts, validation=held_out, config=config(seed=i)) for i in range(4)],
    )
    assert losers(ready.loop.trials) == []


def test_a_score_chooses_the_checkpoint_in_place_of_the_loss(tiny_llama, texts, held_out):
    def first_number(prompt: SoftPrompt) -> float:
        return -abs(float(prompt.tensor[0, 0]) - target)

    every = config(epochs=4, validate_every=1)
    seen = []
    train(tiny_llama, texts, every, validation=held_out, sink=seen.append)
    third = [event for event in seen if isinstance(event, ResumePoint)][2].prompts[None]
    target = float(third.tensor[0, 0])
    result = train(tiny_llama, texts, every, validation=held_out, score=first_number)
    assert result.kept_step == 3
    assert result.value == 0.0
    assert torch.equal(result.prompt.tensor, third.tensor)
    with pytest.raises(ConfigError, match="no score was given"):
        train(tiny_llama, texts, config(best_by="accuracy"), validation=held_out)
    with pytest.raises(ConfigError, match="no validation rows"):
        train(tiny_llama, texts, config(best_by="accuracy"), score=first_number)


@pytest.mark.parametrize("kind", ["residual-mlp", "low-rank"])
def test_a_reparameterisation_begins_at_the_start_and_is_folded_away(kind, tiny_llama, texts):
    settings = config(reparameterisation=kind, bottleneck=3)
    trial = ready_run(tiny_llama, texts, settings).trial
    assert torch.equal(trial.prompt(), trial.start)
    result = train(tiny_llama, texts, settings)
    assert result.prompt.tensor.shape == trial.start.shape
    assert result.losses[-1] < result.losses[0]
    assert not math.isnan(result.losses[-1])
    plain = train(tiny_llama, texts, config())
    assert relative_error(result.prompt.tensor, plain.prompt.tensor) > 0.01


def test_a_candidate_that_diverges_stops_and_the_others_train_on(tiny_llama, texts, held_out):
    rates = {"calm": 0.05, "wild": 1e29}
    candidates = [
        Candidate(name=name, data=texts, validation=held_out, config=config(learning_rate=rate))
        for name, rate in rates.items()
    ]
    calm, wild = train_together(tiny_llama, candidates)
    assert (calm.diverged_after, len(calm.losses)) == (None, calm.plan.num_steps)
    assert wild.diverged_after is not None
    assert wild.diverged_after < wild.plan.num_steps
    assert bool(wild.prompt.tensor.isfinite().all())
    (alone,) = train_together(tiny_llama, candidates[:1])
    assert relative_error(calm.prompt.tensor, alone.prompt.tensor) < 1e-3
    with pytest.raises(DivergedError, match=r"diverged after step \d+: lower the learning rate \(1e\+29\)"):
        train(tiny_llama, texts, config(learning_rate=1e29))
    with pytest.raises(DivergedError):  # found out by the prompt itself, at the end of an epoch of one step
        train(tiny_llama, texts, config(learning_rate=1e29, epochs=1, batch_rows=len(texts)))


def test_few_validations_drop_one_half_at_a_time_and_none_at_the_end(tiny_llama, texts, held_out):
    candidates = [
        Candidate(name=f"{i}", data=texts, validation=held_out, config=config(epochs=2, seed=i)) for i in range(4)
    ]
    results = train_together(tiny_llama, candidates, halving=True)
    assert sorted(result.dropped_after or 0 for result in results) == [0, 0, 3, 3]
