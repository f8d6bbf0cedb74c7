"""docs/architecture.md names files and classes; each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "softprompt"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CODE = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([a-z_/]+\.py)`", PAGE))))
def test_a_file_that_the_architecture_names_is_there(path):
    assert (PACKAGE / path).is_file() or (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(?:[a-z_]+\.)*([A-Z][a-z]+[A-Z][A-Za-z]+)\b", PAGE))))
def test_a_class_that_the_architecture_names_is_there(name):
    assert re.search(rf"class {name}\b", CODE), name


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\| `(tests/[a-z_/]+(?:\.py)?)`", PAGE))))
def test_the_tests_that_show_a_claim_are_there(path):
    assert (ROOT / path).exists(), path


def test_the_page_has_a_row_for_each_package():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    table = PAGE.split("## The life of a training step", maxsplit=1)[0]
    missing = {name for name in packages if f"`{name}`" not in table}
    assert not missing
