"""Output in an encoding that lacks characters: Windows' cp1252 in a pipe, a Latin-1 or ASCII locale."""

from __future__ import annotations

import io
import json
import logging
import re
import sys

import pytest
from support.command_line import ENVIRONMENT, run_apart, run_encoded
from support.material import QUICK, write_csv

from softprompt.server.telemetry.request_log import set_up_logging

ENCODINGS = ("cp1252", "latin-1", "ascii")
JAPANESE = r"\u65e5\u672c"


@pytest.fixture(scope="module")
def run_folder(place, base_folder, texts):
    data = write_csv(place / "日本.csv", [{"prompt": f"w{i} w{i + 1} w7"} for i in range(24)])
    ran = run_encoded(
        "cp1252", "train", "--base", base_folder, *QUICK, "--data", data, "--validation", 4, "--out", place / "日本"
    )
    assert ran.code == 0, ran.err
    assert JAPANESE in ran.err
    return place / "日本"


@pytest.mark.parametrize("encoding", ENCODINGS)
class TestWhatAnEncodingLacks:
    def test_a_character_is_escaped_in_an_answer(self, encoding):
        ran = run_encoded(encoding, "generate", "--base", "embedded", "Once", "--choice", "日本")
        assert ran.code == 0, ran.err
        assert ran.out.rstrip("\n") in (JAPANESE, "日本")

    def test_a_character_is_escaped_in_a_table_whose_box_is_drawn_in_ascii(self, base_folder, library, encoding):
        flags = ("--prompt", library / "coach", "--input", "日本 w5", "--max-new-tokens", 2)
        ran = run_encoded(encoding, "compare", "--base", base_folder, *flags)
        assert ran.code == 0, ran.err
        assert f"Input: {JAPANESE} w5" in ran.out
        assert "peak resident size" in ran.out
        assert not re.search(r"\\u25|\\u2b", ran.out), ran.out

    def test_a_character_in_json_is_escaped_and_parses_to_itself(self, base_folder, library, encoding):
        flags = ("--prompt", library / "coach", "--input", "日本 \U0001f600 é", "--max-new-tokens", 2, "--json")
        ran = run_encoded(encoding, "compare", "--base", base_folder, *flags)
        assert ran.json["answered"][0]["input"] == "日本 \U0001f600 é"
        assert ran.out.isascii()

    def test_a_character_is_escaped_in_a_run_whose_charts_become_numbers(self, run_folder, encoding):
        ran = run_encoded(encoding, "runs", "show", run_folder)
        assert ran.code == 0, ran.err
        assert JAPANESE in ran.out
        assert f"{encoding} has no characters for charts" in ran.err
        assert re.search(r"^\|6 +\|\d\.\d{3}\|$", ran.out, re.MULTILINE)
        assert not re.search(r"\\u2[0-9a-f]{3}", ran.out), ran.out

    def test_a_character_is_escaped_in_a_refusal(self, encoding):
        ran = run_encoded(encoding, "runs", "show", "./日本/none")
        assert JAPANESE in ran.complaint or "日本" in ran.complaint


@pytest.mark.medium
def test_a_process_in_cp1252_prints_its_report_to_the_end(run_folder):
    ran = run_apart(
        "runs", "show", run_folder, "--json", env={**ENVIRONMENT, "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    )
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["run"] == str(run_folder)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_servers_json_log_stays_json(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding, errors="backslashreplace", write_through=True))
    handlers = logging.root.handlers[:]
    try:
        set_up_logging("json")
        logging.getLogger("softprompt").info("%s", "日本 \U0001f600 \x81 é")
    finally:
        logging.basicConfig(handlers=handlers, level=logging.WARNING, force=True)
    assert json.loads(raw.getvalue().decode(encoding))["message"] == "日本 \U0001f600 \x81 é"
