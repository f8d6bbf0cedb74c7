"""Bases with per-layer embeddings: a text keeps those of its token ids, and a virtual token gets an image's."""

from dataclasses import replace

import pytest
import torch
from family_scan import ROWS, assert_exact, outcome_of, row
from support.family_configs import CHANGES, tiny_model
from support.slow_truth import TOLERANCE, TrueDouble, plain_nats, relative_error
from support.tiny_bases import build_tokenizer, random_prompt

from softprompt.base import freeze_base
from softprompt.config import TrainConfig
from softprompt.engine import Engine
from softprompt.errors import BaseModelError
from softprompt.families import forward_of
from softprompt.splice import target_states
from softprompt.training import train

KINDS = ("gemma3n_text", "gemma4_text")
SHARED = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # what each family's own code warns of


def base_of(kind):
    return freeze_base(tiny_model(kind), build_tokenizer(has_bos=False), name="tiny")


@pytest.fixture
def shared_layers(monkeypatch):
    """The last two layers attend to the keys and values of two before them, as in the published models."""
    for kind in KINDS:
        monkeypatch.setitem(CHANGES, kind, {**CHANGES.get(kind, {}), **SHARED})


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_share_keys_and_values_are_exact(kind, shared_layers):
    assert outcome_of(kind).result == "exact"


def test_layers_that_share_keys_and_values_count_in_the_memory_of_rows(shared_layers):
    memory = Engine(base_of("gemma3n_text")).runners.kv_cache
    num_layers, num_key_heads, width, num_bytes = 4, 2, 4, 4
    assert memory.bytes_per_position == num_layers * 2 * num_key_heads * width * num_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_is_that_of_concatenated_embeddings(kind, shared_layers):
    base, untouched = (
        freeze_base(tiny_model(kind).double(), build_tokenizer(has_bos=False), name="tiny") for _ in range(2)
    )
    ours, theirs, other = (random_prompt(base, 4, seed).double().requires_grad_(True) for seed in (3, 3, 4))
    with TrueDouble():
        nats_of_rows(base, ours).backward()
        for prompt in (theirs, other):
            sum(plain_nats(untouched, ids, [True] * len(ids), prompt).sum() for ids in ROWS).backward()
    assert relative_error(ours.grad, theirs.grad) < TOLERANCE[torch.float64]
    assert relative_error(ours.grad, other.grad) > 100 * TOLERANCE[torch.float64]


def test_a_gradient_through_checkpointed_layers_that_share_keys_and_values_is_the_same(shared_layers):
    base = base_of("gemma3n_text")
    prompts = [random_prompt(base, 4).requires_grad_(True) for _ in range(2)]
    for prompt, checkpoint in zip(prompts, (False, True), strict=True):
        nats_of_rows(base, prompt, checkpoint).backward()
    assert torch.equal(prompts[0].grad, prompts[1].grad)


def nats_of_rows(base, prompt, checkpoint=False):
    rows, forward = [row(ids, 0) for ids in ROWS], forward_of(base)
    hidden, targets = target_states(base, forward, rows, [prompt], checkpoint=checkpoint)
    return torch.nn.functional.cross_entropy(forward.logits(hidden), targets.ids, reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_without_its_per_layer_embeddings_is_refused(kind):
    base = base_of(kind)
    object.__setattr__(base, "per_layer", None)
    with pytest.raises(BaseModelError, match="cannot take a soft prompt"):
        forward_of(base)


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_with_the_per_layer_embeddings_of_a_word_are_not_exact(kind):
    base = base_of(kind)
    object.__setattr__(base, "per_layer", replace(base.per_layer, virtual_id=7))
    with pytest.raises(AssertionError, match="logits behind a soft prompt"):
        assert_exact(base, forward_of(base), tiny_model(kind))


def test_virtual_tokens_get_the_per_layer_embeddings_that_the_model_gives_an_image():
    base, given = base_of("gemma4"), {}
    base.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    word, image = 5, base.model.config.image_token_id
    base.model(input_ids=torch.tensor([[word, image]]))
    ours = torch.cat([base.token_inputs(torch.tensor([word])), base.virtual_inputs(random_prompt(base, 1))])
    assert torch.equal(base.per_layer.arguments(ours)["per_layer_inputs"], given["per_layer_inputs"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_prompt_is_as_wide_as_an_input_embedding(kind):
    base = base_of(kind)
    trained = train(base, ["w5 w6 w7", "w8 w9"], TrainConfig(virtual_tokens=2, epochs=1))
    assert trained.prompt.tensor.shape == (2, base.hidden_size) == (2, 16)
