"""Help in sections, and everything that is missing named at once."""

from __future__ import annotations

import click
import pytest
from support.command_line import run, succeed

from softprompt.cli.command import Command
from softprompt.cli.main import commands

WITH_SECTIONS = ("train", "compare", "sweep", "generate", "predict", "serve")


def command_named(name: str) -> Command:
    found = commands.get_command(click.Context(commands), name)
    assert isinstance(found, Command)
    return found


@pytest.mark.parametrize("name", WITH_SECTIONS)
class TestHelp:
    def test_every_option_is_listed_once_under_a_heading_and_examples_come_last(self, name):
        shown = succeed(name, "--help").out
        command = command_named(name)
        listed = shown[shown.index(f"\n{next(iter(command.sections))}:\n") :]
        for option in command.params:
            if isinstance(option, click.Option):
                starts = [line for line in listed.split("\n") if line.startswith(f"  {option.opts[0]} ")]
                assert len(starts) == 1, (option.opts, starts)
        assert "\nOther options:\n" in shown
        assert shown.index("\nExamples:\n") > shown.index("--help")

    def test_every_name_in_a_section_is_a_flag(self, name):
        command = command_named(name)
        known = {parameter.name for parameter in command.params}
        # Settings of a config that this command, or any, has no flag for.
        strangers = {item for names in command.sections.values() for item in names} - known
        assert strangers <= {"validation", "test", "score_tokens", "logit_bias"}

    def test_the_flags_of_the_examples_exist(self, name):
        for example in command_named(name).examples:
            for line in example.replace("\\\n", " ").split(" && "):
                words = line.split()
                start = words.index("softprompt")
                command = command_named(words[start + 1]) if words[start + 1] in WITH_SECTIONS else None
                flags = {flag for option in command.params for flag in option.opts} if command else set()
                for word in words[start + 2 :]:
                    assert command is None or not word.startswith("--") or word in flags, word


class TestMissingOptions:
    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (("train",), "Missing options '--out', '--base' and '--data'."),
            (("train", "--out", "run", "--rows", 3), "Missing options '--base' and '--data'."),
            (("train", "--resume"), "Missing option '--out'."),
            (("compare",), "Missing options '--base' and '--prompt' or '--ensemble'."),
            (("compare", "--base", "b"), "Missing option '--prompt' or '--ensemble'."),
            (("generate", "--base", "b"), "Missing option TEXTS, '--field' or '--message'."),
            (("sweep",), "Missing argument 'SWEEP.toml', option '--out'."),
            (("prompts", "pull"), "Missing argument 'REPO_ID', argument 'NAME', option '--library'."),
        ],
    )
    def test_all_missing_options_are_named_in_one_line(self, arguments, complaint):
        assert run(*arguments).complaint == complaint
