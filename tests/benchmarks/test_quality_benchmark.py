"""The bench of a real base scores as the slow ways do, never measures twice and goes on from there; on the embedded
base here."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.command_line import succeed

from softprompt import DataConfig, SamplingConfig, TrainConfig, load_base, load_prompt, read_rows, rows_from_records
from softprompt.data import render_rows
from softprompt.data.rows import with_labels
from softprompt.demo.tasks import REVIEW_COMPLETION, REVIEW_TEMPLATE
from softprompt.embedded import data_file
from softprompt.engine import Request, generate
from softprompt.evaluation.classification import likeliest_labels
from softprompt.families import forward_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHORT = {"short": {"virtual_tokens": 2, "epochs": 1}}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def bench(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("quality_real")


@pytest.fixture
def store(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("quality_store")


@pytest.fixture
def scoring(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("quality_scoring")


@pytest.fixture
def case(module: Callable[[str], ModuleType]) -> Any:
    config = DataConfig(data=str(data_file("reviews.csv")), template=REVIEW_TEMPLATE, completion=REVIEW_COMPLETION)
    rows = with_labels(read_rows(config))
    base = load_base("embedded", dtype="float32", device="cpu")
    return module("quality_cases").Case(
        "tiny", base, rows.select(range(16)), rows.select(()), rows.select(range(100, 120)), "Say it.",
        (REVIEW_TEMPLATE, "{text}\nOverall, this review is"),
    )  # fmt: skip


def names_and_seeds(bench: Any) -> list[tuple[str, int]]:
    return [(contender.name, seed) for contender, seed in bench.missing]


def measure_all(bench: Any) -> None:
    while todo := [each for each in bench.missing if bench.is_ready(*each)]:
        assert bench.measure(*todo[0])


@pytest.mark.medium
def test_a_stopped_bench_goes_on_and_measures_again_what_has_other_settings(
    bench: Any, case: Any, tmp_path: Path
) -> None:
    def make(num_seeds: int, others: dict[str, Any], only: tuple[str, ...] = ()) -> Any:
        return bench.Bench(case, tmp_path, num_seeds, others, (), only)

    first = make(1, SHORT)
    asked = names_and_seeds(first)
    assert len(asked) == 8 and first.estimate() > 0 and len(names_and_seeds(make(1, SHORT, ("PEFT", "bag")))) == 2

    def stopped(case: Any, seed: int) -> Any:
        raise KeyboardInterrupt

    first.contenders[3] = replace(first.contenders[3], run=stopped)
    with pytest.raises(KeyboardInterrupt):
        measure_all(first)
    second = make(1, SHORT)
    assert names_and_seeds(second) == asked[3:]
    measure_all(second)
    assert names_and_seeds(make(1, SHORT)) == [] and second.estimate() == 0
    assert {seed for _, seed in names_and_seeds(make(2, SHORT))} == {1}
    assert names_and_seeds(make(1, {"short": {"virtual_tokens": 3}})) == [("short", 0)]
    assert sum(" to " in line for line in second.table().splitlines()) == 7  # the bare base has no difference


@pytest.mark.medium
def test_the_grids_winner_is_chosen_on_rows_that_it_did_not_train_on_and_waits_for_all_of_it(
    module: Any, bench: Any, case: Any, store: Any, tmp_path: Path
) -> None:
    own = bench.Bench(case, tmp_path, 1, None, (case.name,), ("grid", "its grid"))
    (best,) = (each for each, _ in own.missing if each.name == store.BEST)
    assert len(own.missing) == 13 and best.stage == max(each.stage for each, _ in own.missing)
    seen = []

    def measured(case: Any, seed: int) -> Any:
        loss = 0.5 if len(seen) == 7 else 0.7
        seen.append(seed)
        return store.Result([1.0, 0.0], [1, 1], 0.0, loss=loss)

    own.contenders = [each if each is best else replace(each, run=measured) for each in own.contenders]
    for each in own.contenders[-13:-1]:
        assert not own.is_ready(best, 0)
        own.measure(each, 0)
    assert own.is_ready(best, 0) and own.measure(best, 0)
    assert own.store.results(store.BEST)[0].note == own.contenders[-6].name.removeprefix(store.GRID)
    settings = module("quality_contenders").grid_settings("Say it.")
    assert len(settings) == 12 and {each["loss"] for each in settings.values()} == {"tokens"}


def test_an_error_of_one_measurement_does_not_stop_the_others(
    bench: Any, case: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = bench.Bench(case, tmp_path, 1, None, (), ("bag",))

    def fails(case: Any, seed: int) -> Any:
        raise ValueError("no such words")

    own.contenders = [replace(each, run=fails) for each in own.contenders]
    with pytest.raises(SystemExit, match=r"because of errors \(above\): tiny: bag of words, seed 0"):
        bench.run([own])
    assert "ValueError: no such words" in capsys.readouterr().out and own.store.read() == {}


def test_results_of_another_dtype_or_of_other_rows_are_refused(store: Any, tmp_path: Path) -> None:
    setting = {"dtype": "float32", "rows": "a", "labels": []}
    store.Store(tmp_path, "tiny", setting)
    for name, value in (("dtype", "bfloat16"), ("rows", "b")):
        with pytest.raises(SystemExit, match=f"has results of another {name}"):
            store.Store(tmp_path, "tiny", {**setting, name: value})


def test_two_processes_never_have_the_same_claim_and_a_killed_one_has_none(store: Any, tmp_path: Path) -> None:
    setting = {"dtype": "float32", "rows": "a"}
    own, other = (store.Store(tmp_path, "tiny", setting) for _ in range(2))
    with own.claim("a", 0) as first, other.claim("a", 0) as second, other.claim("a", 1) as third:
        assert (first, second, third) == (True, False, True)
    code = (
        "import sys, time; from pathlib import Path; from quality_store import Store\n"
        f"with Store(Path(sys.argv[1]), 'tiny', {setting}).claim('a', 0) as mine:\n"
        "    print(mine, flush=True); time.sleep(60)"
    )
    paths = os.pathsep.join([str(BENCHMARKS), *sys.path])
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"True\n"
    with own.claim("a", 0) as while_it_runs:
        assert not while_it_runs
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with own.claim("a", 0) as after_it:
        assert after_it


def test_results_of_two_processes_are_in_one_file(store: Any, tmp_path: Path) -> None:
    own, other = (store.Store(tmp_path, "tiny", {"dtype": "float32", "rows": "a"}) for _ in range(2))
    for each, name in ((own, "a"), (other, "b"), (own, "c")):
        each.add(name, {}, 0, store.Result([1.0], [1], 0.0))
    assert list(other.read()) == ["a", "b", "c"]
    own.add("a", {"more": 1}, 1, store.Result([1.0], [1], 0.0))
    assert other.results("a", {}) == {} and list(other.results("a")) == [1]


def test_an_interval_is_of_the_differences_row_by_row(module: Any, store: Any) -> None:
    paired = module("quality_report").paired
    bare = store.Result([1.0, 5.0, 9.0], [1, 1, 1], 0.0)
    better = store.Result([0.5, 4.5, 8.5], [1, 1, 1], 0.0)  # rows differ much, the gaps do not
    assert paired([better], [bare]) == pytest.approx((-0.5, -0.5, -0.5))
    assert paired([better, bare], [bare]) == pytest.approx((-0.25, -0.25, -0.25))
    gap, low, high = paired([store.Result([9.0, 5.0, 1.0], [1, 1, 1], 0.0)], [bare])
    assert gap == 0 and low < -2 and high > 2


def test_the_summary_says_which_targets_are_met(module: Any, store: Any) -> None:
    report = module("quality_report")

    def kept(labels: list[str], **sums: list[list[float]]) -> Any:
        names = {
            "bare": store.BARE, "ours": f"{store.OURS}, P=20", "grid": store.BEST, "drawn": store.RANDOM,
        }  # fmt: skip
        setting = {"labels": labels, "has_exact_answers": False, "num_train": 200, "num_test": 3}
        contenders = {
            names[name]: {
                "seeds": {str(seed): vars(store.Result(own, [1, 1, 1], 0.0)) for seed, own in enumerate(each)}
            }
            for name, each in sums.items()
        }
        return report.SetResults("tiny", {"setting": setting, "contenders": contenders})

    texts = kept([], bare=[[4.0, 5.0, 6.0]], ours=[[2.0, 3.0, 4.0], [2.1, 3.1, 4.1]], grid=[[1.0, 2.0, 3.0]],
                 drawn=[[5.0, 6.0, 7.0]])  # fmt: skip
    assert [line.split(" (")[0] for line in report.targets(texts)] == [
        "met: not below bare", "MISSED: not below PEFT's grid", "MISSED: 0.65 of the way to the grid",
        "MISSED: spread 2.3 %", "met: random is worse",
    ]  # fmt: skip
    partly = kept([], ours=[[2.0, 3.0, 4.0]], grid=[[1.0, 2.0, 3.0]])  # while the bare base is not yet measured
    assert len(report.targets(partly)) == 1 and report.targets(kept([], bare=[[4.0, 5.0, 6.0]])) == []
    labels = kept(["a", "b"], bare=[[0.0, 0.0, 0.0]], ours=[[1.0, 1.0, 1.0]], drawn=[[1.0, 1.0, 1.0]])
    assert [line.split(" (")[0] for line in report.targets(labels)] == [
        "MISSED: not below bare", "MISSED: mean -100.0 points to bare", "MISSED: random is worse",
    ]  # fmt: skip


def test_labels_in_one_pass_are_those_of_a_pass_for_each(scoring: Any, case: Any) -> None:
    known = [row.prompt for row in render_rows(case.test)]
    own = [case.test.form.labels.index(row.text) for row in render_rows(case.test)]
    for prompt in (None, scoring.as_prompt(case.base, case.base.encode("I did not like it. Good or bad?"))):
        found = scoring.label_figures(case.base, case.test, prompt)
        slow = likeliest_labels(case.base, forward_of(case.base), known, case.test.form.labels, prompt)
        assert found.sums == [float(a != b) for a, b in zip(own, slow, strict=True)]
        assert found.greedy is not None and found.loss > 0


def test_rows_in_context_score_as_the_whole_text_does(scoring: Any, case: Any) -> None:
    ids = scoring.context_ids(case.base, scoring.shots(case))
    labels = [row.text for row in render_rows(scoring.shots(case))]
    assert len(labels) == 8 and len(set(labels)) == 2 and labels.count(labels[0]) == 4
    few = case.test.select(range(6))
    found = scoring.score_rows(case.base, few, scoring.as_prompt(case.base, ids))
    before = "".join(f"{row.prompt}{row.text}\n\n" for row in render_rows(scoring.shots(case)))
    joined = replace(few, form=replace(few.form, template=f"{before}{few.form.template}"))
    assert found.loss == pytest.approx(scoring.score_rows(case.base, joined, None).loss, abs=1e-4)


@pytest.mark.parametrize("words", ["", "My day was quite good. "])
def test_an_answer_is_exact_where_the_greedy_one_is_it(scoring: Any, case: Any, words: str) -> None:
    """With what the base generates as the record; half of it and more than it are the controls."""
    prompt = scoring.as_prompt(case.base, case.base.encode(words)) if words else None
    notes = [row["text"] for row in case.test.records[:6]]
    asked = [Request(tuple(case.base.encode(f"{note} So")), prompt) for note in notes]
    answers = generate(case.base, asked, SamplingConfig(max_new_tokens=40), forward=forward_of(case.base))
    lines = [answer.text.split("\n")[0] for answer in answers]
    ended = [note_and_line for note_and_line in zip(notes, lines, strict=True) if len(note_and_line[1]) > 2]

    def exact(change: Callable[[str], str]) -> list[int]:
        records = [{"note": note, "record": change(line)} for note, line in ended]
        rows = rows_from_records(records, template="{note} So", completion="{record}")
        found = scoring.answer_figures(case.base, rows, prompt)
        assert found.greedy is not None
        return list(found.greedy)

    assert sum(exact(str)) >= len(ended) - 1 > 2
    assert sum(exact(lambda line: line[: len(line) // 2])) == 0 == sum(exact(lambda line: f"{line} x"))


@pytest.mark.medium
def test_ours_is_what_the_command_keeps_of_the_same_rows(module: Any, case: Any, tmp_path: Path) -> None:
    """Also where rows with labels are kept for validation."""
    product, rows = module("quality_product"), case.train
    rows = replace(rows, records=rows.records * 3, indices=tuple(range(48)))
    rows = replace(rows, records=tuple({**row, "text": f"{row['text']} {n}"} for n, row in enumerate(rows.records)))
    file = tmp_path / "rows.jsonl"
    settings = {"virtual_tokens": 2, "epochs": 2, "seed": 3}
    found, recommendation = product.train_as_command(case.base, rows, TrainConfig(**settings), file)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**settings, **product.columns(rows)}.items()]
    ran = succeed(
        "train", "--base=embedded", "--dtype=float32", f"--data={file}", f"--out={tmp_path / 'run'}", *flags
    )  # fmt: skip
    assert len(found.validation_losses) == 2 and "20 of 48 rows are kept" in ran.err
    assert torch.equal(load_prompt(tmp_path / "run").tensor, found.prompt.tensor)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["recommendation"] == recommendation


@pytest.mark.medium
def test_tables_are_printed_from_the_files_alone(
    module: Any, bench: Any, case: Any, tmp_path: Path, capsys: Any
) -> None:
    own = bench.Bench(replace(case, name="smollm2-tiny-16"), tmp_path, 1, None, (), ("bare", "bag"))
    measure_all(own)
    file = tmp_path / "smollm2-tiny-16.json"
    assert json.loads(file.read_text())["setting"]["dtype"] == "float32"
    module("quality_report").print_tables(tmp_path)
    assert capsys.readouterr().out.count("| smollm2-tiny-16 |") == 1
    with pytest.raises(SystemExit, match="has no results of a real base"):
        module("quality_report").print_tables(tmp_path / "claims")
