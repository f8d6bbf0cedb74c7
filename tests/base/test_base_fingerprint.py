"""A base's fingerprint says what it computes: the same however it is stored or held, another for anything else."""

import json

import pytest
import torch
from support.tiny_bases import build_model, build_tokenizer

from softprompt.base import freeze_base, load_base


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or build_tokenizer()).save_pretrained(folder)
    return folder


def as_bin(folder, change_name=lambda name: name):
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    torch.save({change_name(name): value for name, value in weights.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def fingerprint_of(folder, dtype="float32"):
    return load_base(str(folder), dtype=dtype, device="cpu").fingerprint


@pytest.fixture(params=["llama", "gpt2", "bloom"])
def model(request):
    return build_model(request.param)


@pytest.fixture
def truth(model, tmp_path):
    return fingerprint_of(save(model, tmp_path / "truth"))


def test_the_fingerprint_is_the_same_in_bin_and_safetensors(model, truth, tmp_path):
    assert fingerprint_of(as_bin(save(model, tmp_path / "bin"))) == truth


def test_the_fingerprint_is_the_same_in_bfloat16(truth, tmp_path):
    assert fingerprint_of(tmp_path / "truth", dtype="bfloat16") == truth


def test_a_bfloat16_checkpoint_is_the_same_base(model, truth, tmp_path):
    assert fingerprint_of(save(model.to(torch.bfloat16), tmp_path / "half")) == truth


def test_the_fingerprint_is_the_same_for_a_model_made_in_python(model, truth):
    assert freeze_base(model, build_tokenizer()).fingerprint == truth


def test_the_fingerprint_is_the_same_with_bare_names_in_the_checkpoint(model, truth, tmp_path):
    prefix = f"{model.base_model_prefix}."
    folder = as_bin(save(model, tmp_path / "bare"), lambda name: name.removeprefix(prefix))
    assert fingerprint_of(folder) == truth


@pytest.mark.parametrize("stored", ["safetensors", "bin"])
def test_float16_reads_the_checkpoint_because_rounding_twice_is_not_rounding_once(model, truth, tmp_path, stored):
    folder = save(model, tmp_path / "wide")
    folder = folder if stored == "safetensors" else as_bin(folder)
    model.half()
    assert freeze_base(model, build_tokenizer(), folder=str(folder)).fingerprint == truth
    assert freeze_base(model, build_tokenizer(), folder=None).fingerprint != truth


def test_one_changed_weight_changes_the_fingerprint(model, truth):
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert freeze_base(model, build_tokenizer()).fingerprint != truth


def test_other_heads_over_the_same_weights_change_it():
    two, four = build_model("gpt2", n_head=2), build_model("gpt2", n_head=4)
    assert torch.equal(two.transformer.wte.weight, four.transformer.wte.weight)
    assert freeze_base(two, build_tokenizer()).fingerprint != freeze_base(four, build_tokenizer()).fingerprint


def test_another_tokenizer_changes_the_fingerprint(model, truth):
    swapped = json.loads(build_tokenizer().backend_tokenizer.to_str())
    words = swapped["model"]["vocab"]
    words["w7"], words["w8"] = words["w8"], words["w7"]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(swapped)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    assert freeze_base(model, other).fingerprint != truth


def test_a_checkpoint_saved_as_bin_has_the_recorded_fingerprint(shared_data):
    folder = str(shared_data / "models" / "bloom-tiny-random")
    half, whole = (load_base(folder, dtype=dtype, device="cpu") for dtype in ("bfloat16", "float32"))
    assert half.fingerprint == whole.fingerprint
    fp16 = freeze_base(whole.model.half(), whole.tokenizer, folder=folder)
    assert fp16.fingerprint == half.fingerprint
