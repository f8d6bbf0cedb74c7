"""A run that goes on from a state is, to the bit, the run that never stopped."""

import dataclasses
import json

import pytest
import torch
from support.kernel_tables import own_cache, table_of, write_table
from support.ready import ready_run
from support.slow_truth import relative_error
from support.tiny_bases import build_base

from softprompt.config import TrainConfig
from softprompt.errors import StorageError
from softprompt.families import forward_of
from softprompt.families.frozen_linear import active_kernels, can_prepack_float32
from softprompt.training import Candidate, ResumePoint, RunState, train, train_together

SHORT = {"virtual_tokens": 4, "epochs": 3, "batch_rows": 8, "save_every": 1}


def config(**changes):
    return TrainConfig(**{**SHORT, **changes})


def points_of(run):
    """A run's result and every point at which it could be resumed, as they come back from JSON."""
    seen = []
    result = run(lambda event: seen.append(event) if isinstance(event, ResumePoint) else None)
    return result, [through_json(point.state) for point in seen]


def through_json(state):
    return RunState.from_json(json.loads(json.dumps(state.to_json())), state.tensors)


VARIANTS = {
    "plain": {},
    "cosine, clipped, decayed": {"schedule": "cosine", "max_grad_norm": 0.1, "weight_decay": 0.1, "warmup_steps": 2},
    "residual MLP": {"reparameterisation": "residual-mlp", "bottleneck": 3},
    "low rank": {"reparameterisation": "low-rank", "bottleneck": 2},
    "split": {"micro_batch_rows": 3},
    "patience": {"learning_rate": 5.0, "patience": 3, "validate_every": 1},
    "tokens": {"batch_tokens": 40},
    "averaged": {"averaging": 0.6},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_at_any_step_is_the_same_to_the_bit(variant, tiny_llama, texts, held_out):
    settings = config(**VARIANTS[variant])
    straight, states = points_of(lambda sink: train(tiny_llama, texts, settings, validation=held_out, sink=sink))
    assert len(states) == len(straight.losses)
    for state in states:
        resumed = train(tiny_llama, texts, settings, validation=held_out, resume=state)
        assert torch.equal(resumed.prompt.tensor, straight.prompt.tensor)
        assert (resumed.losses, resumed.validation_losses) == (straight.losses, straight.validation_losses)
        assert resumed.kept_step == straight.kept_step
        assert f"resumed after step {state.step}" in resumed.notes


def test_the_optimisers_moments_matter(tiny_llama, texts):
    straight, states = points_of(lambda sink: train(tiny_llama, texts, config(), sink=sink))
    forgetful = {name: torch.zeros_like(t) if "exp_avg" in name else t for name, t in states[2].tensors.items()}
    resumed = train(tiny_llama, texts, config(), resume=dataclasses.replace(states[2], tensors=forgetful))
    assert relative_error(resumed.prompt.tensor, straight.prompt.tensor) > 1e-3  # the control


def test_many_together_resume_too(tiny_llama, texts, held_out):
    candidates = [
        Candidate(name=f"{i}", data=texts, validation=held_out, config=config(epochs=4, seed=i, batch_rows=4 + i))
        for i in range(4)
    ]

    def run(sink=None, resume=None):
        return train_together(tiny_llama, candidates, halving=True, sink=sink, resume=resume)

    straight, states = points_of(run)
    for state in states[:: len(states) // 3]:
        for found, wanted in zip(run(resume=state), straight, strict=True):
            assert torch.equal(found.prompt.tensor, wanted.prompt.tensor)
            assert found.dropped_after == wanted.dropped_after


def test_another_split_gives_the_same_to_rounding(texts):
    base = build_base("llama", dtype=torch.float64)
    straight, states = points_of(lambda sink: train(base, texts, config(), sink=sink))
    resumed = train(base, texts, config(micro_batch_rows=3), resume=states[3])
    assert relative_error(resumed.prompt.tensor, straight.prompt.tensor) < 1e-6
    assert resumed.plan.micro_batch_rows == 3


def test_a_state_of_another_run_is_refused(tiny_llama, texts, held_out):
    _, states = points_of(lambda sink: train(tiny_llama, texts, config(), validation=held_out, sink=sink))
    others = [
        (texts[1:], config(), held_out),
        (texts, config(seed=1), held_out),
        (texts, config(epochs=4), held_out),
        (texts, config(), held_out[1:]),
    ]
    for data, settings, rows in others:
        with pytest.raises(StorageError, match="of another run"):
            train(tiny_llama, data, settings, validation=rows, resume=states[0])
    with pytest.raises(StorageError, match="state_version"):
        RunState.from_json({"state_version": 99}, {})
    with pytest.raises(StorageError, match="malformed"):
        RunState.from_json({"state_version": 1}, {})


def test_a_finished_state_trains_no_further(tiny_llama, texts):
    straight, states = points_of(lambda sink: train(tiny_llama, texts, config(), sink=sink))
    again = train(tiny_llama, texts, config(), resume=states[-1])
    assert torch.equal(again.prompt.tensor, straight.prompt.tensor)
    assert again.losses == straight.losses
    assert ready_run(tiny_llama, texts, config()).loop.step == 0


def test_another_dtype_goes_on_with_the_same_run(texts):
    bases = {dtype: build_base("gpt2", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert bases[torch.float32].embedding_rms != bases[torch.bfloat16].embedding_rms
    straight, states = points_of(lambda sink: train(bases[torch.float32], texts, config(), sink=sink))
    resumed = train(bases[torch.bfloat16], texts, config(), resume=states[3])
    assert len(resumed.losses) == len(straight.losses)
    assert resumed.losses == pytest.approx(straight.losses, rel=0.05)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    return own_cache(monkeypatch, tmp_path / "cache")


def wide_base():
    """Wide enough that each way sums in an order of its own, and not used before."""
    return build_base("llama", hidden_size=64, intermediate_size=1_024)


def trained_under(way, cache, texts, **how):
    base = wide_base()
    write_table(cache, table_of(base, way))
    return points_of(lambda sink: train(base, texts, config(), sink=sink, **how))


@pytest.mark.skipif(not can_prepack_float32(torch.zeros(2, 2)), reason="here torch has no second way with other bits")
def test_a_resumed_run_uses_its_own_kernels_whatever_the_cache_says(cache, texts):
    straight, states = trained_under("onednn", cache, texts)
    assert "onednn" in str(states[2].metadata["kernels"])
    changed, _ = trained_under("linear", cache, texts)
    assert not torch.equal(changed.prompt.tensor, straight.prompt.tensor)  # the control
    resumed, _ = trained_under("linear", cache, texts, resume=states[2])
    assert torch.equal(resumed.prompt.tensor, straight.prompt.tensor)
    assert resumed.losses == straight.losses != changed.losses
    assert resumed.plan.kernels == straight.plan.kernels


def test_a_run_that_is_resumed_on_another_processor_is_planned_anew_and_says_so(cache, texts):
    _, states = trained_under("transposed", cache, texts)
    kernels = states[2].metadata["kernels"]
    moved = {**kernels, "machine": {**kernels["machine"], "processor": "another one"}}
    state = dataclasses.replace(states[2], metadata={**states[2].metadata, "kernels": moved})
    resumed, _ = trained_under("linear", cache, texts, resume=state)
    (note,) = [note for note in resumed.notes if "matrix kernels" in note]
    assert "processor was another one, is " in note and "are planned anew" in note
    assert "transposed" not in str(resumed.plan.kernels["choices"])


def test_a_state_of_a_release_that_recorded_no_kernels_follows_the_fixed_rules(cache, texts):
    base = wide_base()
    straight, states = points_of(
        lambda sink: train(dataclasses.replace(base, kernels="fixed"), texts, config(), sink=sink)
    )
    earlier = {key: value for key, value in states[2].metadata.items() if key != "kernels"}
    resumed, _ = trained_under("transposed", cache, texts, resume=dataclasses.replace(states[2], metadata=earlier))
    assert torch.equal(resumed.prompt.tensor, straight.prompt.tensor)


def test_a_state_with_kernels_that_are_none_is_refused(cache, texts):
    _, states = trained_under("transposed", cache, texts)
    hostile = dataclasses.replace(states[2], metadata={**states[2].metadata, "kernels": {"machine": "evil"}})
    with pytest.raises(StorageError, match="the record of the matrix kernels is malformed"):
        trained_under("transposed", cache, texts, resume=hostile)


def test_a_score_is_computed_with_the_kernels_of_the_run(cache, texts, held_out):
    base, seen = wide_base(), []
    write_table(cache, table_of(base, "transposed"))
    forward = forward_of(base)
    forward.head.kernels.choose({})  # as those of a server whose weights are prepacked differ from a run's

    def score(prompt):
        with forward.head.kernels.active():
            seen.append(active_kernels().choices)
        return 1.0

    train(base, texts, config(best_by="accuracy", epochs=1), validation=held_out, score=score)
    assert seen and all("transposed" in str(choices) for choices in seen)
