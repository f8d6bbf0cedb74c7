"""kill -9 at random moments, while clients and the operator change everything that there is to change."""

from __future__ import annotations

import random
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.fault_server import Servers, Serving, save_base
from support.fault_work import (
    ALWAYS,
    ROWS,
    Aliases,
    Jobs,
    LibraryFolders,
    Place,
    Prompts,
    Streams,
    Uploads,
    Worker,
    outcome,
    sha256,
    streamed,
    trained,
)
from support.prompt_server import eventually, made_prompt

from softprompt.base import load_base
from softprompt.storage import save_prompt

pytestmark = pytest.mark.medium

_WHOLE = re.compile(r"file-[0-9a-f]{32}\.jsonl|prompt-[0-9a-f]{32}")
_READY_S = 20.0


class Stage:
    """Servers one after another on one state and one library, and the workers who use them."""

    def __init__(self, place: Path, servers: Servers, seed: int, num_jobs: int) -> None:
        self.state, self.library = place / "state", place / "library"
        self._base = save_base(place / "base")
        self.servers, self.chance, self.num_kills = servers, random.Random(seed), 0
        base = load_base(str(self._base), dtype="float32", device="cpu")
        prompts = [made_prompt(base, number) for number in range(4)]
        for number, prompt in enumerate(prompts):
            save_prompt(prompt, place / "adapters" / str(number))
        save_prompt(made_prompt(base, 9), self.library / ALWAYS)
        adapters = {prompt.content_hash: place / "adapters" / str(n) for n, prompt in enumerate(prompts)}
        with self.serving(self.start(place / "alone")) as at:
            self.alone, expected = {model: trained(at, ROWS, model) for model in ("base", ALWAYS)}, streamed(at)
            assert self.alone["base"] != trained(at, ROWS, seed=1)
        self.kill()
        self.jobs = Jobs(seed, ROWS, num_jobs)
        self.workers: list[Worker] = [
            self.jobs, Uploads(seed), Prompts(seed, prompts), Aliases(seed),
            LibraryFolders(seed, self.library, adapters), Streams(seed, expected),
        ]  # fmt: skip

    def start(self, state: Path | None = None) -> Serving:
        began = time.monotonic()
        flags = ("--state", state or self.state, "--library", self.library)
        self._server = self.servers.start(self._base, *flags)
        assert time.monotonic() - began < _READY_S
        return self._server

    def kill(self) -> None:
        assert self.servers.kill(self._server) == -9
        self.num_kills += 1

    def kill_in_its_start(self) -> None:
        """At any moment of it, or shortly behind."""
        self._server = self.servers.begin(self._base, "--state", self.state, "--library", self.library)
        time.sleep(self.chance.uniform(0.0, 0.4))
        self.kill()

    @contextmanager
    def serving(self, server: Serving) -> Iterator[Place]:
        with closing(Place.at(server.url)) as found:
            assert found.http.get("/ready").json() == {"status": "ok"}
            yield found

    def round(self, least_s: float, most_s: float) -> None:
        """Start, look at everything, let all work, and kill."""
        server, stop = self.start(), threading.Event()
        with self.serving(server) as place:
            self.look(place, server)
            threads = [threading.Thread(target=each.work, args=(place, stop)) for each in self.workers]
            for thread in threads:
                thread.start()
            time.sleep(self.chance.uniform(least_s, most_s))
            self.kill()
            stop.set()
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()
        assert "Traceback" not in server.said, server.said
        for each in self.workers:
            if each.error is not None:
                raise each.error

    def look(self, place: Place, server: Serving) -> None:
        for each in self.workers:
            each.check(place)
        for model in place.openai.models.list():
            if model.to_dict()["source"] != "checkpoint":  # which a running job replaces
                place.answer(model.id)
        assert "set aside" not in server.said, server.said
        eventually(self._is_disk_whole)  # a job that runs keeps a checkpoint just now, say

    def _is_disk_whole(self) -> bool:
        """What the database knows is there to the byte, and of what it does not know there is no more than two whole
        things for each kill."""
        with closing(sqlite3.connect(f"file:{self.state}/softprompt.db?mode=ro", uri=True)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            files = dict(database.execute("SELECT id, sha256 FROM files").fetchall())
            prompts = {folder for (folder,) in database.execute("SELECT folder FROM prompts") if folder is not None}
        there = {path.name for folder in ("files", "prompts") for path in (self.state / folder).glob("*")}
        known = {f"{name}.jsonl" for name in files} | {folder.rpartition("/")[2] for folder in prompts}
        if not (known <= there and all(_WHOLE.fullmatch(name) for name in there)):
            return False
        assert {name: sha256(self.state / "files" / f"{name}.jsonl") for name in files} == files
        return len(there - known) <= 2 * self.num_kills

    def leave_remains(self) -> None:
        """What a process leaves that is killed while it writes: at a moment that a test may not meet."""
        name, mark = "0" * 32, "0123456789ab"
        for place in (f"files/.file-{name}.partial", f"files/.file-{name}.jsonl.{mark}.partial"):
            (self.state / place).write_bytes(b"half of")
        for place in (f"prompts/.prompt-{name}.{mark}.partial", f"starts/.ftjob-{name[:24]}.{mark}.partial"):
            (self.state / place).mkdir(parents=True)
            (self.state / place / "adapter_config.json").write_bytes(b"half of")

    def end(self) -> None:
        """Every job that anybody was told of has made the prompt that one makes alone."""
        server = self.start()
        with self.serving(server) as place:
            self.look(place, server)
            for job in self.jobs.known.keys() - self.jobs.cancelled:
                assert outcome(place, job) == self.alone[self.jobs.known[job]]
            self.look(place, server)
            hidden = [path for path in self.state.rglob(".*") if path.is_file() or any(path.iterdir())]
            assert hidden == []
        assert "Traceback" not in server.said, server.said
        self.kill()


def test_a_server_killed_twice_loses_nothing_it_has_confirmed(servers: Servers, tmp_path: Path) -> None:
    found = Stage(tmp_path, servers, seed=1, num_jobs=4)
    found.round(0.5, 1.5)
    found.kill_in_its_start()
    found.leave_remains()
    found.end()
    assert all(worker.num_done > 0 for worker in found.workers)


@pytest.mark.slow
def test_a_server_killed_twenty_times_loses_nothing_it_has_confirmed(servers: Servers, tmp_path: Path) -> None:
    found = Stage(tmp_path, servers, seed=2, num_jobs=40)
    for _ in range(7):
        found.round(0.1, 3.0)
        found.round(0.05, 1.0)
        found.kill_in_its_start()
    found.end()
    assert found.num_kills >= 20
    print([worker.num_done for worker in found.workers])
    assert all(worker.num_done > 20 for worker in found.workers)
