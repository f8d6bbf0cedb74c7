"""The library's folder: what is put in, replaced, broken or taken out while the server runs."""

import os
import random
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
from support.prompt_server import eventually, made_prompt, memory_registry, prompt_server, streamed, upload
from support.tiny_bases import random_ids

from softprompt.errors import StorageError
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.keys import Client
from softprompt.server.errors import ApiError
from softprompt.server.prompts import library_watcher as library_module
from softprompt.server.prompts.library_watcher import LibraryWatcher
from softprompt.storage import save_prompt
from softprompt.storage.files import ADAPTER_FILES
from softprompt.storage.save import adapter_to_bytes

IDS = random_ids(5)
ANYBODY = Client("ann", "ann", is_admin=False)
WITHIN_S = 2.5


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "library").mkdir()
    return tmp_path / "library"


@contextmanager
def serving(base, folder, tmp_path):
    with prompt_server(base, tmp_path / "state", folder) as server, server.client("ann") as client:
        yield server, client


def hash_of(registry, name):
    """Of the prompt that is served under a name; None where there is none."""
    try:
        return registry.resolve(name, ANYBODY).prompt.content_hash
    except ApiError:
        return None


def test_sound_folders_are_served_from_the_start_and_broken_ones_are_named(tiny_llama, tiny_gpt2, folder, tmp_path):
    prompt = made_prompt(tiny_llama, 1)
    save_prompt(prompt, folder / "good")
    save_prompt(made_prompt(tiny_gpt2, 2), folder / "foreign")
    cut = save_prompt(made_prompt(tiny_llama, 3), folder / "cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    save_prompt(made_prompt(tiny_llama, 4), folder / "base")
    save_prompt(made_prompt(tiny_llama, 5), folder / "a name with spaces")
    (folder / "empty").mkdir()
    outside = save_prompt(made_prompt(tiny_llama, 6), tmp_path / "outside")
    (folder / "link").symlink_to(outside)
    half_link = save_prompt(made_prompt(tiny_llama, 7), folder / "inner-link")
    (half_link / "adapter_model.safetensors").unlink()
    (half_link / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (folder / ".hidden").mkdir()
    (folder / "README.md").write_text("a file")
    shutil.copytree(folder / "good", os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))
    for name, extra in (("half", '"base_name": "\\ud800"'), ("deep", '"run": ' + '{"a":' * 800 + "1" + "}" * 800)):
        record = save_prompt(made_prompt(tiny_llama, 8), folder / name) / "softprompt.json"
        record.write_text(record.read_text().rstrip()[:-1] + f", {extra}}}")
    with serving(tiny_llama, folder, tmp_path) as (server, client):
        assert [each["id"] for each in client.get("/v1/prompts").json()["data"]] == ["good"]
        assert streamed(client, "good", IDS)[1] != streamed(client, "base", IDS)[1]
        with server.client("admin") as admin:
            named = {each["name"]: each["problem"] for each in admin.get("/v1/prompts").json()["problems"]}
        assert set(named) == {"foreign", "cut", "base", "a name with spaces", "empty", "link", "inner-link",
                              "half", "deep", "caf\\udce9"}  # fmt: skip
        assert "half a character" in named["half"] and "nested deeper" in named["deep"]
        assert "outside" in named["link"] and "trained on" in named["foreign"]


@pytest.mark.medium
def test_changes_of_the_library_count_within_seconds(tiny_llama, folder, tmp_path):
    first, second = made_prompt(tiny_llama, 1), made_prompt(tiny_llama, 2)
    with serving(tiny_llama, folder, tmp_path) as (server, _):

        def eventually_is(expected):
            return eventually(lambda: hash_of(server.registry, "coach") == expected, WITHIN_S)

        save_prompt(first, folder / "coach")
        eventually_is(first.content_hash)
        save_prompt(second, folder / "coach", overwrite=True)
        eventually_is(second.content_hash)
        weights = folder / "coach" / "adapter_model.safetensors"
        sound = weights.read_bytes()
        weights.write_bytes(sound[:-4])
        eventually_is(None)
        assert "coach" in server.library.problems
        weights.write_bytes(sound)
        eventually_is(second.content_hash)
        assert not server.library.problems
        shutil.rmtree(folder / "coach")
        eventually_is(None)
        assert not server.library.problems


@pytest.mark.medium
def test_a_slow_copy_is_served_when_it_is_whole_and_not_before(tiny_llama, folder, tmp_path):
    prompt = made_prompt(tiny_llama, 1, length=20)
    seen, stop = set(), threading.Event()
    with serving(tiny_llama, folder, tmp_path) as (server, _):

        def look():
            while not stop.is_set():
                seen.add(hash_of(server.registry, "slow"))
                time.sleep(0.005)

        looking = threading.Thread(target=look)
        looking.start()
        (folder / "slow").mkdir()
        for name, data in reversed(adapter_to_bytes(prompt).items()):  # the config first, the weights last
            with open(folder / "slow" / name, "wb", buffering=0) as file:
                for begin in range(0, len(data), max(1, len(data) // 3)):
                    file.write(data[begin : begin + max(1, len(data) // 3)])
                    time.sleep(0.15)
        eventually(lambda: hash_of(server.registry, "slow") == prompt.content_hash, WITHIN_S)
        stop.set()
        looking.join()
        assert seen <= {None, prompt.content_hash}
        assert not server.library.problems


@pytest.mark.medium
def test_a_prompt_that_is_replaced_in_place_is_never_missing(tiny_llama, folder, tmp_path):
    """A copy over the old files takes a moment in which they do not belong together."""
    prompts = [made_prompt(tiny_llama, seed) for seed in range(2)]
    save_prompt(prompts[0], folder / "coach")
    wrong, stop = [], threading.Event()
    with serving(tiny_llama, folder, tmp_path) as (server, _):

        def look():
            while not stop.is_set():
                if hash_of(server.registry, "coach") not in {each.content_hash for each in prompts}:
                    wrong.append(time.monotonic())
                time.sleep(0.002)

        looking = threading.Thread(target=look)
        looking.start()
        for number in (1, 0):
            for name, data in adapter_to_bytes(prompts[number]).items():
                (folder / "coach" / name).write_bytes(data)
                time.sleep(0.25)  # longer than changes are gathered, shorter than a broken folder is borne
            eventually(
                lambda number=number: hash_of(server.registry, "coach") == prompts[number].content_hash, WITHIN_S
            )
        stop.set()
        looking.join()
    assert not wrong


@pytest.mark.medium
def test_running_answers_do_not_change_while_the_library_does(tiny_llama, folder, tmp_path):
    """Eight clients stream, each its own prompt, while others come, go, break and are replaced."""
    prompts = {f"p{number}": made_prompt(tiny_llama, number) for number in range(8)}
    for name, prompt in prompts.items():
        save_prompt(prompt, folder / name)
    wrong, stop = [], threading.Event()
    with serving(tiny_llama, folder, tmp_path) as (server, client):
        alone = {name: streamed(client, name, IDS, max_tokens=40)[1] for name in prompts}
        assert len({tuple(tokens) for tokens in alone.values()}) == 8  # the control: each has its own
        counts = dict.fromkeys(prompts, 0)

        def ask(name):
            with server.client(name) as own:
                while not stop.is_set():
                    if streamed(own, name, IDS, max_tokens=40)[1] != alone[name]:
                        wrong.append(name)
                    counts[name] += 1

        asking = [threading.Thread(target=ask, args=(name,)) for name in prompts]
        for thread in asking:
            thread.start()
        chance = random.Random(1)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            place = folder / f"other{chance.randrange(3)}"
            if chance.random() < 0.3:
                shutil.rmtree(place, ignore_errors=True)
            elif chance.random() < 0.3 and place.exists():
                (place / "adapter_model.safetensors").write_bytes(b"broken")
            else:
                save_prompt(made_prompt(tiny_llama, chance.randrange(100)), place, overwrite=True)
            time.sleep(0.05)
        stop.set()
        for thread in asking:
            thread.join()
        assert not wrong and min(counts.values()) > 2, (wrong, counts)


def test_an_admin_unloads_a_prompt_of_the_library_and_loads_it_again(tiny_llama, folder, tmp_path):
    save_prompt(made_prompt(tiny_llama, 1), folder / "coach")
    for is_new in (True, False):  # the second time after a restart
        with serving(tiny_llama, folder, tmp_path) as (server, ann), server.client("admin") as admin:
            if is_new:
                assert ann.delete("/v1/prompts/coach").status_code == 403
                assert ann.delete("/v1/models/coach").status_code == 403
                assert ann.post("/v1/prompts/coach/load").status_code == 403
                assert admin.patch("/v1/prompts/coach", json={"name": "other"}).status_code == 409
                assert admin.patch("/v1/prompts/coach", json={"shared": False}).status_code == 409
                assert admin.patch("/v1/prompts/coach", json={"pinned": True}).json()["pinned"]
                assert admin.delete("/v1/models/coach").json()["deleted"]
                assert (folder / "coach").is_dir()
            else:
                server.library.scan(["coach"])  # as when its files change
            assert ann.get("/v1/prompts/coach").status_code == 404
            if not is_new:
                again = admin.post("/v1/prompts/coach/load")
                assert again.status_code == 200 and again.json()["source"] == "library" and again.json()["pinned"]
                assert ann.get("/v1/prompts/coach").json()["shared"]
                assert admin.post("/v1/prompts/nobody/load").status_code == 404
                assert admin.post("/v1/prompts/.x/load").status_code == 400
    with serving(tiny_llama, folder, tmp_path) as (_, ann):
        assert ann.get("/v1/prompts/coach").json()["pinned"]


def test_a_folder_does_not_replace_a_kept_prompt_of_its_name(tiny_llama, folder, tmp_path):
    with serving(tiny_llama, folder, tmp_path) as (server, ann), server.client() as operator:
        assert upload(operator, "mine", made_prompt(tiny_llama, 1)).status_code == 200
        save_prompt(made_prompt(tiny_llama, 2), folder / "mine")
        server.library.scan()
        assert "another prompt" in server.library.problems["mine"]
        assert operator.get("/v1/prompts/mine").json()["source"] == "upload"
        save_prompt(made_prompt(tiny_llama, 3), folder / "ours")
        server.library.scan()
        answer = upload(operator, "ours", made_prompt(tiny_llama, 4), overwrite="true")
        assert answer.status_code == 409 and "library" in answer.json()["error"]["message"]
        assert upload(ann, "ours", made_prompt(tiny_llama, 4)).status_code == 200  # her own comes first
        assert ann.get("/v1/prompts/ours").json()["source"] == "upload"


@pytest.mark.medium
def test_a_folder_is_scanned_every_second_where_the_system_reports_no_changes(
    tiny_llama, folder, tmp_path, monkeypatch
):
    def deaf(*_, **__):
        raise OSError("no space left on device (inotify watches)")

    monkeypatch.setattr(library_module, "awatch", deaf)
    prompt = made_prompt(tiny_llama, 1)
    with serving(tiny_llama, folder, tmp_path) as (server, _):
        time.sleep(1.2)  # past the first look
        save_prompt(prompt, folder / "coach")
        eventually(lambda: hash_of(server.registry, "coach") == prompt.content_hash, 3)


def test_a_missing_library_is_an_error_and_one_that_vanishes_stays_served(tiny_llama, folder):
    registry = memory_registry("tiny")
    with pytest.raises(StorageError, match="no library"):
        LibraryWatcher(folder / "nowhere", tiny_llama, registry).scan()
    save_prompt(made_prompt(tiny_llama, 1), folder / "coach")
    watched = LibraryWatcher(folder, tiny_llama, registry)
    assert watched.scan() == set()
    before = hash_of(registry, "coach")
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(StorageError):
        watched.scan()
    assert hash_of(registry, "coach") == before


def test_an_unchanged_folder_is_not_read_again(tiny_llama, folder):
    registry = memory_registry("tiny")
    save_prompt(made_prompt(tiny_llama, 1), folder / "coach")
    watched = LibraryWatcher(folder, tiny_llama, registry)
    watched.scan()
    first = registry.resolve("coach", ANYBODY)
    watched.scan()
    assert registry.resolve("coach", ANYBODY) is first
    os.utime(folder / "coach" / "adapter_config.json")
    watched.scan()
    assert registry.resolve("coach", ANYBODY) is not first


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_every_state_of_a_copy_is_whole_or_refused(tiny_llama, folder, order):
    """Cut a copy anywhere: what is served is the old prompt, the new one, or none."""
    old, new = made_prompt(tiny_llama, 1), made_prompt(tiny_llama, 2, length=6)
    allowed = {None, old.content_hash, new.content_hash}
    names = ADAPTER_FILES if order == "forward" else ADAPTER_FILES[::-1]
    contents = adapter_to_bytes(new)
    for begins_with in (None, old):
        seen = set()
        for number, name in enumerate(names):
            for share in (0.0, 0.5, 1.0):
                place = folder / f"{order}-{number}-{share}-{begins_with is None}"
                place.mkdir()
                if begins_with is not None:
                    shutil.rmtree(place)
                    save_prompt(old, place)
                for done in names[:number]:
                    (place / done).write_bytes(contents[done])
                (place / name).write_bytes(contents[name][: int(share * len(contents[name]))])
                registry = memory_registry("tiny")
                LibraryWatcher(folder, tiny_llama, registry).scan([place.name])
                seen.add(hash_of(registry, place.name))
        assert seen <= allowed and None in seen and new.content_hash in seen


def test_a_prompt_is_a_value_that_readers_share(tiny_llama, folder):
    save_prompt(made_prompt(tiny_llama, 1), folder / "coach")
    registry = memory_registry("tiny")
    LibraryWatcher(folder, tiny_llama, registry).scan()
    prompt = registry.resolve("coach", ANYBODY).prompt
    assert isinstance(prompt, SoftPrompt) and registry.resolve("coach", Client("bob")).prompt is prompt
