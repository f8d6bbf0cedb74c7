"""The snippet of docs/engine.md runs, and its table is the config."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from softprompt.config import EngineConfig

PAGE = (Path(__file__).parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")


@pytest.mark.medium
def test_the_snippet(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    exec(code, {})
    shown = capsys.readouterr().out
    assert shown.count("Finished(") == 2
    assert shown.count("Tokens(") > 4


def test_the_table_names_every_setting():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert rows == ["EngineConfig", *(item.name for item in dataclasses.fields(EngineConfig))]
