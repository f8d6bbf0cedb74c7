"""Encoder-decoders: the states that predict a decoder's targets are those of plain concatenated embeddings."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from support.seq2seq_bases import FAMILIES, build_seq2seq, plain_pair_logits
from support.slow_truth import TOLERANCE, TrueDouble, relative_error
from support.tiny_bases import random_ids, random_prompt

from softprompt.families import forward_of
from softprompt.loss import weighted_nll
from softprompt.splice import Row, target_states

SMALL = ("t5", "pegasus")  # tied and scaled; embeddings scaled outside of their table
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
EACH = pytest.mark.parametrize(
    "family", [one if one in SMALL else pytest.param(one, marks=pytest.mark.medium) for one in FAMILIES]
)


def pairs(has_decoder_prompt):
    """Rows of several lengths on both sides, under two prompts and none, targets here and there."""
    lengths = [(4, 3, 0), (9, 1, 1), (1, 6, 0), (5, 5, None), (1, 2, 1)]
    return [
        Row(
            random_ids(own, 50 + number), prompt, [float((number + column) % 3 > 0) for column in range(own)],
            source=random_ids(read, number), has_decoder_prompt=has_decoder_prompt,
        )
        for number, (read, own, prompt) in enumerate(lengths)
    ]  # fmt: skip


def plain_logits_of(base, row, prompts):
    vectors = None if row.prompt is None else prompts[row.prompt]
    if vectors is None or not row.has_decoder_prompt:
        return plain_pair_logits(base, row.source, row.ids, vectors)
    half = len(vectors) // 2
    return plain_pair_logits(base, row.source, row.ids, vectors[:half], vectors[half:])


def wanted(row):
    return [column for column, weight in enumerate(row.targets) if weight]


def plain_loss(base, rows, prompts):
    """Summed nats of all targets, row by row."""
    wide = torch.promote_types(base.dtype, torch.float32)
    parts = [
        torch.nn.functional.cross_entropy(
            plain_logits_of(base, row, prompts)[wanted(row)].to(wide),
            torch.tensor([row.ids[column] for column in wanted(row)]),
            reduction="sum",
        )
        for row in rows
    ]
    return torch.stack(parts).sum()


def our_loss(base, rows, prompts):
    forward = forward_of(base)
    hidden, targets = target_states(base, forward, rows, prompts)
    total, _ = weighted_nll(forward.head, hidden, targets.ids, targets.weights.to(hidden.dtype), base.vocab_size)
    return total


def leaves(base):
    return [random_prompt(base, length, seed).requires_grad_() for length, seed in ((4, 1), (6, 2))]


@EACH
@DTYPES
@pytest.mark.parametrize("has_decoder_prompt", [False, True], ids=["encoder", "both"])
def test_loss_and_gradient_are_those_of_concatenated_embeddings(family, dtype, has_decoder_prompt):
    softer = {"initializer_factor": 1.0} if "t5" in family else {}  # float32's rounding is not blown up by the model
    base, rows = build_seq2seq(family, dtype=dtype, **softer), pairs(has_decoder_prompt)
    ours, plain = leaves(base), leaves(base)
    forward_of(base)
    with TrueDouble() if dtype is torch.float64 else nullcontext():
        loss, truth = our_loss(base, rows, ours), plain_loss(base, rows, plain)
        loss.backward()
        truth.backward()
    assert relative_error(loss.detach(), truth.detach()) < TOLERANCE[dtype]
    for mine, theirs in zip(ours, plain, strict=True):
        assert relative_error(mine.grad, theirs.grad) < TOLERANCE[dtype]


@EACH
def test_the_targets_lie_in_row_order_with_their_columns(family):
    base, rows = build_seq2seq(family), pairs(False)
    hidden, targets = target_states(base, forward_of(base), rows, [p.detach() for p in leaves(base)])
    assert targets.rows.tolist() == [number for number, row in enumerate(rows) for _ in wanted(row)]
    assert targets.columns.tolist() == [column for row in rows for column in wanted(row)]
    assert targets.ids.tolist() == [row.ids[column] for row in rows for column in wanted(row)]
    assert len(hidden) == len(targets.ids)


@torch.no_grad()
def test_controls_another_prompt_no_prompt_and_swapped_halves_give_other_losses():
    base, rows = build_seq2seq("t5"), pairs(True)
    prompts = [prompt.detach() for prompt in leaves(base)]
    loss = our_loss(base, rows, prompts)
    bare = [replace(row, prompt=None) for row in rows]
    swapped = [torch.cat([prompt[len(prompt) // 2 :], prompt[: len(prompt) // 2]]) for prompt in prompts]
    for other in (our_loss(base, rows, prompts[::-1]), our_loss(base, bare, []), our_loss(base, rows, swapped)):
        assert relative_error(other, loss) > 1e-3


@torch.no_grad()
def test_a_row_is_changed_by_no_neighbour_and_by_its_own_text():
    base, rows = build_seq2seq("t5"), pairs(True)
    prompts = [prompt.detach() for prompt in leaves(base)]
    forward = forward_of(base)

    def states_of_first(some):
        hidden, targets = target_states(base, forward, some, prompts)
        return hidden[targets.rows == 0]

    whole = states_of_first(rows)
    neighbour = replace(rows[1], source=random_ids(20, 9))
    assert relative_error(states_of_first([rows[0], neighbour, *rows[2:]]), whole) < 1e-5
    own = replace(rows[0], source=random_ids(4, 9))
    assert relative_error(states_of_first([own, *rows[1:]]), whole) > 1e-3


@torch.no_grad()
def test_where_one_of_the_decoders_vectors_is_left_out_the_row_says_how_many_are_left():
    base = build_seq2seq("t5")
    row, prompt = pairs(True)[0], random_prompt(base, 5)
    ours = our_loss(base, [replace(row, num_decoder_tokens=2)], [prompt])
    logits = plain_pair_logits(base, row.source, row.ids, prompt[:3], prompt[3:])[wanted(row)]
    truth = torch.nn.functional.cross_entropy(logits, torch.tensor([row.ids[i] for i in wanted(row)]), reduction="sum")
    assert relative_error(ours, truth) < 1e-5
