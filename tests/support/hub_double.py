"""A small Hub of our own on 127.0.0.1; the real one was never asked.

It has the endpoints that huggingface_hub calls to make a repository, commit to it, list it and download.
Repositories are dictionaries of bytes; safetensors go the LFS way, the rest inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import close_session, disable_progress_bars

TOKEN = "hf_right"


class HubState:
    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}  # (repository, revision) -> path -> bytes
        self.blobs: dict[str, bytes] = {}  # LFS objects by sha256
        self.private: set[str] = set()
        self.requests: list[str] = []

    def commit_of(self, repo: str, revision: str) -> str:
        listing = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.files[repo, revision].items())
        return hashlib.sha1(json.dumps([repo, listing]).encode()).hexdigest()

    def revision(self, repo: str, text: str) -> str | None:
        for known, name in self.files:
            if known == repo and text in (name, self.commit_of(repo, name)):
                return name
        return None


class Handler(BaseHTTPRequestHandler):
    state: HubState
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        self.state.requests.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        for pattern, action in ROUTES:
            if match := re.fullmatch(pattern, path):
                action(self, *match.groups())
                return
        self.fail(404, "EntryNotFound", "no such endpoint")

    # -- making and writing

    def create(self) -> None:
        if not self.authorised():
            return
        wanted = json.loads(self.body)
        repo = "/".join(filter(None, (wanted.get("organization") or "me", wanted["name"])))
        if any(known == repo for known, _ in self.state.files):
            self.send(409, {"error": "exists", "url": f"{self.host}/{repo}"})
            return
        self.state.files[repo, "main"] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if "private" in (wanted.get("visibility"), wanted.get("private") and "private"):
            self.state.private.add(repo)
        self.send(200, {"url": f"{self.host}/{repo}", "name": repo})

    def validate_card(self) -> None:
        front = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
        sound = front["library_name"] == "peft" and isinstance(front["tags"], list)
        self.send(200, {"errors": [] if sound else [{"message": "front matter"}], "warnings": []})

    def branch(self, repo: str, name: str) -> None:
        if self.authorised():
            self.state.files.setdefault((repo, name), dict(self.state.files[repo, "main"]))
            self.send(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        if self.authorised() and self.known(repo, revision):
            files = json.loads(self.body)["files"]
            paths = [file["path"] for file in files]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
            answer = [{"path": path, "uploadMode": mode} for path, mode in zip(paths, modes, strict=True)]
            self.send(200, {"files": [{**item, "shouldIgnore": False} for item in answer]})

    def lfs_batch(self, repo: str) -> None:
        objects = json.loads(self.body)["objects"]
        answer = [{**item, "actions": {"upload": {"href": f"{self.host}/lfs/{item['oid']}"}}} for item in objects]
        self.send(200, {"transfer": "basic", "objects": answer})

    def lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.state.blobs[oid] = self.body
        self.send(200, {})

    def commit(self, repo: str, revision: str) -> None:
        if not (self.authorised() and self.known(repo, revision)):
            return
        files = self.state.files[repo, revision]
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
        commit = self.state.commit_of(repo, revision)
        self.send(200, {"commitOid": commit, "commitUrl": f"{self.host}/{repo}/commit/{commit}"})

    # -- reading

    def info(self, repo: str, revision: str = "main") -> None:
        if self.readable(repo) and (name := self.known(repo, revision)):
            self.send(200, {"id": repo, "sha": self.state.commit_of(repo, name), "siblings": []})

    def tree(self, repo: str, revision: str) -> None:
        if self.readable(repo) and (name := self.known(repo, revision)):
            files = self.state.files[repo, name]
            self.send(200, [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                            for path, data in files.items()])  # fmt: skip

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not self.readable(repo) or not (name := self.known(repo, revision)):
            return
        data = self.state.files[repo, name].get(path)
        if data is None:
            self.fail(404, "EntryNotFound", "no such file")
            return
        tag = hashlib.sha1(data).hexdigest()
        self.send(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": self.state.commit_of(repo, name)})

    # -- answers

    @property
    def host(self) -> str:
        return f"http://{self.headers['Host']}"

    def authorised(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.fail(401, "", "Invalid username or password.")
        return False

    def readable(self, repo: str) -> bool:
        hidden = repo in self.state.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if repo == "me/gated":
            self.fail(403, "GatedRepo", "restricted")
        elif repo == "me/broken":
            self.fail(500, "", "down")
        elif hidden or not any(known == repo for known, _ in self.state.files):
            self.fail(404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    def known(self, repo: str, revision: str) -> str | None:
        name = self.state.revision(repo, revision)
        if name is None:
            self.fail(404, "RevisionNotFound", "Invalid rev id")
        return name

    def fail(self, status: int, code: str, message: str) -> None:
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate_card),
    (rf"/api/models/{ID}/branch/([\w.-]+)", Handler.branch),
    (rf"/api/models/{ID}/preupload/([\w.-]+)", Handler.preupload),
    (rf"/api/models/{ID}/commit/([\w.-]+)", Handler.commit),
    (rf"/{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/lfs/(\w+)", Handler.lfs_put),
    (rf"/api/models/{ID}/revision/([\w.-]+)", Handler.info),
    (rf"/api/models/{ID}", Handler.info),
    (rf"/api/models/{ID}/tree/([\w.-]+)", Handler.tree),
    (rf"/{ID}/resolve/([\w.-]+)/([\w.-]+)", Handler.resolve),
]


@contextmanager
def serve_hub() -> Iterator[tuple[str, HubState]]:
    """A running Hub's address and its state."""
    state = HubState()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"state": state}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubState]:
    """huggingface_hub pointed at the double, with an empty cache and no login."""
    with serve_hub() as (address, state):
        for name, value in {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        close_session()
        disable_progress_bars()
        yield state
        close_session()
