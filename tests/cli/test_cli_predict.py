"""`softprompt predict`: a file in, a file out; killed, interrupted and resumed; what is refused."""

from __future__ import annotations

import _thread
import csv
import json
import os
import shlex
import signal
import threading
import time

import pyarrow as pa
import pytest
from pyarrow import parquet
from support.command_line import run, succeed
from support.killable import Forks
from support.material import review, sentence, write_csv, write_jsonl

TINY = ("--batch-tokens", 64)  # chunks of a few rows


@pytest.fixture
def ask(base_folder, library, tmp_path):
    """`predict` by the prompt with labels; `out` is a name in `tmp_path`."""

    def ask(data, out="answers.csv", *flags, prompt="critic", runner=succeed):
        where = ("--base", base_folder, "--dtype", "float32", "--prompt", library / prompt)
        return runner("predict", *where, "--data", data, "--out", tmp_path / out, *flags)

    return ask


def rows_of(path):
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def reviews40(tmp_path):
    return write_csv(tmp_path / "reviews.csv", [{"id": f"{i:03}", "text": review(i)["text"]} for i in range(40)])


def test_every_format_has_the_same_answers_in_the_rows_order(ask, reviews40, tmp_path):
    rows = rows_of(reviews40)
    inputs = {"csv": reviews40, "jsonl": write_jsonl(tmp_path / "in.jsonl", rows), "parquet": tmp_path / "in.parquet"}
    parquet.write_table(pa.Table.from_pylist(rows), inputs["parquet"])
    found = {}
    for kind, other in (("csv", "jsonl"), ("jsonl", "parquet"), ("parquet", "csv")):
        ask(inputs[kind], f"out.{other}", *TINY)
        found[other] = rows_of(tmp_path / f"out.{other}")
    for row, a, b, c in zip(rows, found["csv"], found["jsonl"], found["parquet"], strict=True):
        assert list(b) == list(c) == list(a) == [*row, "label", "confidence", "unsure", "truncated", "error"]
        assert {name: b[name] for name in row} == row
        assert b == c
        added = {"label": b["label"], "confidence": repr(b["confidence"])}
        assert a == {**row, **added, "unsure": "", "truncated": "false", "error": ""}
    assert {item["label"] for item in found["jsonl"]} <= {"w90", "w91"}


def test_training_on_labels_keeps_a_calibration_that_predict_uses(base_folder, reviews, reviews40, tmp_path):
    flags = ("--template", "w5 {text} w6", "--completion", " {label}", "--validation", 20, "--epochs", 1)
    out = tmp_path / "run"
    succeed("train", "--base", base_folder, "--dtype", "float32", "--data", reviews, *flags, "--out", out)
    where = ("predict", "--base", base_folder, "--dtype", "float32", "--prompt", out, "--data", reviews40)
    ran = succeed(*where, "--out", tmp_path / "a.jsonl", "--probabilities", "--target-accuracy", 0.4)
    assert "confidences are calibrated on 20 validation rows (temperature" in ran.err
    assert "an answer is sure at a confidence of" in ran.err
    for row in rows_of(tmp_path / "a.jsonl"):
        assert row["p(w90)"] + row["p(w91)"] == pytest.approx(1, abs=2e-6)
        assert row["confidence"] == row[f"p({row['label']})"]
        assert row["unsure"] in (True, False)


def test_a_prompt_without_validation_rows_says_that_it_is_uncalibrated(ask, reviews40):
    assert "confidences are uncalibrated" in ask(reviews40).err
    ran = ask(reviews40, "b.csv", "--threshold", 0.9, "--json")
    assert "no answer is marked unsure" not in ran.err
    assert ran.json["rows"] == 40
    assert sum(ran.json["labels"].values()) == 40
    assert 0 < ran.json["unsure"] <= 40


def test_a_prompt_that_writes_text_writes_it(ask, texts, tmp_path):
    ask(texts, "a.jsonl", "--text-column", "prompt", "--max-new-tokens", 4, "--rows", 3, prompt="coach")
    found = rows_of(tmp_path / "a.jsonl")
    assert len(found) == 3
    assert all(isinstance(row["answer"], str) and row["mean_log_probability"] < 0 for row in found)
    assert all(row["prompt"] and row["finish_reason"] in ("stop", "length") for row in found)


class TestRows:
    def test_cells_of_a_csv_come_back_as_they_were(self, ask, tmp_path):
        rows = [
            {"a;b": 'say "hi"', "text": "w7\r\nw8", "label": "007"},
            {"a;b": "1,5; 2\n", "text": "w9 ü 日本 \u2028", "label": " NA "},
            {"a;b": "", "text": "=1+1", "label": ""},
        ]
        path = tmp_path / "in.csv"
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
        ran = ask(path)
        assert "the rows have a column 'label', so the answer's is 'predicted_label'" in ran.err
        out = (tmp_path / "answers.csv").read_bytes()
        assert out.startswith(b'\xef\xbb\xbf"a;b";text;label;predicted_label;confidence;')
        with open(tmp_path / "answers.csv", newline="", encoding="utf-8-sig") as file:
            found = list(csv.DictReader(file, delimiter=";"))
        assert [{name: row[name] for name in rows[0]} for row in found] == rows
        assert all(row["predicted_label"] in ("w90", "w91") for row in found)

    def test_types_of_a_parquet_file_are_kept(self, ask, tmp_path):
        import datetime
        import decimal

        table = pa.table({
            "id": pa.array([1, None, 3], pa.int16()),
            "at": pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5, 6)] * 3, pa.timestamp("ns", tz="UTC")),
            "day": pa.array([datetime.date(2026, 1, 2), None, None], pa.date32()),
            "price": pa.array([decimal.Decimal("1.10")] * 3, pa.decimal128(10, 2)),
            "raw": pa.array([b"\xff\x00", b"", None], pa.binary()),
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "tags": pa.array([["x"], [], None], pa.list_(pa.string())),
            "share": pa.array([0.1, float("nan"), None], pa.float32()),
            "text": ["w7 w8", None, "w9"],
        })  # fmt: skip
        parquet.write_table(table, tmp_path / "in.parquet")
        ask(tmp_path / "in.parquet", "a.parquet")
        found = parquet.read_table(tmp_path / "a.parquet")
        assert found.select(table.column_names).schema == table.schema
        for name in set(table.column_names) - {"share"}:
            assert found[name].to_pylist() == table[name].to_pylist(), name
        assert found["error"].to_pylist() == [None, "the row is empty", None]
        assert found["confidence"].type == pa.float64()
        ask(tmp_path / "in.parquet", "a.jsonl")
        row = rows_of(tmp_path / "a.jsonl")[1]
        assert (row["share"], row["id"], row["price"], row["tags"]) == (None, None, "1.10", [])

    def test_json_rows_of_several_kinds_become_one_table(self, ask, tmp_path):
        rows = [
            {"text": "w7", "id": 1, "more": {"a": [1]}}, {"text": "w8", "id": "x", "when": None},
            {"text": "half \ud800", "id": 2**70}, {"text": ["w7"], "score": 1}, {"text": "w9", "score": 0.5},
        ]  # fmt: skip
        path = write_jsonl(tmp_path / "in.jsonl", rows)
        for out in ("a.parquet", "a.csv"):
            ask(path, out, "--json")
        found = rows_of(tmp_path / "a.parquet")
        assert [row["id"] for row in found] == ["1", "x", str(2**70), None, None]
        assert [row["score"] for row in found] == [None, None, None, 1.0, 0.5]
        assert found[0]["more"] == {"a": [1]}
        assert [row["error"] is None for row in found] == [True, True, False, False, True]
        ask(path, "a.jsonl")
        assert [{name: row[name] for name in own} for own, row in zip(rows, rows_of(tmp_path / "a.jsonl"), strict=True)
                ] == rows  # fmt: skip

    def test_rows_without_an_answer_stop_nothing_unless_strict(self, ask, tmp_path):
        path = write_csv(tmp_path / "in.csv", [{"text": "w7"}, {"text": " "}, {"text": " ".join(["w8"] * 200)}])
        ran = ask(path)
        assert "1 cut to fit; 1 without an answer (see the column error)" in ran.err
        rows = rows_of(tmp_path / "answers.csv")
        assert [row["error"] for row in rows] == ["", "the row is empty", ""]
        assert [row["truncated"] for row in rows] == ["false", "false", "true"]
        assert ask(path, "b.csv", "--strict", runner=run).code == 2
        assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "answers.csv").read_bytes()

    def test_no_rows_give_a_header(self, ask, tmp_path):
        (tmp_path / "in.csv").write_text("id,text\n")
        ask(tmp_path / "in.csv")
        assert (tmp_path / "answers.csv").read_text() == "id,text,label,confidence,unsure,truncated,error\n"


class TestRefusals:
    @pytest.fixture
    def refuse(self, ask, tmp_path):
        def refuse(data, out="answers.csv", *flags, **more):
            before = sorted(tmp_path.iterdir())
            complaint = ask(data, out, *flags, runner=run, **more).complaint
            assert sorted(tmp_path.iterdir()) == before
            return complaint

        return refuse

    def test_hostile_paths(self, refuse, reviews40, tmp_path):
        before = reviews40.read_bytes()
        (tmp_path / "link.csv").symlink_to(reviews40)
        (tmp_path / "folder.csv").mkdir()
        (tmp_path / "old.csv").write_text("mine")
        for out in ("reviews.csv", "link.csv"):
            assert "is the file that is read; choose another" in refuse(reviews40, out, "--overwrite")
        assert "exists; --overwrite replaces it" in refuse(reviews40, "old.csv")
        assert "is a folder; choose a file" in refuse(reviews40, "folder.csv", "--overwrite")
        assert "there is no folder" in refuse(reviews40, "none/answers.csv")
        assert "ending '.xlsx' is not known; answers can be .csv" in refuse(reviews40, "answers.xlsx")
        assert "there is no data at" in refuse(tmp_path / "none.csv")
        assert "nothing is left to resume" in refuse(reviews40, "old.csv", "--resume")
        assert (tmp_path / "old.csv").read_text() == "mine"
        assert reviews40.read_bytes() == before

    def test_data_that_is_broken_at_its_end_is_refused_at_the_start(self, refuse, tmp_path):
        head = "id,text\n" + "1,w7\n" * 50
        path = tmp_path / "in.csv"
        for tail, why in (
            ("1,2,3\n", "line 52: 3 cells"),
            ('"open', "line 52: broken CSV"),
            ("1,\0\n", "line 52 holds"),
        ):
            path.write_text(head + tail)
            assert why in refuse(path)
        path.write_bytes(head.encode() + b"1,\xff\n")
        assert "byte 0xff in line 52" in refuse(path)
        path = tmp_path / "in.jsonl"
        path.write_text('{"text": "w7"}\n' * 3 + "{")
        assert "line 4 is not JSON" in refuse(path)
        path = tmp_path / "in.parquet"
        path.write_bytes(b"PAR1 no PAR1")
        assert "cannot be read" in refuse(path)

    def test_columns_and_settings(self, refuse, reviews40, tmp_path):
        path = write_csv(tmp_path / "in.csv", [{"review": "w7", "id": "1"}])
        assert "asks for 'text'; the columns are 'review', 'id'" in refuse(path)
        assert "has no column 'reviews'; did you mean 'review'?" in refuse(path, "a.csv", "--text-column", "reviews")
        assert "threshold is 2.0" in refuse(reviews40, "a.csv", "--threshold", 2)
        assert "probabilities is about labels" in refuse(
            reviews40, "a.csv", "--probabilities", "--text-column", "text", prompt="coach"
        )


class TestResuming:
    @pytest.fixture(scope="class")
    def forks(self):
        with Forks() as forks:
            yield forks

    @pytest.fixture
    def many(self, tmp_path):
        rows = [{"id": i, "text": sentence(i, 3, 30), "note": f"a\nb,{i}"} for i in range(240)]
        return write_csv(tmp_path / "many.csv", rows)

    @staticmethod
    def _parts(folder):
        return len(list(folder.glob("*-*.csv"))) + len(list(folder.glob("*-*.parquet")))

    def _wait_for_parts(self, folder, count):
        deadline = time.monotonic() + 60
        while self._parts(folder) < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    @pytest.mark.medium
    @pytest.mark.parametrize("ending", ["csv", "parquet"])
    def test_a_killed_job_goes_on_to_the_same_bytes(self, ask, many, forks, base_folder, library, tmp_path, ending):
        ask(many, f"whole.{ending}", *TINY)
        out = tmp_path / f"killed.{ending}"
        where = ("--base", base_folder, "--dtype", "float32", "--prompt", library / "critic", "--data", many)
        pid = forks.start(["predict", *where, "--out", out, *TINY], str(tmp_path / "log"))
        self._wait_for_parts(tmp_path / f"killed.{ending}.partial", 3)
        os.kill(pid, signal.SIGKILL)
        assert forks.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert not out.exists()
        folder = tmp_path / f"killed.{ending}.partial"
        kept = {path.name: path.stat().st_mtime_ns for path in folder.glob(f"*-*.{ending}")}
        refused = ask(many, out.name, *TINY, runner=run).complaint
        assert "--resume goes on with it, --overwrite begins again" in refused
        assert "settings changed since" in ask(many, out.name, "--threshold", 0.5, "--resume", runner=run).complaint
        assert kept == {path.name: path.stat().st_mtime_ns for path in folder.glob(f"*-*.{ending}")}
        ran = ask(many, out.name, *TINY, "--resume", "--json")
        assert "rows are answered already" in ran.err
        assert ran.json["rows"] == sum(ran.json["labels"].values()) == 240
        assert out.read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
        assert not folder.exists()

    def test_changed_rows_are_another_job(self, ask, tmp_path, reviews40):
        from softprompt.config import DataConfig
        from softprompt.data.stream import open_stream
        from softprompt.runs.prediction_file import PredictionFile

        stream = open_stream(DataConfig(data=str(reviews40)))
        PredictionFile(tmp_path / "answers.csv", stream, (), {"data": "other"}).begin()
        complaint = ask(reviews40, "answers.csv", "--resume", runner=run).complaint
        assert "are of another job: base, " in complaint
        assert "data" in complaint
        ask(reviews40, "answers.csv", "--overwrite")
        assert not (tmp_path / "answers.csv.partial").exists()

    def test_ctrl_c_says_how_to_go_on_to_the_same_bytes(self, ask, many, tmp_path):
        ask(many, "whole.csv", *TINY)

        def press() -> None:
            self._wait_for_parts(tmp_path / "answers.csv.partial", 2)
            _thread.interrupt_main()

        thread = threading.Thread(target=press)
        thread.start()
        stopped = ask(many, "answers.csv", *TINY, runner=run)
        thread.join()
        assert stopped.code == 130
        assert "Traceback" not in stopped.err
        last = stopped.err.strip().splitlines()[-1]
        assert "of 240 rows are answered; go on with: softprompt predict --base" in last
        assert last.endswith("--resume")
        assert not (tmp_path / "answers.csv").exists()
        succeed(*shlex.split(last.partition("go on with: softprompt ")[2]))
        assert (tmp_path / "answers.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
