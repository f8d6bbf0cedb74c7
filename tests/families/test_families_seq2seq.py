"""Encoder-decoders: encoder, decoder and head on embeddings are the model, whatever else is in the batch."""

import pytest
import torch
from support.family_configs import each_of
from support.seq2seq_bases import FAMILIES, build_seq2seq, plain_pair_logits
from support.tiny_bases import random_ids, random_prompt

from softprompt.errors import BaseModelError
from softprompt.families import forward_of, seq2seq_forward

ROWS = (((5, 9, 7, 2), (6, 8, 2)), ((11, 2), (4, 4, 9, 13, 2)), ((30, 31, 32, 33, 34, 2), (7, 2)))  # text, answer


@pytest.fixture(scope="module", params=each_of(FAMILIES, ("t5", "umt5", "bart", "pegasus")))
def base(request):
    return build_seq2seq(request.param, dtype=torch.float64)


def decoder_ids(base, answer):
    return torch.tensor([[*base.decoder_start_ids, *answer[:-1]]])


def model_logits(base, text, answer, prompt=None):
    """[T, V] of the model itself: on its token ids, or on one run of concatenated embeddings."""
    if prompt is not None:
        return plain_pair_logits(base, text, answer, prompt)
    ids = decoder_ids(base, answer)
    return base.model(input_ids=torch.tensor([text]), decoder_input_ids=ids).logits[0, -len(answer) :]


def batched_logits(base, rows, prompts):
    """[T, V] of each row, from one padded batch."""
    forward = seq2seq_forward(forward_of(base))
    texts = [base.token_inputs(torch.tensor(text)) for text, _ in rows]
    texts = [torch.cat([base.virtual_inputs(p), t]) for p, t in zip(prompts, texts, strict=True)]
    embeds = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.stack([(torch.arange(embeds.shape[1]) < len(text)).long() for text in texts])
    answers = [base.token_inputs(decoder_ids(base, answer)[0]) for _, answer in rows]
    inputs = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
    logits = forward.head(forward.decode(inputs, forward.encode(embeds, mask), mask))
    first = len(base.decoder_start_ids) - 1
    return [own[first : first + len(answer)] for own, (_, answer) in zip(logits, rows, strict=True)]


def test_rows_behind_prompts_of_several_lengths_in_one_batch_have_the_models_own_logits(base):
    prompts = [random_prompt(base, length, seed=length) for length in (3, 1, 5)]
    found = batched_logits(base, ROWS, prompts)
    for (text, answer), prompt, own in zip(ROWS, prompts, found, strict=True):
        torch.testing.assert_close(own, model_logits(base, text, answer, prompt), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(own, model_logits(base, text, answer), rtol=1e-3)
        assert not torch.allclose(own, model_logits(base, text, answer, prompt.flip(1)), rtol=1e-3)


def test_the_gradient_of_a_prompt_is_that_of_the_model_on_concatenated_embeddings(base):
    leaves = [random_prompt(base, 3, seed=seed).requires_grad_(True) for seed in range(3)]
    ours = torch.autograd.grad(sum(own.logsumexp(-1).sum() for own in batched_logits(base, ROWS, leaves)), leaves)
    alone = [model_logits(base, *row, leaf).logsumexp(-1).sum() for row, leaf in zip(ROWS, leaves, strict=True)]
    for mine, plain in zip(ours, torch.autograd.grad(sum(alone), leaves), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-9)


def packed_logits(base, rows, prompts, texts=None, checkpoint=False):
    """[T, V] of each answer, from packed rows."""
    forward = seq2seq_forward(forward_of(base))
    assert forward.can_pack and not forward.can_share_prefix, forward.packing.note
    read = [base.token_inputs(torch.tensor(text)) for text, _ in rows]
    read = [torch.cat([base.virtual_inputs(p), t]) for p, t in zip(prompts, read, strict=False)]
    written = [base.token_inputs(decoder_ids(base, answer)[0]) for _, answer in rows]
    hidden = forward.packed_pairs(
        torch.cat(read), list(map(len, read)), torch.cat(written), list(map(len, written)), texts, checkpoint
    )
    parts = forward.head(hidden).split(list(map(len, written)))
    return [own[-len(answer) :] for own, (_, answer) in zip(parts, rows, strict=True)]


def test_packed_rows_have_the_models_own_logits_and_see_nothing_of_each_other(base):
    prompts = [random_prompt(base, length, seed=length) for length in (3, 1, 5)]
    found = packed_logits(base, ROWS, prompts)
    for (text, answer), prompt, own in zip(ROWS, prompts, found, strict=True):
        torch.testing.assert_close(own, model_logits(base, text, answer, prompt), rtol=1e-9, atol=1e-9)
    neighbour = [(ROWS[0][0][::-1], ROWS[0][1][::-1]), *ROWS[1:]]
    changed = packed_logits(base, neighbour, prompts)
    assert all(torch.equal(own, other) for own, other in zip(found[1:], changed[1:], strict=True))
    assert not torch.allclose(found[0], changed[0], rtol=1e-3)


def test_answers_to_one_text_share_its_encoder(base):
    rows = [(ROWS[2][0], answer) for answer in ((6, 8, 2), (7, 2))]
    prompt = random_prompt(base, 3)
    found = packed_logits(base, rows, [prompt], texts=[0, 0])
    for (text, answer), own in zip(rows, found, strict=True):
        torch.testing.assert_close(own, model_logits(base, text, answer, prompt), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_gradient_through_packed_rows_is_that_of_the_model(base, checkpoint):
    leaves = [random_prompt(base, 3, seed=seed).requires_grad_(True) for seed in range(3)]
    found = packed_logits(base, ROWS, leaves, checkpoint=checkpoint)
    ours = torch.autograd.grad(sum(own.logsumexp(-1).sum() for own in found), leaves)
    alone = [model_logits(base, *row, leaf).logsumexp(-1).sum() for row, leaf in zip(ROWS, leaves, strict=True)]
    for mine, plain in zip(ours, torch.autograd.grad(sum(alone), leaves), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-9)


def test_long_rows_are_cut_into_blocks_and_far_distances_share_a_bucket():
    base = build_seq2seq("t5", dtype=torch.float64)
    rows = [(random_ids(600, 1), random_ids(300, 2)), (random_ids(20, 3), random_ids(520, 4))]
    prompts = [random_prompt(base, 3, seed=seed) for seed in range(2)]
    for (text, answer), prompt, own in zip(rows, prompts, packed_logits(base, rows, prompts), strict=True):
        torch.testing.assert_close(own, model_logits(base, text, answer, prompt), rtol=1e-9, atol=1e-9)


def test_the_embeddings_of_a_text_are_those_that_the_encoder_makes_of_its_ids(base):
    ids = torch.tensor([random_ids(6)])
    forward = seq2seq_forward(forward_of(base))
    ours = forward.encode(base.token_inputs(ids), torch.ones_like(ids))
    torch.testing.assert_close(ours, base.model.get_encoder()(input_ids=ids)[0], rtol=1e-9, atol=1e-9)


def test_a_base_whose_decoder_has_embeddings_of_its_own_is_refused():
    base = build_seq2seq("bart")
    base.model.get_decoder().embed_tokens = torch.nn.Embedding(base.vocab_size, base.hidden_size)
    with pytest.raises(BaseModelError, match="not those on the text's token ids"):
        forward_of(base)


def test_a_base_without_a_start_token_is_refused():
    base = build_seq2seq("t5")
    base.model.config.decoder_start_token_id = base.model.generation_config.decoder_start_token_id = None
    with pytest.raises(BaseModelError, match="decoder_start_token_id"):
        forward_of(base)
