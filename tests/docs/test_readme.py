"""Every command and snippet of the README runs, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from softprompt.cli.main import main
from softprompt.demo.job import lay_out_data
from softprompt.demo.tasks import TASKS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("readme")
    lay_out_data(place / "demo-out" / "data", TASKS)
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


def run_here(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process: torch is imported once for all of them."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, line


@pytest.mark.medium
def test_the_commands_of_the_readme_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [line for block in blocks("console") for line in block.splitlines()]
    assert len(shown) == 13
    for line in shown:
        run_here(line, folder, monkeypatch)
    for name in ("coach", "quotes", "reviews"):
        assert (folder / "prompts" / name / "adapter_model.safetensors").exists()


@pytest.mark.medium
def test_the_python_snippet_of_the_readme_runs(folder: Path) -> None:
    snippet, _ = blocks("python")
    assert "quotes" in run([sys.executable, "-c", snippet], folder)


@pytest.mark.medium
def test_the_server_of_the_readme_answers_and_trains(folder: Path) -> None:
    (command,), (_, snippet) = blocks("shell"), blocks("python")
    with serving(command.split(), folder) as url:
        shown = run([sys.executable, "-c", snippet.replace("http://127.0.0.1:8000", url)], folder)
    assert re.search(r"^ft:embedded:verdicts:ftjob-\w+ +\w+", shown, flags=re.MULTILINE), shown


@contextmanager
def serving(command: list[str], folder: Path) -> Iterator[str]:
    """The command on a free port, which its first line tells."""
    command = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    with open(folder / "serve.log", "w") as log, subprocess.Popen(
        command, cwd=folder, env={**os.environ, "SOFTPROMPT_PORT": "0"}, stdout=subprocess.PIPE, stderr=log, text=True
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("http://127.0.0.1:"), (folder / "serve.log").read_text()
            yield line.partition("/v1")[0]
        finally:
            process.terminate()


def test_set_up_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`?make ([a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_link_of_the_docs_has_a_target() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
