"""Push and pull against a small Hub of our own on 127.0.0.1; the real one was never asked.

The double has the endpoints that huggingface_hub calls to make a repository, commit to it, list it and download.
Repositories are dictionaries of bytes; safetensors go the LFS way, the rest inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import close_session, disable_progress_bars

from softprompt.base.model import Base
from softprompt.errors import AdapterError, ExistsError, StorageError, WrongBaseError
from softprompt.prompt import SoftPrompt
from softprompt.storage import Library, load_prompt, pull_prompt, push_prompt, save_prompt
from softprompt.storage.files import ADAPTER_FILES, MAX_TEXT_BYTES

MakePrompt = Callable[..., SoftPrompt]
TOKEN = "hf_right"
# huggingface_hub 2.4 uploads LFS files through an argument that its HTTP library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubState]:
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


@pytest.fixture
def saved(tmp_path: Path, prompt: SoftPrompt) -> Path:
    return save_prompt(prompt, tmp_path / "saved")


def test_there_and_back(hub: HubState, saved: Path, tmp_path: Path, prompt: SoftPrompt, base: Base) -> None:
    url = push_prompt(saved, "me/coach", private=True, token=TOKEN)
    assert url.startswith("http://127.0.0.1")
    assert "/me/coach/commit/" in url
    assert hub.private == {"me/coach"}
    assert sorted(hub.files["me/coach", "main"]) == [".gitattributes", *sorted(ADAPTER_FILES)]
    place = pull_prompt("me/coach", Library(tmp_path / "library").place("coach"), token=TOKEN, base=base)
    loaded = load_prompt(place, base)
    assert torch.equal(loaded.tensor, prompt.tensor)
    assert (loaded.record.form, loaded.record.parent) == (prompt.record.form, prompt.record.parent)
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (place / name).read_bytes() == (saved / name).read_bytes()
    assert not any(path.is_symlink() for path in place.iterdir())


def test_what_is_published_tells_no_path_and_no_text(
    hub: HubState, tmp_path: Path, make_prompt: Callable[..., SoftPrompt]
) -> None:
    run = {"epochs": 6, "losses": [2.5, 1.5], "source": "/home/me/rows.csv", "data": {"folder": "/home/me", "rows": 5},
           "notes": ["a sentence of the data"], "versions": {"torch": "2.13.0+cpu"}, "first": "Life is"}  # fmt: skip
    push_prompt(save_prompt(make_prompt(run=run), tmp_path / "x"), "me/coach", token=TOKEN)
    published = json.loads(hub.files["me/coach", "main"]["softprompt.json"])
    assert published["run"] == {"epochs": 6, "losses": [2.5, 1.5], "data": {"rows": 5}, "notes": [],
                                "versions": {"torch": "2.13.0+cpu"}}  # fmt: skip
    assert load_prompt(tmp_path / "x").record.run == run
    whole = b"".join(hub.files["me/coach", "main"].values())
    assert b"/home/me" not in whole
    assert b"sentence" not in whole


def test_pushing_again_and_to_a_branch(hub: HubState, saved: Path, tmp_path: Path, make_prompt: MakePrompt) -> None:
    push_prompt(saved, "me/coach", token=TOKEN)
    save_prompt(make_prompt(seed=8), saved, overwrite=True)
    push_prompt(saved, "me/coach", token=TOKEN, revision="next")
    main, following = (hub.files["me/coach", name]["softprompt.json"] for name in ("main", "next"))
    assert main != following
    pulled = pull_prompt("me/coach", tmp_path / "next", revision="next")
    assert torch.equal(load_prompt(pulled).tensor, make_prompt(seed=8).tensor)


def test_only_an_adapters_files_are_fetched_and_safetensors_preferred(
    hub: HubState, saved: Path, tmp_path: Path
) -> None:
    push_prompt(saved, "me/coach", token=TOKEN)
    hub.files["me/coach", "main"] |= {"adapter_model.bin": b"pickle", "train.py": b"import os", "optimizer.pt": b"x"}
    hub.requests.clear()
    place = pull_prompt("me/coach", tmp_path / "pulled")
    assert sorted(path.name for path in place.iterdir()) == sorted(ADAPTER_FILES)
    fetched = {line.rpartition("/")[2] for line in hub.requests if line.startswith("GET") and "/resolve/" in line}
    assert fetched == set(ADAPTER_FILES)


def test_an_older_bin_is_fetched_where_there_is_nothing_else(
    hub: HubState, saved: Path, tmp_path: Path, prompt: SoftPrompt
) -> None:
    torch.save({"prompt_embeddings": prompt.tensor}, tmp_path / "w.bin")
    config = (saved / "adapter_config.json").read_bytes()
    hub.files["me/old", "main"] = {
        "adapter_config.json": config,
        "adapter_model.bin": (tmp_path / "w.bin").read_bytes(),
    }
    place = pull_prompt("me/old", tmp_path / "pulled")
    assert torch.equal(load_prompt(place).tensor, prompt.tensor)
    with pytest.raises(StorageError, match="import it into a library and push that"):
        push_prompt(place, "me/again", token=TOKEN)


def test_the_cache_serves_offline(hub: HubState, saved: Path, tmp_path: Path, prompt: SoftPrompt) -> None:
    push_prompt(saved, "me/coach", token=TOKEN)
    with pytest.raises(StorageError, match="me/coach is not in the local cache; pull it once without offline"):
        pull_prompt("me/coach", tmp_path / "early", offline=True)
    pull_prompt("me/coach", tmp_path / "online")
    hub.requests.clear()
    place = pull_prompt("me/coach", tmp_path / "offline", offline=True)
    assert torch.equal(load_prompt(place).tensor, prompt.tensor)
    assert hub.requests == []


def test_what_is_pulled_is_checked_before_it_is_kept(
    hub: HubState, saved: Path, tmp_path: Path, make_base: Callable[..., Base]
) -> None:
    push_prompt(saved, "me/coach", token=TOKEN)
    with pytest.raises(WrongBaseError, match="me/coach on the Hub was trained on 'tiny/llama'"):
        pull_prompt("me/coach", tmp_path / "pulled", base=make_base(seed=9))
    with pytest.raises(ExistsError):
        pull_prompt("me/coach", saved)
    hub.files["me/coach", "main"]["adapter_config.json"] = b'{"peft_type": "LORA"}'
    with pytest.raises(AdapterError, match=r"me/coach on the Hub/adapter_config\.json has the peft_type 'LORA'"):
        pull_prompt("me/coach", tmp_path / "pulled")
    hub.files["me/coach", "main"]["adapter_config.json"] = b" " * (MAX_TEXT_BYTES + 1)
    hub.requests.clear()
    with pytest.raises(StorageError, match="the limit is 1,048,576: not fetched"):
        pull_prompt("me/coach", tmp_path / "pulled")
    assert not [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert not (tmp_path / "pulled").exists()


def test_a_broken_folder_is_not_pushed(hub: HubState, saved: Path) -> None:
    (saved / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterError, match="cut off"):
        push_prompt(saved, "me/coach", token=TOKEN)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo", "settings", "message"),
    [
        ("me/absent", {"token": TOKEN}, "no repository me/absent on the Hub, or it is private"),
        ("me/secret", {}, "no repository me/secret on the Hub, or it is private"),
        ("me/gated", {}, "me/gated is gated; accept its terms"),
        ("me/coach", {"revision": "absent"}, "me/coach has no such revision"),
        ("me/empty", {}, r"me/empty on the Hub has no adapter_model\.safetensors"),
        ("not a name", {}, "'not a name' is not a repository's name; write it as owner/name"),
    ],
)
def test_refused_pulls(hub: HubState, tmp_path: Path, repo: str, settings: dict[str, str], message: str) -> None:
    hub.files |= {("me/secret", "main"): {}, ("me/coach", "main"): {}, ("me/empty", "main"): {"README.md": b"x"}}
    hub.private.add("me/secret")
    with pytest.raises(StorageError, match=message) as caught:
        pull_prompt(repo, tmp_path / "pulled", **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pulled").exists()


def test_pushing_without_the_right_token(hub: HubState, saved: Path) -> None:
    for token in (None, "hf_wrong"):
        with pytest.raises(StorageError, match=r"does not allow this for me/coach \(HTTP 401\); log in"):
            push_prompt(saved, "me/coach", token=token)
    with pytest.raises(StorageError, match="is not a repository's name"):
        push_prompt(saved, "a/b/c", token=TOKEN)


def test_no_network(hub: HubState, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_prompt(saved, "me/coach", token=TOKEN)
    pull_prompt("me/coach", tmp_path / "online")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = "the Hub cannot be reached for me/coach .*check the network, or pull with offline"
    with pytest.raises(StorageError, match=message):
        pull_prompt("me/coach", tmp_path / "pulled")
    with pytest.raises(StorageError, match="the Hub cannot be reached for me/coach"):
        push_prompt(saved, "me/coach", token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(StorageError, match="HF_HUB_OFFLINE is set"):
        pull_prompt("me/coach", tmp_path / "pulled")
