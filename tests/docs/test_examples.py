"""The examples run, and the flat loop reaches what `softprompt.train` reaches."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from softprompt import DataConfig, TrainConfig, load_base, read_rows, train
from softprompt.data import build_examples
from softprompt.embedded import base_folder, data_file

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_flat_loop_reaches_the_losses_of_train() -> None:
    base = load_base("embedded", dtype="float32")
    plain = {"virtual_tokens": 4, "epochs": 2, "schedule": "linear", "reparameterisation": "none"}
    config = TrainConfig(**plain)
    rows = read_rows(DataConfig(data=str(data_file("quotes.jsonl")), text_column="quote", rows=16))
    data = build_examples(base, rows, eos=True, max_length=base.max_length - 4)
    prompt, losses = load_example("flat_loop").tune(base, data, config)
    result = train(base, data, config)
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(losses), rtol=0, atol=1e-4)
    assert losses[-1] < losses[0]
    other = train(base, data, TrainConfig(**plain, seed=1))  # control: another seed is another run
    assert (torch.tensor(other.losses) - torch.tensor(losses)).abs().max() > 1e-2
    assert prompt.shape == result.prompt.tensor.shape


@pytest.mark.medium
@pytest.mark.parametrize("preset", [pytest.param([], marks=pytest.mark.slow), ["--preset", "notebook"]])
def test_the_notebook_runs_on_local_files(tmp_path: Path, preset: list[str]) -> None:
    command = [sys.executable, str(EXAMPLES / "notebook.py"), "--base", str(base_folder()), *preset]
    files = ["--prompts", str(data_file("coach-prompts.csv")), "--quotes", str(data_file("quotes.jsonl"))]
    done = subprocess.run(
        [*command, *files, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "trainable params: 1,024" in done.stdout
    assert (tmp_path / "out" / "quotes" / "adapter_config.json").exists()
