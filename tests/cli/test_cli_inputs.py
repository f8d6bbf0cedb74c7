"""An input on the command line takes the form of the prompt: its template, a chat message, its labels."""

from __future__ import annotations

import json
import shutil

import pytest
from support.command_line import run, succeed

from softprompt import BaseConfig, load_base, load_prompt
from softprompt.evaluation import likeliest_labels
from softprompt.families import forward_of

TEXTS = ("w7 w8 w40", "w12 w41", "w30 w9 w33 w40")


@pytest.fixture(scope="module")
def ask(base_folder, prompts):
    def generate(name, *arguments):
        flags = ("--prompt", prompts / name) if name else ()
        return succeed(
            "generate", "--base", base_folder, "--dtype", "float32", *flags, "--max-new-tokens", 4, "--json", *arguments
        ).json

    return generate


def filled(text):
    return f"w5 {text} w6"


class TestAPromptWithLabels:
    def test_the_likeliest_label_after_the_template_is_the_answer(self, ask, base_folder, prompts):
        base = load_base(BaseConfig(base=str(base_folder), dtype="float32"))
        critic = load_prompt(prompts / "critic", base)
        labels = critic.record.form.labels
        assert labels == (" w90", " w91")
        wanted = likeliest_labels(base, forward_of(base), [filled(text) for text in TEXTS], labels, critic)
        answers = ask("critic", *TEXTS)
        assert [answer["text"] for answer in answers] == [labels[number].strip() for number in wanted]
        for answer in answers:
            assert set(answer["labels"]) == set(labels)
            best = max(answer["labels"], key=answer["labels"].get)
            assert best.strip() == answer["text"]
            assert sum(answer["log_probs"]) == pytest.approx(answer["labels"][best], abs=1e-5)
            assert base.decode(tuple(answer["ids"])).strip() == answer["text"]

    def test_a_field_and_a_message_get_the_same_answer(self, ask):
        answer = ask("critic", TEXTS[0])
        assert ask("critic", "--field", f"text={TEXTS[0]}") == answer
        assert ask("critic", "--message", "system=w9", "--message", TEXTS[0]) == answer
        assert ask("critic", TEXTS[1]) != answer

    def test_raw_continues_the_text_itself(self, ask):
        (answer,) = ask("critic", "--raw", TEXTS[0])
        assert "labels" not in answer
        assert ask("critic", "--raw", filled(TEXTS[0])) != [answer]

    def test_a_sampling_flag_without_effect_is_named(self, base_folder, prompts):
        flags = ("--prompt", prompts / "critic", "--temperature", 1, "w7")
        ran = succeed("generate", "--base", base_folder, *flags)
        assert "note: --temperature has no effect on an answer among labels; --raw generates freely" in ran.err

    def test_an_input_that_is_too_long_is_refused_and_not_cut(self, base_folder, prompts):
        ran = run("generate", "--base", base_folder, "--prompt", prompts / "critic", "w7 " * 100)
        assert "103 tokens" in ran.complaint or "shorten the input" in ran.complaint


class TestARecordWithoutLabels:
    """As releases before labels wrote it: the template is filled and the answer is free."""

    @pytest.fixture(scope="class")
    def older(self, prompts):
        folder = prompts / "older"
        shutil.copytree(prompts / "critic", folder)
        record = json.loads((folder / "softprompt.json").read_text())
        del record["form"]["labels"]
        (folder / "softprompt.json").write_text(json.dumps(record))
        return folder

    def test_a_prompt_without_recorded_labels_answers_freely_after_its_template(self, ask, older):
        assert ask("older", TEXTS[0]) == ask("critic", "--raw", filled(TEXTS[0]))


class TestAChatPrompt:
    def test_a_text_becomes_a_message_of_the_user(self, ask):
        answer = ask("helper", TEXTS[0])
        assert ask("helper", "--message", TEXTS[0]) == answer
        assert ask("helper", "--message", f"user={TEXTS[0]}") == answer
        assert ask("helper", "--raw", TEXTS[0]) != answer

    def test_several_messages_make_one_conversation(self, ask):
        turns = ("--message", "w7", "--message", "assistant=w8 w9", "--message", TEXTS[0])
        assert len(ask("helper", *turns)) == 1
        assert ask("helper", *turns) != ask("helper", TEXTS[0])

    def test_a_message_without_a_known_role_is_text_of_the_user(self, ask):
        assert ask("helper", "--message", "w7=w8") == ask("helper", "--message", "user=w7=w8")


class TestATemplateOfSeveralFields:
    def test_one_text_for_several_fields_is_refused_with_the_fields_and_the_flag(self, base_folder, prompts):
        ran = run("generate", "--base", base_folder, "--prompt", prompts / "pairs", "w7")
        assert "has 'a', 'b'" in ran.err
        assert "--field NAME=TEXT" in ran.err
        assert ran.code == 2

    def test_fields_fill_the_template_by_name(self, ask):
        assert ask("pairs", "--field", "a=w7", "--field", "b=w8") == ask("pairs", "--raw", "w7 w5 w8")


class TestKindsOfInput:
    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (("w7", "--field", "text=w8"), "texts and --field exclude each other"),
            (("--message", "w7", "--field", "text=w8"), "--field and --message exclude each other"),
            (("--raw", "--field", "text=w8"), "--raw continues texts as they are, and --field fills a form"),
        ],
    )
    def test_two_kinds_of_input_exclude_each_other(self, base_folder, arguments, complaint):
        assert complaint in run("generate", "--base", base_folder, *arguments).complaint

    def test_the_bare_base_continues_texts_and_answers_chats(self, ask):
        assert ask(None, TEXTS[0]) == ask(None, "--raw", TEXTS[0])
        assert ask(None, "--message", TEXTS[0]) != ask(None, TEXTS[0])


class TestCompare:
    @pytest.fixture(scope="class")
    def compared(self, base_folder, prompts):
        def answers(names, *arguments):
            flags = [part for name in names for part in ("--prompt", prompts / name)]
            base = ("--base", base_folder, "--dtype", "float32", "--max-new-tokens", 4)
            return succeed("compare", *base, *flags, *arguments, "--json").json["answered"][0]["answers"]

        return answers

    def test_each_prompt_gets_the_input_in_its_own_form(self, compared, ask):
        found = compared(["coach", "critic", "helper"], "--input", TEXTS[0])
        assert found == {
            "base": ask(None, TEXTS[0])[0]["text"],
            "coach": ask("coach", TEXTS[0])[0]["text"],
            "critic": ask("critic", "--raw", filled(TEXTS[0]))[0]["text"],
            "helper": ask("helper", TEXTS[0])[0]["text"],
        }

    @pytest.mark.parametrize(
        ("first", "asked"), [("critic", ("--raw", filled(TEXTS[0]))), ("helper", ("--message", TEXTS[0]))]
    )
    def test_the_bare_base_gets_the_input_of_the_first_prompt(self, compared, ask, first, asked):
        assert compared([first, "coach"], "--input", TEXTS[0])["base"] == ask(None, *asked)[0]["text"]

    def test_raw_gives_the_base_and_every_prompt_the_text_itself(self, compared, ask):
        found = compared(["critic", "helper"], "--input", TEXTS[0], "--raw")
        assert found["base"] == ask(None, TEXTS[0])[0]["text"]
        assert found["critic"] == ask("critic", "--raw", TEXTS[0])[0]["text"]
        assert found["helper"] == ask("helper", "--raw", TEXTS[0])[0]["text"]


def test_int8_weights_are_named_beside_the_answers_that_they_gave():
    bare = ("generate", "--base", "embedded", "--dtype", "float32", "The lid", "--max-new-tokens", 4, "--json")
    ran, loaded = succeed(*bare, "--weights", "int8"), succeed(*bare)
    assert ran.json[0]["weights"] == "int8"
    assert "are those of int8 weights in steps of at most 32 tokens" in ran.err
    assert loaded.json[0]["weights"] == "loaded"
    assert "int8" not in loaded.err
    assert ran.json[0]["log_probs"] != loaded.json[0]["log_probs"]
