"""A GGUF file wherever a base is given: train, resume, show, generate, the files of settings; refusals end in 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.command_line import run, succeed
from support.gguf_files import cut, write_gguf

from softprompt import load_base, load_prompt
from softprompt.cli.serve_settings import read_settings
from softprompt.cli.sweep_file import read_sweep
from softprompt.splice import Row, concatenate

QUICK = ("--virtual-tokens", 3, "--epochs", 2, "--dtype", "float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf-cli")
    write_gguf(folder / "tiny.gguf")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"in the {i}th inner thing"}) + "\n" for i in range(6))
    )
    return folder


@pytest.fixture(scope="module")
def adapter(place: Path) -> Path:
    flags = ("--base", "tiny.gguf", "--data", "rows.jsonl", "--text-column", "text", "--out", "prompts/own")
    succeed("train", *flags, *QUICK, cwd=place)
    return place / "prompts" / "own"


def test_the_adapter_records_a_path_that_loads_from_anywhere(place: Path, adapter: Path) -> None:
    file = str(place / "tiny.gguf")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == file
    assert f"base = load_base({file!r})" in (adapter / "README.md").read_text()
    succeed("prompts", "show", "own", "--library", place / "prompts", "--base", file)
    assert succeed("generate", "--base", file, "--prompt", adapter, "in the", "--max-new-tokens", 3).out


def test_its_run_is_listed_and_goes_on_where_it_stopped(place: Path, adapter: Path) -> None:
    assert "tiny.gguf" in succeed("runs", "list", place / "prompts").out
    before = (adapter / "adapter_model.safetensors").read_bytes()
    succeed("train", "--resume", "--out", adapter)
    assert (adapter / "adapter_model.safetensors").read_bytes() == before


def test_peft_computes_the_same_logits_on_the_plain_model(place: Path, adapter: Path) -> None:
    base = load_base(str(place / "tiny.gguf"), dtype="float32", device="cpu")
    ids = base.encode("in the inner thing")
    spliced = concatenate(base, [Row(ids, 0)], [load_prompt(adapter, base).tensor])
    with torch.no_grad():
        ours = base.model(inputs_embeds=spliced.embeds_BSH).logits[0, -len(ids) :]
        peft = PeftModel.from_pretrained(base.model, str(adapter))(torch.tensor([ids])).logits[0, -len(ids) :]
        bare = load_base(str(place / "tiny.gguf"), dtype="float32", device="cpu").model(torch.tensor([ids])).logits[0]
    assert torch.allclose(ours, peft, atol=1e-5)
    assert not torch.allclose(ours, bare, atol=1e-2)


def test_a_broken_file_ends_the_command_with_one_line_and_nothing_written(place: Path, tmp_path: Path) -> None:
    cut(place / "tiny.gguf", tmp_path / "half.gguf", 0.5)
    done = run("train", "--base", tmp_path / "half.gguf", "--data", place / "rows.jsonl", "--out", tmp_path / "out")
    assert "is cut off or damaged" in done.complaint
    assert not (tmp_path / "out").exists()


def test_files_of_settings_name_it_as_seen_from_their_own_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "sweep.toml").write_text('[base]\nbase = "tiny.gguf"\n[tasks.one]\ndata = "rows.jsonl"\n')
    (place / "serve.toml").write_text('base = "tiny.gguf"\n')
    monkeypatch.chdir("/")
    assert read_sweep(place / "sweep.toml").base["base"] == str(place / "tiny.gguf")
    assert read_settings(place / "serve.toml")["base"] == str(place / "tiny.gguf")
