"""The API's own description, fuzzed with schemathesis against a real server: whatever is sent, there is no 5xx, and
every response is one that the description has, error envelopes included.

More of the slow one: FUZZ_EXAMPLES=2000 pytest -m slow tests/server/test_server_fuzz.py
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import FlakyStrategyDefinition, Unsatisfiable
from hypothesis.stateful import run_state_machine_as_test
from hypothesis.strategies import SearchStrategy
from openai import OpenAI
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from support.job_server import LONG, create_job, plain_rows, upload, wait_for_end
from support.running_server import running
from support.tiny_bases import build_base, random_prompt

from softprompt.config import EngineConfig, ServerConfig
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.keys import create_key
from softprompt.server.dependencies import dependency_of
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.start import serving_app
from softprompt.server.state.database import Database

SEED = 6
STORIES = 60  # sets of twelve stories of ten steps
FEW, MANY = 3, int(os.environ.get("FUZZ_EXAMPLES", "150"))  # examples of an operation
NOT_THESE = ["positive_data_acceptance"]  # no description says all that may be wrong: rows that are no rows, say
REFUSED = ["400", "401", "403", "404", "405", "409", "413", "429"]  # where data breaks the description
QUIET: dict[str, Any] = {
    "database": None, "deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck),
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "base_name": "embedded", "max_jobs": 2, "request_timeout_s": 5.0, "max_body_bytes": 2**20, "drain_s": 1.0,
    "max_upload_bytes": 2**20, "client_timeout_s": 5.0,
}  # fmt: skip


def described(ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case) -> None:
    """The operation's description has this very status, and an error its envelope."""
    if response.status_code == 405:  # a method that the path does not have: no operation of the description
        return
    known = case.operation.definition.raw["responses"]
    assert str(response.status_code) in known, f"{case.operation.label}: {response.status_code} {response.text[:300]}"
    if response.status_code >= 400 and case.operation.path.startswith("/v1/"):
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) < 1_000, error


class Fuzzed:
    """A running server with a little of everything in it, and who asks."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self.session = requests.Session()
        self.session.trust_env = False
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.client = OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0)

    def fuzz(self, num_examples: int, *, with_edges: bool = False, only: Collection[str] = ()) -> int:
        """Send each operation so many examples of each kind; returns how many requests in all.

        `with_edges`: also every edge of every field that schemathesis knows of. `only`: just these operations. Fails
        with each operation that failed, and what was sent.
        """
        schema = self._schema()
        failures: list[str] = []
        self.num_sent = 0
        for operation in (each.ok() for each in schema.get_all_operations()):
            if only and operation.label not in only:
                continue
            try:
                for mode in GenerationMode:
                    self._send_examples(operation.as_strategy(generation_mode=mode), num_examples)
                for case in self._edges(schema, operation) if with_edges else ():
                    # .../load is also the path of a prompt whose name ends so, with the methods of those
                    if case.method == "POST" or not operation.path.endswith("/load"):
                        self.send(case)
            except Unsatisfiable:  # nothing about it can be wrong
                pass
            except (Exception, FailureGroup) as failure:
                failures.append(f"{operation.label}: {failure} {getattr(failure, 'exceptions', '')}")
        assert not failures, "\n\n".join(failures)
        return self.num_sent

    def _schema(self) -> schemathesis.BaseSchema:
        told = self.session.get(f"{self.url}/openapi.json", timeout=30).json()
        overruled = ["negative_data_rejection"] if self.headers else []  # a key that is wrong or missing, by ours
        if not self.headers:  # no key is asked for
            del told["components"]["securitySchemes"]
            for operation in (each for methods in told["paths"].values() for each in methods.values()):
                operation.pop("security", None)
        schema = schemathesis.openapi.from_dict(told)
        schema.config.seed = SEED
        schema.config.checks.update(excluded_check_names=[*NOT_THESE, *overruled])
        schema.config.checks.negative_data_rejection.expected_statuses = REFUSED
        return schema

    def _send_examples(self, cases: SearchStrategy[schemathesis.Case], num_examples: int) -> None:
        once = given(case=cases)(lambda case: self.send(case))
        settings(max_examples=num_examples, derandomize=True, **QUIET)(once)()

    def _edges(self, schema: schemathesis.BaseSchema, operation: Any) -> Iterator[schemathesis.Case]:
        return schema.iter_coverage_cases(operation, generation_modes=list(GenerationMode),
                                          generation_config=schema.config.generation)  # fmt: skip

    def wander(self, number: int) -> set[tuple[str, int]]:
        """Stories: a file is uploaded, trained on, deleted, and so on, by the description's links and by names that go
        together. `number` chooses them. Gives the operations that were asked, and the statuses that they answered."""
        answered: set[tuple[str, int]] = set()

        how = {"base_url": self.url, "session": self.session, "headers": self.headers, "timeout": 30}

        class Story(self._schema().as_state_machine()):  # type: ignore[misc]  # a class made at run time
            def get_call_kwargs(self, case: schemathesis.Case) -> dict[str, Any]:
                return how

            def validate_response(self, response: Any, case: schemathesis.Case, **more: Any) -> None:
                answered.add((case.operation.label, response.status_code))
                case.validate_response(response, additional_checks=[described])

        bounded = settings(max_examples=12, stateful_step_count=10, **QUIET)
        with suppress(FlakyStrategyDefinition):  # what can be asked next depends on the server, where things stay
            run_state_machine_as_test(seed(number)(Story), settings=bounded)
        return answered

    def send(self, case: schemathesis.Case) -> None:
        self.num_sent += 1
        case.call_and_validate(self.url, self.session, self.headers, additional_checks=[described], timeout=30)

    def fill(self, prompts: PromptRegistry) -> None:
        base = build_base()
        for name in ("quotes", "coach"):
            prompts.keep(SoftPrompt(random_prompt(base, 4)), name=name, owner="", source="folder", is_shared=True)
        job = create_job(self.client, upload(self.client, plain_rows(4)), LONG)
        self.client.fine_tuning.jobs.pause(job.id)

    def check_alive(self) -> None:
        """It answers, and the job that was begun before is as it was, or was changed by a request."""
        for job in self.client.fine_tuning.jobs.list():
            if job.status not in ("succeeded", "failed", "cancelled"):
                self.client.fine_tuning.jobs.cancel(job.id)
                assert wait_for_end(self.client, job.id).status == "cancelled"
        assert self.client.completions.create(model="base", prompt="w5", max_tokens=2).usage is not None


@contextmanager
def fuzzed(state: Path, *, asks_for_keys: bool = False) -> Iterator[Fuzzed]:
    base = build_base()
    config = ServerConfig(state=str(state), require_keys=asks_for_keys, **SETTINGS)
    key = None
    if asks_for_keys:
        with closing(Database.of(config)) as database:
            key = create_key(database, "fuzz")[1]
    app = serving_app(base, config, EngineConfig(max_waiting=64), offline=True)
    with running(config, app) as server:
        found = Fuzzed(f"http://127.0.0.1:{server.port}", key)
        found.fill(dependency_of(app, PromptRegistry))
        yield found
        found.check_alive()


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    with fuzzed(tmp_path_factory.mktemp("open")) as found:
        yield found


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    with fuzzed(tmp_path_factory.mktemp("keyed"), asks_for_keys=True) as found:
        yield found


def test_random_bodies_for_inference_are_answered_as_described(open_server: Fuzzed) -> None:
    """The other routes and more examples are in the slower tiers."""
    assert open_server.fuzz(2, only=("POST /v1/completions", "POST /v1/classify", "GET /v1/models/{model}")) >= 8


@pytest.mark.medium
def test_few_examples_of_each_operation_are_answered_as_described(open_server: Fuzzed) -> None:
    assert open_server.fuzz(FEW) > 10 * FEW


@pytest.mark.medium
def test_few_examples_with_a_clients_key_are_answered_as_described(keyed_server: Fuzzed) -> None:
    assert keyed_server.fuzz(FEW) > 10 * FEW


@pytest.mark.slow
def test_many_examples_of_each_operation_are_answered_as_described(open_server: Fuzzed) -> None:
    assert open_server.fuzz(MANY, with_edges=True) > 10 * MANY


@pytest.mark.slow
def test_chains_of_requests_are_answered_as_described(open_server: Fuzzed) -> None:
    answered = set().union(*(open_server.wander(number) for number in range(STORIES)))
    assert {("POST /v1/files", 200), ("POST /v1/fine_tuning/jobs", 200), ("DELETE /v1/files/{file_id}", 200),
            ("GET /v1/fine_tuning/jobs/{fine_tuning_job_id}", 200)} <= answered  # fmt: skip
