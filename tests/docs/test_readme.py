"""Every command and snippet of the README runs, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt.demo.job import _lay_out_data
from softprompt.demo.tasks import TASKS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("readme")
    _lay_out_data(place / "demo-out" / "data", TASKS)
    return place


def run(command: list[str], folder: Path, shell: str | None = None) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command if shell is None else ["bash", "-ec", shell],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.medium
def test_commands_run(folder: Path) -> None:
    shown = [line for block in blocks("console") for line in block.splitlines()]
    assert len(shown) == 12
    for line in shown:
        run([], folder, shell=line)
    for name in ("coach", "quotes", "reviews"):
        assert (folder / "prompts" / name / "adapter_model.safetensors").exists()


@pytest.mark.medium
def test_snippet_runs(folder: Path) -> None:
    (snippet,) = blocks("python")
    assert "quotes" in run([sys.executable, "-c", snippet], folder)


def test_set_up_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`?make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
