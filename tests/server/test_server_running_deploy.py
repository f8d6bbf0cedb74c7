"""What lies in deploy/ names settings that there are, and gives a stop the time that it takes."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt.config import BaseConfig, EngineConfig, ServerConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT, IMAGE = DEPLOY / "softprompt.service", DEPLOY / "Dockerfile"
SETTINGS = {f"SOFTPROMPT_{item.name.upper()}" for kind in (BaseConfig, ServerConfig, EngineConfig)
            for item in dataclasses.fields(kind)} | {"SOFTPROMPT_CONFIG"}  # fmt: skip


@pytest.mark.parametrize("path", [UNIT, IMAGE, DEPLOY / "README.md"], ids=lambda path: path.name)
def test_every_setting_is_one(path):
    named = set(re.findall(r"SOFTPROMPT_[A-Z_]+", path.read_text()))
    assert named
    assert named <= SETTINGS


def test_a_stop_has_its_time():
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert int(stop) > 2 * ServerConfig.drain_s + 10  # answers, then a job's checkpoint
    assert f"--stop-timeout {stop}" in (DEPLOY / "README.md").read_text()


def test_the_image_listens_where_it_says():
    text = IMAGE.read_text()
    assert f"EXPOSE {ServerConfig.port}\n" in text
    assert f"http://127.0.0.1:{ServerConfig.port}/health" in text
    assert text.index("USER softprompt") < text.index("ENTRYPOINT")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_understands_the_unit(tmp_path):
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/softprompt/bin/softprompt", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
