"""Bases that cannot work are refused in one sentence; what the tested list does not name is checked when first used."""

import pytest
import transformers as hf
from support.tiny_bases import OTHERS, VOCAB, build_base, build_tokenizer

from softprompt.base import freeze_base
from softprompt.errors import BaseModelError
from softprompt.families import TESTED_FAMILIES, forward_of

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def saved(model, folder):
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", OTHERS)
def test_an_unknown_but_causal_family_passes_the_check(family):
    base = build_base(family)
    assert base.model.config.model_type not in TESTED_FAMILIES
    assert forward_of(base).backbone is not base.model


def test_a_bidirectional_model_is_refused_when_it_is_first_used():
    model = hf.BertLMHeadModel(hf.BertConfig(**SMALL, is_decoder=False))
    with pytest.raises(BaseModelError, match=r"'tiny' \(bert\) is not causal"):
        forward_of(freeze_base(model, build_tokenizer(), name="tiny"))


def test_rows_of_a_family_that_mixes_them_run_one_at_a_time(monkeypatch):
    base = build_base("stablelm")
    plain = base.model.model.forward

    def leaking(**inputs):
        hidden = plain(**inputs)
        hidden.last_hidden_state = hidden.last_hidden_state + hidden.last_hidden_state.std(dim=0, correction=0)
        return hidden

    monkeypatch.setattr(base.model.model, "forward", leaking)
    forward = forward_of(base)
    assert forward.max_batchable_length == 0
    assert "one at a time" in forward.packing.note
