"""Prompts over HTTP: added, listed, changed and deleted while the server runs; aliases; and who sees what."""

from dataclasses import replace

import openai
import pytest
import torch
from support.hub_double import TOKEN, hub_double
from support.prompt_server import as_upload, made_prompt, prompt_server, streamed, upload
from support.tiny_bases import random_ids

from softprompt.config import EngineConfig
from softprompt.storage import pull_prompt, save_prompt
from softprompt.storage.save import adapter_to_bytes
from softprompt.types import InputForm

IDS = random_ids(5)


@pytest.fixture(scope="module")
def server(tiny_llama, tmp_path_factory):
    with prompt_server(tiny_llama, tmp_path_factory.mktemp("state"),
                       engine_config=EngineConfig(prefix_bytes=30_000)) as running:  # fmt: skip
        yield running


@pytest.fixture
def ann(server):
    with server.client("ann") as client:
        yield client


@pytest.fixture
def bob(server):
    with server.client("bob") as client:
        yield client


@pytest.fixture
def admin(server):
    with server.client("admin") as client:
        yield client


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in error["message"]
    return error["message"]


def names(client):
    return [each["id"] for each in client.get("/v1/prompts").json()["data"]]


def test_an_uploaded_prompt_answers_as_the_prompt_does(ann, server, tiny_llama):
    prompt = made_prompt(tiny_llama, 1, run={"epochs": 3, "loss": float("nan")})
    answer = upload(ann, "coach", prompt)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert (made["id"], made["object"], made["source"], made["is_own"]) == ("coach", "prompt", "upload", True)
    assert made["content_hash"] == prompt.content_hash and made["num_virtual_tokens"] == 4
    assert made["record"]["base_fingerprint"] == tiny_llama.fingerprint
    assert ann.get("/v1/prompts/coach").json()["record"]["run"] == {"epochs": 3, "loss": None}
    (listed,) = [each for each in ann.get("/v1/prompts").json()["data"] if each["id"] == "coach"]
    assert listed["record"]["run"] is None
    head, tokens = streamed(ann, "coach", IDS)
    assert head["model"] == "coach" and tokens != streamed(ann, "base", IDS)[1]  # the control


def test_an_adapter_of_pefts_is_accepted_if_its_width_fits(ann, tiny_llama):
    files = as_upload(made_prompt(tiny_llama, 2), leave_out=("README.md", "softprompt.json"))
    answer = ann.post("/v1/prompts", data={"name": "peft"}, files=files)
    assert answer.status_code == 200 and answer.json()["record"]["base_fingerprint"] is None


def test_a_head_is_uploaded_with_its_prompt_if_the_base_has_such_a_head(ann, tiny_llama):
    form = InputForm(
        kind="template",
        template="{text}",
        completion="{label}",
        task="classify",
        labels=("bad", "good"),
        pooling="last",
    )
    plain = made_prompt(tiny_llama, 2, form=form, base_kind="causal")
    prompt = replace(plain, head={"score.weight": torch.ones(2, 16)})
    answer = upload(ann, "critic", prompt)
    assert answer.status_code == 200, answer.text
    assert answer.json()["content_hash"] == prompt.content_hash != plain.content_hash
    other = replace(plain, head={"classifier.weight": torch.ones(2, 16)})
    assert "has the weight 'classifier.weight', but the classify head" in error_of(upload(ann, "other", other), 400)
    assert "no weights of a head" in error_of(upload(ann, "none", plain), 400)


def test_a_name_in_use_is_refused_without_overwrite(ann, bob, tiny_llama):
    assert upload(ann, "twice", made_prompt(tiny_llama, 1)).status_code == 200
    assert "overwrite" in error_of(upload(ann, "twice", made_prompt(tiny_llama, 2)), 409)
    assert upload(bob, "twice", made_prompt(tiny_llama, 3)).status_code == 200  # a name of his own
    new = made_prompt(tiny_llama, 2)
    assert upload(ann, "twice", new, overwrite="true").json()["content_hash"] == new.content_hash


def test_a_running_request_keeps_the_prompt_that_is_replaced_meanwhile(ann, tiny_llama):
    old, new = made_prompt(tiny_llama, 4), made_prompt(tiny_llama, 5)
    upload(ann, "moving", old)
    before = streamed(ann, "moving", IDS, max_tokens=60)[1]
    with ann.stream("POST", "/stream", json={"model": "moving", "ids": IDS, "max_tokens": 60}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert upload(ann, "moving", new, overwrite="true").status_code == 200
        during = [token for line in lines for token in map(int, line.strip("[]").split(","))]
    assert during == before
    assert streamed(ann, "moving", IDS, max_tokens=60)[1] != before


def test_clients_see_their_own_and_what_is_shared(ann, bob, admin, tiny_llama):
    upload(ann, "secret", made_prompt(tiny_llama, 6))
    upload(admin, "everyones", made_prompt(tiny_llama, 7), shared="true")
    assert "secret" in names(ann) and "secret" not in names(bob) + names(admin)
    assert "everyones" in names(bob)
    for work in (
        lambda name: bob.get(f"/v1/prompts/{name}"),
        lambda name: bob.patch(f"/v1/prompts/{name}", json={"name": "mine"}),
        lambda name: bob.delete(f"/v1/prompts/{name}"),
        lambda name: bob.delete(f"/v1/models/{name}"),
        lambda name: bob.put("/v1/aliases/mine", json={"model": name}),
        lambda name: bob.post("/stream", json={"model": name, "ids": IDS}),
    ):
        assert error_of(work("secret"), 404).replace("secret", "zecret") == error_of(work("zecret"), 404)
    error_of(bob.delete("/v1/prompts/everyones"), 403)
    error_of(bob.patch("/v1/prompts/everyones", json={"pinned": True}), 403)
    error_of(upload(bob, "loud", made_prompt(tiny_llama, 8), shared="true"), 403)
    upload(bob, "bobs", made_prompt(tiny_llama, 9))
    error_of(bob.patch("/v1/prompts/bobs", json={"shared": True}), 403)
    assert bob.get("/v1/prompts").json()["problems"] is None and admin.get("/v1/prompts").json()["problems"] == []


def test_a_folder_is_for_admins_and_is_copied(ann, admin, tiny_llama, tmp_path):
    folder = save_prompt(made_prompt(tiny_llama, 9), tmp_path / "adapter")
    wanted = {"name": "from-folder", "folder": str(folder)}
    assert "admin" in error_of(ann.post("/v1/prompts", json=wanted), 403)
    assert admin.post("/v1/prompts", json=wanted).json()["source"] == "folder"
    (folder / "adapter_config.json").unlink()
    assert "from-folder" in names(admin)
    error_of(admin.post("/v1/prompts", json={"name": "x", "folder": str(tmp_path / "nowhere")}), 400)
    error_of(admin.post("/v1/prompts", json={"name": "x", "folder": "a\0b"}), 400)


def test_a_prompt_comes_from_the_hub(ann, tiny_llama, monkeypatch, tmp_path):
    with hub_double(tmp_path, monkeypatch) as hub:
        hub.files["me/coach", "main"] = adapter_to_bytes(made_prompt(tiny_llama, 10))
        hub.files["me/pickle", "main"] = {"adapter_model.bin": b"x", "adapter_config.json": b"{}"}
        answer = ann.post("/v1/prompts", json={"name": "pulled", "hub": "me/coach", "revision": "main"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["source"] == "hub" and "pulled" in names(ann)
        for repository in ("me/nothing", "me/pickle", "../../x", "https://example.org/x"):
            error_of(ann.post("/v1/prompts", json={"name": "x", "hub": repository}), 400)
    assert "x" not in names(ann)


def test_only_an_admin_gets_what_the_operators_token_reads(ann, admin, tiny_llama, monkeypatch, tmp_path):
    """Any key once pulled the operator's private repositories; with the token gone, they still came from the cache."""
    with hub_double(tmp_path, monkeypatch) as hub:
        hub.files["me/secret", "main"] = adapter_to_bytes(made_prompt(tiny_llama, 20))
        hub.files["me/open", "main"] = adapter_to_bytes(made_prompt(tiny_llama, 21))
        hub.private.add("me/secret")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        commit = hub.commit_of("me/secret", "main")

        def pulled(client, repository, revision="main"):
            wanted = {"name": "pulled", "hub": repository, "revision": revision, "overwrite": True}
            return client.post("/v1/prompts", json=wanted)

        assert "asked without a token" in error_of(pulled(ann, "me/secret"), 400)
        assert pulled(admin, "me/secret").status_code == 200  # the control; it is in the machine's cache now
        cached = sorted((tmp_path / "cache").rglob("*"))
        for revision in ("main", commit):
            assert "no repository me/secret" in error_of(pulled(ann, "me/secret", revision), 400)
        assert pulled(ann, "me/open").status_code == 200
        assert sorted((tmp_path / "cache").rglob("*")) == cached  # nobody else's pull is seen by how soon it comes
        admin.delete("/v1/prompts/pulled")


def test_an_offline_servers_cache_of_the_hub_is_for_admins(tiny_llama, monkeypatch, tmp_path):
    with (
        hub_double(tmp_path, monkeypatch) as hub,
        prompt_server(tiny_llama, tmp_path / "state", offline=True) as server,
    ):
        hub.files["me/open", "main"] = adapter_to_bytes(made_prompt(tiny_llama, 21))
        pull_prompt("me/open", tmp_path / "before")
        wanted = {"name": "pulled", "hub": "me/open"}
        with server.client("ann") as ann, server.client("admin") as admin:
            assert "only an admin's key" in error_of(ann.post("/v1/prompts", json=wanted), 403)
            assert admin.post("/v1/prompts", json=wanted).status_code == 200


def test_a_prompt_is_renamed_pinned_and_shared(ann, bob, admin, server, tiny_llama):
    upload(ann, "before", made_prompt(tiny_llama, 11))
    upload(ann, "taken", made_prompt(tiny_llama, 1))
    assert ann.patch("/v1/prompts/before", json={"name": "behind"}).json()["id"] == "behind"
    error_of(ann.get("/v1/prompts/before"), 404)
    error_of(ann.patch("/v1/prompts/behind", json={"name": "taken"}), 409)
    error_of(ann.patch("/v1/prompts/behind", json={"name": "base"}), 409)
    error_of(ann.patch("/v1/prompts/behind", json={"name": "../x"}), 400)
    error_of(ann.patch("/v1/prompts/behind", json={"colour": "red"}), 400)
    assert ann.patch("/v1/prompts/behind", json={"pinned": True}).json()["pinned"]
    assert len(server.pinned) == 1
    upload(ann, "behind", made_prompt(tiny_llama, 12), overwrite="true")  # its successor is pinned in its place
    assert ann.get("/v1/prompts/behind").json()["pinned"] and len(server.pinned) == 1
    upload(admin, "given", made_prompt(tiny_llama, 13))
    assert admin.patch("/v1/prompts/given", json={"shared": True}).json()["shared"] and "given" in names(bob)
    assert not admin.patch("/v1/prompts/given", json={"shared": False}).json()["shared"] and "given" not in names(bob)
    ann.delete("/v1/prompts/behind")
    assert not server.pinned


def test_a_pin_beyond_the_engines_memory_is_refused(ann, server, tiny_llama):
    upload(ann, "long", made_prompt(tiny_llama, 14, length=90))
    per_position = server.engine.runners.kv_cache.bytes_per_position
    assert 90 * per_position * 2 < 30_000 < 90 * per_position * 4
    upload(ann, "longer", made_prompt(tiny_llama, 15, length=91))
    assert ann.patch("/v1/prompts/long", json={"pinned": True}).status_code == 200
    assert "unpin" in error_of(ann.patch("/v1/prompts/longer", json={"pinned": True}), 409)
    assert not ann.get("/v1/prompts/longer").json()["pinned"]
    for name in ("long", "longer"):
        ann.delete(f"/v1/prompts/{name}")


def test_a_deleted_prompt_leaves_nothing(ann, server, tiny_llama):
    folders = set((server.state / "prompts").iterdir())
    upload(ann, "short-lived", made_prompt(tiny_llama, 16))
    assert ann.delete("/v1/prompts/short-lived").json() == {"id": "short-lived", "object": "prompt", "deleted": True}
    error_of(ann.delete("/v1/prompts/short-lived"), 404)
    assert set((server.state / "prompts").iterdir()) == folders
    error_of(ann.delete("/v1/prompts/base"), 404)


def test_openais_client_deletes_a_model(ann, server, tiny_llama):
    upload(ann, "fine", made_prompt(tiny_llama, 17))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="ann", max_retries=0) as client:
        deleted = client.models.delete("fine")
        assert (deleted.id, deleted.object, deleted.deleted) == ("fine", "model", True)
        with pytest.raises(openai.NotFoundError, match="fine"):
            client.models.delete("fine")


def test_an_alias_is_switched_and_switched_back(ann, bob, tiny_llama):
    for number in (3, 4):
        upload(ann, f"coach-v{number}", made_prompt(tiny_llama, 20 + number))
    answers = {name: streamed(ann, name, IDS)[1] for name in ("coach-v3", "coach-v4")}
    assert answers["coach-v3"] != answers["coach-v4"]
    for name in ("coach-v3", "coach-v4", "coach-v3"):
        made = ann.put("/v1/aliases/the-coach", json={"model": name}).json()
        assert made["targets"] == [{"model": name, "share": 1.0}] and made["is_own"]
        head, tokens = streamed(ann, "the-coach", IDS)
        assert head == {"model": name, "alias": "the-coach"} and tokens == answers[name]
    assert ann.get("/v1/prompts/coach-v3").json()["aliases"] == ["the-coach"]
    assert [each["id"] for each in ann.get("/v1/aliases").json()["data"]] == ["the-coach"]
    assert bob.get("/v1/aliases").json()["data"] == []
    error_of(bob.post("/stream", json={"model": "the-coach", "ids": IDS}), 404)
    error_of(ann.delete("/v1/prompts/coach-v3"), 409)
    error_of(ann.get("/v1/prompts/the-coach"), 404)
    error_of(ann.put("/v1/aliases/coach-v3", json={"model": "coach-v4"}), 409)
    error_of(ann.put("/v1/aliases/another", json={"model": "the-coach"}), 400)
    error_of(ann.put("/v1/aliases/another", json={"model": "coach-v3", "shared": True}), 403)
    assert ann.delete("/v1/aliases/the-coach").json() == {"id": "the-coach", "object": "alias", "deleted": True}
    error_of(ann.delete("/v1/aliases/the-coach"), 404)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "a", "targets": [{"model": "b"}]},
        {"targets": []},
        {"targets": [{"model": "twice", "share": 0}]},
        {"targets": [{"model": "twice", "share": -1}]},
        {"targets": [{"model": "twice"}, {"model": "twice"}]},
        {"model": 5},
        {"model": "twice", "colour": "red"},
        [],
    ],
)
def test_a_malformed_alias_is_refused(ann, body):
    error_of(ann.put("/v1/aliases/odd", json=body), 400)


def test_shared_requests_are_counted_by_the_prompt_that_answered(ann, tiny_llama):
    for name in ("a-side", "b-side"):
        upload(ann, name, made_prompt(tiny_llama, 30))
    targets = [{"model": "a-side", "share": 3}, {"model": "b-side", "share": 1}]
    made = ann.put("/v1/aliases/ab", json={"targets": targets}).json()
    assert made["targets"] == [{"model": "a-side", "share": 0.75}, {"model": "b-side", "share": 0.25}]
    drawn = [streamed(ann, "ab", IDS, max_tokens=1)[0]["model"] for _ in range(60)]
    assert 2 <= drawn.count("b-side") <= 35  # 15 are expected; beyond these once in ten thousand times
    kept = [streamed(ann, "ab", IDS, max_tokens=1, user="u1")[0]["model"] for _ in range(8)]
    assert len(set(kept)) == 1


def test_a_shared_alias_shows_others_no_names(admin, bob, tiny_llama):
    upload(admin, "hidden-v1", made_prompt(tiny_llama, 31))
    admin.put("/v1/aliases/open", json={"model": "hidden-v1", "shared": True})
    (alias,) = [each for each in bob.get("/v1/aliases").json()["data"] if each["id"] == "open"]
    assert alias["targets"] is None and not alias["is_own"]
    assert streamed(bob, "open", IDS)[1] == streamed(admin, "hidden-v1", IDS)[1]
    error_of(bob.delete("/v1/aliases/open"), 404)
    assert admin.delete("/v1/aliases/open").status_code == 200


def test_the_list_of_prompts_comes_in_pages(server, tiny_llama):
    with server.client("pager") as client:
        for number in range(5):
            upload(client, f"zz-{number}", made_prompt(tiny_llama, number))
        found, after = [], "zz"
        while True:
            page = client.get("/v1/prompts", params={"limit": 2, "after": after}).json()
            found += [each["id"] for each in page["data"]]
            if not page["has_more"]:
                break
            after = found[-1]
        assert found == [f"zz-{number}" for number in range(5)]
        error_of(client.get("/v1/prompts", params={"limit": 0}), 400)


def test_every_route_of_prompts_is_in_the_openapi_document(server, ann):
    paths = ann.get("/openapi.json").json()["paths"]
    assert set(paths["/v1/prompts"]) == {"get", "post"}
    assert set(paths["/v1/prompts/{name}"]) == {"get", "patch", "delete"}
    assert set(paths["/v1/prompts"]["post"]["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    for path in ("/v1/prompts/{name}/load", "/v1/aliases", "/v1/aliases/{alias}", "/v1/models/{model}"):
        assert all(way["summary"] and way["description"] for way in paths[path].values()), path
