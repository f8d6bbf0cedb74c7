"""What a name means, for whom; what outlives the process; and that a look-up waits for nobody."""

import random
import threading
import time
from collections import Counter

import pytest
from support.prompt_server import MemoryRepository, made_prompt, memory_registry

from softprompt.errors import StorageError
from softprompt.server.clients.keys import OPERATOR, Client
from softprompt.server.errors import ApiError
from softprompt.server.prompts.model import Alias, Model, Target, by_share
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.prompts.repository import PromptRepository
from softprompt.server.state.database import Database

ANN, BOB = Client("ann", "ann", is_admin=False), Client("bob", "bob", is_admin=False)
LOCAL = Client()


def private(name, owner, prompt=None, **more):
    return Model(id=name, prompt=prompt, owner=owner, source="upload", is_shared=False, **more)


def status_of(work, *args, **more):
    with pytest.raises(ApiError) as caught:
        work(*args, **more)
    return caught.value.status


@pytest.fixture
def registry():
    return memory_registry("org/tiny")


@pytest.fixture
def kept(tiny_llama, tmp_path):
    """Makes registries over one state folder, as a server does that starts again."""
    databases = []

    def make():
        databases.append(Database.in_folder(tmp_path))
        made = PromptRegistry("tiny", PromptRepository(tmp_path, databases[-1], tiny_llama))
        made.load()
        return made

    yield make
    for database in databases:
        database.close()


def test_the_base_has_two_names_that_nobody_else_may_have(registry):
    assert registry.resolve("base", ANN) is registry.resolve("org/tiny", ANN) is registry.base
    for name in ("base", "org/tiny"):
        assert status_of(registry.publish, private(name, "ann")) == 409
        assert status_of(registry.put_alias, Alias(name=name, targets=(Target("base"),), owner="ann")) == 409


def test_own_prompts_come_first_then_own_aliases_then_shared_ones(registry):
    registry.publish(Model(id="coach"))
    registry.publish(Model(id="other"))
    assert registry.resolve("coach", ANN).owner == OPERATOR
    registry.put_alias(Alias(name="coach", targets=(Target("other"),), owner="ann"))
    assert registry.resolve("coach", ANN).id == "other" and registry.resolve("coach", BOB).id == "coach"
    registry.publish(private("coach", "bob"))
    assert registry.resolve("coach", BOB).owner == "bob"
    assert {(model.id, model.owner) for model in registry.models(BOB)} == {
        ("org/tiny", OPERATOR), ("coach", "bob"), ("other", OPERATOR)
    }  # fmt: skip


def test_a_private_name_of_another_client_is_refused_like_an_unknown_one(registry):
    registry.publish(private("coach", "ann"))
    registry.publish(private("mine", "bob"))

    def error_of(name, client):
        with pytest.raises(ApiError) as caught:
            registry.resolve(name, client)
        assert caught.value.status == 404 and caught.value.code == "model_not_found"
        return caught.value.message

    assert error_of("coach", BOB).replace("'coach'", "'roach'") == error_of("roach", BOB)
    assert "mine" in error_of("mime", BOB) and "mine" not in error_of("mime", ANN)
    assert "'coach'" in error_of("coahc", ANN)
    assert len(error_of("x" * 10_000_000, ANN)) < 200


def test_two_owners_cannot_share_one_name(registry):
    registry.publish(Model(id="coach", owner="ann", source="upload"))
    assert registry.resolve("coach", BOB).owner == "ann"
    assert status_of(registry.publish, Model(id="coach", owner="bob", source="upload")) == 409
    shared = Alias(name="coach", targets=(Target("base"),), owner="bob", is_shared=True)
    assert status_of(registry.put_alias, shared) == 409
    registry.withdraw("coach", "ann")
    registry.put_alias(shared)
    assert status_of(registry.publish, Model(id="coach", owner="ann", source="upload")) == 409
    assert registry.resolve("coach", ANN) == Model(id="org/tiny", source="base", alias="coach",
                                                    created=registry.base.created)  # fmt: skip


def test_an_alias_points_to_prompts_that_its_owner_sees(registry):
    registry.publish(private("coach-v3", "ann"))

    def point(name, *targets, owner="ann"):
        registry.put_alias(Alias(name=name, targets=tuple(map(Target, targets)), owner=owner))

    point("coach", "coach-v3")
    found = registry.resolve("coach", ANN)
    assert (found.id, found.alias, found.owner) == ("coach-v3", "coach", "ann")
    assert status_of(point, "coach-v3", "base") == 409  # would hide a prompt
    assert status_of(point, "again", "coach") == 400  # an alias of an alias
    assert status_of(point, "again", "nobody") == 404
    assert status_of(point, "mine", "coach-v3", owner="bob") == 404
    assert status_of(registry.publish, private("coach", "ann")) == 409
    assert status_of(registry.delete, registry.find("coach-v3", ANN)) == 409
    assert status_of(registry.change, registry.find("coach-v3", ANN), name="coach-v4") == 409
    assert status_of(registry.remove_alias, "coach", "bob") == 404
    registry.remove_alias("coach", "ann")
    assert status_of(registry.resolve, "coach", ANN) == 404


def test_a_shared_alias_means_what_its_owner_sees(registry):
    registry.publish(private("coach-v3", "admin"))
    registry.publish(private("coach-v3", "bob"))
    registry.put_alias(Alias(name="coach", targets=(Target("coach-v3"),), owner="admin", is_shared=True))
    assert registry.resolve("coach", BOB).owner == registry.resolve("coach", ANN).owner == "admin"
    registry.withdraw("coach-v3", "admin")
    assert status_of(registry.resolve, "coach", BOB) == 404


def test_an_aliass_shares_hold_and_each_user_keeps_one_target(registry):
    for name in ("v3", "v4"):
        registry.publish(Model(id=name))

    def share(first, second):
        registry.put_alias(Alias(name="coach", targets=(Target("v3", first), Target("v4", second)), is_shared=True))

    share(9.0, 1.0)
    random.seed(3)
    drawn = Counter(registry.resolve("coach", LOCAL).id for _ in range(10_000))
    assert abs(drawn["v4"] - 1_000) < 150  # five standard deviations
    users = [f"user-{number}" for number in range(2_000)]
    first = [registry.resolve("coach", ANN, user).id for user in users]
    assert first == [registry.resolve("coach", BOB, user).id for user in users]
    assert abs(first.count("v4") - 200) < 70
    share(8.0, 2.0)  # of the users only those move that have to
    second = [registry.resolve("coach", ANN, user).id for user in users]
    assert all(now == "v4" for before, now in zip(first, second, strict=True) if before == "v4")
    registry.withdraw("v4", OPERATOR)  # what is not there has no share
    assert {registry.resolve("coach", ANN, user).id for user in users} == {"v3"}


def test_rounding_of_shares_falls_to_the_last_target():
    models = [(Model(id=str(number)), 0.1) for number in range(10)]
    assert by_share(models, 1 - 2**-53).id == "9" and by_share(models, 0.0).id == "0"


def test_kept_prompts_and_aliases_are_served_after_a_restart(kept, tiny_llama, tmp_path):
    registry = kept()
    prompt = made_prompt(tiny_llama, 1)
    registry.keep(prompt, name="ft:tiny:a:1", owner="ann", source="job", job="ftjob-1")
    registry.keep(made_prompt(tiny_llama, 2), name="b", owner="bob", source="upload", is_shared=True)
    registry.change(registry.find("b", BOB), is_pinned=True)
    registry.put_alias(Alias(name="c", targets=(Target("b", 1.0), Target("base", 3.0)), owner="bob"))
    registry.keep(made_prompt(tiny_llama, 3), name="gone", owner="bob", source="upload")
    registry.forget("gone", "bob")
    again = kept()
    for before in (registry.find("ft:tiny:a:1", ANN), registry.find("b", ANN)):
        after = again.find(before.id, ANN)
        assert after.prompt.content_hash == before.prompt.content_hash
        assert (after.owner, after.source, after.job, after.is_shared, after.is_pinned, after.created) == (
            before.owner, before.source, before.job, before.is_shared, before.is_pinned, before.created
        )  # fmt: skip
    assert [model.id for model in again.pinned()] == ["b"]
    assert again.aliases(BOB) == registry.aliases(BOB) and not again.aliases(ANN)
    assert status_of(again.resolve, "gone", BOB) == 404
    assert len(list((tmp_path / "prompts").iterdir())) == 2


def test_a_job_that_keeps_its_prompt_twice_has_it_once(kept, tiny_llama, tmp_path):
    registry = kept()
    registry.keep(made_prompt(tiny_llama, 1), name="a", owner="ann", source="job")
    registry.change(registry.find("a", ANN), is_pinned=True)
    new = registry.keep(made_prompt(tiny_llama, 2), name="a", owner="ann", source="job")
    assert new.is_pinned and kept().find("a", ANN).prompt.content_hash == made_prompt(tiny_llama, 2).content_hash
    assert len(list((tmp_path / "prompts").iterdir())) == 1
    keep = registry.keep
    assert status_of(keep, made_prompt(tiny_llama, 3), name="a", owner="ann", source="job", overwrite=False) == 409
    assert status_of(keep, made_prompt(tiny_llama, 3), name="base", owner="ann", source="job") == 409
    assert len(list((tmp_path / "prompts").iterdir())) == 1


def test_a_renamed_and_shared_prompt_stays_so_after_a_restart(kept, tiny_llama):
    registry = kept()
    registry.keep(made_prompt(tiny_llama, 1), name="a", owner="ann", source="upload")
    registry.change(registry.find("a", ANN), name="b", is_shared=True)
    for each in (registry, kept()):
        assert each.find("b", BOB).owner == "ann" and status_of(each.find, "a", ANN) == 404
    registry.change(registry.find("b", ANN), is_shared=False)
    for each in (registry, kept()):
        assert status_of(each.find, "b", BOB) == 404


def test_a_prompt_that_cannot_be_written_is_not_served(kept, tiny_llama, tmp_path, monkeypatch):
    registry = kept()
    registry.keep(made_prompt(tiny_llama, 1), name="a", owner="ann", source="upload")
    before = registry.find("a", ANN)

    def full(*_):
        raise StorageError("no space left")

    monkeypatch.setattr(PromptRepository, "add", full)
    for name in ("a", "b"):
        with pytest.raises(StorageError):
            registry.keep(made_prompt(tiny_llama, 2), name=name, owner="ann", source="upload")
    assert registry.find("a", ANN) is before and status_of(registry.find, "b", ANN) == 404
    assert len(list((tmp_path / "prompts").iterdir())) == 1


@pytest.mark.parametrize("spoil", ["cut", "other", "gone"])
def test_a_broken_kept_prompt_is_named_and_the_others_are_served(kept, tiny_llama, tiny_gpt2, tmp_path, spoil):
    registry = kept()
    registry.keep(made_prompt(tiny_llama, 1), name="good", owner="ann", source="upload")
    (sound,) = (tmp_path / "prompts").iterdir()
    prompt = made_prompt(tiny_gpt2 if spoil == "other" else tiny_llama, 2)
    registry.keep(prompt, name="bad", owner="ann", source="upload")
    (folder,) = set((tmp_path / "prompts").iterdir()) - {sound}
    weights = folder / "adapter_model.safetensors"
    if spoil == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif spoil == "gone":
        weights.unlink()
    again = kept()
    assert again.find("good", ANN) and status_of(again.find, "bad", ANN) == 404
    assert list(again.problems) == ["bad"]
    again.keep(made_prompt(tiny_llama, 3), name="bad", owner="ann", source="upload")
    assert not again.problems and not folder.exists()


def test_temporary_folders_of_a_killed_process_are_deleted(kept, tmp_path):
    left = tmp_path / "prompts" / ".prompt-1.abc.partial"
    left.mkdir(parents=True)
    (left / "adapter_config.json").write_bytes(b"{")
    kept()
    assert not left.exists()


def test_a_prompts_folder_outside_of_the_state_is_refused(kept, tiny_llama, tmp_path):
    registry = kept()
    registry.keep(made_prompt(tiny_llama, 1), name="a", owner="ann", source="upload")
    (folder,) = (tmp_path / "prompts").iterdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    assert "a" in kept().problems


def test_a_look_up_does_not_wait_for_a_change_that_is_being_written():
    is_writing, may_end = threading.Event(), threading.Event()

    class SlowRepository(MemoryRepository):
        def put_alias(self, alias):
            is_writing.set()
            assert may_end.wait(10)

    registry = PromptRegistry("tiny", SlowRepository())
    registry.publish(Model(id="a"))
    writer = threading.Thread(target=registry.put_alias, args=(Alias(name="b", targets=(Target("a"),)),))
    writer.start()
    try:
        assert is_writing.wait(10)
        assert registry.resolve("a", ANN).id == "a" and len(registry.models(ANN)) == 2
        assert status_of(registry.resolve, "b", LOCAL) == 404
    finally:
        may_end.set()
        writer.join()
    assert registry.resolve("b", LOCAL).id == "a"


def test_ten_thousand_prompts_are_published_and_found_quickly(registry):
    began = time.perf_counter()
    for number in range(10_000):
        registry.publish(Model(id=f"p{number}"))
    put_s = time.perf_counter() - began
    began = time.perf_counter()
    assert all(registry.resolve(f"p{number}", ANN).id == f"p{number}" for number in range(10_000))
    found_s = time.perf_counter() - began
    began = time.perf_counter()
    for number in range(20):
        assert status_of(registry.resolve, f"q{number}", ANN) == 404
    missed_s = (time.perf_counter() - began) / 20
    assert put_s < 2 and found_s < 1 and missed_s < 0.2, (put_s, found_s, missed_s)


def test_readers_see_each_name_whole_while_names_change(registry):
    """A renamed prompt is always there under one of its names, an alias always means one of its two targets."""
    for name in ("v1", "v2", "moving-0"):
        registry.publish(private(name, "ann"))
    registry.put_alias(Alias(name="now", targets=(Target("v1"),), owner="ann"))
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            if registry.resolve("now", ANN).id not in ("v1", "v2"):
                wrong.append("alias")
            if not any(model.id.startswith("moving") for model in registry.models(ANN)):
                wrong.append("gone")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(300):
            registry.put_alias(Alias(name="now", targets=(Target(f"v{number % 2 + 1}"),), owner="ann"))
            registry.change(registry.find(f"moving-{number}", ANN), name=f"moving-{number + 1}")
    finally:
        stop.set()
        reader.join()
    assert not wrong
