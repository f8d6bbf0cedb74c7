"""What lies in deploy/ names settings that there are, and gives a stop the time that it takes."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt.base.cache import VARIABLE
from softprompt.config import BaseConfig, EngineConfig, ServerConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT, IMAGE = DEPLOY / "softprompt.service", DEPLOY / "Dockerfile"
SETTINGS = {f"SOFTPROMPT_{item.name.upper()}" for kind in (BaseConfig, ServerConfig, EngineConfig)
            for item in dataclasses.fields(kind)} | {"SOFTPROMPT_CONFIG"}  # fmt: skip


@pytest.mark.parametrize("path", [UNIT, IMAGE, DEPLOY / "README.md"], ids=lambda path: path.name)
def test_every_setting_named_in_deploy_exists(path):
    named = set(re.findall(r"SOFTPROMPT_[A-Z_]+", path.read_text()))
    assert named
    assert named <= {*SETTINGS, VARIABLE}


def test_the_units_stop_timeout_covers_drain_and_checkpoint():
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert int(stop) > 2 * ServerConfig.drain_s + 10  # answers, then a job's checkpoint
    assert f"--stop-timeout {stop}" in (DEPLOY / "README.md").read_text()


def test_the_images_health_check_asks_the_port_it_exposes():
    text = IMAGE.read_text()
    assert f"EXPOSE {ServerConfig.port}\n" in text
    assert f"http://127.0.0.1:{ServerConfig.port}/health" in text
    assert text.index("USER softprompt") < text.index("ENTRYPOINT")


def test_the_proxies_wait_longer_than_an_answer_and_take_the_largest_upload():
    nginx, caddy = (DEPLOY / "nginx.conf").read_text(), (DEPLOY / "Caddyfile").read_text()
    for text, timeout, size in (
        (nginx, r"proxy_read_timeout (\d+)s", r"client_max_body_size (\d+)m"),
        (caddy, r"response_header_timeout (\d+)s", r"max_size (\d+)MiB"),
    ):
        assert f"127.0.0.1:{ServerConfig.port}" in text
        assert int(re.findall(timeout, text)[0]) > ServerConfig.request_timeout_s
        assert int(re.findall(size, text)[0]) * 2**20 > ServerConfig.max_upload_bytes
    assert int(re.findall(r"^\s+write (\d+)s", caddy, re.MULTILINE)[0]) > ServerConfig.request_timeout_s


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_the_proxies_set_every_limit_that_the_readme_names(name):
    text = (DEPLOY / name).read_text()
    rows = [line.split("|") for line in (DEPLOY / "README.md").read_text().splitlines() if line.startswith("| ")]
    column = next(row for row in rows if row[1].strip() == "Limit").index(
        " nginx " if name == "nginx.conf" else " Caddy "
    )
    named = [option for row in rows if len(row) > column for option in re.findall(r"`(\w+)`", row[column])]
    assert len(named) >= 3
    assert all(re.search(rf"^\s+{option} ", text, re.MULTILINE) for option in named), named
    assert text.count("{") == text.count("}")


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx here")
def test_nginx_accepts_its_configuration(tmp_path):
    site = (DEPLOY / "nginx.conf").read_text().replace("listen 443 ssl;", "listen 8443;")
    site = re.sub(r"^\s+ssl_certificate.*$", "", site, flags=re.MULTILINE)
    whole = tmp_path / "nginx.conf"
    whole.write_text(f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\n{site}\n}}\n")
    done = subprocess.run(["nginx", "-t", "-p", tmp_path, "-c", whole], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("caddy") is None, reason="no Caddy here")
def test_caddy_accepts_its_configuration():
    done = subprocess.run(["caddy", "validate", "--adapter", "caddyfile", "--config", DEPLOY / "Caddyfile"],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_accepts_the_unit(tmp_path):
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/softprompt/bin/softprompt", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
