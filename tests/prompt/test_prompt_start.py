"""Every start is made of what it says, is a function of its seed alone, and says aloud what it had to change."""

from collections import Counter

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from support.tiny_bases import build_base, build_model

from softprompt.errors import ConfigError
from softprompt.prompt import StartTexts, starting_tensor

TEXTS = StartTexts(data=[(5, 6, 7, 5), (5, 8)], instruction=(10, 11, 12), labels=[(20, 21), (22,)])
ALL = ["data", "text", "vocab", "labels", "random", "peft"]


def start(base, kind, count=4, seed=0, texts=TEXTS):
    return starting_tensor(base, kind, count, seed, texts)


def ids_of(base, tensor):
    """The token whose embedding each vector is; fails where one is none."""
    table = base.embedding.weight
    return [int((table == vector).all(dim=1).nonzero()[0, 0]) for vector in tensor]


@pytest.mark.parametrize("kind", ALL)
def test_a_start_has_its_shape_and_its_seed_alone_decides(tiny_llama, kind):
    torch.manual_seed(1)
    first, _ = start(tiny_llama, kind)
    torch.manual_seed(2)
    again, _ = start(tiny_llama, kind)
    assert first.shape == (4, tiny_llama.hidden_size)
    assert (first.dtype, first.device.type) == (torch.float32, "cpu")
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", ["data", "vocab", "random", "peft"])
def test_another_seed_is_another_start(tiny_llama, kind):
    many = StartTexts(data=[tuple(range(3, 60))])
    assert not torch.equal(start(tiny_llama, kind, texts=many)[0], start(tiny_llama, kind, seed=1, texts=many)[0])


@pytest.mark.parametrize("kind", ALL)
def test_a_start_leaves_torchs_own_generator_alone(tiny_llama, kind):
    before = torch.random.get_rng_state()
    start(tiny_llama, kind)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_data_draws_each_token_of_the_text_once_before_it_repeats(tiny_llama):
    tensor, _ = start(tiny_llama, "data", count=8)
    ids = ids_of(tiny_llama, tensor)
    assert sorted(ids[:4]) == [5, 6, 7, 8]
    assert ids[4:] == ids[:4]


def test_data_prefers_what_occurs_often(tiny_llama):
    texts = StartTexts(data=[(5,) * 30 + (6, 7)])
    drawn = Counter(ids_of(tiny_llama, start(tiny_llama, "data", 1, seed, texts)[0])[0] for seed in range(40))
    assert drawn[5] > 30


@pytest.mark.parametrize(
    ("count", "expected", "notes"),
    [
        (3, [10, 11, 12], ()),
        (5, [10, 11, 12, 10, 11], ("init text has 3 tokens; repeated to fill 5 virtual tokens",)),
        (2, [10, 11], ("init text has 3 tokens; cut to the first 2 virtual tokens",)),
    ],
)
def test_text_is_repeated_or_cut_and_says_so(tiny_llama, count, expected, notes):
    tensor, said = start(tiny_llama, "text", count)
    assert ids_of(tiny_llama, tensor) == expected
    assert said == notes


def test_text_is_what_peft_starts_from(tiny_llama, tmp_path):
    tiny_llama.tokenizer.save_pretrained(tmp_path)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prompt_tuning_init="TEXT", prompt_tuning_init_text="w10 w11 w12",
        tokenizer_name_or_path=str(tmp_path), tokenizer_kwargs={"local_files_only": True},
    )  # fmt: skip
    theirs = get_peft_model(build_model("llama"), config).get_prompt_embedding_to_save("default")
    bos_and_text = StartTexts(instruction=tiny_llama.tokenizer("w10 w11 w12")["input_ids"])  # PEFT keeps the BOS
    assert torch.equal(start(tiny_llama, "text", 5, texts=bos_and_text)[0], theirs)


def test_vocab_takes_no_special_token(tiny_llama):
    tensor, _ = start(tiny_llama, "vocab", 500)
    ids = set(ids_of(tiny_llama, tensor))
    assert ids.isdisjoint({0, 1, 2})
    assert len(ids) > 80


def test_labels_come_first_then_the_training_text(tiny_llama):
    ids = ids_of(tiny_llama, start(tiny_llama, "labels", 5)[0])
    assert ids[:2] == [20, 22]
    assert set(ids[2:]) <= {5, 6, 7, 8}
    assert ids_of(tiny_llama, start(tiny_llama, "labels", 1)[0]) == [20]


def test_random_has_the_size_of_the_embeddings(tiny_llama):
    tensor, _ = start(tiny_llama, "random", 500)
    assert float(tensor.square().mean().sqrt()) == pytest.approx(tiny_llama.embedding_rms, rel=0.03)
    assert torch.allclose(tensor, start(tiny_llama, "peft", 500)[0] * tiny_llama.embedding_rms)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_peft_is_the_very_tensor_that_peft_draws_with_that_seed(family):
    base, model = build_base(family), build_model(family)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    torch.manual_seed(11)
    theirs = get_peft_model(model, config).get_prompt_embedding_to_save("default")
    assert torch.equal(start(base, "peft", 6, seed=11)[0], theirs)
    assert not torch.equal(start(base, "peft", 6, seed=12)[0], theirs)


@pytest.mark.parametrize(
    ("kind", "sentence"), [("data", "needs training text"), ("text", "needs an init_text"), ("labels", "with labels")]
)
def test_a_start_with_nothing_to_draw_on_is_refused(tiny_llama, kind, sentence):
    with pytest.raises(ConfigError, match=sentence):
        start(tiny_llama, kind, texts=StartTexts())


def test_a_bfloat16_base_gives_a_float32_start():
    assert start(build_base("llama", dtype=torch.bfloat16), "data")[0].dtype == torch.float32


def test_a_scaled_embedding_is_taken_as_the_model_gives_it_out():
    base = build_base("gemma3")
    assert torch.equal(start(base, "text", 3)[0], base.embedding(torch.tensor([10, 11, 12])))
