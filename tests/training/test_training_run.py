"""A run: the base untouched by a bit, the same seed the same bits, and any cutting or interleaving the same run."""

import dataclasses
import math

import pytest
import torch
from support.ready import ready_run
from support.slow_truth import plain_nats
from support.tiny_bases import LIMIT, build_base, random_ids, random_prompt
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from softprompt.config import SamplingConfig, TrainConfig
from softprompt.data import build_examples, rows_from_texts
from softprompt.engine import Request, generate
from softprompt.errors import ConfigError, LengthError, PromptError
from softprompt.families import forward_of
from softprompt.loss import score_examples
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row
from softprompt.training import Checkpoint, ResumePoint, SliceDone, StepDone, train
from softprompt.training.step import accumulate_gradient

SHORT = {
    "virtual_tokens": 4, "epochs": 2, "batch_rows": 8, "micro_batch_rows": 8, "schedule": "linear",
    "reparameterisation": "none",
}  # fmt: skip


def config(**changes):
    return TrainConfig(**{**SHORT, **changes})


def state_of(base):
    """Every parameter and buffer, copied."""
    named = [*base.model.named_parameters(), *base.model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_base_is_bit_identical_after_everything_and_only_the_prompt_moved(family, texts, held_out):
    base = build_base(family)
    before, modules = state_of(base), [type(module) for module in base.model.modules()]
    result = train(base, texts, config(), validation=held_out)
    generate(base, [Request((5, 6), result.prompt), Request((7,))], SamplingConfig(temperature=1.0))
    examples = build_examples(base, rows_from_texts(held_out), eos=True, max_length=50)
    score_examples(base, forward_of(base), examples.examples, result.prompt.tensor)
    after = state_of(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.model.parameters())
    assert modules == [type(module) for module in base.model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.model.modules())
    start, _ = ready_run(base, texts, config()).trial.start, None
    assert not torch.equal(result.prompt.tensor, start)


@pytest.mark.parametrize("share", [0.5, 1.0, 0.2])
def test_the_kept_prompt_is_the_mean_over_the_last_steps(share, tiny_llama, texts, held_out):
    def run(averaging):
        seen = []
        settings = config(epochs=3, batch_rows=4, save_every=1, averaging=averaging)
        sink = lambda event: seen.append(event.prompts[None].tensor) if isinstance(event, ResumePoint) else None  # noqa: E731
        return train(tiny_llama, texts, settings, sink=sink), seen

    last, prompts = run(0.0)
    mean, seen = run(share)
    first = len(prompts) - int(share * len(prompts))
    expected = [torch.stack(prompts[first : end + 1]).double().mean(0) for end in range(first, len(prompts))]
    assert mean.losses == last.losses  # the steps themselves are the same
    assert all(torch.equal(a, b) for a, b in zip(seen[:first], prompts[:first], strict=True))
    for found, wanted in zip(seen[first:], expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(mean.prompt.tensor, seen[-1])
    assert (mean.prompt.tensor - last.prompt.tensor).abs().max() > 1e-4  # the control


def test_a_validation_scores_the_mean(tiny_llama, texts, held_out):
    result = train(tiny_llama, texts, config(averaging=0.5), validation=held_out)
    examples = build_examples(tiny_llama, rows_from_texts(held_out), eos=True, max_length=50).examples
    scores = score_examples(tiny_llama, forward_of(tiny_llama), examples, result.prompt.tensor)
    nats = sum(score.text_nats for score in scores) / sum(score.num_text for score in scores)
    assert dict(result.validation_losses)[result.kept_step] == pytest.approx(nats, rel=1e-5)


def test_a_single_step_that_validates_best_gives_way_to_the_first_mean(tiny_llama, texts, held_out):
    """Three steps are an epoch here, and each is validated at its end."""

    def run(epochs, averaging):
        scores = iter([0.9, 0.1, 0.3, 0.2])
        settings = config(epochs=epochs, averaging=averaging, best_by="f1")
        return train(tiny_llama, texts, settings, validation=held_out, score=lambda prompt: next(scores))

    mean, single, early = run(4, 0.5), run(4, 0.0), run(1, 0.1)
    assert (mean.kept_step, mean.value) == (9, -0.3)
    assert (single.kept_step, single.value) == (3, -0.9)  # the control
    assert (early.kept_step, early.value) == (3, -0.9)


def test_training_lowers_the_loss(tiny_llama):
    alike = ["w5 w6 w5 w6 w5"] * 24
    losses = train(tiny_llama, alike, config(epochs=8, relative_learning_rate=1.0)).losses
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tiny_llama, texts):
    first, again, other = (train(tiny_llama, texts, config(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.prompt.tensor, again.prompt.tensor)
    assert first.losses == again.losses
    assert not torch.equal(first.prompt.tensor, other.prompt.tensor)


@pytest.mark.parametrize("micro_batch_rows", [1, 3, 5])
def test_micro_batches_add_up_to_one_batch(tiny_llama64, texts, micro_batch_rows):
    whole = train(tiny_llama64, texts, config(max_steps=1, batch_rows=21, micro_batch_rows=21))
    cut = train(tiny_llama64, texts, config(max_steps=1, batch_rows=21, micro_batch_rows=micro_batch_rows))
    assert cut.losses == pytest.approx(whole.losses, rel=1e-13)
    rows = [Row(random_ids(1 + i % 9, i), 0, (True,) * (1 + i % 9)) for i in range(13)]
    gradients = []
    for size in (13, micro_batch_rows):
        prompt = random_prompt(tiny_llama64, 4).requires_grad_(True)
        list(accumulate_gradient(tiny_llama64, forward_of(tiny_llama64), [prompt], rows, size))
        gradients.append(prompt.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_prompts_trained_together_get_what_each_gets_alone(tiny_llama64):
    base = tiny_llama64
    forward = forward_of(base)
    rows = [Row(random_ids(1 + 2 * i, i), i % 3, (True,) * (1 + 2 * i)) for i in range(9)]
    together = [random_prompt(base, 2 + i, i).requires_grad_(True) for i in range(3)]
    list(accumulate_gradient(base, forward, together, rows, 4))
    for number in range(3):
        alone = random_prompt(base, 2 + number, number).requires_grad_(True)
        mine = [dataclasses.replace(row, prompt=0) for row in rows if row.prompt == number]
        list(accumulate_gradient(base, forward, [alone], mine, 4))
        torch.testing.assert_close(together[number].grad, alone.grad, rtol=1e-12, atol=1e-12)


def test_the_end_weighs_what_it_is_told_to(tiny_llama64):
    base, ids = tiny_llama64, random_ids(6)
    prompt, truth = (random_prompt(base, 4).requires_grad_(True) for _ in range(2))
    list(accumulate_gradient(base, forward_of(base), [prompt], [Row(ids, 0, (0, 1, 1, 1, 1, 0.3))], 1))
    nats = plain_nats(base, ids, (False,) + (True,) * 5, truth)
    ((nats[:4].sum() + 0.3 * nats[4]) / 4.3).backward()
    torch.testing.assert_close(prompt.grad, truth.grad, rtol=1e-9, atol=1e-12)


def test_driven_slice_by_slice_with_other_work_in_between_it_is_the_same_run(tiny_llama, texts, held_out):
    settings = config(micro_batch_rows=3)
    straight = train(tiny_llama, texts, settings, validation=held_out)
    loop = ready_run(tiny_llama, texts, settings, validation=held_out).loop
    answers, losses, num_slices = set(), [], 0
    for event in loop.events():
        num_slices += isinstance(event, SliceDone)
        losses += [event.loss] if isinstance(event, StepDone) else []
        (answer,) = generate(tiny_llama, [Request((5, 6), SoftPrompt(random_prompt(tiny_llama, 3)))])
        answers.add(answer.ids)
    assert num_slices > 2 * len(losses)
    assert len(answers) == 1
    assert tuple(losses) == straight.losses
    assert torch.equal(loop.trials[0].best.tensor, straight.prompt.tensor)


def test_the_best_prompt_by_validation_is_kept_and_patience_ends_the_run(tiny_llama, texts, held_out):
    checkpoints = []
    settings = config(epochs=40, relative_learning_rate=1.0, schedule="constant", patience=3, eos=False)
    result = train(
        tiny_llama, texts, settings, validation=held_out,
        sink=lambda event: checkpoints.append(event) if isinstance(event, Checkpoint) else None,
    )  # fmt: skip
    curve = dict(result.validation_losses)
    assert result.kept_step == min(curve, key=curve.get)
    assert len(result.losses) < result.plan.num_steps
    steps = list(curve)
    assert len(steps) - 1 - steps.index(result.kept_step) == 3
    kept = next(checkpoint for checkpoint in checkpoints if checkpoint.step == result.kept_step)
    assert torch.equal(kept.prompt.tensor, result.prompt.tensor)
    assert not torch.equal(checkpoints[-1].prompt.tensor, result.prompt.tensor)  # the last one is another


def test_the_validation_loss_is_the_reported_one(tiny_llama, texts, held_out):
    result = train(tiny_llama, texts, config(), validation=held_out)
    examples = build_examples(tiny_llama, rows_from_texts(held_out), eos=True, max_length=50).examples
    scores = score_examples(tiny_llama, forward_of(tiny_llama), examples, result.prompt.tensor)
    loss = sum(score.text_nats for score in scores) / sum(score.num_text for score in scores)
    assert dict(result.validation_losses)[result.kept_step] == pytest.approx(loss, rel=1e-6)


def test_validation_comes_every_so_many_steps_and_at_the_end(tiny_llama, texts, held_out):
    every = train(tiny_llama, texts, config(epochs=3, validate_every=4), validation=held_out)
    assert [step for step, _ in every.validation_losses] == [4, 8, 9]
    by_epoch = train(tiny_llama, texts, config(epochs=3), validation=held_out)
    assert [step for step, _ in by_epoch.validation_losses] == [3, 6, 9]


def test_without_validation_the_last_step_is_kept_and_the_run_says_so(tiny_llama, texts):
    last = []
    result = train(tiny_llama, texts, config(), sink=lambda event: last.append(event))
    assert "no validation rows: the last step is kept" in result.notes
    assert (result.kept_step, result.validation_losses) == (len(result.losses), ())
    assert torch.equal(result.prompt.tensor, last[-1].prompts[None].tensor)


def test_max_steps_ends_the_run_and_its_schedule(tiny_llama, texts):
    steps = []
    result = train(
        tiny_llama, texts, config(max_steps=4), sink=lambda e: steps.append(e) if isinstance(e, StepDone) else None
    )
    assert [event.step for event in steps] == [1, 2, 3, 4]
    assert result.plan.num_steps == 4
    assert [event.learning_rate / result.plan.learning_rate for event in steps] == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "stable-decay"])
def test_learning_rates_are_those_of_transformers(tiny_llama, texts, schedule, warmup):
    steps = []
    settings = config(epochs=3, schedule=schedule, warmup_steps=warmup, learning_rate=0.01)
    train(tiny_llama, texts, settings, sink=lambda e: steps.append(e) if isinstance(e, StepDone) else None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    truth = {
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, 9),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, 9),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
        "stable-decay": lambda: get_wsd_schedule(optimizer, warmup, 3, num_training_steps=9, decay_type="linear"),
    }[schedule]()
    rates = []
    for _ in range(9):
        rates.append(truth.get_last_lr()[0])
        optimizer.step()
        truth.step()
    assert [event.learning_rate for event in steps] == rates


def test_the_learning_rate_is_relative_to_the_embeddings_or_absolute(tiny_llama, texts):
    assert ready_run(tiny_llama, texts, config(relative_learning_rate=0.5)).trial.plan.learning_rate == pytest.approx(
        0.5 * tiny_llama.embedding_rms
    )
    assert ready_run(tiny_llama, texts, config(learning_rate=3e-3)).trial.plan.learning_rate == 3e-3
    with pytest.raises(ConfigError, match="exclude each other"):
        config(learning_rate=1.0, relative_learning_rate=1.0)


def test_clipping_scales_the_gradient_and_reports_its_norm(tiny_llama, texts):
    seen = []

    def watch(loop):
        for event in loop.events():
            if isinstance(event, StepDone):
                seen.append((event.grad_norm, float(loop.trials[0]._parameters.leaves["prompt"].grad.norm())))

    watch(ready_run(tiny_llama, texts, config(max_steps=3, max_grad_norm=1e-3)).loop)
    watch(ready_run(tiny_llama, texts, config(max_steps=3)).loop)
    clipped, free = seen[:3], seen[3:]
    assert all(norm > 1e-3 and left == pytest.approx(1e-3, rel=1e-2) for norm, left in clipped)
    assert all(norm == pytest.approx(left, rel=1e-6) for norm, left in free)
    assert clipped[0][0] == pytest.approx(free[0][0])


def test_a_step_is_counted_per_target_once(tiny_llama, texts):
    events = []
    train(tiny_llama, texts, config(epochs=1, batch_rows=21), sink=events.append)
    (step,) = (event for event in events if isinstance(event, StepDone))
    examples = build_examples(tiny_llama, rows_from_texts(texts), eos=True, max_length=LIMIT - 4).examples
    assert step.num_rows == 21
    assert step.num_tokens == sum(len(example.ids) for example in examples)
    assert step.num_targets == sum(sum(example.target_mask) for example in examples)


def test_batches_by_tokens_hold_no_more_than_that(tiny_llama, texts):
    trial = ready_run(tiny_llama, texts, config(batch_tokens=40)).trial
    for steps in trial.plan.epochs:
        assert sorted(index for step in steps for index in step) == list(range(21))
        assert all(sum(len(trial.examples[i].ids) for i in step) <= 40 for step in steps)


def stop_after(num_steps):
    def sink(event):
        if isinstance(event, StepDone) and event.step == num_steps:
            raise KeyboardInterrupt

    return sink


def test_an_interrupt_keeps_the_best_prompt_so_far(tiny_llama, texts, held_out):
    whole = train(tiny_llama, texts, config(epochs=3), validation=held_out)
    result = train(tiny_llama, texts, config(epochs=3), validation=held_out, sink=stop_after(8))
    assert (result.interrupted, whole.interrupted) == (True, False)
    assert result.losses == whole.losses[: len(result.losses)]
    seen = dict(whole.validation_losses[:2])
    assert result.kept_step == min(seen, key=seen.get)


def test_an_interrupt_without_validation_keeps_where_it_stands(tiny_llama, texts):
    result = train(tiny_llama, texts, config(epochs=3, schedule="constant"), sink=stop_after(5))
    assert (result.interrupted, result.kept_step) == (True, 5)
    assert result.prompt.record.run["interrupted"]
    five = train(tiny_llama, texts, config(epochs=3, schedule="constant", max_steps=5))
    assert torch.equal(result.prompt.tensor, five.prompt.tensor)


def test_an_interrupt_before_the_first_step_gives_the_start(tiny_llama, texts):
    def sink(event):
        raise KeyboardInterrupt

    result = train(tiny_llama, texts, config(), sink=sink)
    assert (result.kept_step, result.losses) == (0, ())
    assert torch.equal(result.prompt.tensor, ready_run(tiny_llama, texts, config()).trial.start)


def test_further_training_starts_from_the_prompt_and_names_its_parent(tiny_llama, texts):
    parent = train(tiny_llama, texts, config()).prompt
    before = parent.content_hash
    child = train(tiny_llama, texts, config(virtual_tokens=9, max_steps=1), start=parent)
    assert child.prompt.record.parent == parent.content_hash == before
    assert child.prompt.num_virtual_tokens == 4  # the start's, whatever the configuration says
    assert any("further training" in note for note in child.notes)
    assert (child.prompt.tensor - parent.tensor).abs().max() <= 1.1 * child.plan.learning_rate


def test_the_record_says_where_the_prompt_comes_from(tiny_llama, texts):
    result = train(tiny_llama, texts, config(seed=5))
    record = result.prompt.record
    assert (record.base_name, record.base_fingerprint) == ("tiny-llama", tiny_llama.fingerprint)
    assert record.parent is None
    assert record.run["plan"]["config"]["seed"] == 5
    assert len(record.run["losses"]) == 6
    assert record.run["plan"]["versions"].keys() >= {"torch", "transformers"}


def test_what_cannot_be_trained_is_refused(tiny_llama, texts):
    with pytest.raises(PromptError, match="width 7; base 'tiny-llama' has 16"):
        train(tiny_llama, texts, config(), start=SoftPrompt(torch.ones(2, 7)))
    with pytest.raises(LengthError):
        train(tiny_llama, texts, config(virtual_tokens=LIMIT))
    long = build_examples(tiny_llama, rows_from_texts([" ".join(["w5"] * 60)]), eos=True, max_length=LIMIT)
    short = build_examples(tiny_llama, rows_from_texts(["w5 w6"]), eos=True, max_length=LIMIT)
    with pytest.raises(LengthError, match=f"50 virtual tokens and a row of 62 tokens are more than the {LIMIT}"):
        train(tiny_llama, long, config(virtual_tokens=50))
    with pytest.raises(LengthError):
        train(tiny_llama, short, config(virtual_tokens=50), validation=long)


def test_a_truncated_row_has_no_end_and_a_whole_one_has(tiny_llama):
    ready = ready_run(tiny_llama, [" ".join(["w5"] * 200), "w6 w7"], config(virtual_tokens=10))
    cut, whole = ready.data[0].examples
    assert (len(cut.ids), cut.has_eos, whole.has_eos) == (LIMIT - 10, False, True)


def test_a_bfloat16_base_trains_a_float32_prompt(texts):
    base = build_base("llama", dtype=torch.bfloat16)
    loop = ready_run(base, texts, config()).loop
    losses = [event.loss for event in loop.events() if isinstance(event, StepDone)]
    assert loop.trials[0].prompt().dtype == torch.float32
    assert all(math.isfinite(loss) for loss in losses)
    truth = train(build_base("llama"), texts, config()).losses
    assert losses == pytest.approx(truth, abs=0.05)
