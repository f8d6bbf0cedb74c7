"""Line breaks and tabs as they are typed in a shell are alike in every flag that takes text."""

from __future__ import annotations

import click
import pytest
from support.command_line import succeed

from softprompt.cli.inputs import parse_fields, stop_notes
from softprompt.cli.main import commands

TYPED, MEANT = r"a\nb\tc\\nd", "a\nb\tc\\nd"


def parsed(name, *arguments):
    command = commands.get_command(click.Context(commands), name)
    return command.make_context(name, list(arguments), click.Context(commands)).params


@pytest.mark.parametrize(
    ("name", "arguments", "parameter"),
    [
        ("generate", ["--base", "x", TYPED], "texts"),
        ("generate", ["--base", "x", "a", "--stop", TYPED], "stop"),
        ("generate", ["--base", "x", "a", "--choice", TYPED], "choice"),
        ("compare", ["--base", "x", "--prompt", "p", "--input", TYPED], "texts"),
        ("compare", ["--base", "x", "--prompt", "p", "--stop", TYPED], "stop"),
        ("train", ["--base", "x", "--data", "y", "--out", "z", "--init", "text", "--init-text", TYPED], "init_text"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_a_typed_line_break_becomes_one_and_a_doubled_backslash_a_backslash(name, arguments, parameter):
    found = parsed(name, *arguments)[parameter]
    assert found in (MEANT, (MEANT,))


def test_a_typed_line_break_in_a_field_becomes_one():
    assert parse_fields([f"text={TYPED}"]) == {"text": MEANT}


def test_json_keeps_its_own_escapes():
    schema = r'{"const": "a\nb"}'
    assert parsed("generate", "--base", "x", "a", "--json-schema", schema)["json_schema"] == schema


@pytest.mark.parametrize("name", ["generate", "compare", "train"])
def test_the_help_explains_how_a_backslash_is_typed(name):
    shown = " ".join(succeed(name, "--help").out.split())
    assert r"\n is a line break" in shown
    assert r"\\n a backslash and an n" in shown


class TestStopsThatNeverMatch:
    def test_a_control_token_is_named_with_the_id_that_ends_there(self, base_folder):
        ran = succeed(
            "generate", "--base", base_folder, "w5 w6", "--max-new-tokens", 1, "--stop", "</s>", "--stop", "w9"
        )
        notes = [line for line in ran.err.splitlines() if line.startswith("note: --stop")]
        assert len(notes) == 1
        assert "'</s>' can never match: </s> is a control token, which answers leave out; --stop-ids 2 " in notes[0]

    def test_text_that_the_tokenizer_cannot_write_is_named(self, tiny_llama):
        (note,) = stop_notes(tiny_llama, ["Zebra", "w5"])
        assert note == "--stop 'Zebra' can never match: no token of the base writes 'Z'"

    def test_a_stop_string_that_can_match_gets_no_note(self, tiny_llama):
        assert stop_notes(tiny_llama, ["w5", "w5 w6", "5"]) == []
