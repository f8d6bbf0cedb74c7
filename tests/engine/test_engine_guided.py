"""Answers under a guide are one of the choices, or JSON that satisfies the schema, whatever the logits are."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from support.tiny_bases import build_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from softprompt.base import freeze_base, load_base
from softprompt.config import SamplingConfig
from softprompt.engine import AsyncEngine, Engine, Request, generate
from softprompt.engine.sampler import Sampler
from softprompt.errors import ConfigError, MissingDependencyError

STRICT = {"x-guidance": {"whitespace_flexible": False}}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", "Größe 😀"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
CHOICES = ("yes", "no", "not at all", "né à 12 h", 'say "😀"\n')


@pytest.fixture(scope="module")
def base():
    return load_base("embedded", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def sampler(base):
    return Sampler(base)


def random_logits(base, seed, extra=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, base.vocab_size + extra, generator=generator) * 2


def answer(base, row, seed=0, sampler=None, extra=0, max_tokens=400):
    """Tokens chosen from random logits until the row ends, and whether it did."""
    sampler = sampler or Sampler(base)
    for step in range(max_tokens):
        if row.is_complete:
            return row.new_ids, True
        (found,) = sampler.sample(random_logits(base, 1000 * seed + step, extra), [row], [None])
        if found.id in base.stop_ids:
            return row.new_ids, True
        assert found.id < base.vocab_size
        row.append(found.id)
    return row.new_ids, False


def text_of(base, ids):
    return base.decode_after(base.encode("It is"), ids)


def check_person(value):
    assert set(value) <= set(PERSON["properties"]) and set(PERSON["required"]) <= set(value)
    assert isinstance(value["name"], str) and len(value["name"]) <= 8
    assert isinstance(value["age"], int) and 0 <= value["age"] <= 120
    assert value["kind"] in PERSON["properties"]["kind"]["enum"]
    tags = value.get("tags", [])
    assert len(tags) <= 3 and all(isinstance(tag, bool) for tag in tags)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("schema", [PERSON, {**PERSON, **STRICT}], ids=["any white space", "none"])
def test_json_satisfies_its_schema(base, sampler, temperature, schema):
    sampling = SamplingConfig(json_schema=json.dumps(schema), temperature=temperature, top_p=0.9)
    for seed in range(6):
        ids, has_ended = answer(base, sampler.new_state(sampling, (5, 6), seed), seed, sampler)
        assert has_ended
        check_person(json.loads(text_of(base, ids)))


@pytest.mark.parametrize("name", ["stories260K-llama", "bloom-tiny-random"])
def test_other_peoples_tokenizers(shared_data, name):
    base = load_base(str(shared_data / "models" / name), device="cpu")
    sampler = Sampler(base)
    for seed in range(8):
        row = sampler.new_state(SamplingConfig(choice=CHOICES[:4], temperature=1.0), (), seed)
        ids, has_ended = answer(base, row, seed, sampler)
        assert has_ended and text_of(base, ids) in CHOICES


def test_a_tokenizer_of_pieces_and_bytes_writes_json(stories):
    for seed in range(4):
        row = Sampler(stories).new_state(SamplingConfig(json_schema=json.dumps(PERSON), temperature=1.0), (1,), seed)
        ids, has_ended = answer(stories, row, seed)
        assert has_ended
        check_person(json.loads(text_of(stories, ids)))


def test_a_guide_that_the_vocabulary_cannot_spell_is_refused(shared_data):
    """llguidance would leave the brace out and go on behind it."""
    base = load_base(str(shared_data / "models" / "bloom-tiny-random"), device="cpu")
    with pytest.raises(ConfigError, match=r"json_schema .* base 'bloom-tiny-random': it has no token for b'\{'"):
        Sampler(base).new_state(SamplingConfig(json_schema='{"type": "object"}'), ())
    with pytest.raises(ConfigError, match="choice cannot be followed"):
        Sampler(base).new_state(SamplingConfig(choice=("fine", "{}")), ())


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_choice_gives_one_of_the_list(base, sampler, temperature):
    found = set()
    for seed in range(20):
        row = sampler.new_state(SamplingConfig(choice=CHOICES, temperature=temperature), (5,), seed)
        ids, has_ended = answer(base, row, seed, sampler)
        assert has_ended
        found.add(text_of(base, ids))
    assert found <= set(CHOICES) and len(found) > 2


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_any_text_can_be_a_choice(base, sampler, choices, seed):
    row = sampler.new_state(SamplingConfig(choice=tuple(choices), temperature=1.0), (5,))
    ids, has_ended = answer(base, row, seed, sampler)
    assert has_ended and text_of(base, ids) in choices


def test_without_the_guide_the_same_logits_do_something_else(base, sampler):
    """The control: the logits above are no help."""
    ids, _ = answer(base, sampler.new_state(SamplingConfig(temperature=1.3), (5,)), 0, sampler, max_tokens=10)
    assert text_of(base, ids) not in CHOICES


def test_guided_and_free_rows_do_not_touch_each_other(base, sampler):
    kinds = [
        {"choice": CHOICES},
        {"choice": CHOICES, "temperature": 1.0, "repetition_penalty": 1.5},
        {"json_schema": json.dumps(PERSON), "temperature": 1.0, "top_k": 5},
        {},
        {"temperature": 1.0},
        {"json_schema": '{"type": "integer"}'},
    ]
    rows = [[sampler.new_state(SamplingConfig(**kind), (5, 6), i) for i, kind in enumerate(kinds)] for _ in range(2)]
    for step in range(12):
        going = [n for n, row in enumerate(rows[0]) if not row.is_complete]
        logits = random_logits(base, step).expand(len(going), -1)
        together = sampler.sample(logits, [rows[0][n] for n in going], [1] * len(going))
        alone = [sampler.sample(logits[:1], [rows[1][n]], [1])[0] for n in going]
        assert together == alone
        for n, found in zip(going, together, strict=True):
            rows[0][n].append(found.id)
            rows[1][n].append(found.id)


def test_ids_behind_the_tokenizers_vocabulary_are_forbidden(base, sampler):
    row = sampler.new_state(SamplingConfig(choice=("yes", "no")), ())
    logits = torch.full((1, base.vocab_size + 77), -5.0)
    logits[0, base.vocab_size :] = 50.0
    assert base.decode([sampler.sample(logits, [row], [None])[0].id])[0] in "yn"


def stop_logits(base):
    logits = torch.zeros(1, base.vocab_size)
    logits[0, list(base.stop_ids)] = 50.0
    return logits


def test_an_end_is_allowed_only_where_the_grammar_is_satisfied(base, sampler):
    row = sampler.new_state(SamplingConfig(choice=("yes", "yes it is")), ())
    text = ""
    while (found := sampler.sample(stop_logits(base), [row], [None])[0]).id not in base.stop_ids:
        row.append(found.id)
        text = base.decode(row.new_ids)
    assert text == "yes" and not row.is_complete
    row.append(found.id)
    assert row.is_complete


@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"min_new_tokens": 50}], ids=str)
def test_settings_that_forbid_the_end_make_it_go_on_as_far_as_it_goes(base, sampler, more):
    row = sampler.new_state(SamplingConfig(choice=("yes", "yes it is"), max_new_tokens=50, **more), ())
    while not row.is_complete:
        row.append(sampler.sample(stop_logits(base), [row], [None])[0].id)
    assert base.decode(row.new_ids) == "yes it is"


def test_a_stop_id_of_the_settings_waits_for_the_grammar_too(base, sampler):
    (stop,) = base.encode(".")
    row = sampler.new_state(SamplingConfig(choice=("yes", "yes it is"), stop_ids=(stop,)), ())
    logits = torch.zeros(1, base.vocab_size)
    logits[0, stop] = 50.0
    while (found := sampler.sample(logits, [row], [None])[0]).id != stop:
        row.append(found.id)
    assert base.decode(row.new_ids) == "yes"
    row.append(stop)
    assert row.is_complete


def test_a_base_without_an_end_of_text_ends_too(base):
    endless = dataclasses.replace(base, stop_ids=(), eos_id=None)
    for choice in (("yes", "no"), ("a", "ab", "abc")):
        row = Sampler(endless).new_state(SamplingConfig(choice=choice, temperature=1.0), ())
        ids, _ = answer(endless, row)
        assert row.is_complete and base.decode(ids) in choice
        assert not set(base.stop_ids) & set(ids)


def test_a_sampling_state_that_is_made_again_continues_alike(base, sampler):
    sampling = SamplingConfig(json_schema=json.dumps(PERSON), temperature=1.0)
    stayed = sampler.new_state(sampling, (5,))
    for step in range(15):
        resumed = sampler.new_state(sampling, (5,))
        for token in stayed.new_ids:
            resumed.append(token)
        ours, theirs = sampler.sample(random_logits(base, step).expand(2, -1), [stayed, resumed], [None, None])
        assert ours == theirs
        stayed.append(ours.id)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ('{"type": "object"', "json_schema is not JSON: Expecting"),
        ("[" * 100_000, "json_schema is not JSON: "),
        ("[]", "json_schema cannot be followed: schema must be an object or boolean"),
        ('{"type": "foo"}', "json_schema cannot be followed: Invalid type: foo"),
        ('{"not": {}}', r'json_schema cannot be followed: Unimplemented keys: \["not"\]'),
        ('{"type": "integer", "minimum": 5, "maximum": 1}', "json_schema cannot be followed: Unsatisfiable schema"),
        ('{"type": "string", "pattern": "(?=a)b"}', "json_schema cannot be followed: regex parse error"),
    ],
)
def test_a_bad_schema_is_one_sentence(sampler, schema, why):
    with pytest.raises(ConfigError, match=why) as caught:
        sampler.new_state(SamplingConfig(json_schema=schema), ())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_half_a_character_is_no_choice(sampler):
    with pytest.raises(ConfigError, match=r"choice\[0\] holds half of a surrogate pair"):
        sampler.new_state(SamplingConfig(choice=("\ud83d",)), ())


def test_a_tokenizer_that_spells_no_bytes_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match="base 'tiny-llama': llguidance cannot read its tokenizer"):
        Sampler(tiny_llama).new_state(SamplingConfig(choice=("w7",)), ())


def test_a_tokenizer_without_special_tokens_is_read(base):
    plain = json.loads(base.tokenizer.backend_tokenizer.to_str())
    plain["added_tokens"] = []
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)))
    bare = freeze_base(build_model("llama", vocab_size=len(tokenizer), eos_token_id=None), tokenizer)
    bare = dataclasses.replace(bare, stop_ids=())
    row = Sampler(bare).new_state(SamplingConfig(choice=("yes", "no")), ())
    ids, has_ended = answer(bare, row)
    assert has_ended and bare.decode(ids) in ("yes", "no")


def test_without_llguidance_the_extra_is_named(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(MissingDependencyError, match=r"softprompt\[guided\]"):
        Sampler(base).new_state(SamplingConfig(choice=("yes",)), ())


def test_the_tokenizer_is_read_once_and_only_when_asked(base, monkeypatch):
    import llguidance.hf

    read = []
    real = llguidance.hf.from_tokenizer
    monkeypatch.setattr(llguidance.hf, "from_tokenizer", lambda *a, **k: read.append(1) or real(*a, **k))
    sampler = Sampler(base)
    sampler.new_state(SamplingConfig(), ())
    assert not read
    for _ in range(3):
        sampler.new_state(SamplingConfig(choice=("yes",)), ())
    assert read == [1]


def test_a_grammar_that_fails_on_the_way_fails_its_row(base, sampler):
    rows = [sampler.new_state(SamplingConfig(choice=("yes", "no"), temperature=t), ()) for t in (0.0, 1.0, 0.0)]
    for row in rows[:2]:
        row.append(base.encode("x")[0])  # no way on from here
    found = sampler.sample(random_logits(base, 0).expand(3, -1), rows, [0] * 3)
    assert found[:2] == [None, None] and found[2] is not None
    assert not any(row.is_complete for row in rows)


def test_a_grammar_is_compiled_once_and_every_row_starts_at_its_beginning(base, monkeypatch):
    compiled = []
    compile_now = LLMatcher.grammar_from_regex
    monkeypatch.setattr(LLMatcher, "grammar_from_regex", lambda text: compiled.append(text) or compile_now(text))
    own = Sampler(base)
    sampling = SamplingConfig(choice=CHOICES, temperature=1.0, seed=3)
    found = [answer(base, own.new_state(sampling, base.encode("It is")), sampler=own) for _ in range(3)]
    assert len(compiled) == 1 and found[0][1] and found[0] == found[1] == found[2]
    for number in range(64):
        own.new_state(SamplingConfig(choice=(f"other {number}",)), ())
    assert answer(base, own.new_state(sampling, base.encode("It is")), sampler=own) == found[0]
    assert len(compiled) == 66  # the first was forgotten in the meantime


def test_a_grammar_that_another_salt_has_compiled_is_compiled_again(base, monkeypatch):
    """How soon the first token came once told which schema others had asked for."""
    compiled = []
    compile_now = LLMatcher.grammar_from_regex
    monkeypatch.setattr(LLMatcher, "grammar_from_regex", lambda text: compiled.append(text) or compile_now(text))
    own = Sampler(base)
    for salt in ("alice", "alice", "bob", "alice"):
        own.new_state(SamplingConfig(choice=CHOICES), (), salt=salt)
    assert len(compiled) == 2


HOSTILE_SCHEMAS = {
    "a reference to itself": ({"$ref": "#"}, "no text satisfies it"),
    "a circle of references": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "no text satisfies it",
    ),
    "a reference to nothing": ({"$ref": "#/$defs/x"}, "Pointer '/\\$defs/x' does not exist"),
    "a reference to another site": ({"$ref": "http://a.example/b.json"}, "does not fetch resources"),
    "a number that no float is": ({"type": "integer", "minimum": -(10**400)}, "number out of range"),
    "not a number": ({"type": "number", "minimum": float("nan")}, "expected value"),
    "many products": (
        {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {"type": "string"}}} for i in range(3)]} for j in range(9)]},
        "schema too large",
    ),
    "a long pattern": ({"type": "string", "pattern": "(" * 3000}, "regex parse error.* \\.\\.\\. "),
}


@pytest.mark.parametrize("name", HOSTILE_SCHEMAS)
def test_a_schema_that_cannot_be_compiled_is_refused_with_the_reason(sampler, name):
    schema, why = HOSTILE_SCHEMAS[name]
    with pytest.raises(ConfigError, match=f"^json_schema cannot be followed: .*{why}") as caught:
        sampler.new_state(SamplingConfig(json_schema=json.dumps(schema)), ())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


KEYWORDS = """
type properties items required additionalProperties anyOf allOf oneOf $ref $defs a enum const minimum maximum maxItems
minItems maxLength minLength pattern format multipleOf prefixItems x-guidance patternProperties not if dependentSchemas
"""
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=4)
    | st.sampled_from(["object", "array", "integer", "number", "string", "#", "#/$defs/a", "(a*)*b{9}", "date"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(KEYWORDS.split()), inner, max_size=5
    ),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["type", "properties", "$defs", "$ref", "items", "anyOf", "allOf"]), ODD))
def test_any_schema_is_followed_or_refused_in_a_sentence(base, sampler, schema):
    try:
        row = sampler.new_state(SamplingConfig(json_schema=json.dumps(schema)), ())
    except ConfigError as error:
        row, refusal = None, str(error)
    if row is None:
        assert 20 < len(refusal) < 400 and "\n" not in refusal
        return
    for step in range(6):
        if row.is_complete:
            return
        (found,) = sampler.sample(random_logits(base, step), [row], [None])
        if found is None:
            assert row.problem is not None
            return
        row.append(found.id)


def test_a_schema_that_is_nested_too_deeply_is_refused(sampler):
    schema = '{"items": ' * 121 + "{}" + "}" * 121
    with pytest.raises(ConfigError, match="json_schema is nested more than 120 levels deep; make it flatter"):
        sampler.new_state(SamplingConfig(json_schema=schema), ())


def test_a_schema_that_grows_too_large_on_the_way_fails_its_request_with_the_reason(base):
    many = {"type": "object", "properties": {f"k{number}": {"type": "string"} for number in range(1000)}}
    sampling = SamplingConfig(json_schema=json.dumps(many))
    with pytest.raises(ConfigError, match=r"JSON schema or choice cannot be followed any further: .*max is 2000"):
        generate(base, [Request(base.encode("It is"), sampling=sampling)])


def test_an_object_is_closed_unless_it_says_otherwise(base, sampler):
    """Each may write `{"b": 1}` where it is open, and only the open one does."""
    closed = {"type": "object", "properties": {"a": {"type": "integer"}}}
    nested = {"type": "array", "items": closed, "minItems": 1}
    for schema, text, is_allowed in (
        (closed, '{"a": 1}', True),
        (closed, '{"b": 1}', False),
        ({**closed, "additionalProperties": True}, '{"b": 1}', True),
        (nested, '[{"b": 1}]', False),
        ({"$defs": {"c": closed}, "$ref": "#/$defs/c"}, '{"b": 1}', False),
        ({"type": "object"}, '{"b": 1}', True),
        ({"allOf": [closed, {"properties": {"b": {"type": "integer"}}}]}, '{"a": 1, "b": 1}', True),
        ({**closed, "required": ["b"]}, '{"b": 1}', True),
        ({"properties": {"properties": closed}}, '{"properties": {"b": 1}}', False),
        ({"enum": [{"properties": {"type": "integer"}}]}, '{"properties": {"type": "integer"}}', True),
    ):
        assert spells(base, sampler, schema, text) == is_allowed, (schema, text)


def test_an_integer_has_at_most_fifteen_digits_unless_it_says_otherwise(base, sampler):
    fifteen, sixteen = "9" * 15, "1" + "0" * 15
    for schema, text, is_allowed in (
        ({"type": "integer"}, fifteen, True),
        ({"type": "integer"}, f"-{fifteen}", True),
        ({"type": "integer"}, sixteen, False),
        ({"type": ["integer", "null"], "minimum": 0}, sixteen, False),
        ({"type": "integer", "maximum": 10**16}, sixteen, True),
        ({"type": "integer", "minimum": 10**16}, "1" + "0" * 16, True),
        ({"type": "integer", "enum": [10**15]}, sixteen, True),
    ):
        assert spells(base, sampler, schema, text) == is_allowed, (schema, text)


def spells(base, sampler, schema, text):
    """Whether the guide lets this text be written, and end there."""
    guide = sampler.new_state(SamplingConfig(json_schema=json.dumps(schema)), ()).guide
    for token in base.encode(text):
        if not guide.allowed(base.vocab_size)[token]:
            return False
        guide.append(token)
    return bool(guide.allowed(base.vocab_size)[list(base.stop_ids)].any()) or guide.is_complete


def test_a_guide_is_compiled_outside_the_engines_thread(base, monkeypatch):
    """Another client's answer goes on meanwhile."""
    threads = []
    compile_now = LLMatcher.grammar_from_json_schema
    monkeypatch.setattr(
        LLMatcher, "grammar_from_json_schema",
        lambda *a, **k: threads.append(threading.current_thread().name) or compile_now(*a, **k),
    )  # fmt: skip
    schema = '{"type": "boolean"}'
    request = Request(base.encode("It is"), sampling=SamplingConfig(json_schema=schema))

    async def ask():
        async with AsyncEngine(Engine(base)) as running:
            return [event async for event in running.generate(request)][-1]

    assert asyncio.run(ask()).answers[0].text in ("true", "false")
    assert len(threads) == 1 and threads[0] != "softprompt-engine"
