"""What is cached for one key and what for all: counted in the engine's own figures, never by a clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from support.app_server import AppServer, serve_app, words
from support.tiny_bases import build_base, random_ids, random_prompt

from softprompt.config import ServerConfig
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.keys import create_key
from softprompt.server.dependencies import dependency_of
from softprompt.server.prompts.model import Model
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.start import serving_app
from softprompt.server.state.database import Database

NUM_VIRTUAL, NUM_TEXT = 9, 51  # BOS included
WHOLE, ALL_BUT_PROMPT, CACHED = NUM_VIRTUAL + NUM_TEXT, NUM_TEXT, NUM_TEXT - 48


class Asking:
    """Keys that ask a server, and what the engine had to run for each request."""

    def __init__(self, place: AppServer, secrets: dict[str, str]) -> None:
        self.place, self.secrets = place, secrets
        self.cached_tokens = 0  # of the last request, as its usage says

    def num_read(self, key: str | None, **fields: Any) -> int:  # Any: JSON
        """Positions of one request that are run until its one token."""
        body = {"model": "p", "prompt": words(random_ids(NUM_TEXT - 1)), "max_tokens": 1, **fields}
        headers = {} if key is None else {"Authorization": f"Bearer {self.secrets[key]}"}
        before = self.place.stats().num_read_tokens
        answer = httpx2.post(f"{self.place.url}/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        self.cached_tokens = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return self.place.stats().num_read_tokens - before


@contextmanager
def asking(state: Path, *names: str, **config: Any) -> Iterator[Asking]:
    database = Database.in_folder(state)
    secrets = {name: create_key(database, name)[1] for name in names}
    database.close()
    base = build_base()
    app = serving_app(base, ServerConfig(state=str(state), require_keys=bool(names), **config))
    dependency_of(app, PromptRegistry).publish(Model(id="p", prompt=SoftPrompt(random_prompt(base, NUM_VIRTUAL))))
    with serve_app(app) as place:
        yield Asking(place, secrets)


def test_a_text_is_cached_for_the_key_that_sent_it_and_a_soft_prompt_for_all(tmp_path: Path) -> None:
    with asking(tmp_path, "alice", "bob") as asks:
        assert [asks.num_read("alice") for _ in range(3)] == [WHOLE, ALL_BUT_PROMPT, CACHED]
        assert asks.cached_tokens == 48
        assert asks.num_read("bob") == ALL_BUT_PROMPT and asks.cached_tokens == 0  # usage tells no more than the time
        assert [asks.num_read("bob") for _ in range(2)] == [ALL_BUT_PROMPT, CACHED]
        assert [asks.num_read("alice", cache_salt="one user") for _ in range(3)][::2] == [ALL_BUT_PROMPT, CACHED]
        assert asks.num_read("bob", cache_salt="one user") == ALL_BUT_PROMPT  # a salt leads to nobody else's texts
        assert asks.num_read("alice", user="bob") == CACHED  # who asks is the key, whatever it says


def test_texts_that_the_operator_shares_are_cached_for_all_keys_with_one_salt(tmp_path: Path) -> None:
    with asking(tmp_path, "alice", "bob", share_prefix_cache=True) as asks:
        assert [asks.num_read("alice") for _ in range(2)] == [WHOLE, ALL_BUT_PROMPT]
        assert [asks.num_read(key) for key in ("bob", "alice")] == [CACHED, CACHED]
        assert [asks.num_read("alice", cache_salt="s") for _ in range(3)][::2] == [ALL_BUT_PROMPT, CACHED]
        assert [asks.num_read("bob", cache_salt=salt) for salt in ("s", "t")] == [CACHED, ALL_BUT_PROMPT]


def test_without_keys_all_are_one_client_and_a_malformed_salt_is_refused(tmp_path: Path) -> None:
    with asking(tmp_path) as asks:
        assert [asks.num_read(None) for _ in range(3)] == [WHOLE, ALL_BUT_PROMPT, CACHED]
        assert asks.num_read(None, cache_salt="s") == ALL_BUT_PROMPT

        for salt in ("", 5, "s" * 1025, ["s"]):
            answer = asks.place.post("/v1/completions", {"model": "base", "prompt": "w5", "cache_salt": salt})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "cache_salt"
