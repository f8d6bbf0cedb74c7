"""Ragged rows under ragged prompts in one batch have the logits of plain concatenation, row by row, in every family."""

import pytest
import torch
from support.family_configs import each_of
from support.slow_truth import TOLERANCE, plain_logits, relative_error
from support.tiny_bases import FAMILIES, LIMIT, OTHERS, VOCAB, build_base, random_ids, random_prompt

from softprompt.families import TESTED_FAMILIES, forward_of
from softprompt.splice import Row, concatenate

# These compute attention or ALiBi in float32 whatever the dtype of their weights.
FLOAT32_INSIDE = ("bloom", "gemma2", "gptj", "gpt_neo", "mpt")
# Softmax in float32 over a float64 mask: a pad in front, which sees nothing, is NaN, and so is what follows it.
NAN_AT_PADS_IN_FRONT = ("bloom", "gemma2", "mpt")
PROMPT_LENGTHS = (1, 5, 64)
ROWS = (
    Row(random_ids(7, 1), 0),
    Row(random_ids(1, 2), 1),  # one token
    Row(random_ids(20, 3), None),  # the bare base
    Row(random_ids(LIMIT - 64, 4), 2),  # as long as the model allows
    Row(random_ids(3, 5), 1),
)


def prompts_of(base):
    return [random_prompt(base, length, seed=length) for length in PROMPT_LENGTHS]


def prompt_of(row, prompts):
    return None if row.prompt is None else prompts[row.prompt]


@torch.no_grad()
def batch_logits(base, rows, prompts, align="left"):
    """Per row, the logits [P + T, V] at its real slots."""
    forward = forward_of(base)
    spliced = concatenate(base, rows, prompts, align)
    logits = forward.logits(forward.hidden_states(spliced.embeds_BSH, spliced.mask_BS, spliced.positions_BS))
    lengths = spliced.lengths
    return [own[:n] if align == "left" else own[-n:] for own, n in zip(logits, lengths, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", each_of([*FAMILIES, *OTHERS]))
def test_logits_equal_plain_concatenation_in_both_alignments(family, dtype):
    base = build_base(family, dtype=dtype)
    prompts = prompts_of(base)
    tolerance = 1e-6 if dtype == torch.float64 and family in FLOAT32_INSIDE else TOLERANCE[dtype]
    alignments = ("left",) if dtype == torch.float64 and family in NAN_AT_PADS_IN_FRONT else ("left", "right")
    for align in alignments:
        for row, ours in zip(ROWS, batch_logits(base, ROWS, prompts, align), strict=True):
            with torch.no_grad():
                truth = plain_logits(base, row.ids, prompt_of(row, prompts))
            assert relative_error(ours, truth) < tolerance, (align, row)


@pytest.mark.parametrize("family", each_of(FAMILIES))
def test_the_head_runs_apart_from_the_backbone(family):
    base = build_base(family)
    assert base.model.config.model_type in TESTED_FAMILIES
    assert forward_of(base).backbone is not base.model


@pytest.mark.parametrize("family", each_of(FAMILIES))
def test_logits_of_a_wrong_a_shuffled_and_no_prompt_are_far_off(family):
    base = build_base(family)
    prompt, other = random_prompt(base, 5, seed=1), random_prompt(base, 5, seed=2)
    ids = random_ids(6)
    with torch.no_grad():
        truth = plain_logits(base, ids, prompt)[-6:]
    rows = [Row(ids, None), Row(ids, 0), Row(ids, 1)]
    for wrong in batch_logits(base, rows, [other, prompt[torch.tensor([3, 0, 4, 2, 1])]]):
        assert relative_error(wrong[-6:], truth) > 0.02


@pytest.mark.parametrize("family", each_of(FAMILIES))
def test_the_tokens_of_a_neighbour_change_no_bit_of_a_padded_row(family):
    base = build_base(family)
    prompts = prompts_of(base)
    mine, neighbour = Row(random_ids(5, 1), 1), random_ids(9, 2)
    before = batch_logits(base, [mine, Row(neighbour, 2)], prompts)
    changed = tuple((token + 1) % VOCAB for token in neighbour)
    after = batch_logits(base, [mine, Row(changed, 2)], prompts)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
