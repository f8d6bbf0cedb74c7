"""Conversations of any length by the obvious way: the same ids and targets, without rendering or reading twice."""

import dataclasses
import random
import re

import pytest
from support.slow_chat import chat_ids as slow_chat_ids
from support.slow_chat import chat_prompt_ids as slow_chat_prompt_ids
from test_data_chat import CHATML, MARKED, with_template
from transformers import PreTrainedTokenizerFast

from softprompt.compute_share import ComputeShare
from softprompt.data import build_examples, chat, chat_prompt_ids, rows_from_records, tokens
from softprompt.data.chat import chat_ids
from softprompt.data.chat_template import ChatTemplate
from softprompt.errors import DataError

END = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
TURN = "<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
LOOP = "{% for message in messages %}" + TURN + "{% endfor %}"
# As the templates of well-known families do it; the names say what is peculiar.
LINEAR = {
    "plain": CHATML,
    "trimmed, with BOS": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|end|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token ~ content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start|>assistant\n\n' }}{% endif %}",
    "default system": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|start|>system\nYou are kind.<|end|>\n' }}{% endif %}" + TURN + "{% endfor %}" + END,
    "system apart": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = "
    "messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = 'be' %}{% endif %}{{ system }}"
    "{% for message in rest %}" + TURN + "{% endfor %}" + END,
    "a prompt that may be missing": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = "
    "false %}{% endif %}" + LOOP + END,
    "macro": "{% macro turn(message) %}" + TURN + "{% endmacro %}{% for message in messages %}{{ turn(message) }}"
    "{% endfor %}" + END,
    "some roles only": "{% for message in messages if message['role'] != 'tool' %}" + TURN + "{% endfor %}" + END,
    "roles filtered": "{% for message in messages | rejectattr('role', 'equalto', 'tool') %}" + TURN + "{% endfor %}"
    + END,
    "state that the end does not see": "{% set ns = namespace(n=0) %}{% for message in messages %}{% set ns.n = ns.n "
    "+ 1 %}[{{ ns.n }}]" + TURN + "{% endfor %}" + END,
    "thinking opened": LOOP + END.replace("\n{% endif", "\n<think>{% endif"),
    "the turn before": "{% for message in messages %}{% if loop.index0 and messages[loop.index0 - 1].role == 'user' %}"
    "!{% endif %}" + TURN + "{% endfor %}" + END,
    "no control tokens": "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "marked": MARKED,
}  # fmt: skip
AGAIN = {
    "the last turn's end": "{% for message in messages %}" + TURN + "{% if loop.last and add_generation_prompt %}"
    "<|start|>assistant\n{% endif %}{% endfor %}",
    "roles alternate": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = "
    "messages %}{% endif %}{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{% endfor %}" + END,
    "earlier thinking dropped": "{% for message in messages %}<|start|>{{ message['role'] }}\n{% if loop.last %}"
    "{{ message['content'] }}{% else %}{{ message['content'].split('</think>')[-1] }}{% endif %}<|end|>\n{% endfor %}"
    + END,
    "thinking behind the last question kept": "{% set ns = namespace(last=messages|length - 1, searching=true) %}"
    "{% for message in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}{% if ns.searching and "
    "message.role == 'user' %}{% set ns.searching = false %}{% set ns.last = index %}{% endif %}{% endfor %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content if loop.index0 > ns.last else "
    "message.content.split('</think>')[-1].lstrip('\n') }}<|end|>\n{% endfor %}" + END,
    "state at the end": "{% set ns = namespace(bot=false) %}{% for message in messages %}{% set ns.bot = "
    "message['role'] == 'assistant' %}" + TURN + "{% endfor %}{% if add_generation_prompt and not ns.bot %}"
    "<|start|>assistant\n{% endif %}",
    "state at the end, by a name": "{% set ns = namespace(n=0) %}{% set other = ns %}{% for message in messages %}"
    "{% set ns.n = ns.n + 1 %}" + TURN + "{% endfor %}{{ other.n }}" + END,
    "the next turn": "{% for message in messages %}" + TURN + "{% if not loop.last and messages[loop.index0 + 1].role "
    "!= 'user' %}>{% endif %}{% endfor %}" + END,
    "copied first": "{% set all = messages | list %}{% for message in all %}" + TURN + "{% endfor %}" + END,
    "in pairs": "{% for pair in messages | batch(2) %}({% for message in pair %}" + TURN + "{% endfor %}){% endfor %}"
    + END,
    "skipped": "{% for message in messages %}{% if message.role == 'tool' %}{% continue %}{% endif %}" + TURN
    + "{% endfor %}" + END,
    "three at most": "{% for message in messages %}{% if loop.index > 3 %}{% break %}{% endif %}" + TURN
    + "{% endfor %}" + END,
    "counted": LOOP + "{{ messages|length }}" + END,
    "the last turn's answer": LOOP + "{% if add_generation_prompt %}<|start|>{{ 'user' if messages[-1].role != 'user' "
    "else 'assistant' }}\n{% endif %}",
    "state in an iterator": "{% set numbers = range(99) | map('string') %}"
    "{% for message in messages %}{{ numbers | first "
    "}}" + TURN + "{% endfor %}{% if add_generation_prompt %}{{ numbers | first }}<|start|>assistant\n{% endif %}",
    "twice": LOOP + LOOP + END,
    "in a block": "{% set text %}" + LOOP + "{% endset %}{{ text }}" + END,
    "in a macro": "{% macro all(messages) %}" + LOOP + "{% endmacro %}{{ all(messages) }}" + END,
    "as JSON": "{{ messages | tojson }}" + LOOP + END,
    "as a whole": "{{ messages == [] }}{{ (messages + [messages[0]]) | length }}" + LOOP + END,
}  # fmt: skip
TEXTS = ("hi", " what do you want? ", "the thing\n", "\nto act", "a <|end|>\n<|start|>system", "<think>so</think>\nyes",
         "é ü", "", "1 + 1", "  ", "</s><|endoftext|>", "x" * 40)  # fmt: skip


def conversations(count, seed=0):
    chance = random.Random(seed)
    for number in range(count):
        roles = ("user", "assistant") if number % 2 else ("user", "assistant", "assistant", "tool", "system")
        size = chance.randint(1, 9)
        chosen = [roles[i % 2] if number % 2 else chance.choice(roles) for i in range(size)] + ["assistant"]
        head = [{"role": "system", "content": "be kind"}] if chance.random() < 0.4 else []
        turns = [{"role": role, "content": chance.choice(TEXTS)} for role in chosen]
        if chance.random() < 0.3:
            turns[-1] = {**turns[-1], "weight": 0}
        yield head + turns


def outcome(function, *args):
    try:
        return function(*args)
    except DataError as error:
        return str(error)


_MEDIUM = [pytest.param(name, marks=pytest.mark.medium) for name in ("spaced_byte_base", "word_base")]


@pytest.fixture(params=["byte_base", "llama_base", *_MEDIUM])
def each_base(request):
    return dataclasses.replace(request.getfixturevalue(request.param))


@pytest.mark.parametrize("name", [None, *LINEAR, *AGAIN])
def test_a_conversation_has_the_ids_and_targets_of_rendering_every_turn_again(each_base, name):
    template = None if name is None else {**LINEAR, **AGAIN}[name]
    base = each_base if template is None else with_template(each_base, template)
    for messages in conversations(12):
        slow, fast = (outcome(function, base, messages, "row 1") for function in (slow_chat_ids, chat_ids))
        assert fast == slow, (name, messages)
        slow, fast = (outcome(function, base, messages) for function in (slow_chat_prompt_ids, chat_prompt_ids))
        assert fast == slow, (name, messages)


@pytest.mark.parametrize("name", [None, *LINEAR, "earlier thinking dropped", "the last turn's end"])
@pytest.mark.parametrize("eos", [True, pytest.param(False, marks=pytest.mark.medium)])
def test_a_cut_conversation_is_the_beginning_of_the_whole(byte_base, name, eos):
    base = byte_base if name is None else with_template(byte_base, {**LINEAR, **AGAIN}[name])
    for messages in conversations(6, seed=1):
        rows = rows_from_records([{"messages": messages}])
        whole = outcome(lambda rows=rows: build_examples(base, rows, eos=eos, max_length=10_000))
        if isinstance(whole, str):
            continue
        (example,) = whole.examples
        for length in (5, 9, 20, 33, len(example.ids) - 1, len(example.ids)):
            cut = outcome(lambda rows=rows, length=length: build_examples(base, rows, eos=eos, max_length=length))
            if isinstance(cut, str):
                assert not any(example.target_mask[:length])
                continue
            (part,) = cut.examples
            assert part.ids == example.ids[: len(part.ids)] and part.target_mask == example.target_mask[: len(part.ids)]
            assert not any(example.target_mask[len(part.ids) : length])
            if eos:
                assert bool(cut.report.truncated_rows) == (len(example.ids) > length)


class Counted:
    """Characters that were rendered and tokenised."""

    def __init__(self, monkeypatch):
        self.rendered = self.tokenised = 0
        render, tokenise = ChatTemplate.render, PreTrainedTokenizerFast.__call__

        def rendering(template, messages, where, **settings):
            found = render(template, messages, where, **settings)
            self.rendered += len(found.text)
            return found

        def tokenising(tokenizer, text, **settings):
            self.tokenised += len(text)
            return tokenise(tokenizer, text, **settings)

        monkeypatch.setattr(ChatTemplate, "render", rendering)
        monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", tokenising)


def long_chat(num_turns, words="what do you want?"):
    turns = ({"role": role, "content": words} for _ in range(num_turns) for role in ("user", "assistant"))
    return [{"role": "system", "content": "be kind"}, *turns]


@pytest.mark.parametrize("name", [None, *(name for name in LINEAR if name != "no control tokens")])
def test_a_conversation_is_rendered_and_read_in_proportion_to_its_length(llama_base, monkeypatch, name):
    base = llama_base if name is None else with_template(llama_base, LINEAR[name])
    chat_ids(base, long_chat(2), "row 1")  # what is kept of a tokenizer
    counted = Counted(monkeypatch)
    ids = chat_ids(base, long_chat(300), "row 1").ids
    length = len(base.tokenizer.decode(ids))
    assert counted.rendered < 3 * length
    assert counted.tokenised < 4 * length


def test_a_template_that_looks_ahead_is_rendered_again_up_to_a_bound(llama_base, monkeypatch):
    monkeypatch.setattr(chat, "MOST_RERENDER_STEPS", 20_000)
    base = with_template(llama_base, AGAIN["the last turn's end"])
    assert chat_ids(base, long_chat(20), "row 1") == slow_chat_ids(base, long_chat(20), "row 1")
    counted = Counted(monkeypatch)
    with pytest.raises(DataError, match=r"row 1: .* each of 3,000 turns has to be rendered with all before it"):
        chat_ids(base, long_chat(3000), "row 1")
    assert counted.rendered < 10**6


@pytest.mark.parametrize("name", [None, "plain", "the last turn's end"])
def test_nothing_is_read_behind_the_length_that_is_kept(llama_base, monkeypatch, name):
    base = llama_base if name is None else with_template(llama_base, {**LINEAR, **AGAIN}[name])
    turns = [*long_chat(5), {"role": "user", "content": "a " * 10**5}, *long_chat(1500)]
    rows = rows_from_records([{"messages": turns}])
    chat_ids(base, long_chat(2), "row 1")
    counted = Counted(monkeypatch)
    made = build_examples(base, rows, eos=True, max_length=100)
    assert made.report.truncated_rows == (0,) and len(made.examples[0].ids) <= 100
    assert counted.tokenised < 20_000 and counted.rendered < 30 * 10**5


def test_a_long_text_is_read_as_far_as_it_is_kept(llama_base, monkeypatch):
    rows = rows_from_records([{"text": "the thing " * 10**5}])
    counted = Counted(monkeypatch)
    made = build_examples(llama_base, rows, eos=True, max_length=50)
    assert made.report.truncated_rows == (0,) and len(made.examples[0].ids) == 50
    assert made.examples[0].ids[1:] == llama_base.encode("the thing " * 100)[:49]
    assert counted.tokenised < 5_000


def test_whoever_stops_the_work_stops_it_within_a_row(llama_base):
    class StoppedError(Exception):
        pass

    num_asked = 0

    def stop():
        nonlocal num_asked
        num_asked += 1
        if num_asked > 50:
            raise StoppedError

    base = with_template(llama_base, CHATML)
    with pytest.raises(StoppedError), ComputeShare().training(stop):
        chat_ids(base, long_chat(500), "row 1")
    num_asked = 0
    loops = "{% for a in range(99999) %}{% for b in range(99) %}{% endfor %}{% endfor %}"
    with pytest.raises(StoppedError), ComputeShare().training(stop):
        chat_prompt_ids(with_template(llama_base, loops), [{"role": "user", "content": "x"}])


def test_control_tokens_are_found_in_a_long_text_where_they_stand(byte_base):
    controls = ("<|a|>", "<|a|><|b|>", "<|ab|>", "[X]", "<", "é" * 300)
    base = with_template(byte_base, CHATML, controls)
    longest_first = re.compile("|".join(map(re.escape, sorted([*controls, "<|endoftext|>"], key=len, reverse=True))))
    chance = random.Random(3)
    for filling in ("", "x" * 997, "<|a|" * 20_000):
        text = "".join(chance.choice([*controls, filling, "y<|", "é"]) for _ in range(300))
        found = tokens.control_tokens(base.tokenizer, CHATML).found_in(text)
        assert [match.span() for match in found] == [match.span() for match in longest_first.finditer(text)]
