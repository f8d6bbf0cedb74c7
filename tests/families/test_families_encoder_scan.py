"""Encoders of every kind, from tiny models: each is exact, or refused in one sentence. The slow test has all."""

import re

import pytest
import transformers as hf
from encoder_scan import KINDS, TITLE, assert_exact, outcome_of, section, tiny_encoder
from family_scan import PAGE
from support.encoders import build_encoder_tokenizer
from support.family_configs import each_of

from softprompt.base import freeze_base
from softprompt.errors import BaseModelError
from softprompt.families import forward_of

pytestmark = pytest.mark.filterwarnings("ignore")  # what each family's own code warns of

EXACT = {
    "convbert": "one at a time",  # its convolutions read pads
    "ernie": "packed",
    "flaubert": "padded",  # a language model of masked words under another name
    "fnet": "one at a time",  # its Fourier transform has no mask
    "gte": "packed",  # rotary positions
    "longformer": "padded",  # windows of its own
    "luke": "padded",  # entities beside the words
    "mobilebert": "padded",  # a bottleneck in each layer
    "mpnet": "padded",  # buckets of distances
    "xmod": "packed",  # adapters of languages
}
REFUSED = {
    "esm": "its states on the embeddings of a text are not those on its token ids",
    "perceiver": "its input embeddings are a Parameter",
    "reformer": "AssertionError",
}


@pytest.mark.parametrize("kind", each_of(EXACT, ("fnet", "flaubert", "longformer")))
def test_an_encoder_of_each_kind_is_exact(kind):
    outcome = outcome_of(kind)
    assert outcome.result == "exact"
    assert outcome.rows == EXACT[kind]


@pytest.mark.parametrize("kind", each_of(REFUSED, ("esm",)))
def test_an_encoder_that_cannot_be_exact_is_refused_in_a_sentence(kind):
    with pytest.raises(BaseModelError, match=re.escape(REFUSED[kind])) as refused:
        forward_of(freeze_base(tiny_encoder(kind), build_encoder_tokenizer(), name="tiny"))
    assert "\n" not in str(refused.value)


def test_an_encoder_that_leaves_keys_out_by_chance_is_refused():
    model = tiny_encoder("big_bird")
    model.config.attention_type = "block_sparse"
    with pytest.raises(BaseModelError, match="by chance; set its attention_type to original_full"):
        forward_of(freeze_base(model, build_encoder_tokenizer(), name="tiny"))


def test_an_encoder_that_ignores_its_soft_prompt_is_refused(monkeypatch):
    model = tiny_encoder("bert")
    for layer in model.base_model.encoder.layer:  # without attention a token's states are its own
        monkeypatch.setattr(layer.attention.self, "forward", lambda hidden, *_, **__: (0 * hidden, None))
    with pytest.raises(BaseModelError, match="alike whatever the soft prompt"):
        forward_of(freeze_base(model, build_encoder_tokenizer(), name="tiny"))


def test_an_encoder_whose_pads_are_seen_runs_rows_one_at_a_time_and_is_exact(monkeypatch):
    model, pristine = tiny_encoder("bert"), tiny_encoder("bert")
    plain = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda *args, attention_mask=None, **more: plain(*args, **more))
    base = freeze_base(model, build_encoder_tokenizer(), name="tiny")
    forward = forward_of(base)
    assert forward.max_batchable_length == 0
    assert "one at a time" in forward.packing.note
    assert_exact(base, forward, pristine)


def rows_of_page():
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {TITLE}\n\n")[2].partition("\n## ")[0]
    return text, [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]


def test_the_page_names_every_class_for_masked_words_once():
    text, rows = rows_of_page()
    if f"transformers {hf.__version__}," not in text:
        pytest.skip("another transformers than the page's is installed")
    assert [row[0].removeprefix("| ") for row in rows] == list(KINDS)


@pytest.mark.slow
def test_every_class_for_masked_words_is_exact_or_refused_and_the_page_says_so():
    outcomes = [outcome_of(kind) for kind in KINDS]
    assert {one.result for one in outcomes} == {"exact", "refused"}
    text, _ = rows_of_page()
    if f"transformers {hf.__version__}," in text:
        assert section(outcomes) == text
