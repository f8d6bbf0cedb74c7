"""Loss and prompt gradient of a step equal torch's autograd over plain concatenation, row by row, in every family."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from support.family_configs import each_of
from support.slow_truth import TOLERANCE, TrueDouble, plain_nats, relative_error
from support.tiny_bases import FAMILIES, LIMIT, OTHERS, build_base, random_ids, random_prompt

from softprompt.families import Packing, forward_of
from softprompt.splice import Row
from softprompt.training.step import accumulate_gradient

LENGTHS = (1, 12, LIMIT - 64, 5, 3)
OWNERS = (0, 1, 2, 0, 1)  # prompts of 1, 7 and 64 vectors
PROMPT_LENGTHS = (1, 7, 64)


def training_rows():
    rows = []
    for seed, (length, owner) in enumerate(zip(LENGTHS, OWNERS, strict=True)):
        targets = [index % 3 != 1 for index in range(length)]  # every third token is context
        rows.append(Row(random_ids(length, seed), owner, targets))
    return rows


def fresh_prompts(base):
    return [random_prompt(base, length, seed=length).requires_grad_(True) for length in PROMPT_LENGTHS]


def true_step(base, rows):
    prompts = fresh_prompts(base)
    nats = [plain_nats(base, row.ids, row.targets, prompts[row.prompt]).sum() for row in rows]
    for number in range(len(prompts)):
        counted = sum(sum(row.targets) for row in rows if row.prompt == number)
        mine = sum(loss for row, loss in zip(rows, nats, strict=True) if row.prompt == number)
        (mine / counted).backward()
    return sum(float(loss.detach().double()) for loss in nats), [prompt.grad for prompt in prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", each_of([*FAMILIES, *OTHERS]))
def test_loss_and_gradient_equal_plain_concatenation(family, dtype):
    base = build_base(family, dtype=dtype)
    assert forward_of(base).packing.carrier, forward_of(base).packing.note
    with TrueDouble() if dtype is torch.float64 else nullcontext():
        check_every_split(base, forward_of(base), TOLERANCE[dtype])


@pytest.mark.parametrize("family", each_of([*FAMILIES, *OTHERS]))
def test_loss_and_gradient_of_padded_rows_equal_plain_concatenation(family):
    """The way of a base that cannot run packed rows."""
    base = build_base(family, dtype=torch.float64)
    with TrueDouble():
        check_every_split(base, replace(forward_of(base), packing=Packing(None, "for this test")), 1e-9)


def check_every_split(base, forward, tolerance):
    rows = training_rows()
    true_nats, true_gradients = true_step(base, rows)
    for micro_batch_rows in (1, 2, 5):
        prompts = fresh_prompts(base)
        nats = float(sum(accumulate_gradient(base, forward, prompts, rows, micro_batch_rows)).sum())
        assert nats == pytest.approx(true_nats, rel=tolerance)
        for ours, truth in zip(prompts, true_gradients, strict=True):
            assert relative_error(ours.grad, truth) < tolerance


@pytest.mark.parametrize("family", each_of(FAMILIES))
@pytest.mark.parametrize("micro_batch_rows", [2, 5])
def test_activation_checkpointing_changes_no_bit_of_a_gradient(family, micro_batch_rows):
    base = build_base(family)
    kept, run_again = fresh_prompts(base), fresh_prompts(base)
    list(accumulate_gradient(base, forward_of(base), kept, training_rows(), micro_batch_rows))
    list(accumulate_gradient(base, forward_of(base), run_again, training_rows(), micro_batch_rows, checkpoint=True))
    for one, other in zip(kept, run_again, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_wrong_prompt_has_another_gradient(tiny_llama):
    rows = training_rows()
    _, truth = true_step(tiny_llama, rows)
    prompts = [prompt.detach().flip(0).requires_grad_(True) for prompt in fresh_prompts(tiny_llama)]
    list(accumulate_gradient(tiny_llama, forward_of(tiny_llama), prompts, rows, 2))
    assert relative_error(prompts[2].grad, truth[2]) > 0.01
