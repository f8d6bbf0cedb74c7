"""A base that Accelerate spreads over devices, parts of it on disk, trains the prompt that it trains in one piece."""

from __future__ import annotations

import pytest
import torch
from support.slow_truth import relative_error
from support.tiny_bases import build_model, build_tokenizer, random_ids
from transformers import AutoModelForCausalLM

from softprompt.base import freeze_base, load_base
from softprompt.base.load import describe
from softprompt.config import SamplingConfig, TrainConfig
from softprompt.engine import Request, generate
from softprompt.errors import ConfigError, MissingDependencyError
from softprompt.training import train

TEXTS = [" ".join(f"w{token}" for token in random_ids(2 + seed, seed)) for seed in range(7)]
SHORT = TrainConfig(virtual_tokens=3, epochs=2, batch_rows=4)
SPREAD = {
    "llama": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "disk"},
    "bloom": {"transformer": "disk", "lm_head": "cpu"},
}  # fmt: skip


@pytest.fixture
def folder(request, tmp_path):
    family = getattr(request, "param", "llama")
    build_model(family).save_pretrained(tmp_path / family)
    build_tokenizer().save_pretrained(tmp_path / family)
    return tmp_path / family


def spread_base(folder, device_map, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map)
    return freeze_base(model, build_tokenizer(), name=folder.name, folder=str(folder))


@pytest.mark.medium
@pytest.mark.parametrize("folder", ["llama", "bloom"], indirect=True)
def test_a_base_with_parts_on_disk_trains_and_answers_the_same(folder):
    base = spread_base(folder, SPREAD[folder.name], torch.float64)
    whole = load_base(str(folder), device="cpu", dtype="float32")
    whole.model.to(torch.float64)
    assert any(parameter.is_meta for parameter in base.model.parameters())
    assert "disk" in describe(base)
    assert base.fingerprint == load_base(str(folder), device="cpu", dtype="float32").fingerprint
    found, expected = (train(b, TEXTS, SHORT, validation=TEXTS[:3]) for b in (base, whole))
    assert relative_error(found.prompt.tensor, expected.prompt.tensor) < 1e-6
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert "rows run padded by length: the base is spread over devices" in found.notes
    assert "rows run packed behind one pass of the soft prompt" in expected.notes
    requests = [Request((5, 6, 7), found.prompt), Request((8, 9, 10, 11, 12, 13))]  # as long: Bloom in float64 needs it
    answers = [[answer.ids for answer in generate(b, requests, SamplingConfig())] for b in (base, whole)]
    assert answers[0] == answers[1]
    assert relative_error(found.prompt.tensor, train(whole, TEXTS[1:], SHORT).prompt.tensor) > 1e-2  # the control


def test_auto_on_one_device_is_that_device(folder):
    spread = load_base(str(folder), device_map="auto", dtype="float32")
    plain = load_base(str(folder), dtype="float32")
    assert spread.device == plain.device
    assert describe(spread) == describe(plain)
    found, expected = (train(base, TEXTS, SHORT) for base in (spread, plain))
    assert torch.equal(found.prompt.tensor, expected.prompt.tensor)


def test_device_maps_that_cannot_be_meant_are_refused(folder, monkeypatch):
    with pytest.raises(ConfigError, match="device_map is 'atuo'; did you mean 'auto'"):
        load_base(str(folder), device_map="atuo")
    with pytest.raises(ConfigError, match="over all devices, but device is 'cpu'; give one of the two"):
        load_base(str(folder), device_map="auto", device="cpu")
    monkeypatch.setattr("softprompt.base.load.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'softprompt\[distributed\]'"):
        load_base(str(folder), device_map="auto")
