"""docs/http-api.md: its snippets run against a real server, and nothing of the server is missing in it."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import click
import httpx2
import pytest
from support.app_server import served

from softprompt import load_base
from softprompt.cli.main import commands
from softprompt.cli.serve_settings import read_settings
from softprompt.config import ServerConfig
from softprompt.embedded import prompts_folder
from softprompt.server.app import create_app
from softprompt.server.start import ROUTERS, serving_app

PAGE = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.medium
def test_the_snippets_run_and_all_metrics_are_listed(tmp_path, capsys):
    config = ServerConfig(state=str(tmp_path / "state"), library=str(prompts_folder()))
    with served(serving_app(load_base("embedded", dtype="float32"), config)) as url:
        names: dict[str, object] = {}
        for code in blocks("python"):
            exec(code.replace("http://127.0.0.1:8000", url), names)
        shown = capsys.readouterr().out
        told = httpx2.get(f"{url}/metrics").text
    assert "['embedded', 'coach', 'quotes', 'reviews']" in shown
    assert " negative" in shown
    assert "step 6 of 6, training loss" in shown
    told_names = set(re.findall(r"^# TYPE softprompt:(\w+) (?!unknown)", told, flags=re.MULTILINE))
    names_served = {name for name in told_names if not name.endswith("_created")}
    assert len(names_served) > 20
    assert {name for name in names_served if f"`{name}`" not in PAGE} == set()
    (section,) = re.findall(r"^## Metrics\n(.*?)^## ", PAGE, flags=re.DOTALL | re.MULTILINE)
    labels = {"model_name", "finished_reason", "source", "status", "alias", "method", "route", "other"}
    assert set(re.findall(r"`(\w+)`", section)) - labels == names_served


def test_the_page_lists_exactly_the_routes():
    told = {f"{method.upper()} {path}" for path, found in create_app((), ROUTERS).openapi()["paths"].items()
            for method in found}  # fmt: skip
    rows = "\n".join(re.findall(r"^\| (`(?:GET|POST|PUT|PATCH|DELETE) .*?) \|", PAGE, flags=re.MULTILINE))
    named = set(re.findall(r"`((?:GET|POST|PUT|PATCH|DELETE) /[^`]*)`", rows))
    assert named == told | {"GET /openapi.json"}


def test_the_page_lists_every_setting_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \| ", PAGE[PAGE.index("| setting |") :], flags=re.MULTILINE))
    assert rows == {item.name: shown(item.default) for item in dataclasses.fields(ServerConfig)}


def shown(default: object) -> str:
    if default is None or isinstance(default, bool):
        return "none" if default is None else str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    return f"{default:,}" if isinstance(default, int) and default > 9_999 else str(default)


def test_the_commands_and_the_settings_file_accept_what_the_page_shows(tmp_path):
    lines = [line.partition("#")[0] for block in blocks("console") for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        command, words = commands, shlex.split(line)[1:]
        parent = click.Context(command, info_name="softprompt", **command.context_settings)
        while isinstance(command, click.Group):
            command = command.get_command(parent, words.pop(0))
        command.make_context(line, words, parent)  # raises UsageError for a flag that is none
    (text,) = blocks("toml")
    (tmp_path / "serve.toml").write_text(text)
    assert read_settings(tmp_path / "serve.toml")["max_rows"] == 16
