"""Loading a base: what is frozen, which ids begin and end a text, how long it may be, and every refusal's sentence."""

import json

import peft
import pytest
import torch
from support.slow_truth import plain_logits, relative_error
from support.tiny_bases import (
    BOS,
    EOS,
    FAMILIES,
    LIMIT,
    build_base,
    build_model,
    build_tokenizer,
    random_ids,
    random_prompt,
)
from torch import nn

from softprompt.base import freeze_base, load_base
from softprompt.base.device import resolve_dtype
from softprompt.base.load import describe, trainable_line
from softprompt.base.model import embedding_rms
from softprompt.config import BaseConfig
from softprompt.engine import Request, generate
from softprompt.errors import BaseModelError, ConfigError
from softprompt.families import forward_of
from softprompt.training.step import accumulate_gradient

CPU = {"dtype": "float32", "device": "cpu"}


@pytest.fixture
def folder(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "tiny")
    build_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_folder_becomes_a_frozen_base_with_the_same_weights(folder):
    base = load_base(str(folder), **CPU)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    expected = build_model("llama").state_dict()
    assert base.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in base.model.state_dict().items())
    assert (base.name, base.folder) == ("tiny", str(folder))
    assert (base.bos_ids, base.eos_id, base.stop_ids) == ((BOS,), EOS, (EOS,))


def test_the_config_object_and_the_settings_are_two_ways_to_say_the_same(folder):
    assert load_base(BaseConfig(base=str(folder), **CPU)).fingerprint == load_base(str(folder), **CPU).fingerprint


def test_dtype_and_device_are_resolved_once(folder):
    assert load_base(str(folder), dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    base = load_base(str(folder), device="cpu")
    assert base.dtype == resolve_dtype("auto", torch.device("cpu"))
    assert base.dtype in (torch.bfloat16, torch.float32)
    assert "all frozen" in describe(base)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dtype": "float16", "device": "cpu"}, "float16 on a CPU"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of"),
        ({"device": "toaster"}, "device 'toaster'"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"max_length": LIMIT + 1}, f"max_length is {LIMIT + 1}.*{LIMIT} positions"),
        ({"max_length": 1}, "max_length is 1"),
        ({"dtpye": "float32"}, "did you mean 'dtype'"),
    ],
)
def test_settings_that_cannot_be_had_are_refused(folder, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_base(str(folder), **{**CPU, **settings})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(folder):
    with pytest.raises(ConfigError, match="'cuda' is not available"):
        load_base(str(folder), device="cuda")


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(BaseModelError, match="there is no such folder"):
        load_base(name, **CPU)


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(BaseModelError, match="cannot be loaded") as caught:
        load_base(str(tmp_path), **CPU)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_lacks_weights_is_refused(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lacks 1 of the model's weights, 'lm_head.weight'"):
        load_base(str(folder), **CPU)


def test_code_in_the_folder_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_base(str(folder), **CPU)
    assert not (tmp_path / "ran").exists()


def test_the_code_would_run_if_it_were_trusted(folder, tmp_path, monkeypatch):
    """The control: the same folder with the flag on does execute its file."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    test_code_in_the_folder_is_not_run(folder, tmp_path)
    with pytest.raises((BaseModelError, AttributeError)):
        load_base(str(folder), trust_remote_code=True, **CPU)
    assert (tmp_path / "ran").exists()


def test_a_tokenizer_without_pad_bos_or_eos_is_handled():
    base = freeze_base(build_model("gpt2"), build_tokenizer(has_bos=False, has_eos=False))
    base.model.generation_config.eos_token_id = None
    bare = freeze_base(base.model, base.tokenizer)
    assert (bare.bos_ids, bare.eos_id, bare.stop_ids) == ((), None, ())
    short, long = generate(bare, [Request(random_ids(2)), Request(random_ids(9))])
    assert len(short.ids) == len(long.ids) == 50


def test_a_pad_token_that_is_eos_hides_no_eos():
    base = build_base("gpt2")
    base.tokenizer.pad_token = base.tokenizer.eos_token
    prompt = random_prompt(base, 3)
    from softprompt.loss import target_nlls
    from softprompt.splice import Row

    rows = [Row((5, EOS), 0, (True, True)), Row((5, 6, 7, 8, EOS), 0, (True,) * 5)]
    assert [len(nats) for nats in target_nlls(base, forward_of(base), rows, [prompt])] == [2, 5]


def test_stop_ids_come_from_the_tokenizer_and_the_generation_settings():
    model = build_model("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert freeze_base(model, build_tokenizer()).stop_ids == (EOS, 7, 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_length_is_the_models_own_and_2048_where_it_has_none(family):
    unlimited = family in ("bloom", "falcon_alibi")
    assert build_base(family).max_length == (2_048 if unlimited else LIMIT)


def test_an_unlimited_family_takes_the_length_it_is_given():
    assert freeze_base(build_model("bloom"), build_tokenizer(), max_length=5_000).max_length == 5_000


def test_mpt_really_ends_at_its_length():
    base = build_base("mpt")
    assert plain_logits(base, random_ids(LIMIT), None).shape[0] == LIMIT
    with pytest.raises(RuntimeError):
        plain_logits(base, random_ids(LIMIT + 1), None)


def test_tied_embeddings_get_no_gradient_and_are_counted_once():
    base = build_base("llama", tie_word_embeddings=True)
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    untied = build_base("llama")
    assert untied.num_parameters - base.num_parameters == base.embedding.weight.numel()
    from softprompt.splice import Row

    prompt = random_prompt(base, 3).requires_grad_(True)
    list(accumulate_gradient(base, forward_of(base), [prompt], [Row(random_ids(4), 0, (True,) * 4)], 1))
    assert prompt.grad is not None
    assert base.embedding.weight.grad is None


def test_a_scaled_embedding_is_measured_as_the_model_gives_it_out():
    base = build_base("gemma3")
    given_out = base.embedding(torch.arange(base.vocab_size)).double()
    assert base.embedding_rms == pytest.approx(float(given_out.square().mean().sqrt()))
    raw = float(base.embedding.weight.double().square().mean().sqrt())
    assert base.embedding_rms == pytest.approx(4 * raw, rel=1e-3)  # the root of the hidden size, 16


def test_the_scale_does_not_depend_on_chunks(monkeypatch):
    whole = build_base("gpt2").embedding_rms
    monkeypatch.setattr("softprompt.base.model.RMS_CHUNK_ROWS", 10)
    assert build_base("gpt2").embedding_rms == whole


def test_the_scale_has_the_same_bits_with_every_number_of_threads():
    """Once they differed, and learning rates with them: each thread summed a part of the table."""
    table = torch.randn(49_152, 64, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.add(embedding_rms(nn.Embedding.from_pretrained(table), table.device))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_embedding_gives_a_copy_without_gradient(tiny_llama):
    out = tiny_llama.embed(torch.tensor([3, 4]))
    out.zero_()
    assert tiny_llama.embedding.weight[3].abs().sum() > 0
    assert not out.requires_grad


def test_input_embeddings_that_are_no_table_are_refused(monkeypatch):
    model = build_model("gpt2")
    monkeypatch.setattr(model, "get_input_embeddings", lambda: nn.Linear(2, 2))
    with pytest.raises(BaseModelError, match="input embeddings are a Linear"):
        freeze_base(model, build_tokenizer())


def test_the_trainable_line_counts_as_peft_does(tiny_gpt2):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(build_model("gpt2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable_line(tiny_gpt2, 4).startswith(f"trainable params: {trainable:,} || all params: {total:,} ||")


def test_a_word_that_looks_like_a_special_token_is_only_text(stories):
    assert stories.bos_ids[0] not in stories.encode("<s> once")
    assert stories.decode(stories.encode("Once upon a time")).strip() == "Once upon a time"


def test_answers_start_with_the_space_that_their_tokens_have(stories):
    before = stories.encode("Once upon")
    whole = stories.encode("Once upon a time")
    assert stories.decode_after(before, whole[len(before) :]) == " a time"


def test_a_base_of_another_seed_is_another_base(tiny_llama):
    other = build_base("llama", seed=1)
    with torch.no_grad():
        mine, theirs = (plain_logits(base, random_ids(5), None) for base in (tiny_llama, other))
    assert relative_error(mine, theirs) > 0.1


def test_a_base_with_an_adapter_beside_it_is_refused(folder):
    assert load_base(str(folder), **CPU).hidden_size == 16
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    peft.get_peft_model(build_model("llama"), settings).save_pretrained(folder)
    with pytest.raises(BaseModelError, match=r"adapter_config\.json beside its weights"):
        load_base(str(folder), **CPU)
