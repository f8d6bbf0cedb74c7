"""The text of an answer, printed piece by piece, is that of the whole answer; the truth decodes it all each time."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_bases import build_base
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from softprompt.base import load_base
from softprompt.engine.detokenizer import Detokenizer

WORDS = "Once upon a time, a café in Zürich sold naïve 😀 and 👨‍👩‍👧 to 東京; two  spaces\n\nand two lines. สวัสดี"
MODELS = Path(__file__).resolve().parents[3] / "shared" / "data" / "models"
REAL = {"stories": MODELS / "stories260K-llama", "bloom": MODELS / "bloom-tiny-random"}
SPECIAL = ["<unk>", "<s>", "</s>"]


class SlowTokenizer(PreTrainedTokenizer):
    """One written in Python, over a list of pieces; how these are joined is the subclass's."""

    def __init__(self, pieces, **settings):
        self.pieces = [*SPECIAL, *pieces]
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **settings)

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {piece: index for index, piece in enumerate(self.pieces)}

    def _tokenize(self, text, **settings):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.pieces.index(token) if token in self.pieces else 0

    def _convert_id_to_token(self, index):
        return self.pieces[index]


class SubwordTokenizer(SlowTokenizer):
    """As CTRL's: the end of a word may still change."""

    def convert_tokens_to_string(self, tokens):
        return " ".join(tokens).replace("@@ ", "").strip()


class StrippingTokenizer(SlowTokenizer):
    """As transformers' own over SentencePiece: a space at the end of a text comes with the next word."""

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("▁", " ").strip()


def byte_level():
    """As GPT-2's: the vocabulary lacks most characters of `WORDS`, and has tokens that end inside of one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_fallback():
    """As Llama's: Metaspace, one token per unknown byte, no space at the start of a text."""
    letters = ["▁", "▁▁", "▁a", "▁time", ",", "é", "n", "o", "d", "\ufffd", "<0x>"]
    vocab = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *"bcefghijklmpqrstuvwxyz"]
    merges = []
    numbers = {token: number for number, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(pieces)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_ends():
    """As the first GPT's: a word's last piece says so, and the space behind it comes with the next one."""
    vocab = {token: number for number, token in enumerate([*SPECIAL, "a", "b", "a</w>", "b</w>", "ab</w>", "</w>"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "removed")
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


MADE = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "word ends": word_ends,
    "subwords": lambda: SubwordTokenizer(["hel@@", "lo", "w@@", "orld", "@@", "a"]),
    "stripping": lambda: StrippingTokenizer(["▁", "▁hello", "lo", "▁w", "▁▁"]),
}
NAMES = ["words", "embedded", *MADE, *REAL]


@cache
def base_of(name):
    if name in REAL:
        return load_base(str(REAL[name])) if REAL[name].is_dir() else None
    if name == "embedded":
        return load_base("embedded")
    if name == "words":
        return build_base("llama")
    return dataclasses.replace(build_base("llama", vocab_size=400), tokenizer=MADE[name]())


def base_or_skip(name):
    return base_of(name) or pytest.skip("the shared material is not here")


def truth(base, before, ids, stop=(), min_new_tokens=0):
    """(text, tokens used, stop string): everything decoded after each token."""
    whole, ignored = "", 0
    for count in range(1, len(ids) + 1):
        whole = base.decode_after(before, ids[:count])
        if count <= min_new_tokens:
            ignored = len(whole.rstrip("\ufffd"))
            continue
        starts = {word: whole.find(word, max(0, ignored - len(word) + 1)) for word in stop}
        found = [(start, len(word), word) for word, start in starts.items() if start >= 0]
        if found:
            start, _, word = min(found)
            return whole[:start], count, word
    return whole, len(ids), None


def printed(base, before, ids, stop=(), min_new_tokens=0):
    """The same, piece by piece."""
    answer, pieces = Detokenizer(base, before, stop, min_new_tokens), []
    for count, token in enumerate(ids, 1):
        pieces.append(answer.append(token))
        assert answer.text == "".join(pieces)
        if answer.stopped_by is not None:
            assert [answer.append(token), answer.finish(), answer.text] == ["", "", "".join(pieces)]
            return answer.text, count, answer.stopped_by
    pieces.append(answer.finish())
    assert [answer.finish(), answer.text] == ["", "".join(pieces)]
    return answer.text, len(ids), None


def is_byte(base, token):
    name = base.tokenizer.convert_ids_to_tokens(token)
    return len(name) == 6 and name.startswith("<0x")


def short_runs(base, ids):
    """Ids without the tokens that would make a run of bytes longer than what is judged as a whole."""
    kept, run = [], 0
    for token in ids:
        run = run + 1 if is_byte(base, token) else run if token in base.tokenizer.all_special_ids else 0
        kept += [token] if run < 16 else []
    return kept


def ids_of(base, *pieces):
    """Ids of pieces of the vocabulary, or of the bytes of a text that it lacks."""
    return [base.tokenizer.convert_tokens_to_ids(piece) for piece in pieces]


def bytes_of(base, text):
    return ids_of(base, *(f"<0x{byte:02X}>" for byte in text.encode()))


@st.composite
def cases(draw, base):
    """A text, an answer, stop strings (most of them in the answer) and the tokens before the first that counts."""
    everything = st.integers(0, len(base.tokenizer) - 1)
    few = st.sampled_from(draw(st.lists(everything, min_size=1, max_size=4)))
    real = st.sampled_from(base.encode(WORDS) or (3,))
    ids = st.lists(everything | few | real, max_size=50)
    spoken = st.integers(0, len(WORDS)).map(lambda start: list(base.encode(WORDS[start : start + 40])))
    before, answer = draw(ids | spoken), draw(ids | spoken)
    both = short_runs(base, before + answer)
    before = both[: len(short_runs(base, before))]
    answer = both[len(before) :]
    whole = base.decode_after(before, answer)
    cut = st.tuples(st.integers(0, len(whole)), st.integers(1, 6)).map(lambda at: whole[at[0] : sum(at)] or "never")
    words = draw(st.lists(cut | st.sampled_from(["never", "ab", "\ufffd", "\n"]), max_size=3))
    unclear = any("\ufffd" in word for word in words)  # where a broken character ends is not worth a definition
    return before, answer, tuple(words), 0 if unclear else draw(st.integers(0, 5))


@pytest.mark.parametrize("name", NAMES)
def test_all_pieces_are_the_whole_up_to_the_first_stop_string(name):
    base = base_or_skip(name)

    @settings(max_examples=80, deadline=None)
    @given(cases(base))
    def check(case):
        before, ids, stop, min_new_tokens = case
        assert printed(base, before, ids) == truth(base, before, ids)
        assert printed(base, before, ids, stop, min_new_tokens) == truth(base, before, ids, stop, min_new_tokens)

    check()


@pytest.mark.parametrize(
    ("name", "before", "text"),
    [
        ("byte level", "Once", " café 😀 東京"),
        ("byte fallback", "Once", "zno 😀"),
        ("byte fallback", "Once", "a time, éno"),
        ("words", "w5", "w6 w7"),
        ("embedded", "Once", " upon a 😀"),
    ],
)
def test_the_text_of_each_token_alone_is_not_the_truth(name, before, text):
    """The control: where this did as well, the law above would say nothing."""
    base = base_of(name)
    head, ids = base.encode(before), base.encode(text)
    assert "".join(base.decode((token,)) for token in ids) != truth(base, head, ids)[0]
    assert printed(base, head, ids) == truth(base, head, ids)


@pytest.mark.parametrize("name", ["words", "embedded", "byte level"])
def test_nothing_is_held_back_but_the_last_character(name):
    base = base_of(name)
    ids = base.encode(WORDS) or tuple(range(3, 90))
    answer = Detokenizer(base, ids)
    for count, token in enumerate(ids * 2, 1):
        answer.append(token)
        held = base.decode_after(ids, (ids * 2)[:count])[len(answer.text) :]
        assert held in ("", "\ufffd")


def letter_of(byte):
    """How byte-level vocabularies write a byte: as itself where it can be seen, the others from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in seen else chr(256 + [other for other in range(256) if other not in seen].index(byte))


@pytest.mark.parametrize("broken", [[0xE2], [0x82], [0xF0, 0x9F], [0xE2, 0x82, 0x41], [0xFF]], ids=str)
@pytest.mark.parametrize("name", ["byte level", "embedded"])
def test_broken_bytes_do_not_hold_text_back(name, broken):
    base = base_of(name)
    ids = ids_of(base, *(letter_of(byte) for byte in broken)) * 50
    answer = Detokenizer(base, base.encode("Once"))
    pieces = [answer.append(token) for token in ids]
    assert len(answer.text) >= len(base.decode(ids)) - 1
    assert max(map(len, pieces)) <= 2
    assert answer.text + answer.finish() == base.decode(ids)


def test_a_run_of_bytes_is_printed_when_it_ends():
    base = base_of("byte fallback")
    answer = Detokenizer(base, (1,))
    ids = [*bytes_of(base, "日本"), *ids_of(base, "▁time", "▁a")]
    assert [answer.append(token) for token in ids] == [""] * 6 + ["日本 time", " a"]


def test_one_wrong_byte_breaks_the_whole_run_before_any_of_it_is_printed():
    base = base_of("byte fallback")
    ids = [*bytes_of(base, "日本")[:5], *ids_of(base, "▁time")]
    assert printed(base, (1,), ids) == (base.decode(ids), 6, None) == ("\ufffd" * 5 + " time", 6, None)


@pytest.mark.parametrize("before", ["", "no", "สวัสดีสวัสดี"])
def test_a_long_run_of_bytes_is_printed_in_whole_characters(before):
    """No end of the run in sight: whole characters come, at the latest every few, and all are the decoder's."""
    base = base_of("byte fallback")
    text = "สวัสดี😀é日本" * 10
    answer, pieces = Detokenizer(base, base.encode(before)), []
    for token in [*bytes_of(base, text), *ids_of(base, "▁time")]:
        pieces.append(answer.append(token))
        assert "\ufffd" not in pieces[-1]
    assert "".join(pieces) == text + " time"
    assert max(map(len, pieces)) <= 17


def test_printed_characters_of_a_long_byte_run_stay_when_the_run_breaks():
    """The documented limit: here the decoder would take back what was printed."""
    base = base_of("byte fallback")
    ids = [*bytes_of(base, "สวัสดีสวัสดี"), *bytes_of(base, "é")[:1]]
    text = printed(base, base.encode("no"), ids)[0]
    assert set(base.decode_after(base.encode("no"), ids)) == {"\ufffd"}
    assert text.startswith("สวัสดี") and text.endswith("\ufffd")


@pytest.mark.parametrize("last", ["broken", "whole"])
def test_a_character_that_the_text_begins_and_the_answer_ends(last):
    base = base_of("byte fallback")
    first, rest = bytes_of(base, "é")
    before, ids = [*ids_of(base, "▁a"), first], [rest, *ids_of(base, *(["o"] if last == "whole" else ["<0xE2>", "o"]))]
    assert printed(base, before, ids) == truth(base, before, ids)


def test_spaces_that_a_decoder_strips_from_the_end_come_with_the_next_word():
    """A window of nothing but spaces would lose them."""
    base = base_of("stripping")
    before = ids_of(base, "▁", "▁hello", *["▁"] * 40, "▁hello", *["▁"] * 10)
    assert printed(base, before, ids_of(base, "▁", "▁w")) == (" " * 12 + "w", 2, None)
    assert base.decode_after(before, ids_of(base, "▁", "▁w")) == " " * 12 + "w"


class Counting:
    """A tokenizer that notes how many ids it is given at once."""

    def __init__(self, tokenizer):
        self._tokenizer, self.counts = tokenizer, []

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids, **settings):
        self.counts.append(len(ids))
        return self._tokenizer.decode(ids, **settings)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("words", [7, 8, 9]),
        ("words", [2]),  # EOS, where it is ignored
        ("words", [2, 2, 2, 7]),
        ("embedded", [300, 500, 700]),
        ("byte fallback", [259]),  # spaces
        ("byte fallback", [13]),  # newlines, each a byte
        ("byte fallback", [233, 134]),  # broken bytes
        ("byte fallback", [233, 134, 259]),
    ],
)
def test_the_work_per_token_grows_with_neither_the_answer_nor_the_text(name, ids):
    base = base_of(name)
    counts = {}
    for length in (60, 600):
        tokenizer = Counting(base.tokenizer)
        answer = Detokenizer(dataclasses.replace(base, tokenizer=tokenizer), [1, *base.encode("w5"), *ids * length])
        for token in ids * length:
            answer.append(token)
        counts[length] = sum(tokenizer.counts) / length / len(ids)
        assert max(tokenizer.counts) <= 96
    assert counts[600] < 1.2 * counts[60]


@pytest.mark.parametrize(
    ("stop", "min_new_tokens", "expected"),
    [
        (("w7",), 0, ("w5 w6 ", 3, "w7")),
        (("6 w", "w6"), 0, ("w5 ", 2, "w6")),
        (("w6 w7", " w6"), 0, ("w5", 2, " w6")),
        (("w5 w6 w8", "w7"), 0, ("w5 w6 ", 3, "w7")),  # what is held as the beginning of the first is printed
        (("w5 w6 w7 w9", "w5 w6 w7 w8 w9"), 0, ("w5 w6 w7 w8 w5", 5, None)),
        (("5",), 0, ("w", 1, "5")),
        (("5",), 1, ("w5 w6 w7 w8 w", 5, "5")),  # vLLM's rule
        (("w5 w6",), 1, ("", 2, "w5 w6")),  # it ends behind the first token
        (("w5 w6",), 2, ("w5 w6 w7 w8 w5", 5, None)),
        (("w6", "w6 w8"), 2, ("w5 w6 w7 w8 w5", 5, None)),
        (("w7", "w7 w"), 0, ("w5 w6 ", 3, "w7")),
    ],
)
def test_an_answer_ends_before_its_first_stop_string(stop, min_new_tokens, expected):
    base = base_of("words")
    before, ids = [9], [5, 6, 7, 8, 5]
    text, count, stopped_by = printed(base, before, ids, stop, min_new_tokens)
    assert (text.removeprefix(" "), count, stopped_by) == expected
    assert (text, count, stopped_by) == truth(base, before, ids, stop, min_new_tokens)


def test_of_two_stop_strings_that_begin_together_the_shorter_is_named():
    """It was complete first, whatever the tokens."""
    base = base_of("words")
    assert printed(base, [9], [5, 66], ("w6", "w66")) == (" w5 ", 2, "w6")
    assert printed(base, [9], [5, 66], ("w66", "w6")) == (" w5 ", 2, "w6")


def test_the_beginning_of_a_stop_string_is_held_until_it_is_none():
    base = base_of("words")
    answer = Detokenizer(base, [9], ("w6 w7 w8",))
    assert [answer.append(token) for token in [5, 6, 7, 6, 7, 9]] == [" w5", " ", "", "w6 w7 ", "", "w6 w7 w9"]
    assert [answer.append(token) for token in [6, 7]] == [" ", ""]
    assert [answer.finish(), answer.finish()] == ["w6 w7", ""]


def test_a_newline_that_is_a_byte_stops_at_once():
    """It is not certain yet (a broken byte may follow), but the answer ends with it."""
    base = base_of("byte fallback")
    assert printed(base, [1], ids_of(base, "▁a", "<0x0A>", "▁a"), ("\n",)) == ("a", 2, "\n")
