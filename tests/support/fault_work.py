"""What clients and the operator do while a server is being killed, each in a thread, and what must be there afterwards.

Every worker has names of its own and does one thing after another. So behind a kill there is what it has been told of,
or that and the one thing that was under way.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from openai import APIConnectionError, OpenAI

from softprompt.prompt import SoftPrompt
from support.job_server import plain_rows
from support.prompt_server import as_upload

GONE = (APIConnectionError, httpx2.TransportError)  # the server has been killed
OPEN = ("validating_files", "queued", "running")
JOB = {"virtual_tokens": 3, "epochs": 30, "batch_rows": 8}  # 90 steps, a checkpoint in each third
ROWS = "\n".join(map(json.dumps, plain_rows())).encode()
ALWAYS = "always"  # a prompt of the library that nobody touches


@dataclass(frozen=True)
class Place:
    """A server as a client finds it."""

    http: httpx2.Client
    openai: OpenAI

    @classmethod
    def at(cls, url: str) -> Place:
        """The client does not try again: what it was told once must hold."""
        return cls(httpx2.Client(base_url=url, timeout=60), OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))

    def close(self) -> None:
        self.http.close()
        self.openai.close()

    def asked(self, method: str, path: str, **body: Any) -> Any:  # Any: JSON
        answer = self.http.request(method, path, **body)
        assert answer.status_code == 200, (method, path, answer.status_code, answer.text)
        return answer.json()

    def answer(self, model: str) -> str:
        found = self.openai.completions.create(model=model, prompt="w3 w4", max_tokens=4, temperature=0)
        return found.choices[0].text

    def prompts_that_serve(self) -> list[str]:
        return [each["id"] for each in self.asked("GET", "/v1/prompts?limit=1000")["data"]]

    def prompts(self, source: str) -> dict[str, str]:
        """Content hashes by name."""
        listed = self.asked("GET", "/v1/prompts?limit=1000")
        assert not listed["has_more"] and not listed["problems"], listed["problems"]
        return {each["id"]: each["content_hash"] for each in listed["data"] if each["source"] == source}


class Worker:
    """`step` does one thing; `check` compares with what is there after a start."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.num_done = 0
        self.error: BaseException | None = None

    def work(self, place: Place, stop: threading.Event) -> None:
        """Until the server is killed, or told to stop."""
        try:
            while not stop.is_set():
                self.step(place)
                self.num_done += 1
        except GONE:
            pass
        except BaseException as error:
            self.error = error

    def step(self, place: Place) -> None:
        raise NotImplementedError

    def check(self, place: Place) -> None:
        raise NotImplementedError


class Uploads(Worker):
    """Files are uploaded and deleted."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._there: dict[str, bytes] = {}
        self._coming: bytes | None = None
        self._going: str | None = None

    def step(self, place: Place) -> None:
        if len(self._there) > 5:
            self._going = self.chance.choice(list(self._there))
            place.openai.files.delete(self._going)
            del self._there[self._going]
            self._going = None
        rows = [
            {"text": f"w{self.chance.randrange(3, 90)} w{self.num_done}"} for _ in range(self.chance.choice((1, 4000)))
        ]
        self._coming = "\n".join(map(json.dumps, rows)).encode()
        found = place.openai.files.create(file=("rows.jsonl", self._coming), purpose="fine-tune")
        self._there[found.id], self._coming = self._coming, None

    def check(self, place: Place) -> None:
        listed = [file for file in place.openai.files.list() if file.filename == "rows.jsonl"]
        found = {file.id: place.openai.files.content(file.id).content for file in listed}
        assert all(file.bytes == len(found[file.id]) for file in listed)
        must = {file: data for file, data in self._there.items() if file != self._going}
        assert must.items() <= found.items()
        rest = {file: data for file, data in found.items() if file not in self._there}
        assert len(rest) <= 1 and set(rest.values()) <= {self._coming}
        assert set(found) - set(rest) <= set(self._there)
        self._there, self._coming, self._going = found, None, None


class Prompts(Worker):
    """Prompts are uploaded, replaced, renamed and deleted."""

    def __init__(self, seed: int, prompts: list[SoftPrompt]) -> None:
        super().__init__(seed)
        self._prompts = prompts
        self._there: dict[str, str] = {}  # content hashes by name
        self._then: dict[str, str] = {}  # when what is under way has been done
        self._num_renames = 0

    def step(self, place: Place) -> None:
        do = self.chance.choice((self._upload, self._upload, self._rename, self._delete))
        do(place)
        self._there = self._then

    def check(self, place: Place) -> None:
        found = place.prompts("upload")
        assert found in (self._there, self._then)
        self._there = self._then = found

    def _upload(self, place: Place) -> None:
        name, prompt = f"p{self.chance.randrange(6)}", self.chance.choice(self._prompts)
        self._then = {**self._there, name: prompt.content_hash}
        place.asked("POST", "/v1/prompts", data={"name": name, "overwrite": "true"}, files=as_upload(prompt))

    def _rename(self, place: Place) -> None:
        if self._there:
            old = self.chance.choice(list(self._there))
            self._num_renames += 1  # a rename that a kill left unanswered may have its name already
            new = f"q{self._num_renames}"
            self._then = {new if name == old else name: known for name, known in self._there.items()}
            place.asked("PATCH", f"/v1/prompts/{old}", json={"name": new, "pinned": self.chance.random() < 0.5})

    def _delete(self, place: Place) -> None:
        if self._there:
            old = self.chance.choice(list(self._there))
            self._then = {name: known for name, known in self._there.items() if name != old}
            place.asked("DELETE", f"/v1/prompts/{old}")


class Aliases(Worker):
    """Aliases come, change and go."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._there: dict[str, list[str]] = {}
        self._then: dict[str, list[str]] = {}

    def step(self, place: Place) -> None:
        name = f"alias-{self.chance.randrange(4)}"
        if name in self._there and self.chance.random() < 0.4:
            self._then = {each: models for each, models in self._there.items() if each != name}
            place.asked("DELETE", f"/v1/aliases/{name}")
        else:
            models = self.chance.choice(([ALWAYS], ["base"], [ALWAYS, "base"]))
            self._then = {**self._there, name: models}
            place.asked("PUT", f"/v1/aliases/{name}", json={"targets": [{"model": each} for each in models]})
        self._there = self._then

    def check(self, place: Place) -> None:
        listed = place.asked("GET", "/v1/aliases")["data"]
        found = {each["id"]: [target["model"] for target in each["targets"]] for each in listed}
        assert found in (self._there, self._then)
        self._there = self._then = found
        for name in found:
            place.answer(name)


class LibraryFolders(Worker):
    """The operator copies adapters into the library and out of it, file by file."""

    def __init__(self, seed: int, library: Path, adapters: Mapping[str, Path]) -> None:
        """`adapters` are folders by their prompts' content hashes."""
        super().__init__(seed)
        self._library, self._adapters = library, adapters
        self._there: dict[str, str] = {}

    def step(self, place: Place) -> None:
        name = f"l{self.chance.randrange(5)}"
        if self._there.pop(name, None) is not None:
            shutil.rmtree(self._library / name)
        else:
            known = self.chance.choice(list(self._adapters))
            shutil.copytree(self._adapters[known], self._library / name)
            self._there[name] = known
        place.http.get("/ready")
        threading.Event().wait(self.chance.uniform(0, 0.3))

    def check(self, place: Place) -> None:
        found = place.prompts("library")
        del found[ALWAYS]
        assert found == self._there


class Jobs(Worker):
    """Jobs are asked for; some are cancelled, some rest for a while."""

    def __init__(self, seed: int, rows: bytes, num_most: int) -> None:
        super().__init__(seed)
        self.known: dict[str, str] = {}  # what each trains: the base, or a prompt further
        self.cancelled: set[str] = set()
        self._rows, self._num_most = rows, num_most
        self._file: str | None = None
        self._is_coming = False
        self._changing: str | None = None  # a job that is being cancelled

    def step(self, place: Place) -> None:
        if self._file is None:
            self._file = place.openai.files.create(file=("training.jsonl", self._rows), purpose="fine-tune").id
        if len(self.known) < self._num_most:
            self._is_coming = True
            model = self.chance.choice(("base", "base", ALWAYS))
            self.known[asked_job(place, self._file, model).id] = model
            self._is_coming = False
        self._disturb(place, self.chance.choice(sorted(self.known)))
        threading.Event().wait(self.chance.uniform(0, 0.4))

    def check(self, place: Place) -> None:
        listed = list(place.openai.fine_tuning.jobs.list(limit=100))
        found = {job.id: job.status for job in listed}
        assert self.known.keys() <= found.keys()
        assert len(found.keys() - self.known.keys()) <= self._is_coming
        assert all(found[job] == "cancelled" for job in self.cancelled)
        if self._changing is not None and found[self._changing] == "cancelled":
            self.cancelled.add(self._changing)
        for job, status in found.items():
            assert status == "cancelled" if job in self.cancelled else status in (*OPEN, "paused", "succeeded"), status
            if status == "paused":
                place.openai.fine_tuning.jobs.resume(job)
        self.known = {job.id: job.model for job in listed}
        self._is_coming, self._changing = False, None

    def _disturb(self, place: Place, job: str) -> None:
        """A job that has just ended can be neither cancelled nor paused: that is told."""
        jobs, drawn = place.openai.fine_tuning.jobs, self.chance.random()
        if jobs.retrieve(job).status not in OPEN or drawn < 0.6:
            return
        if drawn < 0.7:
            self._changing = job
            if place.http.post(f"/v1/fine_tuning/jobs/{job}/cancel").status_code == 200:
                self.cancelled.add(job)
            self._changing = None
        elif place.http.post(f"/v1/fine_tuning/jobs/{job}/pause").status_code == 200:
            place.asked("POST", f"/v1/fine_tuning/jobs/{job}/resume")


class Streams(Worker):
    """Somebody reads answers while they are made."""

    def __init__(self, seed: int, expected: str) -> None:
        super().__init__(seed)
        self._expected = expected

    def step(self, place: Place) -> None:
        assert streamed(place) == self._expected

    def check(self, place: Place) -> None:
        self.step(place)


def streamed(place: Place) -> str:
    with place.openai.completions.create(
        model=ALWAYS, prompt="w5 w6", max_tokens=40, temperature=0, stream=True
    ) as events:
        return "".join(event.choices[0].text for event in events if event.choices)


def asked_job(place: Place, file: str, model: str = "base", **more: Any) -> Any:  # Any: settings; a job
    """A prompt that is trained further keeps its virtual tokens."""
    settings = {**JOB, **more} if model == "base" else {**JOB, **more, "virtual_tokens": None}
    method = {"type": "supervised", "supervised": {"hyperparameters": settings}}
    return place.openai.fine_tuning.jobs.create(model=model, training_file=file, method=method)  # type: ignore[arg-type]


def trained(place: Place, rows: bytes, model: str = "base", **more: Any) -> str:
    """The content hash of the prompt that a job makes where nobody disturbs it."""
    file = place.openai.files.create(file=("alone.jsonl", rows), purpose="fine-tune").id
    return outcome(place, asked_job(place, file, model, **more).id)


def outcome(place: Place, job: str) -> str:
    """The content hash of a job's prompt, when it has succeeded."""
    for _ in range(3_000):
        found = place.openai.fine_tuning.jobs.retrieve(job)
        if found.status == "succeeded":
            return str(place.asked("GET", f"/v1/models/{found.fine_tuned_model}")["content_hash"])
        assert found.status in OPEN, (found.status, found.error)
        threading.Event().wait(0.02)
    raise AssertionError(f"{job} does not end")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
