"""Templates are data: whatever one does, it gives text as transformers would, or a sentence, within bounds."""

import tracemalloc
from contextlib import contextmanager

import pytest
from test_data_chat import CHAT, CHATML, with_template
from transformers.utils.chat_template_utils import render_jinja_template

from softprompt.data import chat_prompt_ids, rows_from_records
from softprompt.data.chat_template import ChatTemplate
from softprompt.data.examples import build_examples
from softprompt.errors import DataError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def grown(body):
    return "{% set ns = namespace(s='xxxxxxxx', l=[1, 2], f=none) %}{% for i in range(99) %}" + body + "{% endfor %}"


FAILING = {
    "a division": ("{{ 1/0 }}", "fails: ZeroDivisionError: division by zero"),
    "its own refusal": ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
    "something undefined": ("{{ nothing.at.all }}", "refuses the messages: 'nothing' is undefined"),
    "no function": ("{{ 5() }}", "refuses the messages: 'int' object is not callable"),
    "an unknown filter": ("{{ 5 | explode }}", "cannot be read: No filter named 'explode'"),
    "a broken tag": ("{% for %}", "cannot be read: "),
    "another file": ("{% include 'x' %}", "refuses the messages: no loader"),
    "Python's insides": ("{{ ''.__class__.__mro__ }}", "refuses the messages: access to attribute '__class__'"),
    "the watch": ("{{ messages._log.reads }}", "refuses the messages: "),
    "a hidden name": ("{% set ns = namespace() %}{% set ns._x = 1 %}", "refuses the messages: a namespace cannot hold"),
    "an undefined message key": ("{{ messages[99].content.strip() }}", "refuses the messages: "),
    "a change": ("{{ messages.append(1) }}", "refuses the messages: "),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end: it has"),
    "a loop over nothing": ("{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
                            "does not end: it has taken"),
    "filters in loops": ("{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
                         "does not end"),
    "much text": ("{% for a in range(99999) %}" + "x" * 10_000 + "{% endfor %}", "does not end: it makes more than"),
    "recursion": ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "does not end: it calls itself too deeply"),
    "a recursive loop": ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "does not end: it calls itself"),
    "a product": ("{{ 'x' * 10**10 }}", "does not end: it makes more than"),
    "a list's product": ("{{ ([1] * 10**10) | length }}", "does not end"),
    "a power": ("{{ 10 ** 99999 }}", "does not end: it computes a whole number"),
    "powers of powers": (grown("{% set ns.l = 3 ** 5000 %}{% set ns.l = ns.l * ns.l %}"), "does not end"),
    "centred": ("{{ 'x' | center(10**10) }}", "does not end"),
    "filled": ("{{ 'x'.zfill(10**10) }}", "does not end"),
    "indented": ("{{ ('\n' * 10000) | indent(100000) }}", "does not end"),
    "formatted": ("{{ '%9999999999d' % 5 }}", "does not end: it formats text to a width"),
    "formatted by a method": ("{{ '{:>9999999999}'.format(5) }}", "does not end"),
    "formatted by an argument": ("{{ '%*d' % (9999999999, 5) }}", "does not end"),
    "formatted by a filter": ("{{ '%9999999999d' | format(5) }}", "does not end"),
    "a wide date": ("{{ strftime_now('%9999999999d') }}", "does not end"),
    "indented JSON": ("{{ [1, 2] | tojson(indent=10**10) }}", "does not end"),
    "batches": ("{{ [1] | batch(10**10, 'x') | list | length }}", "does not end"),
    "replaced": ("{{ ('x' * 100000).replace('x', 'y' * 100000) }}", "does not end"),
    "replaced by a filter": ("{{ ('x' * 100000) | replace('x', 'y' * 100000) }}", "does not end"),
    "joined": ("{{ range(99999) | map('default', 'x') | join('y' * 100000) }}", "does not end"),
    "joined of copies": ("{% set x = 'y' * 100000 %}{{ ([x] * 99999) | join }}", "does not end"),
    "doubled": (grown("{% set ns.s = ns.s + ns.s %}"), "does not end: it makes more than"),
    "doubled by ~": (grown("{% set ns.s = ns.s ~ ns.s %}"), "does not end"),
    "doubled in a block": (grown("{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"), "does not end"),
    "doubled in a macro": ("{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + grown("{% set ns.s = m(ns.s) %}"),
                           "does not end"),
    "doubled in a list": (grown("{% set ns.l = ns.l + ns.l %}"), "does not end"),
    "nested": (grown("{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}", "does not end"),
    "nested JSON": (grown("{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l | tojson }}", "does not end"),
    "nested and compared": (grown("{% set ns.l = [ns.l, ns.l] %}{% set ns.f = [ns.f, ns.f] %}") + "{{ ns.l == ns.f }}",
                            "does not end"),
    "searched": ("{% set x = 'x' * 1000000 %}{% for a in range(99999) %}{{ 'y' in x }}{% endfor %}", "does not end"),
    "sliced": ("{% set x = 'x' * 1000000 %}{% for a in range(99999) %}{% set y = x[1:] %}{% endfor %}", "does not end"),
    "split": ("{% set x = 'x' * 1000000 %}{% for a in range(99999) %}{% set y = x.split('y') %}{% endfor %}",
              "does not end"),
}  # fmt: skip
# What templates in use do that is not in test_data_chat_exact.py
ORDINARY = (
    "{{ messages | tojson }}{{ {'a': [1, 'é']} | tojson(indent=4) }}{{ messages[0] | tojson(ensure_ascii=true) }}",
    "{{ messages | map(attribute='content') | join(', ') }}{{ ', '.join(['a', 'b']) }}{{ ['a', 'b'] | join }}",
    "{% set d = dict(a=1, b=none) %}{{ d.items() | list }}{{ d['a'] }}{{ d.get('c', 'x') }}"
    "{{ none }}{{ 1.5 }}{{ [1] }}",
    "{%- for m in messages -%}\n  {%- if m is mapping and m.content is string -%}{{ '%s: %s' % (m.role, m.content) }}"
    "{%- endif %}\n{% endfor %}",
    "{{ '{}-{}'.format(messages[0].role, 5) }}{{ 'x'.center(9) }}{{ 'x' | center(9) }}{{ 3 * 'ab' }}{{ 2 ** 10 }}",
    "{% set ns = namespace(x='', n=0) %}{% for m in messages %}{% set ns.x = ns.x ~ m.content %}{% set ns.n = ns.n + 1 "
    "%}{% endfor %}{{ ns.x | length }}{{ ns.n }}{{ ns.x[2:9] }}{{ ns.x | trim | replace('a', 'bb') | upper }}",
    "{% for m in messages recursive %}{{ loop.index }}{{ loop.depth }}{% if loop.last %}!{% endif %}"
    "{% else %}-{% endfor %}",
    "{% for role, group in messages | groupby('role') %}{{ role }}{{ group | length }}{% endfor %}",
    "{% for a, b in [(1, 2), (3, 4)] %}{{ a ~ b }}{% endfor %}{{ messages | selectattr('role', 'equalto', 'user') "
    "| list | length }}{{ (messages | last).content }}{{ messages | first == messages[0] }}",
    "{% macro m(x, y='z') %}{{ x }}{{ y }}{{ caller() if caller else '' }}{% endmacro %}{{ m(1) }}{% call m(2) %}c"
    "{% endcall %}{% filter upper %}abc{% endfilter %}{% set b %}q{% endset %}{{ b }}",
    "{{ bos_token }}{{ nothing }}{{ nothing | default('d') }}{{ tools is none }}{{ documents }}{{ '<b>' | e }}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content | indent(2) }}{% endfor %}"
    "{{ messages[0].content.split(' ')[-1] }}{{ messages[-1]['content'].rstrip('g') }}{{ [1, 2, 3] | sum }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %} {% generation %}{% endgeneration %}"
    "{{ messages[1].role }}",
)  # fmt: skip


@contextmanager
def little_memory(is_watched):
    if is_watched:  # it makes loops slow
        tracemalloc.start()
    try:
        yield
    finally:
        if is_watched:
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert most < 10**8


def render(source, messages=CHAT):
    return ChatTemplate(source, SPECIAL).render(messages, "row 1")


@pytest.mark.parametrize("source", [*ORDINARY, CHATML])
def test_an_ordinary_template_gives_what_transformers_gives(source):
    marked = "{% generation %}" in source
    texts, spans = render_jinja_template(
        [[dict(message) for message in CHAT]], chat_template=source, return_assistant_tokens_mask=marked, **SPECIAL
    )
    found = render(source)
    assert found.text == texts[0]
    assert found.marks == (spans[0] if marked else [])


def test_reasoning_is_given_under_every_name_that_templates_read():
    messages = [{"role": "assistant", "content": "a", "reasoning": "why"}]
    source = "{{ messages[0].thinking }}{{ messages[0].reasoning_content }}{{ messages[0] | tojson }}"
    assert render(source, messages).text == render_jinja_template([messages], chat_template=source)[0][0]


@pytest.mark.parametrize("case", FAILING)
def test_a_template_that_fails_or_does_not_end_is_one_sentence(case):
    source, told = FAILING[case]
    with pytest.raises(DataError) as refusal, little_memory("99999" not in source):
        render(source)
    assert str(refusal.value).startswith(f"row 1: the tokenizer's chat template {told}")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


def test_a_message_nested_too_deeply_is_one_sentence(byte_base):
    nested: object = 1
    for _ in range(5_000):
        nested = [nested]
    with pytest.raises(DataError, match="nested too deeply"):
        chat_prompt_ids(byte_base, [{"role": "user", "content": "x", "metadata": nested}])


def test_named_templates_without_a_default_are_named(byte_base):
    base = with_template(byte_base, {"rag": CHATML, "tool_use": CHATML})
    told = "the base's tokenizer has chat templates named 'rag', 'tool_use' and none named 'default'"
    with pytest.raises(DataError, match=f"^row 1 of records: {told}"):
        build_examples(base, rows_from_records([{"messages": CHAT}]), eos=True, max_length=50)
    with pytest.raises(DataError, match=f"^messages: {told}"):
        chat_prompt_ids(base, CHAT)
    named = with_template(byte_base, {"rag": "x", "default": CHATML})
    assert chat_prompt_ids(named, CHAT) == chat_prompt_ids(with_template(byte_base, CHATML), CHAT)
