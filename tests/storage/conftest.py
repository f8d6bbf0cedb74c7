"""Tiny seeded bases and prompts, built here; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from softprompt.base.model import Base
from softprompt.prompt import SoftPrompt
from softprompt.types import InputForm, PromptRecord

REAL_MATERIAL = Path(__file__).resolve().parents[3] / "shared" / "data"
HIDDEN = 16


def build_model(family: str, seed: int = 0, hidden: int = HIDDEN) -> PreTrainedModel:
    torch.manual_seed(seed)
    wide = {"initializer_range": 0.5, "vocab_size": 64, "tie_word_embeddings": False}
    if family == "llama":
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, **wide,
        )  # fmt: skip
        model: PreTrainedModel = LlamaForCausalLM(config)
    elif family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=hidden, n_layer=2, n_head=2, n_positions=64, **wide))
    else:
        model = BloomForCausalLM(BloomConfig(hidden_size=hidden, n_layer=2, n_head=2, **wide))
    return model.eval().requires_grad_(False)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def build_base(family: str = "llama", seed: int = 0, hidden: int = HIDDEN, name: str = "tiny/llama") -> Base:
    model = build_model(family, seed, hidden)
    return Base(model=model, tokenizer=build_tokenizer(), name=name, folder=None, max_length=64, bos_ids=(1,), eos_id=2)


def build_prompt(seed: int = 0, num_virtual_tokens: int = 4, hidden: int = HIDDEN, **record: object) -> SoftPrompt:
    values = torch.randn(num_virtual_tokens, hidden, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt(values, PromptRecord(**record))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    return build_model


@pytest.fixture(scope="session")
def make_base() -> Callable[..., Base]:
    return build_base


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., SoftPrompt]:
    return build_prompt


@pytest.fixture(scope="session")
def real_material() -> Path:
    if not REAL_MATERIAL.is_dir():
        pytest.skip("the shared material is not here")
    return REAL_MATERIAL


@pytest.fixture(scope="session")
def base() -> Base:
    return build_base()


@pytest.fixture
def prompt(base: Base) -> SoftPrompt:
    return build_prompt(
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        form=InputForm(kind="template", template="Review: {text}", completion=" {label}", labels=("bad", "good")),
        parent="ab" * 32,
        run={"epochs": 6, "seed": 0, "versions": {"torch": "2.13.0"}, "example": "A secret sentence of the data."},
    )


@pytest.fixture
def damaged(tmp_path: Path, prompt: SoftPrompt) -> Callable[[Callable[[Path], object]], Path]:
    """A saved adapter after something was done to its folder."""
    from softprompt.storage import save_prompt

    def make(spoil: Callable[[Path], object]) -> Path:
        folder = save_prompt(prompt, tmp_path / "damaged")
        spoil(folder)
        return folder

    return make
