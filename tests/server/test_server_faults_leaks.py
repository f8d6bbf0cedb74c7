"""What one key has is, to another, as if it had never been: in every route, every answer, every header, every hint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from support.app_server import served
from support.fault_work import ROWS, Place, outcome
from support.prompt_server import as_upload, made_prompt

from softprompt.base import Base
from softprompt.config import ServerConfig
from softprompt.server.clients.keys import create_key
from softprompt.server.start import serving_app
from softprompt.server.state.database import Database
from softprompt.storage import save_prompt

pytestmark = pytest.mark.medium
_OWN_EACH_TIME = ("date", "x-request-id")  # headers that no two answers share
_NOW = re.compile(r'"(created|created_at)":\d+')
_STEPS = {"type": "supervised", "supervised": {"hyperparameters": {"virtual_tokens": 2, "n_epochs": 2}}}


@dataclass(frozen=True)
class Owned:
    """Ids and names of one client's things, each with one of the same form that never was."""

    files: dict[str, str]
    jobs: dict[str, str]
    events: dict[str, str]
    checkpoints: dict[str, str]
    models: dict[str, str]  # prompts, aliases, jobs' models and checkpoints' ones

    @property
    def all(self) -> list[str]:
        return [name for each in (self.files, self.jobs, self.events, self.checkpoints, self.models) for name in each]


@pytest.fixture(scope="module")
def places(tiny_llama: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Place]]:
    place = tmp_path_factory.mktemp("leaks")
    save_prompt(made_prompt(tiny_llama, 50), place / "library" / "common")
    with closing(Database.in_folder(place / "state")) as database:
        keys = {name: create_key(database, name, is_admin=name == "root")[1] for name in ("ann", "bob", "root")}
    config = ServerConfig(state=str(place / "state"), library=str(place / "library"), require_keys=True)
    with served(serving_app(tiny_llama, config)) as url:
        yield {name: Place(httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60),
                           OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0))
               for name, key in keys.items()}  # fmt: skip


def train(place: Place, name: str) -> tuple[str, str]:
    """A file and a job on it, which has succeeded."""
    file = place.openai.files.create(file=(f"{name}.jsonl", ROWS), purpose="fine-tune").id
    job = place.openai.fine_tuning.jobs.create(model="base", training_file=file, method=_STEPS, suffix=name).id  # type: ignore[arg-type]
    outcome(place, job)
    return file, job


@pytest.fixture(scope="module")
def owned(places: dict[str, Place], tiny_llama: Base) -> Owned:
    """All that Ann has."""
    ann = places["ann"]
    file, job = train(ann, "annals")
    ann.asked("POST", "/v1/prompts", data={"name": "annas-voice"}, files=as_upload(made_prompt(tiny_llama, 51)))
    ann.asked("PUT", "/v1/aliases/annas-alias", json={"model": "annas-voice"})
    jobs = ann.openai.fine_tuning.jobs
    results = jobs.retrieve(job).result_files
    checkpoints = jobs.checkpoints.list(job).data
    models = ["annas-voice", "annas-alias", str(jobs.retrieve(job).fine_tuned_model)]
    models += [each.fine_tuned_model_checkpoint for each in checkpoints]
    return Owned(
        *({name: _never(name) for name in names} for names in (
            [file, *results], [job], [each.id for each in jobs.list_events(job)], [each.id for each in checkpoints],
            models,
        ))
    )  # fmt: skip


def _never(name: str) -> str:
    """One of the same form: other hexadecimal digits, or another letter at the end."""
    other = re.sub(r"[0-9a-f]{20,}", lambda digits: digits[0][::-1], name)
    return other if other != name else name[:-1] + ("x" if name[-1] != "x" else "y")


def _ways(owned: Owned, bob: dict[str, str]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """The name, method, path and body of each way in which Bob can try for each of Ann's things; NAME stands for it."""
    for name in owned.files:
        yield from ((name, method, f"/v1/files/NAME{more}", {}) for method, more in
                    (("GET", ""), ("GET", "/content"), ("DELETE", "")))  # fmt: skip
        yield name, "GET", "/v1/files?after=NAME", {}
        for field in ({"training_file": "NAME"}, {"training_file": bob["file"], "validation_file": "NAME"}):
            yield name, "POST", "/v1/fine_tuning/jobs", {"model": "base", **field}
    for name in owned.jobs:
        ways = ("GET ", "GET /events", "GET /checkpoints", "POST /cancel", "POST /pause", "POST /resume")
        yield from ((name, way.split(" ")[0], f"/v1/fine_tuning/jobs/NAME{way.split(' ')[1]}", {}) for way in ways)
        yield name, "GET", "/v1/fine_tuning/jobs?after=NAME", {}
    for kind, names in (("events", owned.events), ("checkpoints", owned.checkpoints)):
        for name in names:
            yield name, "GET", f"/v1/fine_tuning/jobs/{bob['job']}/{kind}?after=NAME", {}
    for name in owned.models:
        yield from ((name, method, path, {}) for method, path in
                    (("GET", "/v1/models/NAME"), ("GET", "/v1/prompts/NAME"), ("DELETE", "/v1/aliases/NAME"),
                     ("DELETE", "/v1/models/NAME"), ("DELETE", "/v1/prompts/NAME"), ("POST", "/v1/prompts/NAME/load"),
                     ("GET", "/v1/prompts?after=NAME")))  # fmt: skip
        for change in ({"name": "gnu"}, {"pinned": True}, {"shared": True}, {}):
            yield name, "PATCH", "/v1/prompts/NAME", change
        yield name, "PATCH", "/v1/prompts/zebra", {"name": "NAME"}
        yield name, "PATCH", "/v1/prompts/NAME", {"name": "zebra"}
        for stream in (False, True):
            yield name, "POST", "/v1/completions", {"model": "NAME", "prompt": "w3", "stream": stream}
            asked = {"model": "NAME", "messages": [{"role": "user", "content": "w3"}], "stream": stream}
            yield name, "POST", "/v1/chat/completions", asked
        yield name, "POST", "/v1/fine_tuning/jobs", {"model": "NAME", "training_file": bob["file"]}
        yield name, "PUT", "/v1/aliases/gnu", {"model": "NAME"}
        yield name, "PUT", "/v1/aliases/gnu", {"targets": [{"model": "base"}, {"model": "NAME"}]}
        yield name, "PUT", "/v1/aliases/NAME", {"model": "base"}
        yield name, "DELETE", "/v1/aliases/NAME", {}


def _told(place: Place, method: str, path: str, body: dict[str, Any], name: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and text with the name taken out."""
    sent = json.loads(json.dumps(body).replace("NAME", name))
    more = {"json": sent} if method in ("POST", "PUT", "PATCH") else {}
    answer = place.http.request(method, path.replace("NAME", name), **more)
    headers = {key: value for key, value in answer.headers.items() if key not in _OWN_EACH_TIME}
    text = _NOW.sub(r'"\1":0', answer.text.replace(name, "NAME"))
    return answer.status_code, headers, text


def _tried(bob: Place, method: str, path: str, body: dict[str, Any], name: str) -> tuple[int, dict[str, str], str]:
    found = _told(bob, method, path, body, name)
    if found[0] == 200 and method == "PATCH":  # his own prompt has another name now
        bob.asked("PATCH", f"/v1/prompts/{name}", json={"name": "zebra"})
    return found


def test_another_clients_objects_are_answered_like_none(
    places: dict[str, Place], owned: Owned, tiny_llama: Base
) -> None:
    ann, bob = places["ann"], places["bob"]
    mine = dict(zip(("file", "job"), train(bob, "zoo"), strict=True))
    for model in list(bob.prompts("job")):  # hints would be of these, and of their checkpoints, which go too
        bob.asked("DELETE", f"/v1/models/{model}")
    assert not list(bob.prompts("checkpoint"))
    bob.asked("POST", "/v1/prompts", data={"name": "zebra"}, files=as_upload(made_prompt(tiny_llama, 52)))
    before = {path: ann.http.get(path).text for path in _LISTS} | {"answer": ann.answer("annas-alias")}
    never = {**owned.files, **owned.jobs, **owned.events, **owned.checkpoints, **owned.models}
    num_tried = 0
    for name, method, path, body in _ways(owned, mine):
        hers, nobodys = (_tried(bob, method, path, body, each) for each in (name, never[name]))
        assert hers == nobodys, (method, path, body)
        assert not [each for each in owned.all if each in hers[2].replace("NAME", "")]
        num_tried += 1
    assert num_tried > 100
    assert {path: ann.http.get(path).text for path in _LISTS} | {"answer": ann.answer("annas-alias")} == before
    # the control: Ann herself is answered otherwise
    for name in (*owned.files, *owned.jobs):
        kind = "files" if name in owned.files else "fine_tuning/jobs"
        assert _told(ann, "GET", f"/v1/{kind}/NAME", {}, name)[0] == 200
    assert all(_told(ann, "GET", "/v1/models/NAME", {}, name)[0] == 200 for name in owned.models)


_LISTS = ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models", "/v1/prompts", "/v1/aliases")


def test_another_clients_objects_are_neither_listed_nor_suggested(places: dict[str, Place], owned: Owned) -> None:
    bob = places["bob"]
    texts = [bob.http.get(path).text for path in (*_LISTS, "/openapi.json", "/health", "/ready", "/metrics")]
    assert bob.http.get("/metrics").status_code == 403
    for near in (
        "annas-voic",
        "annas-alia",
        "annas",
        "a",
        "ft:base:annals:ftjob",
        *(name[:-1] for name in owned.models),
    ):
        asked = {"model": near, "prompt": "w3"}
        texts += [bob.http.get(f"/v1/models/{near}").text, bob.http.post("/v1/completions", json=asked).text]
        texts = [text.replace(near, "") for text in texts]
    whole = "\n".join(texts)
    assert "common" in whole and not [name for name in owned.all if name in whole]
    assert "annas" not in whole and "annals" not in whole


def test_each_client_may_use_the_same_name(places: dict[str, Place], owned: Owned, tiny_llama: Base) -> None:
    """Bob has what Ann has under her names, and neither changes the other's."""
    ann, bob = places["ann"], places["bob"]
    before = [ann.answer("annas-voice"), ann.answer("annas-alias")]
    hashes = ann.prompts("upload")
    for name in ("annas-voice", "nobodys-one"):
        answer = bob.http.post("/v1/prompts", data={"name": name}, files=as_upload(made_prompt(tiny_llama, 53)))
        assert answer.status_code == 200, answer.text
    assert bob.asked("GET", "/v1/prompts/annas-voice")["content_hash"] != hashes["annas-voice"]
    bob.asked("PUT", "/v1/aliases/annas-alias", json={"model": "annas-voice"})
    assert bob.answer("annas-alias") == bob.answer("nobodys-one")
    assert [ann.answer("annas-voice"), ann.answer("annas-alias")] == before
    bob.asked("DELETE", "/v1/aliases/annas-alias")
    bob.asked("DELETE", "/v1/prompts/annas-voice")
    assert [ann.answer("annas-voice"), ann.answer("annas-alias")] == before
    assert ann.prompts("upload") == hashes
