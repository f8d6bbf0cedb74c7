"""Encoders from folders: with a masked-LM head, bare, or a classifier's; what is taken off, and what is refused."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support.encoders import ENCODERS, build_encoder, build_encoder_model, build_encoder_tokenizer, save_encoder
from support.family_configs import each_of

from softprompt.base import freeze_base, load_base
from softprompt.errors import BaseModelError

CPU = {"dtype": "float32", "device": "cpu"}
FAMILIES = pytest.mark.parametrize("family", each_of(ENCODERS, ("bert", "roberta")))


def load(folder):
    return load_base(str(folder), **CPU)


def rewritten(folder, change):
    """The folder with its weights changed by a function of the mapping."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@FAMILIES
def test_a_masked_language_model_is_an_encoder_with_its_head(family, tmp_path):
    base, made = load(save_encoder(family, tmp_path / "mlm")), build_encoder(family)
    assert type(base.model) is ENCODERS[family][1]
    assert (base.kind, base.eos_id, base.stop_ids) == ("encoder", None, ())
    tokenizer = base.tokenizer
    assert base.mask_id == tokenizer.mask_token_id
    assert (base.bos_ids, base.end_ids) == ((tokenizer.cls_token_id,), (tokenizer.sep_token_id,))
    assert base.fingerprint == made.fingerprint
    assert base.encode("w7 w9") == (7, 9)


@pytest.mark.parametrize("part", ["bare", "classifier"])
@FAMILIES
def test_a_checkpoint_without_a_masked_lm_head_is_loaded_without(family, part, tmp_path):
    base = load(save_encoder(family, tmp_path / part, part=part))
    assert base.kind == "encoder"
    assert base.mask_id is None
    assert base.model.base_model is base.model
    expected = build_encoder_model(family, part=part).base_model.state_dict()
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_pooler_that_the_checkpoint_lacks_is_taken_off(tmp_path):
    """RoBERTa's classifiers have none: it would be random, and the fingerprint another one each time."""
    folder = save_encoder("roberta", tmp_path / "classifier", part="classifier", num_labels=3)
    first, again = load(folder), load(folder)
    assert first.model.pooler is None
    assert first.fingerprint == again.fingerprint
    pooled = save_encoder("bert", tmp_path / "bert", part="bare")
    assert load(pooled).model.pooler is not None
    without = rewritten(pooled, lambda weights: {k: v for k, v in weights.items() if not k.startswith("pooler.")})
    assert load(without).model.pooler is None


@pytest.mark.parametrize("part", each_of(["masked", "bare"], ["masked"]))
@FAMILIES
def test_the_fingerprint_is_the_same_in_bin_and_safetensors_and_in_16_bits(family, part, tmp_path):
    folder = save_encoder(family, tmp_path / "base", part=part)
    known = load(folder).fingerprint
    assert load_base(str(folder), dtype="bfloat16", device="cpu").fingerprint == known
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load(folder).fingerprint == known
    assert load(save_encoder(family, tmp_path / "other", seed=1, part=part)).fingerprint != known


def test_the_former_names_of_a_checkpoints_norms_are_read_in_float16_too(tmp_path):
    """bert-base-uncased has them: without their values its fingerprint was another one in float16."""
    folder, model = save_encoder("bert", tmp_path / "base"), build_encoder_model("bert")
    known = load(folder).fingerprint
    former = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    rename = {
        name: name.replace(today, old) for name in model.state_dict() for today, old in former.items() if today in name
    }
    rewritten(folder, lambda weights: {rename.get(name, name): value for name, value in weights.items()})
    assert load(folder).fingerprint == known
    half = freeze_base(model.half(), build_encoder_tokenizer(), folder=str(folder))
    assert half.fingerprint == known
    assert freeze_base(model, build_encoder_tokenizer(), folder=None).fingerprint != known


def test_the_discriminator_of_electra_has_no_masked_lm_head_and_its_generator_has(tmp_path):
    generator = load(save_encoder("electra", tmp_path / "generator"))
    discriminator = load(save_encoder("electra", tmp_path / "discriminator", part="discriminator"))
    assert generator.mask_id is not None
    assert discriminator.mask_id is None
    assert (generator.hidden_size, generator.model.config.hidden_size) == (12, 16)  # its embeddings are narrower


def test_a_checkpoint_with_all_heads_of_pretraining_has_the_masked_lm_head(tmp_path):
    """bert-base-uncased's is one of these."""
    config = build_encoder_model("bert").config
    model = hf.BertForPreTraining(config)
    model.save_pretrained(tmp_path)
    build_encoder_tokenizer().save_pretrained(tmp_path)
    base = load(tmp_path)
    assert type(base.model) is hf.BertForMaskedLM
    assert torch.equal(base.model.cls.predictions.transform.dense.weight, model.cls.predictions.transform.dense.weight)


def test_nothing_is_printed_of_what_a_classifiers_checkpoint_has_besides(tmp_path, capfd):
    load(save_encoder("roberta", tmp_path / "classifier", part="classifier"))
    captured = capfd.readouterr()
    assert "UNEXPECTED" not in captured.out + captured.err
    assert "standalone" not in captured.out + captured.err


def test_a_masked_language_model_that_lacks_a_weight_is_refused(tmp_path):
    folder = save_encoder("bert", tmp_path / "mlm")
    rewritten(folder, lambda weights: {k: v for k, v in weights.items() if "transform.dense" not in k})
    with pytest.raises(BaseModelError, match=r"lacks 2 of the model's weights, 'cls.predictions.transform.dense"):
        load(folder)


def test_a_decoder_of_an_encoders_family_stays_causal(tmp_path):
    config = build_encoder_model("bert").config
    config.is_decoder = True
    hf.BertLMHeadModel(config).save_pretrained(tmp_path)
    build_encoder_tokenizer().save_pretrained(tmp_path)
    assert load(tmp_path).kind == "causal"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (hf.WhisperConfig(), "encoder-decoder model .whisper. that is no language model of text to text"),
        (hf.Speech2TextConfig(), "encoder-decoder model .speech_to_text. that is no language model of text to text"),
    ],
    ids=["whisper", "speech_to_text"],
)
def test_an_encoder_decoder_of_speech_is_refused(config, sentence, tmp_path):
    config.save_pretrained(tmp_path)
    build_encoder_tokenizer().save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=sentence) as refused:
        load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_masked_language_model_of_an_unknown_family_is_refused(tmp_path):
    folder = save_encoder("bert", tmp_path / "mlm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2", "architectures": ["XForMaskedLM"]}))
    with pytest.raises(BaseModelError, match=r"masked language model \(XForMaskedLM\) of a family that cannot be used"):
        load(folder)
