"""Encoders: states and masked-LM logits are the model's own, alone, padded or packed, with a soft prompt or without."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.encoders import ENCODERS, NUM_SPECIAL, build_encoder, plain_columns, plain_states
from support.family_configs import each_of
from support.slow_truth import TOLERANCE, TrueDouble, relative_error
from support.tiny_bases import LIMIT, random_ids, random_prompt

from softprompt.errors import BaseModelError
from softprompt.families import PackedBatch, Packing, Segment, attention, decoder_layers, forward_of
from softprompt.families.attention import attention_plan
from softprompt.splice import Row, column_states

# One for each way of positions, widths and windows, and the one that runs padded; the others are repetitions.
REPRESENTATIVES = ("albert", "bert", "deberta-v3", "modernbert", "roberta")
PADDED = ("deberta", "deberta-v2", "deberta-v3")
PROMPT_LENGTHS = (3, 1, 20)
# tokens, prompt, ids in front of it; the third row is longer than any window, the last fills all positions
SHAPES = ((9, 0, 1), (5, None, 0), (40, 1, 0), (9, 0, 0), (LIMIT - 20, 2, 1))
FAMILIES = pytest.mark.parametrize("family", each_of(ENCODERS, REPRESENTATIVES))
PACKED = pytest.mark.parametrize(
    "family", each_of([one for one in ENCODERS if one not in PADDED], ("albert", "modernbert"))
)


def row(length, owner, before, seed, **changes):
    ids = random_ids(length, seed)
    return Row(ids, owner, num_before=before, **{"columns": range(length), **changes})


def all_rows():
    return [row(*shape, seed) for seed, shape in enumerate(SHAPES)]


def all_prompts(base):
    return [random_prompt(base, length, seed=length) for length in PROMPT_LENGTHS]


def padded(forward):
    return replace(forward, packing=Packing(None, "for this test"))


def with_gradients(base, run):
    """States, and the prompts' gradients under a fixed pull at them."""
    prompts = [prompt.requires_grad_(True) for prompt in all_prompts(base)]
    states = run(prompts)
    pull = torch.randn(states.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(states.dtype)
    return states.detach(), torch.autograd.grad((states * pull).sum(), prompts)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@FAMILIES
def test_states_and_logits_are_the_models_own_on_its_token_ids(family, dtype):
    base = build_encoder(family, dtype=dtype)
    pad = base.model.config.pad_token_id
    texts = [random_ids(length, seed) for seed, length in enumerate((40, 7, 22))]
    ids = torch.full((3, 40), pad)
    mask = torch.zeros(3, 40, dtype=torch.long)
    for number, text in enumerate(texts):
        ids[number, : len(text)], mask[number, : len(text)] = torch.tensor(text), 1
    with TrueDouble():
        alone = [base.model.base_model(input_ids=torch.tensor([text]))[0][0] for text in texts]
        own = base.model.base_model(input_ids=ids, attention_mask=mask)[0][mask.bool()]
        logits = base.model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        forward = forward_of(base)
        rows = [Row(text, None, columns=range(len(text))) for text in texts]
        for way in (forward, padded(forward)):
            states, owners = column_states(base, way, rows, [])
            assert relative_error(states, own) < TOLERANCE[dtype]
            assert relative_error(states, torch.cat(alone)) < TOLERANCE[dtype]
            assert relative_error(way.logits(states), logits) < TOLERANCE[dtype]
            assert owners.tolist() == [number for number, text in enumerate(texts) for _ in text]
    assert relative_error(states, own.roll(1, 0)) > 0.1  # the control
    assert relative_error(forward.logits(states.roll(1, 0)), logits) > 0.1


@FAMILIES
def test_states_and_gradients_behind_soft_prompts_are_those_of_rows_run_alone(family):
    base, rows = build_encoder(family, dtype=torch.float64), all_rows()
    forward = forward_of(base)
    assert forward.can_pack == (family not in PADDED)
    assert not forward.can_share_prefix
    with TrueDouble():
        truth, true_gradients = with_gradients(base, lambda p: torch.cat([plain_columns(base, r, p) for r in rows]))
        for way in (forward, padded(forward), replace(padded(forward), max_batchable_length=0)):
            found, gradients = with_gradients(base, lambda p, way=way: column_states(base, way, rows, p)[0])
            assert relative_error(found, truth) < 1e-9
            for ours, theirs in zip(gradients, true_gradients, strict=True):
                assert relative_error(ours, theirs) < 1e-9
        elsewhere = [replace(each, num_before=1 - each.num_before) for each in rows]
        control, _ = with_gradients(base, lambda p: column_states(base, forward, elsewhere, p)[0])
    assert relative_error(control, truth) > 0.01


@pytest.mark.medium
@FAMILIES
def test_float32_rows_are_those_of_rows_run_alone(family):
    base, rows = build_encoder(family), all_rows()
    truth, true_gradients = with_gradients(base, lambda p: torch.cat([plain_columns(base, r, p) for r in rows]))
    found, gradients = with_gradients(base, lambda p: column_states(base, forward_of(base), rows, p)[0])
    assert relative_error(found, truth) < TOLERANCE[torch.float32]
    for ours, theirs in zip(gradients, true_gradients, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("family", each_of(ENCODERS, ("bert", "deberta-v3")))
def test_neighbours_change_no_bit_of_a_row(family):
    base, rows = build_encoder(family), all_rows()
    forward, prompts = forward_of(base), all_prompts(base)
    for way in (forward, padded(forward)):
        before, owners = column_states(base, way, rows, prompts)
        others = [rows[0], row(5, None, 0, 98), row(40, 1, 0, 99), rows[3], row(LIMIT - 20, 2, 1, 97)]
        found, _ = column_states(base, way, others, [prompts[0], -prompts[1], torch.full_like(prompts[2], torch.nan)])
        is_same = (owners == 0) | (owners == 3)
        assert torch.equal(found[is_same], before[is_same])
        assert not torch.equal(found[owners == 2], before[owners == 2])


@torch.no_grad()
@pytest.mark.parametrize("family", each_of(ENCODERS, ("bert", "deberta-v3")))
def test_every_token_of_a_row_sees_its_last_one(family):
    base = build_encoder(family)
    has_changed = changed_by_last_token(base, num_tokens=40)
    assert has_changed.all()


@torch.no_grad()
@pytest.mark.parametrize("has_packing", [True, False])
def test_a_window_reaches_half_its_width_to_each_side(has_packing):
    base = build_encoder("modernbert", layer_types=["sliding_attention"] * 3)
    has_changed = changed_by_last_token(base, num_tokens=40, has_packing=has_packing)
    assert has_changed.tolist() == [token >= 39 - 3 * 4 for token in range(40)]


def changed_by_last_token(base, num_tokens, has_packing=True):
    """Which states of a row another last token changes."""
    forward, prompts = forward_of(base), all_prompts(base)
    one = row(num_tokens, 0, 1, 5)
    last = replace(one, ids=(*one.ids[:-1], one.ids[-1] - 1))
    way = forward if has_packing else padded(forward)
    before, found = (column_states(base, way, [each], prompts)[0] for each in (one, last))
    return (before - found).abs().amax(dim=1) > 1e-6 * before.abs().max()


@PACKED
def test_a_row_cut_into_query_blocks_has_the_same_states_and_gradients(monkeypatch, family):
    base, rows = build_encoder(family, dtype=torch.float64), all_rows()
    forward = forward_of(base)
    with TrueDouble():
        truth, true_gradients = with_gradients(base, lambda p: column_states(base, forward, rows, p)[0])
        for most_scores in (1, 200):
            monkeypatch.setattr(attention, "QUERY_BLOCK", 5)
            monkeypatch.setattr(attention, "MOST_SCORES", dict.fromkeys(("cpu", "cuda"), most_scores))
            found, gradients = with_gradients(base, lambda p: column_states(base, forward, rows, p)[0])
            assert relative_error(found, truth) < 1e-9
            for ours, theirs in zip(gradients, true_gradients, strict=True):
                assert relative_error(ours, theirs) < 1e-9


@PACKED
def test_a_checkpointed_pass_runs_its_layers_twice_and_has_the_same_gradients(family):
    base, rows = build_encoder(family, dtype=torch.float64), all_rows()
    forward, layers, runs = forward_of(base), decoder_layers(base.model), []
    assert layers
    hooks = [layer.register_forward_hook(lambda *_: runs.append(None)) for layer in layers]
    truth, true_gradients = with_gradients(base, lambda p: column_states(base, forward, rows, p)[0])
    num_runs = len(runs)
    found, gradients = with_gradients(base, lambda p: column_states(base, forward, rows, p, checkpoint=True)[0])
    for hook in hooks:
        hook.remove()
    assert num_runs == base.model.config.num_hidden_layers
    assert len(runs) == 2 * num_runs  # the hook lies outside of what is run again
    assert torch.equal(found, truth)
    for ours, theirs in zip(gradients, true_gradients, strict=True):
        assert relative_error(ours, theirs) < 1e-12


@torch.no_grad()
@PACKED
def test_segments_that_are_said_to_be_causal_differ(family):
    """The control of all of the above: the flag of the batch is what opens the future to a token."""
    base = build_encoder(family)
    forward, ids = forward_of(base), torch.tensor(random_ids(9, 1))
    found = {
        is_causal: forward.packed_hidden_states(
            base.token_inputs(ids), torch.arange(9), PackedBatch((Segment(0, 9),), is_causal=is_causal)
        )
        for is_causal in (True, False)
    }
    truth = plain_states(base, Row(tuple(ids.tolist())), [])
    assert relative_error(found[False], truth) < TOLERANCE[torch.float32]
    assert relative_error(found[True], truth) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", each_of(ENCODERS, ("bert", "deberta", "modernbert")))
def test_a_patched_model_without_a_batch_of_ours_computes_the_same_bits(family, implementation):
    options = {} if family in PADDED else {"attn_implementation": implementation}
    base = build_encoder(family, **options)
    ids, mask = torch.tensor([random_ids(30, 1), random_ids(30, 2)]), torch.ones(2, 30, dtype=torch.long)
    mask[1, 6:] = 0
    before = base.model(input_ids=ids, attention_mask=mask).logits
    assert forward_of(base).can_pack == (family not in PADDED)
    assert torch.equal(base.model(input_ids=ids, attention_mask=mask).logits, before)


@FAMILIES
def test_the_logits_of_some_ids_are_those_among_all_and_read_no_other_row_of_the_table(family):
    base = build_encoder(family, dtype=torch.float64)
    forward, states = forward_of(base), torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([NUM_SPECIAL, 30, 9])
    whole, some = forward.logits(states)[:, ids], forward.head.logits_of(states, ids)
    assert relative_error(some.detach(), whole.detach()) < 1e-9
    gradients = [torch.autograd.grad(logits.square().sum(), states)[0] for logits in (whole, some)]
    assert relative_error(gradients[1], gradients[0]) < 1e-9
    with torch.no_grad():
        base.model.get_output_embeddings().weight[40:] = torch.nan
        assert torch.equal(forward.head.logits_of(states, ids), some)
        assert forward.logits(states).isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("family", ["deberta", "deberta-v3"])
def test_a_head_that_multiplies_by_the_embedding_table_is_run_whole(family):
    """DeBERTa's own checkpoints: `legacy` in transformers is a head of another shape."""
    base = build_encoder(family, dtype=torch.float64, legacy=False)
    forward, ids = forward_of(base), torch.tensor([random_ids(9, 1)])
    states = base.model.base_model(input_ids=ids)[0][0]
    truth = base.model(input_ids=ids).logits[0]
    assert relative_error(forward.logits(states), truth) < 1e-9
    some = torch.tensor([7, 60])
    assert relative_error(forward.head.logits_of(states, some), truth[:, some]) < 1e-9


@pytest.mark.parametrize(
    ("family", "part"), [("bert", "bare"), ("roberta", "classifier"), ("electra", "discriminator")]
)
def test_an_encoder_without_a_masked_lm_head_has_states_and_says_that_it_has_no_logits(family, part):
    base = build_encoder(family, part=part)
    forward, prompts = forward_of(base), all_prompts(base)
    states, _ = column_states(base, forward, all_rows(), prompts)
    truth = torch.cat([plain_columns(base, each, prompts) for each in all_rows()])
    assert relative_error(states, truth) < TOLERANCE[torch.float32]
    for ask in (forward.logits, lambda hidden: forward.head.logits_of(hidden, torch.tensor([7]))):
        with pytest.raises(BaseModelError, match="no head for masked words; give a masked language model"):
            ask(states)


@torch.no_grad()
@pytest.mark.parametrize("family", each_of(ENCODERS, ("bert",)))
def test_bfloat16_rows_are_near_those_of_rows_run_alone(family):
    base, rows = build_encoder(family, dtype=torch.bfloat16), all_rows()
    prompts = all_prompts(base)
    truth = torch.cat([plain_columns(base, each, prompts) for each in rows])
    assert relative_error(column_states(base, forward_of(base), rows, prompts)[0].float(), truth.float()) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("wrong", [0, 3])
def test_positions_counted_from_a_wrong_start_are_not_exact(wrong):
    base, prompts = build_encoder("roberta"), []
    forward, one = forward_of(base), Row(random_ids(9, 1), None, columns=range(9))
    assert forward.first_position == 2
    truth = base.model.base_model(input_ids=torch.tensor([one.ids]))[0][0]
    found, _ = column_states(base, replace(forward, first_position=wrong), [one], prompts)
    assert relative_error(found, truth) > 0.01


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=6), st.integers(1, 7), st.integers(1, 80))
def test_an_attention_plan_of_an_encoder_shows_each_token_all_of_its_row(lengths, block, most_scores):
    firsts = [sum(lengths[:number]) for number in range(len(lengths))]
    batch = PackedBatch(tuple(map(Segment, firsts, lengths)), is_causal=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        patch.setattr(attention, "MOST_SCORES", dict.fromkeys(("cpu", "cuda"), most_scores))
        plan = attention_plan(batch, 0, torch.device("cpu"))
    seen = {}
    for group in plan.batches:
        count, num_queries, num_keys = group.shape
        queries, keys = group.queries.view(count, num_queries), group.keys.view(count, num_keys)
        for run, query in group.is_real_Gn.nonzero().tolist():
            assert int(queries[run, query]) not in seen
            seen[int(queries[run, query])] = keys[run][group.key_positions_Gm[run] < num_keys].tolist()
    rows = [list(range(first, first + length)) for first, length in zip(firsts, lengths, strict=True)]
    assert seen == {token: own for own in rows for token in own}
