"""Names stay inside the library; a corrupt entry is listed, not a crash."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt.base.model import Base
from softprompt.errors import AdapterError, ExistsError, StorageError, WrongBaseError
from softprompt.prompt import SoftPrompt
from softprompt.storage import Library, UnknownBaseWarning, load_prompt, resolve_prompt, save_prompt
from softprompt.storage.adapter import AdapterFiles

MakePrompt = Callable[..., SoftPrompt]
MakeBase = Callable[..., Base]
ALLOWED = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


@pytest.fixture
def library(tmp_path: Path, make_prompt: MakePrompt) -> Library:
    library = Library(tmp_path / "library")
    for seed, name in enumerate(("coach", "quotes")):
        library.add(name, make_prompt(seed=seed, base_name="tiny/llama"))
    return library


@given(st.from_regex(ALLOWED, fullmatch=True))
def test_every_allowed_name_is_a_direct_child(name: str) -> None:
    library = Library("/srv/library")
    assert library.place(name).parent == library.folder
    assert Path(os.path.normpath(library.place(name))).parent == library.folder


@given(st.text(max_size=80) | st.from_regex(rf"(\.\./|/|\\|~|\x00|\.)*{ALLOWED}(/\.\.|\n|/)*", fullmatch=True))
def test_any_text_is_a_direct_child_or_refused(name: str) -> None:
    library = Library("/srv/library")
    try:
        place = library.place(name)
    except StorageError:
        return
    assert Path(os.path.normpath(place)).parent == library.folder


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc", "a/b", "a\\b", ".hidden", "-x", "a\n", "a" * 65, "ü", "a b"]
)
def test_other_names_are_refused_everywhere(
    library: Library, make_prompt: MakePrompt, tmp_path: Path, name: str
) -> None:
    for action in (
        lambda: library.add(name, make_prompt()),
        lambda: library.path(name),
        lambda: library.remove(name),
        lambda: library.export(name, tmp_path / "out"),
        lambda: library.import_folder(library.path("coach"), name),
    ):
        with pytest.raises(StorageError, match="is not a prompt's name"):
            action()


def test_the_list_has_every_entry_with_its_description(library: Library, make_prompt: MakePrompt) -> None:
    coach, quotes = library.list()
    assert (coach.name, coach.num_virtual_tokens, coach.hidden_size, coach.base_name) == ("coach", 4, 16, "tiny/llama")
    assert coach.content_hash == make_prompt(seed=0).content_hash != quotes.content_hash
    assert str(coach.created).endswith("+00:00")
    assert coach.num_bytes == sum(file.stat().st_size for file in library.path("coach").iterdir())


def test_corrupt_entries_are_listed_with_their_problem(library: Library, tmp_path: Path) -> None:
    (library.path("coach") / "adapter_model.safetensors").write_bytes(b"torn")
    (library.folder / "notes").mkdir()
    (library.folder / "README.txt").write_text("a file is no entry")
    (library.folder / ".coach.0123.partial").mkdir()
    (library.folder / "bad name").mkdir()
    (library.folder / "away").symlink_to(tmp_path)
    (library.folder / "gone").symlink_to(library.folder / "absent")
    found = {entry.name: entry.problem for entry in library.list()}
    assert list(found) == ["away", "bad name", "coach", "gone", "notes", "quotes"]
    assert found["quotes"] is None
    for name, part in {"coach": "cut off", "notes": "not an adapter", "bad name": "not a prompt's name",
                       "away": "outside of the library", "gone": "no prompt 'gone'"}.items():  # fmt: skip
        assert part in str(found[name])
    assert {check.name: check.problem for check in library.check()} == found


def test_check_names_entries_that_do_not_fit_the_base(
    library: Library, base: Base, prompt: SoftPrompt, make_base: MakeBase
) -> None:
    library.add("mine", prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(check.problem is None for check in library.check(base))
        assert "was trained on" in str(dict(library.check(make_base(seed=9)))["mine"])
        assert all("[4, 16]" in str(check.problem) for check in library.check(make_base(hidden=32)))


def test_a_prompt_is_imported_exported_and_removed(library: Library, tmp_path: Path, make_prompt: MakePrompt) -> None:
    save_prompt(make_prompt(seed=7), tmp_path / "theirs")
    library.import_folder(tmp_path / "theirs", "new")
    with pytest.raises(ExistsError):
        library.import_folder(tmp_path / "theirs", "coach")
    library.import_folder(tmp_path / "theirs", "coach", overwrite=True)
    exported = library.export("coach", tmp_path / "out" / "coach")
    assert torch.equal(load_prompt(exported).tensor, make_prompt(seed=7).tensor)
    assert json.loads((exported / "adapter_config.json").read_text())["prompt_tuning_init"] == "RANDOM"
    with pytest.raises(ExistsError):
        library.export("quotes", exported)
    library.remove("coach")
    assert library.names() == ("new", "quotes")


def test_importing_what_is_refused_changes_nothing(library: Library, tmp_path: Path, prompt: SoftPrompt,
                                                   make_base: MakeBase) -> None:  # fmt: skip
    save_prompt(prompt, tmp_path / "theirs")
    with pytest.raises(WrongBaseError):
        library.import_folder(tmp_path / "theirs", "new", base=make_base(seed=9))
    (tmp_path / "theirs" / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError):
        library.import_folder(tmp_path / "theirs", "new")
    assert library.names() == ("coach", "quotes")


def test_pefts_text_start_and_bin_are_written_anew(library: Library, tmp_path: Path, make_prompt: MakePrompt) -> None:
    """PEFT would ask for a tokenizer to load a TEXT start."""
    folder = save_prompt(make_prompt(seed=7), tmp_path / "theirs")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "a/b"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"prompt_embeddings": make_prompt(seed=7).tensor}, folder / "adapter_model.bin")
    for name in ("adapter_model.safetensors", "softprompt.json"):
        (folder / name).unlink()
    place = library.import_folder(folder, "text")
    assert json.loads((place / "adapter_config.json").read_text())["prompt_tuning_init"] == "RANDOM"
    assert sorted(os.listdir(place)) == sorted(os.listdir(library.path("coach")))


def test_an_import_checks_the_base_and_invents_no_fingerprint(
    library: Library, tmp_path: Path, make_prompt: MakePrompt, base: Base
) -> None:
    save_prompt(make_prompt(seed=7), tmp_path / "theirs")
    with pytest.warns(UnknownBaseWarning):
        library.import_folder(tmp_path / "theirs", "new", base=base)
    assert library.load("new").record.base_fingerprint is None


def test_a_folder_that_is_no_adapter_is_not_removed(library: Library, tmp_path: Path) -> None:
    (library.folder / "notes").mkdir()
    (library.folder / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match="neither an adapter nor a run"):
        library.remove("notes")
    assert (library.folder / "notes" / "thesis.txt").exists()
    (tmp_path / "precious").mkdir()
    (library.folder / "link").symlink_to(tmp_path / "precious")
    library.remove("link")
    assert (tmp_path / "precious").is_dir()
    assert not (library.folder / "link").is_symlink()


def test_a_missing_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no library at"):
        Library(tmp_path / "absent").list()


class TestResolve:
    def test_a_separator_makes_it_a_path(self, library: Library) -> None:
        assert resolve_prompt(f"{library.folder}/coach") == library.folder / "coach"
        assert resolve_prompt("coach", library) == resolve_prompt("coach", str(library.folder)) == library.path("coach")
        with pytest.raises(StorageError, match=r"no folder \./absent"):
            resolve_prompt("./absent", library)

    def test_an_unknown_name_comes_with_the_nearest(self, library: Library) -> None:
        with pytest.raises(StorageError, match=r"no prompt 'coahc' in the library .* did you mean 'coach'"):
            resolve_prompt("coahc", library)
        with pytest.raises(StorageError, match="it has coach, quotes"):
            resolve_prompt("zzz", library)

    def test_a_folder_here_needs_a_separator(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Library
    ) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path)
        for shelf in (None, library):
            with pytest.raises(StorageError, match=r"if you mean the folder here, write \./here"):
                resolve_prompt("here", shelf)
        with pytest.raises(StorageError, match="no library is given"):
            resolve_prompt("absent")
        with pytest.raises(StorageError, match="not a prompt's name"):
            resolve_prompt("..", library)


def with_bad_entries(library: Library, make_prompt: MakePrompt) -> list[str]:
    """What was in the library; five entries of other people's making have joined it."""
    sound = [entry.name for entry in library.list()]
    for name in ("half", "deep", "deep-config", "huge-number"):
        library.add(name, make_prompt())
    half = library.folder / "half" / "softprompt.json"
    half.write_text(json.dumps({**json.loads(half.read_text()), "base_name": "\ud800"}))
    deep = library.folder / "deep" / "softprompt.json"
    deep.write_text(deep.read_text().rstrip()[:-1] + ', "run": ' + '{"a":' * 800 + "1" + "}" * 801)
    config = library.folder / "deep-config" / "adapter_config.json"
    config.write_text(config.read_text().rstrip()[:-1] + ', "x": ' + "[" * 5_000 + "]" * 5_000 + "}")
    number = library.folder / "huge-number" / "softprompt.json"
    number.write_text(number.read_text().rstrip()[:-1] + f', "parent": {"9" * 5_000}}}')
    shutil.copytree(library.folder / sound[0], os.fsdecode(os.fsencode(library.folder) + b"/caf\xe9"))
    return sound


def test_bad_entries_are_named_and_hide_no_others(library: Library, make_prompt: MakePrompt) -> None:
    sound = with_bad_entries(library, make_prompt)
    problems = {entry.name: entry.problem for entry in library.list()}
    assert problems == {check.name: check.problem for check in library.check()}
    assert {name for name, problem in problems.items() if problem is None} == set(sound)
    assert "holds half a character" in str(problems["half"])
    assert "softprompt.json is nested deeper than 100 levels" in str(problems["deep"])
    assert "adapter_config.json is n" in str(problems["deep-config"])  # no JSON to some Pythons, too deep to others
    assert "softprompt.json is not valid JSON" in str(problems["huge-number"])
    assert "is not a prompt's name" in str(problems["caf\udce9"])


def test_an_entry_that_cannot_be_read_hides_no_others(
    library: Library, make_prompt: MakePrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = {entry.name for entry in library.list()}
    library.add("odd", make_prompt())

    read = AdapterFiles.read

    def read_or_fail(folder: Path) -> AdapterFiles:
        if folder.name == "odd":
            raise RecursionError
        return read(folder)

    monkeypatch.setattr(AdapterFiles, "read", read_or_fail)
    problems = {entry.name: entry.problem for entry in library.list()}
    assert problems.pop("odd") == "it cannot be read (it is nested too deeply)"
    assert problems == dict.fromkeys(sound)
