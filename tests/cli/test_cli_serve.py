"""`softprompt serve`: where its settings come from, what it refuses, and its life as a process."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import openai
import pytest
from support.command_line import ENVIRONMENT, run, start

from softprompt.cli.command import config_of
from softprompt.cli.main import commands
from softprompt.cli.serve import command
from softprompt.cli.serve_settings import check_environment
from softprompt.config import BaseConfig, EngineConfig, ServerConfig

KINDS = (BaseConfig, ServerConfig, EngineConfig)


def settings(*arguments: object) -> dict[str, Any]:
    """What the command would work with."""
    parent = click.Context(commands, **commands.context_settings)
    with command.make_context("serve", [*map(str, arguments)], parent) as context:
        return context.params


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.toml"
    path.write_text(text)
    return path


# -- settings


def test_flags_come_before_the_environment_and_that_before_the_file(tmp_path, monkeypatch):
    path = write(tmp_path, "port = 1\ndrain_s = 1\nmax_rows = 1\nmax_waiting = 1")
    monkeypatch.setenv("SOFTPROMPT_DRAIN_S", "2")
    monkeypatch.setenv("SOFTPROMPT_MAX_ROWS", "2")
    monkeypatch.setenv("SOFTPROMPT_REQUIRE_KEYS", "true")
    found = settings("--config", path, "--max-rows", 3)
    assert (found["port"], found["drain_s"], found["max_rows"], found["max_waiting"]) == (1, 2.0, 3, 1)
    assert found["require_keys"] is True
    assert found["host"] == ServerConfig.host


def test_the_file_can_be_named_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_CONFIG", str(write(tmp_path, "[server]\nport = 7")))
    assert settings()["port"] == 7
    assert settings("--port", 8)["port"] == 8


def test_sections_are_read_and_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "tiny").mkdir()
    text = 'base = "tiny"\nport = 9\n[server]\nlibrary = "prompts"\nstate = "/var/x"\ntraining_share = 0.3'
    found = settings("--config", write(tmp_path, text + "\n[engine]\nmax_rows = 5"))
    assert found["base"] == str(tmp_path / "tiny")
    assert (found["library"], found["state"]) == (str(tmp_path / "prompts"), "/var/x")
    assert (found["port"], found["training_share"], found["max_rows"]) == (9, 0.3, 5)
    assert settings("--config", write(tmp_path, '[base]\nbase = "hub/id"\ndtype = "float32"'))["base"] == "hub/id"


def test_without_flags_the_defaults_are_the_configs_own():
    found = settings()
    assert found["base"] is None
    assert config_of(ServerConfig, found) == ServerConfig()
    assert config_of(EngineConfig, found) == EngineConfig()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prot = 1", "there is no setting 'prot' here; did you mean 'port'?"),
        ("[server]\nprot = 1", "[server]: there is no setting 'prot' here; did you mean 'port'?"),
        ("[servers]\nport = 1", "there is no setting 'servers' here; did you mean 'server'?"),
        ("port = '80'", "port is '80'; it must be a whole number"),
        ("port = true", "port is True; it must be a whole number"),
        ("port = 70000", "port is 70000; it must be between 0 and 65535"),
        ("port = 1\n[server]\nport = 2", "has 'port' twice, by itself and in [server]; give it once"),
        ("server = 3", "[server] is 3; it must be a section of settings"),
        ("port = ", "is not TOML"),
    ],
)
def test_an_impossible_settings_file_is_refused(tmp_path, text, complaint):
    assert complaint in run("serve", "--config", write(tmp_path, text)).complaint


def test_a_missing_settings_file_is_refused(tmp_path):
    assert "cannot read the settings file" in run("serve", "--config", tmp_path / "no.toml").complaint


def test_a_misspelt_variable_is_refused_with_the_nearest_name(monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_PROT", "1")
    assert "there is no setting 'SOFTPROMPT_PROT' here; did you mean 'SOFTPROMPT_PORT'?" in run("serve").complaint


# -- refusals


def test_a_port_in_use_is_refused_before_the_base_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        complaint = run("serve", "--port", port, "--state", tmp_path / "state").complaint
    assert (
        complaint == f"cannot listen on 127.0.0.1, port {port}: Address already in use; choose another --port or --host"
    )


def test_a_foreign_host_is_refused(tmp_path):
    assert "cannot listen on 192.0.2.1, port 0" in run("serve", "--host", "192.0.2.1", "--port", 0).complaint


def test_a_public_host_without_any_key_is_refused(tmp_path):
    ran = run("serve", "--host", "0.0.0.0", "--port", 0, "--state", tmp_path / "state", "--base", "no/such")
    assert "every request needs an API key" in ran.complaint


def test_a_bad_base_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    ran = run("serve", "--port", 0, "--base", tmp_path / "empty", "--state", tmp_path / "state")
    assert str(tmp_path / "empty") in ran.complaint


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nsys.argv = ['softprompt', 'serve', '--help']\nfrom softprompt.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'fastapi', 'uvicorn', 'sqlalchemy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert "--training-share" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


# -- a process


@contextmanager
def serving(folder: Path, *arguments: object, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, its URL and the line that it printed."""
    environment = {**ENVIRONMENT, **variables}
    process = start(
        "serve", "--state", folder / "state", *arguments, env=environment, stderr=(folder / "log").open("w")
    )
    try:
        line = process.stdout.readline()
        found = re.match(r"(http://\S+)/v1 ", line)
        assert found, (line, (folder / "log").read_text())
        yield process, found[1], line
    finally:
        process.kill()
        process.communicate()


def ends(process: subprocess.Popen[str], seconds: float = 30) -> int:
    return process.wait(seconds)


@pytest.mark.medium
def test_a_stream_ends_before_the_process_does(tmp_path):
    path = write(tmp_path, 'port = 0\nlog_format = "text"\n[base]\ndtype = "float32"')
    with serving(tmp_path, "--config", path, SOFTPROMPT_LOG_FORMAT="json") as (process, url, line):
        assert "serves embedded and 3 prompts; no API key is asked for; Ctrl-C stops it" in line
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        ask = {"model": "base", "prompt": "There are", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
        stream = iter(client.completions.create(**ask, stream=True))
        next(stream)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(**ask)
        assert (refused.value.status_code, refused.value.code) == (503, "stopping")
        last = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1]
        assert last == "length"
        assert ends(process) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    answered = [line for line in lines if line["message"] == "request"]
    assert [(line["status"], line["route"]) for line in answered] == [(503, "other"), (200, "/v1/completions")]
    assert (answered[1]["model"], answered[1]["completion_tokens"]) == ("embedded", 200)
    assert answered[1]["request_id"].startswith("req-")
    assert "There are" not in (tmp_path / "log").read_text()


@pytest.mark.medium
def test_an_answer_that_takes_too_long_is_aborted_and_a_second_signal_ends_at_once(tmp_path):
    with serving(tmp_path, "--port", 0, "--drain-s", 0.5) as (process, url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        ask = {"model": "base", "prompt": "There are", "max_tokens": 2_000, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**ask, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        with pytest.raises(openai.APIError, match="the server is being stopped"):
            list(stream)
        assert ends(process) == 0
        assert time.monotonic() - began < 10
    with serving(tmp_path, "--port", 0, "--drain-s", 60) as (process, url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(**ask, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert ends(process, 2) == 128 + signal.SIGTERM


@pytest.mark.medium
def test_a_missing_library_is_refused(tmp_path):
    arguments = ("serve", "--port", 0, "--state", tmp_path / "state", "--library", tmp_path / "nothing")
    with start(*arguments) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith(f"softprompt: no library at {tmp_path / 'nothing'}")
    assert "Traceback" not in err


SERVICE_VARIABLES = {
    "SOFTPROMPT_SERVICE_HOST": "10.0.0.7",
    "SOFTPROMPT_SERVICE_PORT": "8000",
    "SOFTPROMPT_SERVICE_PORT_HTTP": "8000",
    "SOFTPROMPT_PORT": "tcp://10.0.0.7:8000",
    "SOFTPROMPT_PORT_8000_TCP": "tcp://10.0.0.7:8000",
    "SOFTPROMPT_PORT_8000_TCP_ADDR": "10.0.0.7",
    "SOFTPROMPT_PORT_8000_TCP_PORT": "8000",
    "SOFTPROMPT_PORT_8000_TCP_PROTO": "tcp",
    "SOFTPROMPT_METRICS_SERVICE_HOST": "fd00::7",
    "SOFTPROMPT_METRICS_PORT": "udp://[fd00::7]:9000",
}


class TestVariablesOfAKubernetesService:
    @pytest.mark.parametrize(("arguments", "port"), [((), 8000), (("--port", 9000), 9000)])
    def test_are_ignored_in_one_line(self, monkeypatch, capsys, arguments, port):
        for name, value in SERVICE_VARIABLES.items():
            monkeypatch.setenv(name, value)
        found = settings(*arguments)
        check_environment({*found, "config"})
        assert found["port"] == port
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "SOFTPROMPT_PORT and 9 more of a Kubernetes Service are ignored" in said
        assert "enableServiceLinks: false" in said

    @pytest.mark.parametrize(
        ("name", "value"),
        [("SOFTPROMPT_PORTS", "8000"), ("SOFTPROMPT_PORT_8000", "1"), ("SOFTPROMPT_HOSTS", "0.0.0.0")],
    )
    def test_a_name_spelt_almost_like_a_flag_is_refused_all_the_same(self, monkeypatch, name, value):
        monkeypatch.setenv("SOFTPROMPT_SERVICE_HOST", "10.0.0.7")
        monkeypatch.setenv(name, value)
        assert f"there is no setting {name!r} here; did you mean" in run("serve").complaint

    def test_a_port_that_is_no_address_is_a_setting_and_judged_as_one(self, monkeypatch):
        monkeypatch.setenv("SOFTPROMPT_PORT", "80OO")
        assert "port is '80OO'; it must be a whole number" in run("serve").complaint
