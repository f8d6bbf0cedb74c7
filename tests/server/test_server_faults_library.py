"""Whatever lies in the library or was spoiled among the kept prompts: it is set aside and named, the rest serves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fault_work import Place
from support.job_server import job_server
from support.prompt_server import as_upload, eventually, made_prompt
from test_server_prompts_hostile import changed, record_with, weights_that_mean_harm

from softprompt.base import Base
from softprompt.storage import save_prompt
from softprompt.storage.files import CONFIG_NAME, PICKLE_NAME, RECORD_NAME, SAFETENSORS_NAME

GOOD = ("coach", "quotes")


@pytest.fixture
def library(tiny_llama: Base, tiny_gpt2: Base, tmp_path: Path) -> Iterator[Path]:
    """Two sound prompts among thirty-odd that are not."""
    place = tmp_path / "library"
    for number, name in enumerate(GOOD):
        save_prompt(made_prompt(tiny_llama, number), place / name)
    for kind, weights in weights_that_mean_harm(tiny_llama).items():
        _write(place / f"bad-weights-{_named(kind)}", {**changed(tiny_llama), SAFETENSORS_NAME: weights})
    _write(place / "bad-config", {**changed(tiny_llama), CONFIG_NAME: b"{" * 10_000})
    _write(place / "bad-record", {**changed(tiny_llama), RECORD_NAME: record_with(tiny_llama, form={"kind": "evil"})})
    _write(place / "bad-bin", {CONFIG_NAME: changed(tiny_llama)[CONFIG_NAME], PICKLE_NAME: b"\x80\x04cos\nsystem\n."})
    save_prompt(made_prompt(tiny_gpt2, 1), place / "bad-base")
    _spoil(tiny_llama, place, tmp_path)
    yield place
    os.chmod(place / "bad-rights" / SAFETENSORS_NAME, 0o600)


def _spoil(base: Base, place: Path, elsewhere: Path) -> None:
    """What is wrong with the folder itself."""
    (place / "bad-empty").mkdir()
    save_prompt(made_prompt(base, 5), elsewhere / "outside")
    (place / "bad-link").symlink_to(elsewhere / "outside")
    (place / "bad-loop").symlink_to("bad-loop")
    for name in ("bad-rights", "bad-pipe", "bad-folder", "bad-hole"):
        save_prompt(made_prompt(base, 6), place / name)
    os.chmod(place / "bad-rights" / SAFETENSORS_NAME, 0)
    for name in ("bad-pipe", "bad-folder", "bad-hole"):
        (place / name / SAFETENSORS_NAME).unlink()
    os.mkfifo(place / "bad-pipe" / SAFETENSORS_NAME)
    (place / "bad-folder" / SAFETENSORS_NAME).mkdir()
    with open(place / "bad-hole" / SAFETENSORS_NAME, "wb") as file:
        file.truncate(2**40)  # a file that says to be a TiB
    save_prompt(made_prompt(base, 7), place / "bad name")


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _named(kind: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in kind)


def _bad(library: Path) -> set[str]:
    """Folders that cannot be served; root may read what has no rights."""
    names = {path.name for path in library.iterdir() if path.name.startswith("bad")}
    return names - {"bad-rights"} if os.geteuid() == 0 else names


def test_broken_library_folders_are_skipped_and_the_others_served(
    tiny_llama: Base, library: Path, tmp_path: Path
) -> None:
    with job_server(tiny_llama, tmp_path / "state", library=str(library)) as (client, _):
        at = Place.at(str(client.base_url).removesuffix("/v1/"))
        answers = {name: at.answer(name) for name in GOOD}
        listed = at.asked("GET", "/v1/prompts")
        problems = {each["name"]: each["problem"] for each in listed["problems"]}
        assert set(problems) == _bad(library)
        assert all("Traceback" not in each and len(each) < 400 for each in problems.values()), problems
        assert _bad(library).isdisjoint(each["id"] for each in listed["data"])
        for name in _bad(library):
            asked = {"model": name, "prompt": "w3", "max_tokens": 2}
            assert at.http.post("/v1/completions", json=asked).status_code == 404
        # one that was sound is spoiled while it is served, and mended again
        weights = library / "coach" / SAFETENSORS_NAME
        sound = weights.read_bytes()
        weights.write_bytes(sound[:-20] + b"\xff" * 20)
        eventually(lambda: "coach" in {each["name"] for each in at.asked("GET", "/v1/prompts")["problems"]})
        assert at.answer("quotes") == answers["quotes"]
        weights.write_bytes(sound)
        eventually(lambda: "coach" in at.prompts_that_serve())
        assert at.answer("coach") == answers["coach"] != answers["quotes"]
        at.close()


@pytest.mark.medium
def test_a_damaged_stored_prompt_is_left_out_at_the_start(tiny_llama: Base, tmp_path: Path) -> None:
    state = tmp_path / "state"
    names = ("sound", "cut", "gone", "flipped")
    with job_server(tiny_llama, state) as (client, _):
        at = Place.at(str(client.base_url).removesuffix("/v1/"))
        for number, name in enumerate(names):
            at.asked("POST", "/v1/prompts", data={"name": name}, files=as_upload(made_prompt(tiny_llama, number)))
        answer = at.answer("sound")
        at.close()
    folders = {_content_hash(path): path for path in (state / "prompts").iterdir()}
    cut, gone, flipped = (folders[made_prompt(tiny_llama, number).content_hash] for number in (1, 2, 3))
    (cut / SAFETENSORS_NAME).write_bytes((cut / SAFETENSORS_NAME).read_bytes()[:-1])
    shutil.rmtree(gone)
    data = bytearray((flipped / SAFETENSORS_NAME).read_bytes())
    data[-3] ^= 1
    (flipped / SAFETENSORS_NAME).write_bytes(data)
    with job_server(tiny_llama, state) as (client, _):
        at = Place.at(str(client.base_url).removesuffix("/v1/"))
        listed = at.asked("GET", "/v1/prompts")
        assert {each["name"] for each in listed["problems"]} == set(names[1:])
        assert [each["id"] for each in listed["data"]] == ["sound"] and at.answer("sound") == answer
        for number, name in enumerate(names[1:]):  # and their names can be used again
            at.asked("POST", "/v1/prompts", data={"name": name}, files=as_upload(made_prompt(tiny_llama, number)))
        assert not at.asked("GET", "/v1/prompts")["problems"]
        at.close()


def _content_hash(folder: Path) -> str:
    return str(json.loads((folder / RECORD_NAME).read_text())["content_hash"])
