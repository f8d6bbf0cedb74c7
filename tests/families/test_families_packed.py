"""Packed rows: each row gets what it gets alone, and the model that runs them is otherwise the model that it was."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.family_configs import each_of
from support.slow_truth import TOLERANCE, TrueDouble, plain_logits, plain_nats, relative_error
from support.tiny_bases import FAMILIES, LIMIT, OTHERS, build_base, random_ids, random_prompt
from transformers import DynamicCache

from softprompt.families import PackedBatch, Packing, Segment, attention, forward_of, patches
from softprompt.families.attention import attention_plan
from softprompt.families.batch import BatchMask
from softprompt.families.frozen_linear import active_kernels
from softprompt.families.patches import install_attention, remove_attention, scoring_of
from softprompt.splice import Row, run_prompts, target_states
from softprompt.training.step import accumulate_gradient

ALL = [*FAMILIES, *OTHERS]
BY_CACHE = ("bloom", "falcon", "falcon_alibi", "mpt")  # the rows come to these beside the mask
PROMPT_LENGTHS = (1, 7, 64)
SHAPES = ((1, 0), (12, 1), (LIMIT - 64, 2), (1, 2), (9, None), (LIMIT - 1, 0), (LIMIT, None))  # tokens, prompt
PASSES = pytest.mark.parametrize("passes", [1, 2])


def row(length, owner, seed):
    return Row(random_ids(length, seed), owner, [float(owner is not None or column > 0) for column in range(length)])


def all_rows():
    return [row(length, owner, seed) for seed, (length, owner) in enumerate(SHAPES)]


def all_prompts(base):
    return [random_prompt(base, length, seed=length) for length in PROMPT_LENGTHS]


def states(base, rows, prompts, passes, **options):
    forward = forward_of(base)
    assert forward.packing.carrier, forward.packing.note
    prefix = run_prompts(base, forward, prompts) if passes == 2 else None
    return target_states(base, forward, rows, prompts, prefix, **options)


@torch.no_grad()
def plain_answers(model, length=9):
    """Without our arguments: two rows, then one of them padded in front, each whole and as a step behind a cache."""
    ids = torch.tensor([random_ids(length, 1), random_ids(length, 2)])
    padded = torch.ones_like(ids)
    padded[1, :4] = 0
    found = []
    for mask in (torch.ones_like(ids), padded):
        given = {} if mask.all() else {"attention_mask": mask}
        earlier = {name: value[:, :6] for name, value in given.items()}
        cache = DynamicCache()
        model(ids[:, :6], past_key_values=cache, use_cache=True, **earlier)
        found.append(model(ids[:, 6:], past_key_values=cache, use_cache=True, **given).logits)
        found.append(model(ids, **given).logits)
    return found


def same_bits(ours, theirs):
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", each_of(ALL))
def test_a_patched_model_without_a_batch_of_ours_computes_the_same_bits(family, dtype):
    base = build_base(family, dtype=dtype)
    before = plain_answers(base.model)
    assert forward_of(base).packing.carrier
    assert same_bits(plain_answers(base.model), before)


@pytest.mark.parametrize("family", each_of(ALL))
def test_removing_the_attention_patches_leaves_each_module_as_it_was(family):
    model = build_base(family).model

    def methods():
        return [{name for name in vars(module) if name in ("forward", "_attn")} for module in model.modules()]

    before, implementation = methods(), model.config._attn_implementation
    assert install_attention(model)
    assert (methods(), model.config._attn_implementation) != (before, implementation)
    remove_attention(model)
    assert (methods(), model.config._attn_implementation) == (before, implementation)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gemma2", {}), ("opt", {}), ("gpt2", {}), ("gpt2", {"reorder_and_upcast_attn": True})],
    ids=["llama", "gemma2", "opt", "gpt2", "gpt2_upcast"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_patched_model_with_eager_attention_computes_the_same_bits(family, changes, dtype):
    base = build_base(family, dtype=dtype, attn_implementation="eager", **changes)
    before = plain_answers(base.model, 60)
    forward_of(base)
    assert same_bits(plain_answers(base.model, 60), before)


@torch.no_grad()
@pytest.mark.parametrize("family", each_of(ALL))
def test_a_copy_of_a_patched_model_computes_with_the_weights_of_the_copy(family):
    base = build_base(family)
    forward_of(base)
    other = replace(base, model=copy.deepcopy(base.model))
    before, rows, prompts = plain_answers(base.model), all_rows(), all_prompts(base)
    packed = states(base, rows, prompts, 1)[0]
    assert same_bits(plain_answers(other.model), before)
    assert torch.equal(states(other, rows, prompts, 1)[0], packed)
    weights = [weight for name, weight in other.model.named_parameters() if ".0." in name and weight.dim() == 2]
    weights[0].mul_(2)
    assert not any(torch.equal(one, old) for one, old in zip(plain_answers(other.model), before, strict=True))
    assert not torch.equal(states(other, rows, prompts, 1)[0], packed)
    assert same_bits(plain_answers(base.model), before)
    assert torch.equal(states(base, rows, prompts, 1)[0], packed)


@PASSES
@pytest.mark.parametrize("family", each_of(ALL))
def test_packed_rows_have_the_states_gradients_and_targets_of_concatenated_rows(family, passes):
    base = build_base(family, dtype=torch.float64)
    forward, rows = forward_of(base), all_rows()
    padded = replace(forward, packing=Packing(None, "for this test"))
    with TrueDouble():
        truth, wanted, true_gradients = with_gradients(base, lambda p: target_states(base, padded, rows, p))
        found, targets, gradients = with_gradients(base, lambda p: states(base, rows, p, passes))
    assert relative_error(found, truth) < 1e-9
    for ours, theirs in zip(gradients, true_gradients, strict=True):
        assert relative_error(ours, theirs) < 1e-9
    for field in ("ids", "rows", "columns", "weights"):
        assert torch.equal(getattr(targets, field), getattr(wanted, field))


def with_gradients(base, run):
    """Hidden states, their targets, and the prompts' gradients under a fixed pull at the hidden states."""
    prompts = [prompt.requires_grad_(True) for prompt in all_prompts(base)]
    hidden, targets = run(prompts)
    pull = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=hidden.dtype)
    return hidden.detach(), targets, torch.autograd.grad((hidden * pull).sum(), prompts)


@torch.no_grad()
@PASSES
@pytest.mark.parametrize("family", each_of(ALL))
def test_neighbours_change_no_bit_of_a_packed_row(family, passes):
    base = build_base(family)
    rows, prompts = all_rows(), all_prompts(base)
    before, targets = states(base, rows, prompts, passes)
    is_others = (targets.rows == 0) | (targets.rows == 4)  # behind prompt 0, and bare
    for other in (random_prompt(base, 64, seed=99), torch.full_like(prompts[2], torch.nan)):
        others = [rows[0], row(12, 1, seed=99), row(LIMIT - 64, 2, seed=98), *rows[3:]]
        found, _ = states(base, others, [prompts[0], random_prompt(base, 7, seed=97), other], passes)
        assert torch.equal(found[is_others], before[is_others])


@torch.no_grad()
@PASSES
@pytest.mark.parametrize("family", each_of(ALL))
def test_a_packed_row_depends_on_its_prompt_and_its_earlier_tokens_only(family, passes):
    base = build_base(family)
    rows, prompts = all_rows(), all_prompts(base)
    before, targets = states(base, rows, prompts, passes)
    ids = rows[1].ids
    other_token = [rows[0], replace(rows[1], ids=(*ids[:3], ids[3] + 1, *ids[4:])), *rows[2:]]
    other_prompt = [prompts[0], random_prompt(base, 7, seed=99), prompts[2]]
    for first, found in (
        (0, states(base, rows, other_prompt, passes)[0]),
        (4, states(base, other_token, prompts, passes)[0]),
    ):
        has_changed = (found != before).any(dim=1)
        assert set(targets.rows[has_changed].tolist()) == {1}
        assert targets.columns[has_changed].tolist()[:3] == [first, first + 1, first + 2]  # all within the windows


@torch.no_grad()
@pytest.mark.parametrize("family", each_of(ALL))
def test_the_length_of_a_neighbour_does_not_change_a_packed_row(family):
    base = build_base(family, dtype=torch.float64)
    with TrueDouble():
        alone, _ = states(base, [row(12, 0, seed=1)], [random_prompt(base, 7)], 1)
        others = [row(12, 0, seed=1), row(40, 1, seed=2), row(3, None, seed=3)]
        together, _ = states(base, others, [random_prompt(base, 7), random_prompt(base, 30, seed=1)], 1)
    assert relative_error(together[:12], alone) < 1e-12


LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 6.0, "short_factor": [1.0, 1.0], "long_factor": [4.0, 8.0],
    "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 30])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16}),
        ("llama", {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 24}),
    ],
    ids=["longrope", "dynamic"],
)
def test_rows_under_dynamic_rope_are_exact(family, changes, length):
    """A prompt's keys are not those of a longer row there, so it may not be run on its own."""
    base = build_base(family, dtype=torch.float64, **changes)
    forward, own, prompts = forward_of(base), row(length, 0, seed=1), [random_prompt(base, 7)]
    with TrueDouble():
        prefix = run_prompts(base, forward, prompts) if forward.can_share_prefix else None
        hidden, _ = target_states(base, forward, [own], prompts, prefix)
        truth = plain_logits(base, own.ids, prompts[0])[6:-1]
    assert relative_error(forward.logits(hidden), truth) < 1e-9


@torch.no_grad()
@PASSES
@pytest.mark.parametrize(
    ("lengths", "prompt_lengths"), [((5, 30), (7,)), ((5, 6), (7, 40))], ids=["long_row", "long_prompt"]
)
def test_a_long_row_or_prompt_does_not_change_the_rotation_of_a_short_row(lengths, prompt_lengths, passes):
    base = build_base("phi3", dtype=torch.float64, rope_parameters=LONG_ROPE, original_max_position_embeddings=16)
    rows = [row(length, 0, seed=length) for length in lengths]
    prompts = [random_prompt(base, length, seed=length) for length in prompt_lengths]
    with TrueDouble():
        hidden, _ = states(base, rows, prompts, passes)
        truth = torch.cat([plain_logits(base, each.ids, prompts[0])[6:-1] for each in rows])
    assert relative_error(forward_of(base).logits(hidden), truth) < 1e-9


@torch.no_grad()
@PASSES
def test_rows_without_a_token_have_no_targets(tiny_llama, passes):
    prompts = [random_prompt(tiny_llama, 3)]
    assert states(tiny_llama, [Row((), 0), row(2, 0, seed=1)], prompts, passes)[0].shape[0] == 2
    assert states(tiny_llama, [Row((), 0)], prompts, passes)[0].shape[0] == 0


@PASSES
@pytest.mark.parametrize("most_scores", [1, 60])
@pytest.mark.parametrize(
    "family", each_of(["llama", "mistral_window", "bloom", "gemma2", "gpt_neo", "falcon_alibi", "mpt"])
)
def test_a_row_cut_into_query_blocks_has_the_same_states_and_gradients(monkeypatch, family, most_scores, passes):
    base = build_base(family, dtype=torch.float64)
    with TrueDouble():
        truth, _, true_gradients = with_gradients(base, lambda p: states(base, all_rows(), p, passes))
        monkeypatch.setattr(attention, "QUERY_BLOCK", 5)
        monkeypatch.setattr(attention, "MOST_SCORES", dict.fromkeys(("cpu", "cuda"), most_scores))
        found, _, gradients = with_gradients(base, lambda p: states(base, all_rows(), p, passes))
    assert relative_error(found, truth) < 1e-9
    for ours, theirs in zip(gradients, true_gradients, strict=True):
        assert relative_error(ours, theirs) < 1e-9


@st.composite
def packs(draw):
    """Prompts of 1 to 6 vectors, in this pass or in an earlier one, and rows of 1 to 14 tokens."""
    prompts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    rows = draw(st.lists(st.tuples(st.integers(1, 14), st.none() | st.integers(0, len(prompts) - 1)), max_size=5))
    ranges = [(sum(prompts[:number]), length) for number, length in enumerate(prompts)]
    is_later = bool(rows) and draw(st.booleans())
    segments = [] if is_later else [Segment(*own) for own in ranges]
    for length, owner in rows:
        first = sum(segment.length for segment in segments)
        segments.append(Segment(first, length, None if owner is None else ranges[owner]))
    return PackedBatch(tuple(segments)), sum(prompts) if is_later else 0


@settings(deadline=None, max_examples=100)
@given(packs(), st.integers(1, 7), st.integers(1, 80), st.sampled_from([0, 2**16]))
def test_an_attention_plan_shows_each_token_its_prefix_and_its_row_up_to_itself(pack, block, most_scores, most_waste):
    rows, num_before = pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        patch.setattr(attention, "MOST_SCORES", dict.fromkeys(("cpu", "cuda"), most_scores))
        patch.setattr(attention, "MOST_WASTE", most_waste)
        plan = attention_plan(rows, num_before, torch.device("cpu"))
    seen = [sight for group in plan.batches for sight in sights(group)]
    expected = {}
    for segment in rows.segments:
        first, length = segment.prefix or (0, 0)
        for index in range(segment.length):
            own = range(num_before + segment.first, num_before + segment.first + index + 1)
            expected[segment.first + index] = [*range(first, first + length), *own]
    assert len(seen) == len(expected)
    assert dict(seen) == expected
    queries = torch.cat([group.queries for group in plan.batches])
    assert queries[plan.query_index_S].tolist() == list(range(len(expected)))


def sights(group):
    """(token, the keys that it sees in order of their positions) of a group's real queries."""
    count, num_queries, num_keys = group.shape
    queries, keys = group.queries.view(count, num_queries), group.keys.view(count, num_keys)
    for run, query in group.is_real_Gn.nonzero().tolist():
        is_seen = group.key_positions_Gm[run] <= group.query_positions_Gn[run, query]
        assert group.key_positions_Gm[run][is_seen].tolist() == list(range(int(is_seen.sum())))
        assert group.query_positions_Gn[run, query] == is_seen.sum() - 1
        yield int(queries[run, query]), keys[run][is_seen].tolist()


@pytest.mark.parametrize("family", each_of(family for family in ALL if family not in BY_CACHE))
def test_a_mask_that_lost_its_batch_gives_nan(monkeypatch, family):
    base = build_base(family)
    rows, prompts = [row(5, 0, seed=1), row(9, 0, seed=2)], [random_prompt(base, 3)]
    assert states(base, rows, prompts, 1)[0].isfinite().all()
    mask_of = BatchMask.of
    monkeypatch.setattr(BatchMask, "of", lambda *args: mask_of(*args).as_subclass(torch.Tensor))
    hidden, _ = states(base, rows, prompts, 1)
    assert forward_of(base).logits(hidden).isnan().all()


def zeros(rows, module, query, key, value, scores):
    return torch.zeros_like(query).transpose(0, 1)


def failing(*args):
    raise RuntimeError("no such attention")


@pytest.mark.parametrize(("attend", "why"), [(zeros, "its answers differ"), (failing, "no such attention")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neo"])
def test_a_base_whose_packed_attention_is_wrong_runs_padded(monkeypatch, family, attend, why):
    monkeypatch.setattr("softprompt.families.patches.attend", attend)
    base = build_base(family)
    implementation = base.model.config._attn_implementation
    before = plain_answers(base.model)
    packing = forward_of(base).packing
    assert packing.carrier is None
    assert packing.note.startswith("rows run padded by length: packed rows failed their check")
    assert why in packing.note
    assert base.model.config._attn_implementation == implementation
    changed = [module for module in base.model.modules() if {"forward", "_attn"} & vars(module).keys()]
    assert {type(module).__name__ for module in changed} <= {
        "Linear",
        "Conv1D",
        "BloomGelu",
        "NewGELUActivation",
        "LlamaRMSNorm",
    }
    assert same_bits(plain_answers(base.model), before)
    check_training(base)


def check_training(base):
    rows = [row(length, 0, seed=length) for length in (1, 12, 5)]
    ours, truth = (random_prompt(base, 7).requires_grad_(True) for _ in range(2))
    nats = float(sum(accumulate_gradient(base, forward_of(base), [ours], rows, 2)))
    true_nats = sum(plain_nats(base, each.ids, each.targets, truth).sum() for each in rows)
    (true_nats / sum(len(each.ids) for each in rows)).backward()
    assert nats == pytest.approx(float(true_nats.detach()), rel=1e-5)
    assert relative_error(ours.grad, truth.grad) < TOLERANCE[torch.float32]


def test_a_base_spread_over_devices_runs_padded():
    base = build_base()
    base.model.model.layers[0]._hf_hook = object()
    assert forward_of(base).packing == Packing(None, "rows run padded by length: the base is spread over devices")
    assert base.model.config._attn_implementation == "sdpa"


def test_an_unknown_attention_implementation_is_not_replaced():
    model = build_base().model
    model.config._attn_implementation_internal = "flex_attention"
    assert install_attention(model) is None
    assert model.config._attn_implementation == "flex_attention"


def test_a_window_that_is_no_argument_of_the_attention_is_refused():
    def window(config, **given):
        return scoring_of(SimpleNamespace(**config), torch.zeros(1, 1, 4), given).window

    own = {"config": SimpleNamespace(sliding_window=6)}
    assert window(own, sliding_window=4) == 4
    assert window(own, sliding_window=None) is None
    assert window({}) is None
    assert window({"config": SimpleNamespace(sliding_window=None)}) is None
    with pytest.raises(NotImplementedError, match="its sliding_window is not an argument of its attention"):
        window(own)
    with pytest.raises(NotImplementedError, match="its attention_chunk_size is not"):
        window({"config": SimpleNamespace(attention_chunk_size=8)})


@pytest.mark.parametrize(
    ("change", "why"),
    [({"sliding_window": ...}, "its sliding_window is not"), ({"s_aux": 1}, "does not compute s_aux")],
)
def test_a_family_whose_attention_computes_more_than_ours_runs_padded(monkeypatch, change, why):
    def changed(module, query, kwargs):
        return scoring_of(
            module, query, {name: value for name, value in {**kwargs, **change}.items() if value is not ...}
        )

    monkeypatch.setattr(patches, "scoring_of", changed)
    base = build_base("mistral_window")
    packing = forward_of(base).packing
    assert packing.carrier is None
    assert why in packing.note
    check_training(base)


def saved_bytes(base, checkpoint, passes):
    """Bytes that the graph of the rows keeps for the backward pass, the base's weights left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in base.model.parameters()}
    prompts = [prompt.requires_grad_(True) for prompt in all_prompts(base)]
    prefix = run_prompts(base, forward_of(base), prompts) if passes == 2 else None
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden, _ = target_states(base, forward_of(base), all_rows(), prompts, prefix, checkpoint)
    assert hidden.requires_grad
    return sum(kept.values())


@PASSES
@pytest.mark.parametrize("family", each_of(ALL))
def test_activation_checkpointing_halves_what_the_graph_keeps(family, passes):
    base = build_base(family)
    assert saved_bytes(base, True, passes) < saved_bytes(base, False, passes) / 2


def test_the_second_run_of_a_checkpointed_layer_uses_the_same_kernels():
    base, seen = build_base(), []
    forward, prompt = forward_of(base), random_prompt(base, 7).requires_grad_(True)
    hook = base.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(active_kernels()))
    hidden, _ = target_states(base, forward, [row(5, 0, seed=1)], [prompt], checkpoint=True)
    assert seen == [forward.head.kernels]
    hidden.sum().backward()
    hook.remove()
    assert seen == [forward.head.kernels] * 2
    assert active_kernels() is None
