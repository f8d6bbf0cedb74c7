"""The embedded base loads as any Hugging Face Bloom does, and knows its text."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_utils import PreTrainedModel
from writer.corpus import NUM_SHARDS, shard

from softprompt.embedded import base_folder

MAX_LOSS = 2.6  # nats per token on text of the same writer that was not trained on


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(base_folder())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base_folder())


def test_weights_are_bfloat16_and_tied(model: PreTrainedModel) -> None:
    assert model.config.model_type == "bloom"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_tokenizer_adds_nothing_and_gives_text_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "I want you to act as a coach. «Ünïcode» 42\nSentiment: positive"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


def test_loss_on_unseen_text_of_the_same_writer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [text for _, text in zip(range(16), shard(NUM_SHARDS), strict=False)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        logits = model.float()(**batch).logits[:, :-1]
    labels = batch.input_ids[:, 1:].masked_fill(batch.attention_mask[:, 1:] == 0, -100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert loss < MAX_LOSS < math.log(len(tokenizer)) / 2
