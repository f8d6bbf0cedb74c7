"""Loading from the Hub, against a small server that speaks the Hub's file URLs: download, pinned revision, offline."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from support.tiny_bases import build_base, build_model, build_tokenizer

pytestmark = pytest.mark.medium  # a process of its own, most of whose time is importing torch

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
# One process for all, because importing torch is most of its time. The counts show who asked the network.
SCRIPT = """
import json, os, urllib.request
from softprompt.base import load_base
from softprompt.errors import BaseModelError

def facts(name, **settings):
    try:
        base = load_base(name, dtype="float32", device="cpu", **settings)
        found = [base.name, base.folder, base.fingerprint]
    except BaseModelError as error:
        found = str(error)
    count = int(urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/count").read())
    return {"found": found, "count": count}

tiny = "maker/tiny"
print(json.dumps({
    "newest": facts(tiny), "cached": facts(tiny, offline=True), "pinned": facts(tiny, revision="v2"),
    "pinned_cached": facts(tiny, revision="v2", offline=True), "unknown": facts("maker/other", offline=True),
    "no_revision": facts(tiny, revision="v3"),
}))
"""


class Hub(BaseHTTPRequestHandler):
    """GET and HEAD of /maker/tiny/resolve/<revision>/<file>; everything else is not there."""

    folders: dict  # revision -> folder
    num_asked = 0

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        if self.path == "/count":
            return self.reply(200, str(type(self).num_asked).encode())
        type(self).num_asked += 1
        parts = unquote(self.path).strip("/").split("/")
        revision = parts[3] if parts[:3] == ["maker", "tiny", "resolve"] else None
        revision = {commit: name for name, commit in COMMITS.items()}.get(revision, revision)
        file = self.folders[revision] / "/".join(parts[4:]) if revision in self.folders else None
        if file is None or not file.is_file():
            is_known = revision in self.folders or "tree" in parts
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound" if is_known else "RevisionNotFound"})
        headers = {"X-Repo-Commit": COMMITS[revision], "ETag": f'"{revision}-{file.name}"'}
        return self.reply(200, file.read_bytes(), headers, with_body)

    def reply(self, status, body, headers=None, with_body=True):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for revision, seed in (("main", 0), ("v2", 1)):
        build_model("llama", seed=seed).save_pretrained(root / revision)
        build_tokenizer().save_pretrained(root / revision)
    handler = type("TinyHub", (Hub,), {"folders": {revision: root / revision for revision in COMMITS}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def loaded(hub, tmp_path_factory):
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    cache = str(tmp_path_factory.mktemp("cache"))
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": cache, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_a_base_comes_from_the_hub_and_its_folder_is_the_snapshot(loaded):
    name, folder, fingerprint = loaded["newest"]["found"]
    assert name == "maker/tiny"
    assert folder.endswith(f"snapshots/{COMMITS['main']}")
    assert fingerprint == build_base("llama").fingerprint


def test_a_revision_is_pinned(loaded):
    _, folder, fingerprint = loaded["pinned"]["found"]
    assert folder.endswith(f"snapshots/{COMMITS['v2']}")
    assert fingerprint == build_base("llama", seed=1).fingerprint != build_base("llama").fingerprint


def test_offline_reads_the_cache_and_asks_nobody(loaded):
    assert loaded["cached"] == loaded["newest"]
    assert loaded["pinned_cached"] == loaded["pinned"]
    assert loaded["pinned"]["count"] > loaded["cached"]["count"] > 0  # the control: the counter does count


def test_offline_without_a_cache_is_refused_without_asking(loaded):
    assert loaded["unknown"]["found"].startswith("base 'maker/other' cannot be loaded")
    assert loaded["unknown"]["count"] == loaded["pinned_cached"]["count"]


def test_a_revision_that_is_not_there_is_one_sentence(loaded):
    sentence = loaded["no_revision"]["found"]
    assert sentence.startswith("base 'maker/tiny' cannot be loaded")
    assert "v3" in sentence
    assert "\n" not in sentence
