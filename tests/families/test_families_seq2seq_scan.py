"""Encoder-decoders of every kind, from tiny models: exact, or refused in one sentence. The slow test has all."""

import re

import pytest
import transformers as hf
from family_scan import PAGE
from seq2seq_scan import KINDS, TITLE, outcome_of, section, tiny_seq2seq
from support.family_configs import each_of
from support.seq2seq_bases import build_tokenizer

from softprompt.base import freeze_base
from softprompt.errors import BaseModelError
from softprompt.families import forward_of

pytestmark = pytest.mark.filterwarnings("ignore")  # what each family's own code warns of

EXACT = {
    "blenderbot": ("packed", "together"),
    "blenderbot-small": ("packed", "together"),
    "led": ("padded", "one row at a time"),  # windows of its own
    "marian": ("packed", "together"),  # sinusoids, and biases of the logits
    "plbart": ("packed", "together"),
    "switch_transformers": ("padded", "one row at a time"),  # experts
}
REFUSED = {
    "fsmt": "missing 1 required positional argument: 'input_ids'",
    "prophetnet": "transformers' own generate does not run on it",
    "t5gemma": "not those on the text's token ids",
}


@pytest.mark.parametrize("kind", each_of(EXACT, ("marian",)))
def test_an_encoder_decoder_of_each_kind_is_exact(kind):
    outcome = outcome_of(kind)
    assert (outcome.result, outcome.training, outcome.answers) == ("exact", *EXACT[kind])


@pytest.mark.parametrize("kind", each_of(REFUSED, ("fsmt",)))
def test_an_encoder_decoder_that_cannot_be_exact_is_refused_in_a_sentence(kind):
    with pytest.raises(BaseModelError, match=re.escape(REFUSED[kind])) as refused:
        forward_of(freeze_base(tiny_seq2seq(kind), build_tokenizer(), name="tiny"))
    assert "\n" not in str(refused.value)


def rows_of_page():
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {TITLE}\n\n")[2].partition("\n## ")[0]
    return text, [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]


def test_the_page_names_every_encoder_decoder_of_text_once():
    text, rows = rows_of_page()
    if f"transformers {hf.__version__}," not in text:
        pytest.skip("another transformers than the page's is installed")
    assert [row[0].removeprefix("| ") for row in rows] == list(KINDS)


@pytest.mark.slow
def test_every_encoder_decoder_is_exact_or_refused_and_the_page_says_so():
    outcomes = [outcome_of(kind) for kind in KINDS]
    assert {one.result for one in outcomes} == {"exact", "refused"}
    text, _ = rows_of_page()
    if f"transformers {hf.__version__}," in text:
        assert section(outcomes) == text
