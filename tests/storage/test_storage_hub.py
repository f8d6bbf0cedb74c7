"""Push and pull against a small Hub of our own (`hub_double`); the real one was never asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from support.hub_double import TOKEN, HubState, hub_double

from softprompt.base.model import Base
from softprompt.errors import AdapterError, ExistsError, StorageError, WrongBaseError
from softprompt.prompt import SoftPrompt
from softprompt.storage import Library, load_prompt, pull_prompt, push_prompt, save_prompt
from softprompt.storage.files import ADAPTER_FILES, MAX_TEXT_BYTES
from softprompt.types import InputForm

MakePrompt = Callable[..., SoftPrompt]
# huggingface_hub 2.4 uploads LFS files through an argument that its HTTP library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubState]:
    with hub_double(tmp_path, monkeypatch) as state:
        yield state


@pytest.fixture
def saved(tmp_path: Path, prompt: SoftPrompt) -> Path:
    return save_prompt(prompt, tmp_path / "saved")


def test_a_pushed_prompt_is_pulled_unchanged(
    hub: HubState, saved: Path, tmp_path: Path, prompt: SoftPrompt, base: Base
) -> None:
    url = push_prompt(saved, "me/coach", private=True, token=TOKEN)
    assert url.startswith("http://127.0.0.1")
    assert "/me/coach/commit/" in url
    assert hub.private == {"me/coach"}
    assert sorted(hub.files["me/coach", "main"]) == [".gitattributes", *sorted(ADAPTER_FILES)]
    place = pull_prompt("me/coach", Library(tmp_path / "library").place("coach"), token=TOKEN, base=base)
    loaded = load_prompt(place, base)
    assert torch.equal(loaded.tensor, prompt.tensor)
    assert (loaded.record.form, loaded.record.parent) == (prompt.record.form, prompt.record.parent)
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (place / name).read_bytes() == (saved / name).read_bytes()
    assert not any(path.is_symlink() for path in place.iterdir())


def test_a_pushed_head_is_pulled_unchanged(hub: HubState, tmp_path: Path, prompt: SoftPrompt, base: Base) -> None:
    form = InputForm(task="classify", labels=("bad", "good"), pooling="last")
    head = {"score.weight": torch.randn(2, 16, generator=torch.Generator().manual_seed(0))}
    headed = SoftPrompt(prompt.tensor, replace(prompt.record, form=form, base_kind="causal"), head)
    push_prompt(save_prompt(headed, tmp_path / "saved", base=base), "me/critic", token=TOKEN)
    pulled = load_prompt(pull_prompt("me/critic", tmp_path / "pulled", token=TOKEN, base=base), base)
    assert pulled.content_hash == headed.content_hash
    assert (pulled.record.form, list(pulled.head)) == (form, ["score.weight"])


def test_a_published_record_has_no_path_and_no_text(
    hub: HubState, tmp_path: Path, make_prompt: Callable[..., SoftPrompt]
) -> None:
    run = {"epochs": 6, "losses": [2.5, 1.5], "source": "/home/me/rows.csv", "data": {"folder": "/home/me", "rows": 5},
           "notes": ["a sentence of the data"], "versions": {"torch": "2.13.0+cpu"}, "first": "Life is"}  # fmt: skip
    push_prompt(save_prompt(make_prompt(run=run), tmp_path / "x"), "me/coach", token=TOKEN)
    published = json.loads(hub.files["me/coach", "main"]["softprompt.json"])
    assert published["run"] == {"epochs": 6, "losses": [2.5, 1.5], "data": {"rows": 5}, "notes": [],
                                "versions": {"torch": "2.13.0+cpu"}}  # fmt: skip
    assert load_prompt(tmp_path / "x").record.run == run
    whole = b"".join(hub.files["me/coach", "main"].values())
    assert b"/home/me" not in whole
    assert b"sentence" not in whole


def test_the_path_of_a_local_base_is_not_published(hub: HubState, tmp_path: Path, make_prompt: MakePrompt) -> None:
    push_prompt(
        save_prompt(make_prompt(base_name="llama", base_source="/home/me/llama"), tmp_path / "x"),
        "me/coach",
        token=TOKEN,
    )
    pulled = pull_prompt("me/coach", tmp_path / "y", token=TOKEN)
    assert not any(b"/home/me" in (pulled / name).read_bytes() for name in ADAPTER_FILES)
    assert load_prompt(pulled).record.base_name == "llama"
    assert "load_base('llama')" in (pulled / "README.md").read_text()


@pytest.mark.medium
def test_a_prompt_is_pushed_again_and_to_a_branch(
    hub: HubState, saved: Path, tmp_path: Path, make_prompt: MakePrompt
) -> None:
    push_prompt(saved, "me/coach", token=TOKEN)
    save_prompt(make_prompt(seed=8), saved, overwrite=True)
    push_prompt(saved, "me/coach", token=TOKEN, revision="next")
    main, following = (hub.files["me/coach", name]["softprompt.json"] for name in ("main", "next"))
    assert main != following
    pulled = pull_prompt("me/coach", tmp_path / "next", revision="next")
    assert torch.equal(load_prompt(pulled).tensor, make_prompt(seed=8).tensor)


def test_only_an_adapters_files_are_fetched_and_safetensors_preferred(
    hub: HubState, saved: Path, tmp_path: Path
) -> None:
    push_prompt(saved, "me/coach", token=TOKEN)
    hub.files["me/coach", "main"] |= {"adapter_model.bin": b"pickle", "train.py": b"import os", "optimizer.pt": b"x"}
    hub.requests.clear()
    place = pull_prompt("me/coach", tmp_path / "pulled")
    assert sorted(path.name for path in place.iterdir()) == sorted(ADAPTER_FILES)
    fetched = {line.rpartition("/")[2] for line in hub.requests if line.startswith("GET") and "/resolve/" in line}
    assert fetched == set(ADAPTER_FILES)


def test_an_older_bin_is_fetched_where_there_is_nothing_else(
    hub: HubState, saved: Path, tmp_path: Path, prompt: SoftPrompt
) -> None:
    torch.save({"prompt_embeddings": prompt.tensor}, tmp_path / "w.bin")
    config = (saved / "adapter_config.json").read_bytes()
    hub.files["me/old", "main"] = {
        "adapter_config.json": config,
        "adapter_model.bin": (tmp_path / "w.bin").read_bytes(),
    }
    place = pull_prompt("me/old", tmp_path / "pulled")
    assert torch.equal(load_prompt(place).tensor, prompt.tensor)
    with pytest.raises(StorageError, match="import it into a library and push that"):
        push_prompt(place, "me/again", token=TOKEN)


def test_a_pulled_prompt_is_available_offline(hub: HubState, saved: Path, tmp_path: Path, prompt: SoftPrompt) -> None:
    push_prompt(saved, "me/coach", token=TOKEN)
    with pytest.raises(StorageError, match="me/coach is not in the local cache; pull it once without offline"):
        pull_prompt("me/coach", tmp_path / "early", offline=True)
    pull_prompt("me/coach", tmp_path / "online")
    hub.requests.clear()
    place = pull_prompt("me/coach", tmp_path / "offline", offline=True)
    assert torch.equal(load_prompt(place).tensor, prompt.tensor)
    assert hub.requests == []


def test_what_is_pulled_is_checked_before_it_is_kept(
    hub: HubState, saved: Path, tmp_path: Path, make_base: Callable[..., Base]
) -> None:
    push_prompt(saved, "me/coach", token=TOKEN)
    with pytest.raises(WrongBaseError, match="me/coach on the Hub was trained on 'tiny/llama'"):
        pull_prompt("me/coach", tmp_path / "pulled", base=make_base(seed=9))
    with pytest.raises(ExistsError):
        pull_prompt("me/coach", saved)
    hub.files["me/coach", "main"]["adapter_config.json"] = b'{"peft_type": "LORA"}'
    with pytest.raises(AdapterError, match=r"me/coach on the Hub/adapter_config\.json has the peft_type 'LORA'"):
        pull_prompt("me/coach", tmp_path / "pulled")
    hub.files["me/coach", "main"]["adapter_config.json"] = b" " * (MAX_TEXT_BYTES + 1)
    hub.requests.clear()
    with pytest.raises(StorageError, match="the limit is 1,048,576: not fetched"):
        pull_prompt("me/coach", tmp_path / "pulled")
    assert not [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert not (tmp_path / "pulled").exists()


def test_a_broken_folder_is_not_pushed(hub: HubState, saved: Path) -> None:
    (saved / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterError, match="cut off"):
        push_prompt(saved, "me/coach", token=TOKEN)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo", "settings", "message"),
    [
        ("me/absent", {"token": TOKEN}, "no repository me/absent on the Hub, or it is private"),
        ("me/secret", {}, "no repository me/secret on the Hub, or it is private"),
        ("me/gated", {}, "me/gated is gated; accept its terms"),
        ("me/coach", {"revision": "absent"}, "me/coach has no such revision"),
        ("me/empty", {}, r"me/empty on the Hub has no adapter_model\.safetensors"),
        ("not a name", {}, "'not a name' is not a repository's name; write it as owner/name"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: HubState, tmp_path: Path, repo: str, settings: dict[str, str], message: str
) -> None:
    hub.files |= {("me/secret", "main"): {}, ("me/coach", "main"): {}, ("me/empty", "main"): {"README.md": b"x"}}
    hub.private.add("me/secret")
    with pytest.raises(StorageError, match=message) as caught:
        pull_prompt(repo, tmp_path / "pulled", **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pulled").exists()


def test_a_push_without_the_right_token_is_refused(hub: HubState, saved: Path) -> None:
    for token in (None, "hf_wrong"):
        with pytest.raises(StorageError, match=r"does not allow this for me/coach \(HTTP 401\); log in"):
            push_prompt(saved, "me/coach", token=token)
    with pytest.raises(StorageError, match="is not a repository's name"):
        push_prompt(saved, "a/b/c", token=TOKEN)


@pytest.mark.medium
def test_an_unreachable_hub_is_one_sentence(
    hub: HubState, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_prompt(saved, "me/coach", token=TOKEN)
    pull_prompt("me/coach", tmp_path / "online")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = "the Hub cannot be reached for me/coach .*check the network, or pull with offline"
    with pytest.raises(StorageError, match=message):
        pull_prompt("me/coach", tmp_path / "pulled")
    with pytest.raises(StorageError, match="the Hub cannot be reached for me/coach"):
        push_prompt(saved, "me/coach", token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(StorageError, match="HF_HUB_OFFLINE is set"):
        pull_prompt("me/coach", tmp_path / "pulled")
