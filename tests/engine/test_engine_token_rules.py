"""What generation_config.json says of tokens is followed as transformers follows it; the rest is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_bases import BOS, EOS, VOCAB, build_model, build_tokenizer, random_ids, random_prompt

from softprompt.base import Base, freeze_base
from softprompt.config import SamplingConfig
from softprompt.engine import Request, generate
from softprompt.errors import BaseModelError
from softprompt.prompt import SoftPrompt

NEW = 12
TEXTS = [random_ids(5, seed) for seed in range(4)] + [random_ids(1, 9), random_ids(11, 10)]


def base_with(family: str = "llama", **settings: Any) -> Base:
    model = build_model(family)
    for name, value in {"eos_token_id": EOS, **settings}.items():
        setattr(model.generation_config, name, value)
    return freeze_base(model, build_tokenizer(), name="ruled")


def truth(base: Base, ids: tuple[int, ...]) -> list[int]:
    """transformers' own greedy answer, its end left out as ours leaves it out."""
    with torch.no_grad():
        out = base.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), max_new_tokens=NEW, do_sample=False
        )
    new: list[int] = out[0, len(ids) :].tolist()
    return new[:-1] if new[-1] == EOS else new


def ours(base: Base, texts: list[tuple[int, ...]], **settings: Any) -> list[list[int]]:
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=0, **settings)
    return [list(answer.ids) for answer in generate(base, [Request(ids, sampling=sampling) for ids in texts])]


def plain(family: str) -> list[list[int]]:
    return ours(base_with(family), TEXTS, ignore_eos=True)


def likely(family: str) -> list[int]:
    """Tokens that come in answers without a rule, often ones first: rules on others would change nothing."""
    said = [token for answer in plain(family) for token in answer]
    return sorted(set(said), key=said.count, reverse=True)


def pairs(family: str) -> list[list[int]]:
    return [answer[1:3] for answer in plain(family)] + [answer[2:5] for answer in plain(family)]


RULES = {
    "suppress_tokens": lambda family: {"suppress_tokens": [*likely(family)[:5], -1, VOCAB + 3]},
    "begin_suppress_tokens": lambda family: {"begin_suppress_tokens": [answer[0] for answer in plain(family)]},
    "bad_words_ids": lambda family: {"bad_words_ids": [[likely(family)[0]], *pairs(family), [EOS]]},
    "sequence_bias": lambda family: {
        "sequence_bias": [[[likely(family)[0]], -3.0], *([pair, -4.0] for pair in pairs(family)), [[7, 8], 2.5]]
    },
    "no_repeat_ngram_size": lambda family: {"no_repeat_ngram_size": 2},
    "no_token_twice": lambda family: {"no_repeat_ngram_size": 1},
    "min_new_tokens": lambda family: {"min_new_tokens": 9, "eos_token_id": [EOS, *likely(family)[:3]]},
    "min_length": lambda family: {"min_length": 10, "eos_token_id": [EOS, *likely(family)[:3]]},
    "forced_bos_token_id": lambda family: {"forced_bos_token_id": 7},
    "forced_eos_token_id": lambda family: {"forced_eos_token_id": 9},
    "a few together": lambda family: {
        "suppress_tokens": likely(family)[:3], "no_repeat_ngram_size": 3, "min_new_tokens": 6,
        "begin_suppress_tokens": likely(family)[3:6], "forced_eos_token_id": [9],
    },
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.medium)])
@pytest.mark.parametrize("rule", RULES)
def test_answers_under_a_bases_rules_are_those_of_transformers_alone_and_together(rule: str, family: str) -> None:
    settings = RULES[rule](family)
    base = base_with(family, **settings)
    ends = base.model.generation_config.eos_token_id
    expected = [truth(base, ids) for ids in TEXTS]
    if isinstance(ends, list):
        expected = [answer[:-1] if answer and answer[-1] in ends else answer for answer in expected]
    assert ours(base, TEXTS) == expected
    assert [ours(base, [ids])[0] for ids in TEXTS[:2]] == expected[:2]
    bare = ours(base_with(family), TEXTS)
    if rule not in ("min_new_tokens", "min_length"):  # these need ends that come early
        assert expected != bare  # the control: a rule that changes nothing shows nothing


def test_a_least_length_really_moved_the_end() -> None:
    ends = likely("llama")[:3]
    short = ours(base_with(eos_token_id=ends), TEXTS)
    long = ours(base_with(eos_token_id=ends, min_new_tokens=9), TEXTS)
    assert min(map(len, short)) < 9 <= min(map(len, long))


def test_a_suppressed_token_is_never_drawn_and_a_soft_prompt_does_not_count_as_text() -> None:
    base = base_with(suppress_tokens=list(range(3, 60)), no_repeat_ngram_size=1)
    prompt = SoftPrompt(random_prompt(base, 4).float())
    sampling = SamplingConfig(max_new_tokens=20, temperature=2.0, seed=3, ignore_eos=True)
    for request in (Request((61, 62), sampling=sampling), Request((61, 62), prompt, sampling=sampling)):
        ids = generate(base, [request])[0].ids
        assert len(set(ids)) == len(ids) == 20
        assert not set(ids) & {*range(3, 60), 61, 62}


def test_a_base_without_rules_costs_a_row_nothing() -> None:
    base = base_with()
    assert base.rules.ignored == ()
    assert not base.rules.has_token_rules
    assert base.rules.note is None


def test_a_generation_default_that_is_not_followed_is_named_with_its_value() -> None:
    note = base_with(temperature=0.6, do_sample=True, repetition_penalty=1.1, top_p=1.0, my_own=[1]).rules.note
    assert note is not None
    assert "do_sample = True" in note
    assert "temperature = 0.6" in note
    assert "repetition_penalty = 1.1" in note
    assert "my_own = [1]" in note
    assert "top_p" not in note
    assert "suppress_tokens" not in note


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("suppress_tokens", "all"), ("begin_suppress_tokens", [1.5]), ("bad_words_ids", [3]), ("bad_words_ids", [[]]),
        ("sequence_bias", [[[1], float("nan")]]), ("sequence_bias", {"a": 1.0}), ("min_length", -1),
        ("min_new_tokens", "3"), ("no_repeat_ngram_size", 0.5), ("eos_token_id", float("nan")),
        ("eos_token_id", ["</s>"]), ("forced_eos_token_id", {"a": 1}),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_meant_is_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(BaseModelError, match=f"base 'ruled': generation_config.json: {setting} is .*; it must be a"):
        base_with(**{setting: value})


def test_an_answer_can_begin_with_what_is_only_never_first() -> None:
    first = ours(base_with(), [TEXTS[0]])[0][0]
    answers = ours(base_with(begin_suppress_tokens=[first]), TEXTS, ignore_eos=True)
    assert answers[0][0] != first
    assert any(first in answer[1:] for answer in answers) or BOS in answers[0]
