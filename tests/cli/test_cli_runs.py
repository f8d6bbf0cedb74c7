"""softprompt runs: what a run's folder tells, whatever state it is in."""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil

import pytest
from support.command_line import run, succeed
from support.material import QUICK, review, sentence, write_csv, write_jsonl

from softprompt.cli.runs import draw, sampled
from softprompt.runs import RunFolder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, base_folder, texts):
    """Runs in several states below one folder; read only."""
    place = tmp_path_factory.mktemp("shelf")
    train = ("train", "--base", base_folder, "--data", texts, "--text-column", "prompt", *QUICK, "--rows", 24)
    succeed(*train, "--validation", 6, "--out", place / "finished")
    succeed(*train, "--out", place / "deep" / "er" / "unfinished")
    unfinished = RunFolder(place / "deep" / "er" / "unfinished")
    unfinished.write_plan({key: value for key, value in unfinished.read_plan().items() if key != "result"})
    unfinished.go_back_to(4)
    with open(unfinished.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "step": 5, "lo')  # as a running process may leave it for a moment
    shutil.copytree(place / "finished", place / "interrupted")
    plan = json.loads((place / "interrupted" / "run.json").read_text())
    plan["result"]["interrupted"] = True
    (place / "interrupted" / "run.json").write_text(json.dumps(plan))
    return place


@pytest.fixture
def copy(shelf, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(shelf / "finished", tmp_path / "runs" / "copy")


@pytest.fixture(scope="module")
def swept(tmp_path_factory, base_folder):
    """Ten candidates of two tasks."""
    folder = tmp_path_factory.mktemp("swept")
    write_csv(folder / "texts.csv", [{"prompt": sentence(i)} for i in range(24)])
    write_jsonl(folder / "reviews.jsonl", [review(i) for i in range(24)])
    (folder / "sweep.toml").write_text(
        "[data]\nvalidation = 6\n[train]\nvirtual_tokens = 2\nepochs = 2\n[grid]\nseed = [0, 1, 2, 3, 4]\n"
        "relative_learning_rate = [0.1, 0.3]\n[tasks.texts]\ndata = 'texts.csv'\ntext_column = 'prompt'\n"
        "[tasks.reviews]\ndata = 'reviews.jsonl'\ntemplate = '{text}'\ncompletion = ' {label}'\n"
    )
    succeed("sweep", "sweep.toml", "--base", base_folder, "--dtype", "float32", "--out", "run", cwd=folder)
    return folder / "run"


def entries(folder):
    return {entry["run"]: entry for entry in succeed("runs", "list", folder, "--json").json}


class TestList:
    def test_every_run_with_its_state(self, shelf, base_folder):
        found = entries(shelf)
        assert list(found) == ["deep/er/unfinished", "finished", "interrupted"]
        finished = found["finished"]
        losses = dict(RunFolder(shelf / "finished").read_plan()["result"]["validation_losses"])
        assert finished["best"] == {"": pytest.approx(min(losses.values()))}
        assert (finished["state"], finished["steps"], finished["planned_steps"]) == ("finished", 6, 6)
        assert finished["base"] == str(base_folder)
        assert finished["data"][0].endswith("texts.csv")
        assert finished["begun"].endswith("+00:00")
        unfinished = found["deep/er/unfinished"]
        assert (unfinished["state"], unfinished["steps"], unfinished["planned_steps"]) == ("unfinished", 4, 6)
        assert unfinished["last_checkpoint"] == 3
        assert found["interrupted"]["state"] == "interrupted"

    def test_as_a_table(self, shelf, monkeypatch):
        monkeypatch.setenv("COLUMNS", "300")
        out = succeed("runs", "list", shelf).out
        assert f"{shelf}: 3 runs" in out
        lines = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
        assert "4 of 6" in lines["deep/er/unfinished"]
        assert "unfinished, resumable from step 3" in lines["deep/er/unfinished"]
        assert " training" in lines["deep/er/unfinished"]
        assert "interrupted, resumable from step 6" in lines["interrupted"]
        losses = dict(RunFolder(shelf / "finished").read_plan()["result"]["validation_losses"])
        assert f"{min(losses.values()):.3f} validation, best" in lines["finished"]

    def test_here_is_the_default_and_a_run_itself_is_one(self, shelf):
        assert "finished" in succeed("runs", "list", cwd=shelf).out
        assert list(entries(shelf / "finished")) == ["."]

    def test_of_several_tasks(self, swept, monkeypatch):
        monkeypatch.setenv("COLUMNS", "300")
        (entry,) = entries(swept.parent).values()
        assert list(entry["best"]) == ["texts", "reviews"]
        assert entry["data"] == ["texts.csv", "reviews.jsonl"]
        assert re.search(r"texts \d\.\d{3} validation, best; reviews \d", succeed("runs", "list", swept.parent).out)

    def test_how_deep_it_looks(self, shelf, tmp_path):
        for name in ("a/b/c", "a/b/c2/d", ".hidden", "run/candidates/inner"):
            shutil.copytree(shelf / "finished", tmp_path / name)
        shutil.copytree(shelf / "finished", tmp_path / "run", dirs_exist_ok=True)
        os.symlink(shelf, tmp_path / "link")
        assert list(entries(tmp_path)) == ["a/b/c", "run"]

    def test_nothing_and_nowhere(self, tmp_path):
        assert "0 runs" in succeed("runs", "list", tmp_path).out
        assert f"no folder {tmp_path / 'x'} to look for runs in" in run("runs", "list", tmp_path / "x").complaint

    def test_other_tools_folders_are_none_of_ours(self, tmp_path):
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "run.json").write_text('{"a": 1}')
        (tmp_path / "theirs" / "metrics.jsonl").write_text("{}\n")
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "run.json").write_text("run, json")
        assert entries(tmp_path) == {}

    def test_a_run_without_a_checkpoint(self, copy, monkeypatch):
        monkeypatch.setenv("COLUMNS", "300")
        folder = RunFolder(copy)
        folder.write_plan({key: value for key, value in folder.read_plan().items() if key not in ("result", "begun")})
        (copy / "metrics.jsonl").unlink()
        shutil.rmtree(copy / "checkpoints")
        found = entries(copy.parent)["copy"]
        assert (found["state"], found["steps"], found["last_checkpoint"]) == ("unfinished", 0, None)
        assert "unfinished, no checkpoint yet" in succeed("runs", "list", copy.parent).out
        assert "0 of 6" in succeed("runs", "show", copy).out

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("run.json", b"{", "run.json is not valid JSON"),
            ("run.json", b'{"softprompt_run": 99}', "has no run.json of this release"),
            ("run.json", b'{"softprompt_run": 1}', "do not read as a run's"),
            ("run.json", b'{"softprompt_run": 1, "candidates": {"a": 1}}', "do not read as a run's"),
            ("metrics.jsonl", b'{"kind"\n{"kind": "step"}\n', "line 1 of "),
            ("metrics.jsonl", b'{"kind": "step", "step": 1, "loss": "x"}\n', "do not read as a run's"),
            ("metrics.jsonl", b'{"kind": "step", "step": 1, "loss": 1, "candidate": "who"}\n', "do not read as a run"),
            ("adapter_model.safetensors", b"x", "safetensors"),
        ],
    )
    def test_a_broken_run_is_listed_with_its_problem(self, copy, name, content, said):
        (copy / name).write_bytes(content)
        found = entries(copy.parent)["copy"]
        assert found["state"] == "broken"
        assert said in found["problem"]
        assert "broken: " in " ".join(succeed("runs", "list", copy.parent).out.replace("│", " ").split())
        if name != "adapter_model.safetensors":
            assert said in run("runs", "show", copy).complaint


class TestShow:
    def test_facts_settings_checkpoints_and_curves(self, shelf, base_folder, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")  # room for a long temporary path
        out = succeed("runs", "show", shelf / "finished").out
        facts = dict(
            (cell.strip() for cell in line.strip("│").split("│")) for line in out.splitlines() if line.count("│") == 3
        )
        assert facts["state"] == "finished"
        assert facts["steps"] == "6 of 6"
        assert facts["checkpoints"] == "step 3, step 6"
        assert facts["base"] == str(base_folder)
        assert (facts["virtual tokens"], facts["epochs"], facts["dtype"]) == ("3", "2", "float32")
        assert "batch rows" not in facts  # a default
        assert facts["kept"].startswith("step ")
        assert "training loss (nats per target)" in out
        assert "validation loss (nats per text token)" in out
        assert out.count("└┬") == 2  # the corner of a chart
        assert "\x1b" not in out

    def test_while_it_is_going(self, shelf):
        found = succeed("runs", "show", shelf / "deep" / "er" / "unfinished", "--json").json
        (prompt,) = found["prompts"]
        metrics = RunFolder(shelf / "deep" / "er" / "unfinished").read_metrics()
        assert prompt["training"] == [[line["step"], line["loss"]] for line in metrics if line["kind"] == "step"]
        assert len(prompt["training"]) == 4
        assert prompt["validation"] == []
        assert [checkpoint["step"] for checkpoint in found["checkpoints"]] == [3]
        out = succeed("runs", "show", shelf / "deep" / "er" / "unfinished").out
        assert "unfinished, resumable from step 3" in out
        assert "validation loss" not in out

    def test_candidates_best_first_and_eight_curves_of_each_task(self, swept, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        out = succeed("runs", "show", swept).out
        found = succeed("runs", "show", swept, "--json").json
        for task in ("texts", "reviews"):
            prompts = [prompt for prompt in found["prompts"] if prompt["task"] == task]
            ranked = sorted(prompts, key=lambda prompt: min(loss for _, loss in prompt["validation"]))
            assert [prompt["kept"] for prompt in ranked].count(True) == 1
            assert ranked[0]["kept"]
            names = [prompt["name"] for prompt in ranked]
            table = out.partition(f"\n{task} ")[2] if task == "reviews" else out.partition("\nreviews ")[0]
            words = [line.split()[0] for line in table.splitlines() if line.strip()]
            assert [word for word in words if word in names] == names
            assert f"{task}: training loss (nats per target), best 8 of 10" in out
            legend = out.partition(f"{task}: validation loss")[2].partition("a=")[2]
            assert legend.split()[:2] == [ranked[0]["name"], f"b={ranked[1]['name']}"]
            assert any(prompt["dropped_after"] is not None for prompt in prompts)
        assert "dropped" in out

    def test_no_run(self, tmp_path):
        complaint = run("runs", "show", tmp_path / "x").complaint
        assert complaint == f"{tmp_path / 'x'} is not a run's folder: it has no run.json of this release"

    def test_without_plotext_the_curves_are_numbers(self, shelf, monkeypatch):
        monkeypatch.setattr("softprompt.cli.runs.find_spec", lambda name: None)
        ran = succeed("runs", "show", shelf / "finished")
        assert "plotext is not installed, so the curves are tables of numbers; pip install" in ran.err
        losses = RunFolder(shelf / "finished").read_plan()["result"]["losses"]
        table = [line.split() for line in ran.out.partition("training loss")[2].splitlines()]
        for step, loss in enumerate(losses, start=1):
            assert [f"{step}", f"{loss:.3f}"] in table
        assert "└┬" not in ran.out

    def test_many_curves_as_numbers_fit_80_columns(self, swept, monkeypatch):
        monkeypatch.setattr("softprompt.cli.runs.find_spec", lambda name: None)
        monkeypatch.setenv("COLUMNS", "80")
        numbers = succeed("runs", "show", swept).out.partition("texts: training loss")[2]
        assert max(len(line) for line in numbers.splitlines()) <= 80
        assert numbers.splitlines()[2].split() == ["step", *"abcdefgh"]
        assert "…" not in numbers
        assert " b=seed" in numbers

    def test_plotext_is_imported_for_charts_alone(self, shelf, monkeypatch):
        imported = []
        real = builtins.__import__

        def spy(name, *arguments, **others):
            imported.append(name)
            return real(name, *arguments, **others)

        monkeypatch.setattr(builtins, "__import__", spy)
        succeed("runs", "list", shelf)
        succeed("runs", "show", shelf / "finished", "--json")
        assert "plotext" not in imported
        succeed("runs", "show", shelf / "finished")
        assert "plotext" in imported


class TestCharts:
    def test_one_curve_falls_from_the_top_left_to_the_bottom_right(self):
        drawn = draw("loss", {"": [(step, 10.0 - step) for step in range(1, 10)]}, 60)
        lines = drawn.split("\n")
        assert max(len(line) for line in lines) <= 60
        assert lines[0].strip() == "loss"
        canvas = [line.partition("┤")[2] or line.partition("│")[2] for line in lines if line.rstrip().endswith("│")]
        marked = [[column for column, mark in enumerate(line) if mark not in " │"] for line in canvas]
        firsts = [columns[0] for columns in marked if columns]
        assert len(firsts) > 5
        assert firsts == sorted(firsts)
        assert [part for part in lines[-2].split() if part] == ["1", "3", "5", "7", "9"]

    def test_letters_tell_curves_apart(self):
        curves = {f"c{index}": [(1, 1.0 + index), (5, 0.5 + index)] for index in range(8)}
        drawn = draw("loss", curves, 70)
        assert drawn.split("\n")[-1].split() == [f"{mark}=c{index}" for index, mark in enumerate("abcdefgh")]
        assert all(f"{mark}{mark}{mark}" in drawn for mark in "abcdefgh")

    def test_a_single_point(self):
        assert draw("loss", {"": [(3, 2.0)]}, 60).split("\n")[-2].split() == ["3"]

    def test_two_charts_do_not_mix(self):
        one = draw("one", {"": [(1, 1.0), (2, 2.0)]}, 60)
        draw("two", {"a": [(1, 5.0), (9, 9.0)], "b": [(1, 1.0)]}, 70)
        assert draw("one", {"": [(1, 1.0), (2, 2.0)]}, 60) == one

    def test_numbers_in_its_place(self):
        curves = {"a": [(step, float(step)) for step in range(1, 101)], "b": [(1, 0.5), (100, 0.25)]}
        rows = sampled(curves, 5)
        assert [row[0] for row in rows] == ["1", "26", "51", "75", "100"]
        assert rows[0] == ["1", "1.000", "0.500"]
        assert rows[1] == ["26", "26.000", ""]
