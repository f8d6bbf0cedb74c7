"""Collectors: bounded names, what a generation counts, and /metrics of a server that has answered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from support.app_server import AppServer, app_server
from support.memory import kept_bytes
from support.tiny_bases import random_prompt

from softprompt.engine import AsyncEngine
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.keys import create_key
from softprompt.server.dependencies import dependency_of
from softprompt.server.lifecycle import Lifecycle
from softprompt.server.state.database import Database
from softprompt.server.telemetry.metrics import BoundedNames, Metrics


@pytest.fixture(scope="module")
def place(tiny_llama, tmp_path_factory) -> Iterator[AppServer]:
    prompts = {"coach": SoftPrompt(random_prompt(tiny_llama, 3, seed=1))}
    with app_server(tiny_llama, tmp_path_factory.mktemp("state"), prompts) as found:
        yield found


def figures(place: AppServer) -> dict[tuple[str, ...], float]:
    """Every sample, by its name and its labels' values."""
    answer = place.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse(answer.text)
        for sample in family.samples
    }


# -- names


def test_the_first_names_are_labels_and_the_rest_are_other():
    names = BoundedNames(2, lambda name: pytest.fail(f"forgot {name}"))
    assert [names.use(name) for name in ("a", "b", "c", "a", "b", "c")] == [True, True, False, True, True, False]


def test_a_much_used_name_replaces_the_least_used_label():
    forgotten: list[str] = []
    names = BoundedNames(2, forgotten.append)
    for name in "aaabb":
        names.use(name)
    shown = [names.use("c") for _ in range(6)]
    assert shown == [False] * 4 + [True] * 2
    assert forgotten == ["b"]
    assert names.use("a")
    assert not names.use("b")


def test_thousands_of_names_take_bounded_memory():
    names = BoundedNames(5, lambda name: None)

    def use(first: int, count: int) -> None:
        for index in range(first, first + count):
            names.use("often")
            names.use(f"name-{index}")

    use(0, 500)
    assert kept_bytes(lambda: use(500, 5_000)) < 50_000  # five thousand names are 300,000 and more
    assert names.use("often")


def test_models_beyond_the_limit_are_counted_as_other():
    metrics = Metrics(max_names=2)
    for index in range(50):
        generation = metrics.generation_started(f"model-{index}")
        generation.tokens(1)
        generation.ended("stop", 7)
        metrics.drawn("alias", f"model-{index}")
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    assert {s.labels["model_name"] for s in samples if "model_name" in s.labels} == {"model-0", "model-1", "other"}
    assert metrics.registry.get_sample_value("softprompt:prompt_tokens_total", {"model_name": "other"}) == 48 * 7


def test_a_replaced_model_leaves_no_series():
    metrics = Metrics(max_names=1)
    metrics.generation_started("old").ended("stop", 1)
    for _ in range(3):
        metrics.generation_started("new").ended("length", 1)
    models = {s.labels.get("model_name") for family in metrics.registry.collect() for s in family.samples}
    assert "old" not in models
    assert "new" in models


# -- one generation


def test_a_generation_counts_its_tokens_times_and_end():
    metrics = Metrics()
    generation = metrics.generation_started("m")
    for num_tokens in (1, 2, 1):
        generation.tokens(num_tokens)
    generation.ended("length", num_prompt_tokens=9, num_virtual_tokens=3)
    generation.ended("abort")  # what a `finally` says afterwards
    expected = {
        "prompt_tokens_total": 9, "virtual_tokens_total": 3, "generation_tokens_total": 4,
        "time_to_first_token_seconds_count": 1, "inter_token_latency_seconds_count": 2,
        "request_time_per_output_token_seconds_count": 1, "e2e_request_latency_seconds_count": 1,
        "request_prompt_tokens_sum": 9, "request_generation_tokens_sum": 4,
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics.registry.get_sample_value(f"softprompt:{name}", {"model_name": "m"}) == value, name
    ends = {how: metrics.registry.get_sample_value("softprompt:request_success_total",
            {"model_name": "m", "finished_reason": how}) for how in ("length", "abort")}  # fmt: skip
    assert ends == {"length": 1, "abort": None}


def test_a_streamed_token_costs_little():
    generation = Metrics().generation_started("m")
    best = min(_seconds(generation) for _ in range(5))
    assert best < 2_000 * 10e-6


def _seconds(generation) -> float:
    began = time.perf_counter()
    for _ in range(2_000):
        generation.tokens(1)
    return time.perf_counter() - began


# -- a whole server


def test_a_server_that_has_answered_exports_its_metrics(place):
    before = figures(place)
    answer = place.client.completions.create(model="coach", prompt="w5 w6", max_tokens=4, temperature=0,
                                             extra_body={"ignore_eos": True})  # fmt: skip
    stream = place.client.completions.create(model="base", prompt="w5 w6 w7", max_tokens=6, temperature=0, stream=True,
                                             extra_body={"ignore_eos": True})  # fmt: skip
    assert len(list(stream)) >= 6
    place.until_idle()
    after = figures(place)

    def grew(*key: str) -> float:
        return after[(f"softprompt:{key[0]}", *key[1:])] - before.get((f"softprompt:{key[0]}", *key[1:]), 0)

    base = place.client.models.list().data[0].id
    assert grew("prompt_tokens_total", "coach") == answer.usage.prompt_tokens == 3
    assert grew("virtual_tokens_total", "coach") == 3
    assert grew("generation_tokens_total", "coach") == answer.usage.completion_tokens == 4
    assert grew("generation_tokens_total", base) == 6
    assert grew("request_success_total", "length", "coach") == 1
    assert grew("inter_token_latency_seconds_count", base) == 5
    assert grew("time_to_first_token_seconds_count", base) == 1
    assert grew("http_requests_total", "POST", "/v1/completions", "200") == 2
    assert grew("prefix_cache_queries_total") >= 1
    assert after["softprompt:num_requests_running",] == after["softprompt:num_requests_waiting",] == 0
    assert after["softprompt:kv_cache_usage_perc",] == 0
    assert after["softprompt:prefix_cache_bytes",] > 0
    assert after["softprompt:prompts", "library"] == 1
    assert "process_resident_memory_bytes" in {name for name, *_ in after}


def test_a_client_that_hangs_up_counts_as_an_abort(place):
    stream = place.client.completions.create(model="coach", prompt="w5", max_tokens=80, stream=True,
                                             extra_body={"ignore_eos": True})  # fmt: skip
    next(iter(stream))
    stream.close()
    place.until_idle()
    key = ("softprompt:request_success_total", "abort", "coach")
    end = time.monotonic() + 5
    while figures(place).get(key) != 1:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.medium
def test_a_jobs_tokens_are_counted(place):
    rows = b"".join(b'{"text": "w5 w6 w7 w8"}\n' for _ in range(8))
    file = place.client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    job = place.client.fine_tuning.jobs.create(training_file=file.id, model="base", hyperparameters={"n_epochs": 2})
    end = time.monotonic() + 30
    while (job := place.client.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed"):
        assert time.monotonic() < end
        time.sleep(0.05)
    found = figures(place)
    assert found["softprompt:training_tokens_total",] == job.trained_tokens > 0
    assert found["softprompt:jobs", "succeeded"] == 1
    assert found["softprompt:prompts", "job"] == 1


def test_two_servers_count_apart(place, tiny_llama, tmp_path):
    with app_server(tiny_llama, tmp_path / "state") as other:
        assert ("softprompt:generation_tokens_total", "coach") not in figures(other)


def test_health_and_ready_are_200_while_the_server_works(tiny_llama, tmp_path):
    with app_server(tiny_llama, tmp_path / "state") as place:
        assert place.http.get("/health").json() == place.http.get("/ready").json() == {"status": "ok"}
        dependency_of(place.app, Lifecycle).begin_to_drain()
        answer = place.http.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "the server is being stopped"})
        assert place.http.get("/health").status_code == 200
        refused = place.http.get("/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")


def test_a_stopped_engine_is_unhealthy_and_not_ready(tiny_llama, tmp_path):
    with app_server(tiny_llama, tmp_path / "state") as place:
        asyncio.run(dependency_of(place.app, AsyncEngine).close())
        for path in ("/health", "/ready"):
            answer = place.http.get(path)
            assert (answer.status_code, answer.json()) == (503, {"status": "the engine has stopped"})
        found = figures(place)  # the rest is still told
        assert ("softprompt:num_requests_running",) not in found
        assert any(name == "softprompt:http_requests_total" for name, *_ in found)


def test_metrics_need_an_admins_key_where_keys_are_asked_for(tiny_llama, tmp_path, caplog):
    with closing(Database.in_folder(tmp_path / "state")) as database:
        keys = [create_key(database, name, is_admin=name == "admin") for name in ("a", "admin")]
    asked = [None, *({"authorization": f"Bearer {secret}"} for _, secret in keys)]
    with app_server(tiny_llama, tmp_path / "state", require_keys=True) as place:
        assert [place.http.get("/metrics", headers=headers).status_code for headers in asked] == [401, 403, 200]
        assert [place.http.get(path).status_code for path in ("/health", "/ready")] == [200, 200]
        with caplog.at_level(logging.INFO, "softprompt.server.requests"):
            place.http.get("/v1/models", headers=asked[1])
            end = time.monotonic() + 5
            while not caplog.records and time.monotonic() < end:
                time.sleep(0.01)  # the line is written behind the answer
    (line,) = [record.fields for record in caplog.records if record.name == "softprompt.server.requests"]
    assert line["client"] == keys[0][0].id
    assert keys[0][1] not in str(line)
