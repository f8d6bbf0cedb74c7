"""The whole server, by keys and OpenAI's client: a prompt that is uploaded, called, shared out and rolled back."""

import openai
import pytest
from support.app_server import served
from support.prompt_server import as_upload, made_prompt

from softprompt.config import ServerConfig
from softprompt.server.clients.keys import create_key
from softprompt.server.start import serving_app
from softprompt.server.state.database import Database
from softprompt.storage import save_prompt

TEXT = "w5 w6 w7 w8"


@pytest.fixture(scope="module")
def place(tiny_llama, tmp_path_factory):
    """The server's URL and three keys: an admin's and two others'."""
    state, library = tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("library")
    save_prompt(made_prompt(tiny_llama, 1), library / "ours")
    config = ServerConfig(state=str(state), library=str(library), require_keys=True)
    database = Database.of(config)
    keys = [create_key(database, name, is_admin=name == "admin")[1] for name in ("admin", "ann", "bob")]
    database.close()
    with served(serving_app(tiny_llama, config)) as url:
        yield url, *keys


@pytest.fixture
def clients(place):
    url, *keys = place
    made = [openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in keys]
    yield made
    for client in made:
        client.close()


def post(client, name, prompt, **fields):
    return client.post(
        "/prompts", cast_to=dict, body={"name": name, **fields}, files=as_upload(prompt),
        options={"headers": {"Content-Type": "multipart/form-data"}},
    )  # fmt: skip


def put_alias(client, name, **body):
    return client.put(f"/aliases/{name}", cast_to=dict, body=body)


def answer(client, model, **asked):
    found = client.completions.create(model=model, prompt=TEXT, max_tokens=12, temperature=0, **asked)
    return found.model, found.choices[0].text


def test_the_library_is_served_to_every_key_and_to_nobody_without(clients, place):
    for client in clients:
        assert "ours" in [model.id for model in client.models.list()]
        assert answer(client, "ours")[1] != answer(client, "base")[1]
    with (
        openai.OpenAI(base_url=f"{place[0]}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.get("/prompts", cast_to=dict)


def test_an_alias_of_an_upload_is_switched_and_rolled_back(clients, tiny_llama):
    _, ann, bob = clients
    for number in (1, 2):
        post(ann, f"coach-v{number}", made_prompt(tiny_llama, 10 + number))
    first, second = answer(ann, "coach-v1"), answer(ann, "coach-v2")
    assert first[1] != second[1]
    for name, expected in (("coach-v1", first), ("coach-v2", second), ("coach-v1", first)):
        put_alias(ann, "coach", model=name)
        assert answer(ann, "coach")[1] == expected[1]
    for name in ("coach", "coach-v1"):
        with pytest.raises(openai.NotFoundError):
            answer(bob, name)
    stream = ann.completions.create(model="coach", prompt=TEXT, max_tokens=12, temperature=0, stream=True)
    beginning = next(stream).choices[0].text
    put_alias(ann, "coach", model="coach-v2")
    assert beginning + "".join(part.choices[0].text for part in stream if part.choices) == first[1]
    with pytest.raises(openai.ConflictError):
        ann.models.delete("coach-v2")
    ann.delete("/aliases/coach", cast_to=dict)
    assert ann.models.delete("coach-v2").deleted


def test_two_versions_of_a_prompt_are_counted_apart(clients, place, tiny_llama):
    admin, ann, _ = clients
    for name in ("side-a", "side-b"):
        post(admin, name, made_prompt(tiny_llama, 20), shared="true")
    targets = [{"model": "side-a", "share": 0.5}, {"model": "side-b", "share": 0.5}]
    put_alias(admin, "ab", targets=targets, shared=True)
    for _ in range(20):
        answer(ann, "ab")
    mine = {answer(ann, "ab", user=f"user-{number % 2}") for number in range(8)}
    assert len(mine) <= 2
    told = ann._client.get(f"{place[0]}/metrics", headers={"Authorization": f"Bearer {place[1]}"}).text
    counted = [
        float(line.rpartition(" ")[2]) for line in told.splitlines() if 'alias="ab"' in line and "_total" in line
    ]
    assert len(counted) == 2 and sum(counted) == 28


def test_only_an_admin_unloads_a_prompt_of_the_library(clients):
    admin, ann, _ = clients
    with pytest.raises(openai.PermissionDeniedError):
        ann.models.delete("ours")
    assert admin.models.delete("ours").deleted
    with pytest.raises(openai.NotFoundError):
        answer(ann, "ours")
    admin.post("/prompts/ours/load", cast_to=dict)
    assert answer(ann, "ours")[1]
