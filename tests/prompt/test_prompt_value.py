"""A soft prompt is a value: float32 on the CPU, a copy, hashed by its numbers, never anything that is not finite."""

import dataclasses

import pytest
import torch

from softprompt.errors import PromptError
from softprompt.prompt import SoftPrompt
from softprompt.types import PromptRecord


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prompts_tensor_is_a_float32_copy(dtype):
    source = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    prompt = SoftPrompt(source)
    with torch.no_grad():
        source.mul_(5)
    assert torch.equal(prompt.tensor, torch.ones(2, 3))
    assert not prompt.tensor.requires_grad
    assert (prompt.num_virtual_tokens, prompt.hidden_size, prompt.num_bytes) == (2, 3, 24)


def test_a_prompts_tensor_cannot_be_replaced():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SoftPrompt(torch.ones(1, 1)).tensor = torch.zeros(1, 1)


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (torch.ones(3), r"this one has \[3\]"),
        (torch.ones(1, 2, 3), r"this one has \[1, 2, 3\]"),
        (torch.ones(0, 3), r"this one has \[0, 3\]"),
        (torch.ones(2, 3, dtype=torch.int64), "dtype torch.int64"),
        (torch.tensor([[1.0, float("nan")]]), "1 of 2 are NaN or infinite"),
        (torch.tensor([[float("inf"), -float("inf")]]), "2 of 2 are NaN or infinite"),
    ],
)
def test_a_tensor_that_is_no_prompt_is_refused(tensor, sentence):
    with pytest.raises(PromptError, match=sentence):
        SoftPrompt(tensor)


def test_the_content_hash_covers_values_and_shape():
    values = torch.arange(6.0).reshape(2, 3)
    same = SoftPrompt(values.bfloat16(), PromptRecord(base_name="elsewhere"))
    assert SoftPrompt(values).content_hash == same.content_hash
    assert SoftPrompt(values).content_hash != SoftPrompt(values.reshape(3, 2)).content_hash
    values[0, 0] = 1e-7
    assert SoftPrompt(values).content_hash != same.content_hash
