"""Causal families of every kind, from tiny models: each is exact, or refused in one sentence. The slow test has all."""

import re

import pytest
import transformers as hf
from family_scan import assert_exact, causal_part, outcome_of, page
from support.family_configs import KINDS, NOT_BUILT, each_of, tiny_model
from support.tiny_bases import LIMIT, build_tokenizer, random_ids, random_prompt

from softprompt.base import freeze_base
from softprompt.config import SamplingConfig, TrainConfig
from softprompt.engine import Request, generate
from softprompt.errors import BaseModelError
from softprompt.families import forward_of
from softprompt.prompt import SoftPrompt
from softprompt.training import train

pytestmark = pytest.mark.filterwarnings("ignore")  # what each family's own code warns of

# kind -> how it trains and answers
EXACT = {
    "bart": ("padded", "one row at a time"),  # finds its own positions
    "camembert": ("packed", "together"),  # counts its positions from behind the pad's id
    "deepseek_v3": ("packed", "together"),  # latent attention
    "gemma3n_text": ("packed", "together"),  # per-layer embeddings
    "gemma4_text": ("packed", "together"),  # both
    "gemma4_unified_text": ("packed", "together"),  # heads of two widths
    "granitemoehybrid": ("padded", "one row at a time"),  # states and attention
    "lfm2": ("padded", "one row at a time"),  # convolutions and attention
    "mamba": ("padded", "one row at a time"),  # states alone, under another name than a cache's
    "openai-gpt": ("padded", "one row at a time, without a cache"),
    "recurrent_gemma": ("padded", "one row at a time, without a cache"),  # its state lies on its modules
    "rwkv": ("padded", "one row at a time"),  # gives its state back
}
REFUSED = {
    "cpmant": "token ids and no embeddings",
    "reformer": "AssertionError",  # cannot be trained in eval mode
    "xlm": "mask token",
    "xlnet": "a later token changes earlier answers",
}


def base_of(kind):
    return freeze_base(tiny_model(kind), build_tokenizer(has_bos=False), name="tiny")


@pytest.mark.parametrize(
    "kind", each_of(EXACT, ("bart", "camembert", "deepseek_v3", "gemma4_text", "lfm2", "mamba", "openai-gpt"))
)
def test_a_family_of_each_kind_is_exact(kind):
    outcome = outcome_of(kind)
    assert outcome.result == "exact"
    assert (outcome.training, outcome.answers) == EXACT[kind]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_cannot_be_exact_is_refused_in_a_sentence_before_anything_is_trained(kind):
    with pytest.raises(BaseModelError, match=re.escape(REFUSED[kind])) as refused:
        train(base_of(kind), ["w5 w6 w7", "w8 w9"], TrainConfig(virtual_tokens=2, epochs=1))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("wrong", [0, 2])
def test_logits_at_positions_counted_from_a_wrong_start_are_not_exact(wrong):
    base, pristine = base_of("camembert"), tiny_model("camembert")
    forward = forward_of(base)
    assert forward.first_position == 3
    object.__setattr__(forward, "first_position", wrong)
    with pytest.raises(AssertionError, match="logits of ids"):
        assert_exact(base, forward, pristine)


def test_an_answer_may_use_only_the_positions_behind_the_pad_id():
    base = base_of("camembert")
    assert base.max_length == LIMIT - 3
    request = Request(random_ids(10), SoftPrompt(random_prompt(base, 3)))
    wanted = base.max_length - 13
    (answer,) = generate(base, [request], SamplingConfig(max_new_tokens=wanted, min_new_tokens=wanted))
    assert len(answer.ids) == wanted


def test_a_model_whose_cache_forgets_runs_without_a_cache(monkeypatch):
    base = base_of("mamba")
    plain = type(base.model.backbone).forward

    def forgetful(*args, cache_params=None, **inputs):
        return plain(base.model.backbone, *args, **inputs)

    monkeypatch.setattr(base.model.backbone, "forward", forgetful)
    assert forward_of(base).cache == "none"


def test_a_model_that_embeds_its_ids_twice_is_refused(monkeypatch):
    base = base_of("stablelm")
    plain = base.model.forward

    def twice(input_ids=None, inputs_embeds=None, position_ids=None, **inputs):
        outputs = plain(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, **inputs)
        if input_ids is not None:
            outputs.logits = outputs.logits + base.model.lm_head.weight[input_ids].mean(-1, keepdim=True)
        return outputs

    monkeypatch.setattr(base.model, "forward", twice)
    with pytest.raises(BaseModelError, match="not those on the text's token ids"):
        forward_of(base)


def test_a_base_that_ignores_its_soft_prompt_is_refused(monkeypatch):
    base = base_of("stablelm")
    for layer in base.model.model.layers:  # without attention a token's answers are its own
        monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (0 * hidden_states, None))
    with pytest.raises(BaseModelError, match="alike whatever the soft prompt"):
        forward_of(base)


def test_the_page_names_every_causal_class_once():
    text = causal_part()
    if f"transformers {hf.__version__}," not in text:
        pytest.skip("another transformers than the page's is installed")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows if row[0] != "| ---"] == list(KINDS)
    assert {row[0].removeprefix("| ") for row in rows if row[2] == "not built"} == set(NOT_BUILT)


@pytest.mark.slow
def test_every_causal_class_is_exact_or_refused_or_listed_and_the_page_says_so():
    outcomes = [outcome_of(kind) for kind in KINDS]
    assert {one.result for one in outcomes} == {"exact", "refused", "not built"}
    if f"transformers {hf.__version__}," in causal_part():
        assert page(outcomes) == causal_part()
