"""softprompt compare: answers side by side, held-out figures found again through the prompts' records."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import ENVIRONMENT, run, succeed
from support.material import QUICK, TEMPLATE, review, sentence, write_csv, write_jsonl

from softprompt.storage import load_prompt, save_prompt

INPUTS = ("--input", "w5 w6 w7", "--input", "w8", "--max-new-tokens", 6)


@pytest.fixture
def compare(base_folder, library):
    def call(*flags, prompts=("coach", "critic"), cwd=None):
        named = [part for prompt in prompts for part in ("--prompt", library / prompt)]
        return succeed("compare", "--base", base_folder, "--dtype", "float32", *named, *flags, cwd=cwd)

    return call


def test_tables_show_the_base_first_and_every_figure(compare):
    ran = compare(*INPUTS)
    lines = ran.out.splitlines()
    names = [next(iter(line.replace("│", " ").split()), "") for line in lines]
    shown = [name for name in names if name in ("base", "coach", "critic")]
    assert shown == ["base", "coach", "critic"] * 5  # two inputs, two losses, one accuracy
    assert "Input: w5 w6 w7" in ran.out
    assert "Held-out loss on texts.csv: 16 rows, " in ran.out
    assert "Held-out loss on reviews.jsonl: 16 rows, 32 text tokens" not in ran.out
    assert "Held-out loss on reviews.jsonl: 16 rows, 16 text tokens" in ran.out
    assert "Accuracy on reviews.jsonl: 16 rows" in ran.out
    assert "One base of 0.0 MiB, 2 prompts of 0.4 KiB together; peak resident size" in lines[-1]
    assert ran.err.count("\n") == 1, ran.err


def figures(out: str) -> list[list[str]]:
    """The words of each line behind the first held-out loss, memory aside."""
    return [line.split() for line in out.partition("Held-out loss")[2].splitlines()[1:-1] if "─" not in line]


def test_figures_fit_80_columns_and_nothing_is_cut(compare, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    narrow = compare(*INPUTS, "--max-new-tokens", 60)
    assert max(len(line) for line in narrow.out.splitlines()[:-1]) <= 80
    assert "…" not in narrow.out
    monkeypatch.setenv("COLUMNS", "300")
    assert figures(compare(*INPUTS).out) == figures(narrow.out)
    monkeypatch.setenv("COLUMNS", "20")  # figures stay whole even there
    assert figures(compare(*INPUTS).out) == figures(narrow.out)


def test_piped_answers_are_whole(compare, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    flags = (*INPUTS, "--max-new-tokens", 60)
    answers = compare(*flags, "--json").json["answered"]
    shown = compare(*flags).out
    words = " ".join(cell for line in shown.splitlines() if "│" in line for cell in [line.split("│")[2].strip()])
    for item in answers:
        for text in item["answers"].values():
            assert " ".join(text.split()) in " ".join(words.split())
    assert max(len(line) for line in shown.splitlines()) <= 120


def test_json_has_every_answer_and_figure(compare):
    found = compare(*INPUTS, "--json").json
    assert found["base_name"] == "tiny-llama"
    assert found["prompts"] == {"coach": 3, "critic": 3}
    assert [list(item["answers"]) for item in found["answered"]] == [["base", "coach", "critic"]] * 2
    assert {(loss["held_out"], loss["prompt"]) for loss in found["losses"]} == {
        (held_out, prompt) for held_out in ("texts.csv", "reviews.jsonl") for prompt in (None, "coach", "critic")
    }
    assert [item["prompt"] for item in found["accuracies"]] == [None, "coach", "critic"]
    assert found["prompt_bytes"] == 2 * 3 * 16 * 4


def test_compare_and_generate_give_the_same_answers(compare, base_folder, library):
    answers = compare(*INPUTS, "--json").json["answered"][0]["answers"]
    fixed = ("generate", "--base", base_folder, "--dtype", "float32", "w5 w6 w7", "--max-new-tokens", 6)
    assert succeed(*fixed).out == answers["base"] + "\n"
    assert succeed(*fixed, "--prompt", library / "coach").out == answers["coach"] + "\n"


def test_the_markdown_report_has_the_figures_of_the_tables(compare, tmp_path):
    ran = compare(*INPUTS, "--markdown", tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# tiny-llama: before and after\n")
    assert "| prompt | nats/token |" in text
    assert f"written to {tmp_path / 'report.md'}" in ran.err
    assert "Held-out loss" in ran.out


class TestHeldOutRows:
    @pytest.fixture
    def project(self, tmp_path, base_folder):
        """A project whose prompts were trained with relative paths."""
        folder = tmp_path / "project"
        folder.mkdir()
        write_csv(folder / "texts.csv", [{"prompt": sentence(i)} for i in range(30)])
        for name, column in (("one", 0), ("two", 1)):
            flags = (
                "--data",
                "texts.csv",
                "--rows",
                20,
                "--seed",
                column,
                "--out",
                f"prompts/{name}",
                "--max-steps",
                1,
            )
            succeed("train", "--base", base_folder, *QUICK, *flags, cwd=folder)
        return folder

    def test_held_out_rows_are_found_from_another_folder_and_shared_ones_read_once(self, compare, project, tmp_path):
        prompts = (project / "prompts" / "one", project / "prompts" / "two")
        found = compare("--json", prompts=prompts, cwd=tmp_path).json
        assert [(loss["held_out"], loss["prompt"]) for loss in found["losses"]] == [
            ("texts.csv", None), ("texts.csv", "one"), ("texts.csv", "two"),
        ]  # fmt: skip
        assert found["losses"][0]["num_rows"] == 10

    def test_a_file_of_the_same_name_elsewhere_is_not_used(self, compare, project, tmp_path):
        write_csv(tmp_path / "texts.csv", [{"prompt": sentence(i)} for i in range(90, 99)])
        ran = compare("--json", prompts=(project / "prompts" / "one",), cwd=tmp_path)
        assert ran.json["losses"][0]["num_rows"] == 10

    def test_held_out_rows_of_a_moved_project_are_found(self, compare, project, tmp_path):
        moved = shutil.move(project, tmp_path / "moved")
        assert compare("--json", prompts=(Path(moved) / "prompts" / "one",), cwd=Path(moved)).json["losses"]

    def test_a_changed_held_out_file_becomes_a_note(self, compare, project):
        write_csv(project / "texts.csv", [{"prompt": sentence(i + 1)} for i in range(30)])
        ran = compare(*INPUTS, "--json", prompts=(project / "prompts" / "one",))
        assert ran.json["losses"] == []
        assert f"note: the held-out rows of one cannot be read: {project}/texts.csv has changed since" in ran.err

    def test_a_lost_held_out_file_becomes_a_note(self, compare, project):
        (project / "texts.csv").unlink()
        ran = compare(*INPUTS, "--json", prompts=(project / "prompts" / "one",))
        assert ran.json["losses"] == []
        assert "note: the held-out rows of one cannot be read: there is no data at 'texts.csv'" in ran.err

    @pytest.mark.parametrize("run_record", [{}, {"test": 3}, {"test": {"hash": "x"}, "data": [], "plan": 1}])
    def test_a_record_without_the_source_of_its_rows_becomes_a_note(self, compare, library, tmp_path, run_record):
        from dataclasses import replace

        prompt = load_prompt(library / "coach")
        save_prompt(replace(prompt, record=replace(prompt.record, run=run_record)), tmp_path / "mute")
        ran = compare(*INPUTS, "--json", prompts=(tmp_path / "mute",))
        assert ran.json["losses"] == []
        assert "give --data" in ran.err

    def test_data_names_another_held_out_set(self, compare, tmp_path):
        data = write_csv(tmp_path / "more.csv", [{"said": sentence(i)} for i in range(50, 58)])
        found = compare("--data", data, "--text-column", "said", "--rows", 5, "--json").json
        assert {(loss["held_out"], loss["num_rows"]) for loss in found["losses"]} == {("more.csv", 5)}
        assert found["accuracies"] == []

    def test_another_labelled_set_is_read_in_the_prompts_template(self, compare, tmp_path):
        """Rows of one label only say nothing of the labels there are; the prompt's record does."""
        data = write_jsonl(tmp_path / "more.jsonl", [review(2 * i) for i in range(30, 35)])
        for flags in ((), TEMPLATE):
            found = compare("--data", data, *flags, "--json", prompts=("critic",)).json
            assert [(item["prompt"], item["num_rows"]) for item in found["accuracies"]] == [(None, 5), ("critic", 5)]


def test_fields_fill_the_template_of_the_prompt(compare):
    found = compare("--field", "text=w7 w40", "--max-new-tokens", 4, "--json", prompts=("critic",)).json
    raw = compare("--input", "w5 w7 w40 w6", "--raw", "--max-new-tokens", 4, "--json", prompts=("critic",)).json
    assert found["answered"][0]["input"] == "text=w7 w40"
    assert found["answered"][0]["answers"] == raw["answered"][0]["answers"]


def test_prompts_with_the_same_name_are_shown_by_their_paths(compare, library, tmp_path):
    for parent in ("a", "b"):
        shutil.copytree(library / "coach", tmp_path / parent / "coach")
    shutil.copytree(library / "coach", tmp_path / "base")
    prompts = (tmp_path / "a" / "coach", tmp_path / "b" / "coach", tmp_path / "base")
    found = compare(*INPUTS, "--json", prompts=prompts).json
    assert list(found["prompts"]) == [str(path) for path in prompts]


MEMORY_SCRIPT = """
import json, sys
import torch
from softprompt import SoftPrompt, compare, load_base, rows_from_texts, SamplingConfig
from softprompt.training import peak_bytes

base = load_base(sys.argv[1], dtype="float32", device="cpu")
prompts = {f"p{i}": SoftPrompt(torch.randn(20, base.hidden_size)) for i in range(50)}
rows = {"rows": rows_from_texts([f"w{5 + i} w7 w9" for i in range(8)])}
peaks = []
for count in (2, 2, 50):
    some = dict(list(prompts.items())[:count])
    found = compare(base, some, ["w5 w6", "w8"], held_out=rows, sampling=SamplingConfig(max_new_tokens=20))
    peaks.append(found.peak_bytes)
print(json.dumps([peaks, sum(prompt.num_bytes for prompt in prompts.values())]))
"""


@pytest.mark.medium
def test_fifty_prompts_take_no_more_memory_than_two_beyond_their_own_size(base_folder):
    child = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(base_folder)], capture_output=True, text=True, env=ENVIRONMENT
    )
    (_, two, fifty), own = json.loads(child.stdout)
    assert fifty - two < 4 * 2**20 + own


class TestTaskScores:
    def test_tables_json_and_markdown_have_the_same_scores(self, compare, tmp_path):
        flags = ("--score", "rouge_l", "--score", "chrf", "--markdown", tmp_path / "report.md")
        found = compare(*flags, "--json", prompts=("critic",)).json
        shown = compare(*flags, prompts=("critic",))
        report = (tmp_path / "report.md").read_text()
        assert [(item["name"], item["prompt"]) for item in found["scores"]] == [
            ("rouge_l", None), ("rouge_l", "critic"), ("chrf", None), ("chrf", "critic"),
        ]  # fmt: skip
        for item in found["scores"]:
            assert (item["held_out"], item["num_rows"], item["num_available"]) == ("reviews.jsonl", 16, 16)
        assert "chrf of greedy answers on reviews.jsonl: 16 rows" in shown.out
        line = f"| critic | {found['scores'][3]['value']:.3f} | {found['scores'][3]['difference']:+.3f} |"
        assert line in report
        assert line.split("|")[2] in shown.out.partition("chrf of greedy")[2]
        assert "note:" not in shown.err

    def test_a_set_that_is_scored_in_part_is_noted(self, compare):
        ran = compare("--score", "chrf", "--score-rows", 5, prompts=("critic",))
        assert "note: the first 5 of 16 rows of reviews.jsonl are scored (--score-rows)\n" in ran.err
        assert "chrf of greedy answers on reviews.jsonl: 5 of 16 rows" in ran.out

    def test_a_typed_limit_of_tokens_holds_for_scores_and_the_default_does_not(self, compare, tmp_path):
        words = " ".join(f"w{5 + i % 90}" for i in range(60))
        data = write_jsonl(tmp_path / "long.jsonl", [{"text": "w8", "label": words}])
        flags = ("--data", data, *TEMPLATE, "--score", "chrf", "--json")
        values = [
            compare(*flags, *limit, prompts=("coach",)).json["scores"][0]["value"]
            for limit in ((), ("--max-new-tokens", 50), ("--max-new-tokens", 1))
        ]
        assert values[0] != values[1] != values[2]

    def test_classes_and_confusion_are_shown_for_labelled_rows(self, compare, tmp_path):
        flags = ("--markdown", tmp_path / "report.md")
        found = compare(*flags, "--json", prompts=("critic",)).json["accuracies"][1]
        out = compare(*flags, prompts=("critic",)).out
        report = (tmp_path / "report.md").read_text()
        assert [item["label"] for item in found["classes"]] == [" w90", " w91"]
        assert sum(item["support"] for item in found["classes"]) == sum(map(sum, found["confusion"])) == 16
        assert (found["calibrated"], found["by_likelihood"]) == (
            False, (found["confusion"][0][0] + found["confusion"][1][1]) / 16,
        )  # fmt: skip
        assert f"Classes of reviews.jsonl by critic: macro F1 {found['f1_macro']:.1%}" in report
        for label, row in zip(("w90", "w91"), found["confusion"], strict=True):
            assert f"| {label} | {row[0]} | {row[1]} |" in report
            assert [label, *map(str, row)] in [line.split() for line in out.splitlines()]
        assert "calibrated" not in out + report

    def test_calibrated_figures_are_marked(self, compare, tmp_path):
        flags = ("--calibrate", "--markdown", tmp_path / "report.md")
        found = compare(*flags, "--json", prompts=("critic",)).json
        assert [item["calibrated"] for item in found["accuracies"]] == [True, True]
        assert found["scores"] == []
        assert "Accuracy on reviews.jsonl: 16 rows, calibrated" in compare(*flags, prompts=("critic",)).out
        assert (tmp_path / "report.md").read_text().count("calibrated") == 1 + 2 + 2
        plain = compare("--json", prompts=("critic",)).json
        assert plain["accuracies"] != found["accuracies"]
        assert plain["losses"] == found["losses"]

    @pytest.mark.parametrize(("num_labels", "is_shown"), [(12, True), (13, False)])
    def test_a_matrix_of_many_classes_stands_in_the_report_alone(self, compare, tmp_path, num_labels, is_shown):
        rows = [{"text": sentence(i), "label": f"w{40 + i % num_labels} w7"} for i in range(2 * num_labels)]
        data = write_jsonl(tmp_path / "many.jsonl", rows)
        flags = ("--data", data, *TEMPLATE, "--markdown", tmp_path / "report.md")
        ran = compare(*flags, prompts=("coach",))
        assert "Classes of many.jsonl by coach" in ran.out
        assert ("Confusion of many.jsonl by coach" in " ".join(ran.out.split())) == is_shown
        assert ("too large to show here are in --markdown and --json" in ran.out) != is_shown
        report = (tmp_path / "report.md").read_text()
        assert "Confusion of many.jsonl by coach" in report
        assert f"| {num_labels} w{39 + num_labels} w7 |" in report  # too wide for names: the columns are numbered

    def test_chats_are_compared_as_chats(self, compare, chats):
        flags = ("--data", chats, "--messages-column", "messages", "--score", "f1", "--json")
        assert [item["num_rows"] for item in compare(*flags).json["scores"]] == [20, 20, 20]


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (("--score", "f1"), "score 'f1' compares answers with completions, and the held-out rows have none"),
            (("--calibrate",), "calibrate needs labels, and the held-out rows have none (texts.csv)"),
            (("--score", "f1", "--score-rows", 0), "score_rows is 0; it must be at least 1"),
            (("--score", "bleu"), "score is 'bleu'; it must be one of 'exact_match', 'f1', 'rouge_l', 'chrf'"),
        ],
    )
    def test_a_score_that_the_rows_do_not_allow_is_refused(self, base_folder, library, flags, complaint):
        assert complaint in run("compare", "--base", base_folder, "--prompt", library / "coach", *flags).complaint

    def test_a_prompt_given_twice_is_refused(self, base_folder, library):
        again = library / ".." / library.name / "coach"
        flags = ("--prompt", library / "coach", "--prompt", again, *INPUTS)
        assert f"prompt '{again}' is given twice" in run("compare", "--base", base_folder, *flags).complaint

    def test_a_comparison_without_inputs_or_rows_is_refused(self, base_folder, library, tmp_path):
        from dataclasses import replace

        prompt = load_prompt(library / "coach")
        save_prompt(replace(prompt, record=replace(prompt.record, run={})), tmp_path / "mute")
        ran = run("compare", "--base", base_folder, "--prompt", tmp_path / "mute")
        assert ran.complaint == "nothing to compare: give --input, --field or --data"

    @pytest.mark.parametrize("field", ["text", "=w5", ""])
    def test_a_field_without_a_name_is_refused(self, base_folder, library, field):
        ran = run("compare", "--base", base_folder, "--prompt", library / "critic", "--field", field)
        assert "is not of the form name=text" in ran.complaint

    def test_a_label_unknown_to_the_prompt_is_refused(self, base_folder, library, tmp_path):
        data = write_jsonl(tmp_path / "odd.jsonl", [review(0), {**review(1), "label": "w77"}])
        ran = run("compare", "--base", base_folder, "--prompt", library / "critic", "--data", data)
        assert f"row 2 of {data}: ' w77' is none of the labels ' w90', ' w91'" in ran.complaint

    def test_a_report_that_cannot_be_written_is_refused(self, base_folder, library, tmp_path):
        flags = ("--prompt", library / "coach", *INPUTS, "--markdown", tmp_path / "no" / "report.md")
        assert "cannot write" in run("compare", "--base", base_folder, *flags).complaint
