"""PEFT itself is the judge of the format: our folder in PEFT, PEFT's folder here, the same logits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.base.model import Base
from softprompt.errors import AdapterError
from softprompt.prompt import SoftPrompt
from softprompt.storage import UnknownBaseWarning, load_prompt, save_prompt

MakePrompt = Callable[..., SoftPrompt]
MakeBase = Callable[..., Base]
IDS = torch.tensor([[1, 5, 9, 33, 20]])
FAMILIES = ("llama", "gpt2", "bloom")


@pytest.fixture(autouse=True)
def quiet_peft() -> Any:
    """PEFT asks the Hub for the base's config when saving, and warns that it cannot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft|transformers|huggingface_hub")
        yield


class Judge:
    """PEFT on one side, plain concatenation on the other."""

    def __init__(self, make_model: Callable[..., PreTrainedModel]) -> None:
        self.make_model = make_model

    def saves(self, folder: Path, family: str = "llama", adapter_name: str = "default", **settings: Any) -> Tensor:
        """A prompt-tuning adapter as PEFT's own `save_pretrained` writes it; gives back its tensor."""
        torch.manual_seed(3)
        config = PromptTuningConfig(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, **settings})
        model = get_peft_model(self.make_model(family), config, adapter_name=adapter_name)
        model.save_pretrained(str(folder))
        return model.prompt_encoder[adapter_name].embedding.weight.detach().clone()

    def loads(self, folder: Path, family: str = "llama") -> Any:  # Any: PEFT's class has no types
        return PeftModel.from_pretrained(self.make_model(family), str(folder))

    def logits(self, folder: Path, family: str = "llama") -> Tensor:
        with torch.no_grad():
            return self.loads(folder, family)(input_ids=IDS).logits

    def plain_logits(self, prompt: SoftPrompt, family: str) -> Tensor:
        model = self.make_model(family)
        with torch.no_grad():
            embeds = torch.cat([prompt.tensor[None], model.get_input_embeddings()(IDS)], dim=1)
            return model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long)).logits


@pytest.fixture
def judge(make_model: Callable[..., PreTrainedModel]) -> Judge:
    return Judge(make_model)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_our_folder_with_the_same_logits(
    tmp_path: Path, family: str, make_base: MakeBase, make_prompt: MakePrompt, judge: Judge
) -> None:
    prompt = make_prompt(seed=1)
    folder = save_prompt(prompt, tmp_path / "ours", base=make_base(family, name=f"tiny/{family}"))
    model = judge.loads(folder, family)
    assert torch.equal(model.get_prompt_embedding_to_save("default"), prompt.tensor)
    expected = judge.plain_logits(prompt, family)
    torch.testing.assert_close(judge.logits(folder, family), expected, atol=1e-5, rtol=1e-5)
    wrong = judge.plain_logits(make_prompt(seed=2), family)
    assert (wrong[:, -1] - expected[:, -1]).abs().max() > 1e-2, "the control must fail"


@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_folder_loads_here_with_the_same_logits(
    tmp_path: Path, family: str, make_base: MakeBase, judge: Judge
) -> None:
    tensor = judge.saves(tmp_path / "theirs", family)
    base = make_base(family, name="tiny/other")
    with pytest.warns(UnknownBaseWarning, match="more could not be checked"):
        prompt = load_prompt(tmp_path / "theirs", base)
    assert torch.equal(prompt.tensor, tensor)
    torch.testing.assert_close(
        judge.logits(tmp_path / "theirs", family), judge.plain_logits(prompt, family), atol=1e-5, rtol=1e-5
    )


def test_a_prompt_survives_our_folder_peft_and_back(tmp_path: Path, judge: Judge) -> None:
    """PEFT -> here -> PEFT -> here: the same vectors bit for bit."""
    tensor = judge.saves(tmp_path / "theirs")
    save_prompt(load_prompt(tmp_path / "theirs"), tmp_path / "ours")
    judge.loads(tmp_path / "ours").save_pretrained(str(tmp_path / "again"))
    assert torch.equal(load_prompt(tmp_path / "again").tensor, tensor)


def test_the_folder_is_what_peft_writes(tmp_path: Path, base: Base, prompt: SoftPrompt, judge: Judge) -> None:
    judge.saves(tmp_path / "theirs")
    save_prompt(prompt, tmp_path / "ours", base=base)
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert list(ours) == list(theirs)
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert differing <= {"base_model_name_or_path"}
    assert ours["base_model_name_or_path"] == base.name
    for who in ("ours", "theirs"):
        with safe_open(tmp_path / who / "adapter_model.safetensors", "pt") as file:
            assert list(file.keys()) == ["prompt_embeddings"]
            assert file.metadata() == {"format": "pt"}
            assert file.get_tensor("prompt_embeddings").shape == (4, 16)
            assert file.get_tensor("prompt_embeddings").dtype == torch.float32


def test_peft_reads_the_config_of_a_prompt_without_any_base(
    tmp_path: Path, make_prompt: MakePrompt, judge: Judge
) -> None:
    save_prompt(make_prompt(), tmp_path / "ours")
    config = PeftConfig.from_pretrained(str(tmp_path / "ours"))
    assert (config.peft_type, config.task_type, config.num_virtual_tokens) == ("PROMPT_TUNING", "CAUSAL_LM", 4)
    assert config.prompt_tuning_init == "RANDOM"
    assert judge.logits(tmp_path / "ours").shape[1] == IDS.shape[1] + 4


def test_pefts_older_bin_loads_here(tmp_path: Path, judge: Judge) -> None:
    tensor = judge.saves(tmp_path / "theirs")
    torch.save({"prompt_embeddings": tensor}, tmp_path / "theirs" / "adapter_model.bin")
    (tmp_path / "theirs" / "adapter_model.safetensors").unlink()
    assert torch.equal(load_prompt(tmp_path / "theirs").tensor, tensor)
    assert torch.equal(judge.loads(tmp_path / "theirs")
                       .get_prompt_embedding_to_save("default"), tensor)  # fmt: skip


def test_an_adapter_of_another_name_lies_in_a_sub_folder(tmp_path: Path, judge: Judge) -> None:
    tensor = judge.saves(tmp_path / "theirs", adapter_name="coach")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json .* but 'coach' below it has: give .*theirs/coach"):
        load_prompt(tmp_path / "theirs")
    assert torch.equal(load_prompt(tmp_path / "theirs" / "coach").tensor, tensor)


def test_a_peft_adapter_without_a_task_is_taken_with_the_flag(tmp_path: Path, judge: Judge) -> None:
    tensor = judge.saves(tmp_path / "theirs")
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": None}))
    with pytest.raises(AdapterError, match=r"names no task_type; .* task_type='CAUSAL_LM' \(--task-type CAUSAL_LM\)"):
        load_prompt(tmp_path / "theirs")
    assert torch.equal(load_prompt(tmp_path / "theirs", task_type="CAUSAL_LM").tensor, tensor)


def test_peft_saving_into_our_folder_is_noticed(tmp_path: Path, make_prompt: MakePrompt, judge: Judge) -> None:
    """PEFT replaces the weights and leaves our record, which then described other vectors."""
    save_prompt(make_prompt(seed=1), tmp_path / "x")
    judge.saves(tmp_path / "x")
    with pytest.raises(AdapterError, match=r"are not those that softprompt\.json describes"):
        load_prompt(tmp_path / "x")
    (tmp_path / "x" / "softprompt.json").unlink()
    load_prompt(tmp_path / "x")
