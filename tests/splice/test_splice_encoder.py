"""States at the columns of rows, of encoders and of causal bases: which token each is of, and of which row."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.encoders import ENCODERS, build_encoder, plain_columns
from support.family_configs import each_of
from support.slow_truth import TrueDouble, relative_error
from support.tiny_bases import VOCAB, build_base, random_ids, random_prompt

from softprompt.families import Packing, forward_of
from softprompt.splice import Row, column_states

BASES = {family: build_encoder(family, dtype=torch.float64) for family in ("bert", "deberta")}
BASES["llama"] = build_base("llama", dtype=torch.float64)
PROMPTS = {name: [random_prompt(base, length, seed=length) for length in (1, 4)] for name, base in BASES.items()}


@st.composite
def batches(draw, num_before):
    """Rows of 1 to 8 ids under one of two prompts or none, with columns in any order, some twice."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = draw(st.none() | st.integers(0, 1))
        ids = draw(st.lists(st.integers(5, VOCAB - 1), min_size=1, max_size=8))
        columns = st.lists(st.integers(0 if prompt is None else -1, len(ids) - 1), max_size=4)
        rows.append(Row(ids, prompt, columns=draw(columns), num_before=draw(st.integers(0, num_before))))
    return rows


@settings(deadline=None, max_examples=15)
@given(st.data(), st.sampled_from(list(BASES)))
@torch.no_grad()
def test_each_state_is_of_its_column_and_row(data, name):
    base, prompts = BASES[name], PROMPTS[name]
    rows = data.draw(batches(num_before=int(name != "llama")))
    with TrueDouble():
        states, owners = column_states(base, forward_of(base), rows, prompts)
        truth = [plain_columns(base, row, prompts) for row in rows]
    assert owners.tolist() == [number for number, row in enumerate(rows) for _ in row.columns]
    for number, own in enumerate(truth):
        assert len(own) == 0 or relative_error(states[owners == number], own) < 1e-9


def columns_of(length, columns):
    return {"first": (0,), "virtual": (-1,), "last": (length - 1,), "all": tuple(range(length))}[columns]


@torch.no_grad()
@pytest.mark.parametrize("columns", ["first", "virtual", "last", "all"])
@pytest.mark.parametrize("name", list(BASES))
def test_other_texts_of_a_row_are_read_as_its_own_and_belong_to_it(name, columns):
    base, prompts = BASES[name], PROMPTS[name]
    before = int(name != "llama")
    texts = [[random_ids(length, seed) for seed, length in enumerate(lengths)] for lengths in ((5, 3, 9), (7,))]
    rows = [
        Row(own[0], number, columns=columns_of(len(own[0]), columns), num_before=before, others=own[1:])
        for number, own in enumerate(texts)
    ]
    with TrueDouble():
        states, owners = column_states(base, forward_of(base), rows, prompts)
        each = [
            Row(ids, number, columns=columns_of(len(ids), columns), num_before=before)
            for number, own in enumerate(texts)
            for ids in own
        ]
        truth = torch.cat([plain_columns(base, row, prompts) for row in each])
    assert relative_error(states, truth) < 1e-9
    assert owners.tolist() == [row.prompt for row in each for _ in row.columns]
    assert [len(own) for own in rows[0].columns_of_others] == [len(row.columns) for row in each[1:3]]


@torch.no_grad()
def test_a_base_that_must_run_rows_alone_does_so():
    """FNet's Fourier transform runs over the pads too."""
    base = build_encoder("bert", dtype=torch.float64)
    forward = replace(forward_of(base), max_batchable_length=0)
    seen = []
    base.model.base_model.register_forward_hook(lambda *_: seen.append(None))
    rows = [Row(random_ids(length, length), 0, columns=(0, -1), others=[random_ids(2, 1)]) for length in (4, 7)]
    prompts = PROMPTS["bert"]
    states, owners = column_states(base, forward, rows, prompts)
    assert len(seen) == 4
    assert owners.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    together, _ = column_states(base, forward_of(base), rows, prompts)
    assert relative_error(states, together) < 1e-9


def test_a_gradient_reaches_the_prompts_that_rows_name_and_no_weight():
    base = build_encoder("bert")
    prompts = [random_prompt(base, 3, seed).requires_grad_(True) for seed in (1, 2)]
    rows = [Row(random_ids(5, 1), 0, columns=(0,), num_before=1), Row(random_ids(5, 2), None, columns=(0,))]
    states, _ = column_states(base, forward_of(base), rows, prompts)
    states.sum().backward()
    assert prompts[0].grad.abs().sum() > 0
    assert prompts[0].grad.dtype == torch.float32
    assert prompts[1].grad is None
    assert all(parameter.grad is None for parameter in base.model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("family", each_of(ENCODERS, ("bert", "deberta-v3", "roberta")))
def test_the_second_text_of_a_pair_has_the_token_type_that_the_tokenizer_gives_it(family):
    base = build_encoder(family, dtype=torch.float64)
    pairs = [("w7 w9", "w20 w21 w22"), ("w30", "w31"), ("w8 w9 w10 w11", "w12")]
    encoded = [base.tokenizer(*pair) for pair in pairs]
    firsts = [len(base.bos_ids) + len(first.split()) + len(base.pair_ids) for first, _ in pairs]
    ids = [own["input_ids"] for own in encoded]
    rows = [Row(own, None, columns=range(len(own)), num_first=n) for own, n in zip(ids, firsts, strict=True)]
    has_types = family in ("bert", "electra")  # DeBERTa embeds none of those that its tokenizer gives
    assert base.second_type == int(has_types)
    forward = forward_of(base)
    with TrueDouble():
        alone = replace(forward, packing=Packing(None, "for this test"), max_batchable_length=0)
        for way in (forward, replace(alone, max_batchable_length=None), alone):
            states, owners = column_states(base, way, [*rows, Row(ids[0], None, columns=(0,))], [])
            for number, own in enumerate(encoded):
                types = {"token_type_ids": torch.tensor([own["token_type_ids"]])} if has_types else {}
                truth = base.model.base_model(input_ids=torch.tensor([own["input_ids"]]), **types)[0][0]
                assert relative_error(states[owners == number], truth) < 1e-9
            bare = base.model.base_model(input_ids=torch.tensor([ids[0]]))[0][0]
            assert relative_error(states[-1], bare[0]) < 1e-9  # one text has type 0 throughout
            assert (relative_error(states[owners == 0], bare) > 0.01) == has_types


@torch.no_grad()
@pytest.mark.parametrize("num_before", [0, 1])
def test_virtual_tokens_have_token_type_0(num_before):
    base, prompts = BASES["bert"], PROMPTS["bert"]
    one = Row(random_ids(9, 1), 1, columns=range(9), num_before=num_before, num_first=5)
    with TrueDouble():
        states, _ = column_states(base, forward_of(base), [one], prompts)
        text = base.embedding(torch.tensor(one.ids))
        whole = torch.cat([text[:num_before], prompts[1].double(), text[num_before:]])
        types = torch.tensor([[0] * (4 + 5) + [1] * 4])
        truth = base.model.base_model(inputs_embeds=whole[None], token_type_ids=types)[0][0]
    assert relative_error(states, torch.cat([truth[:num_before], truth[num_before + 4 :]])) < 1e-9
