"""A base's tokenizer: whether it fits, the ids of a text, the special ids before it and the ids that end it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from softprompt.base.generation import eos_ids_of
from softprompt.errors import BaseModelError, EncodingError, shortened
from softprompt.guard import cause_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = "a"
_MOST_PROBES = 64  # tokens of a vocabulary that are decoded and encoded again


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, name: str, vocab_size: int, **options: bool
) -> tuple[int, ...]:
    """Token ids of a text, nothing added in front or behind.

    Raises EncodingError where the tokenizer of base `name` cannot encode it (one of words without an unknown token),
    or gives an id that the base, which embeds `vocab_size` of them, does not have.
    """
    try:
        ids = tuple(tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the Rust library raises bare Exceptions, and panics that are not even that
        raise EncodingError(
            f"the tokenizer of base {name!r} cannot encode the text {shortened(text)} ({cause_of(error)})"
        ) from error
    if ids and max(ids) >= vocab_size:
        raise EncodingError(
            f"token {tokenizer.convert_ids_to_tokens(max(ids))!r} has id {max(ids):,}, but base {name!r} embeds ids "
            f"below {vocab_size:,}; leave it out of the text {shortened(text)}, or use the base's own tokenizer"
        )
    return ids


def encode_with_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, name: str, vocab_size: int
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Token ids as `encode_text` gives them, and the characters of the text that each is made of: first, end.

    Raises EncodingError too where the tokenizer does not say, as those in Python do not.
    """
    if not tokenizer.is_fast:
        raise EncodingError(
            f"the tokenizer of base {name!r} ({type(tokenizer).__name__}) does not say which characters a token is "
            "made of; words and spans of a text need a fast tokenizer (tokenizer.json)"
        )
    ids = encode_text(tokenizer, text, name, vocab_size, split_special_tokens=True)
    found = tokenizer(
        text, add_special_tokens=False, verbose=False, split_special_tokens=True, return_offsets_mapping=True
    )
    return ids, tuple((first, end) for first, end in found["offset_mapping"])


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str, vocab_size: int) -> None:
    """Raises BaseModelError for a tokenizer that cannot belong to this base.

    It may have fewer tokens than the base embeds (padded tables), and added tokens beyond them, which are refused where
    a text holds one. transformers makes an empty tokenizer where the files are missing: that is refused.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    own = {token: index for token, index in vocabulary.items() if token not in added}
    if not own and not _encodes_some_text(tokenizer, vocabulary):
        raise BaseModelError(
            f"the tokenizer of base {name!r} has no vocabulary ({len(vocabulary):,} tokens for {vocab_size:,} "
            "embeddings); is one of its files missing, for example tokenizer.json?"
        )
    largest = max(own.values(), default=-1)
    if largest >= vocab_size:
        raise BaseModelError(
            f"the tokenizer of base {name!r} has ids up to {largest:,}, but the base embeds ids below {vocab_size:,}; "
            "it belongs to another base"
        )
    beyond = [i for i in (*bos_ids_of(tokenizer), eos_id_of(tokenizer)) if i is not None and not 0 <= i < vocab_size]
    if beyond:
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        raise BaseModelError(
            f"the tokenizer of base {name!r} begins or ends texts with {token!r}, id {beyond[0]:,}, but the base has "
            f"only {vocab_size:,} embeddings; correct its bos_token or eos_token"
        )
    if not _encodes_some_text(tokenizer, own):
        raise BaseModelError(
            f"the tokenizer of base {name!r} makes every text its unknown token or nothing at all ({len(own):,} tokens "
            f"for {vocab_size:,} embeddings); is one of its files missing, tokenizer.json or the vocabulary?"
        )


def bos_ids_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text; empty for GPT-2 or Bloom, BOS for Llama."""
    return _added_ids(tokenizer)[0]


def end_ids_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts behind a text: [SEP] for BERT, EOS for T5; empty for Llama."""
    return _added_ids(tokenizer)[1]


def target_bos_ids_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts before what the decoder of an encoder-decoder is to write (`text_target`)."""
    return _added_ids(tokenizer, argument="text_target")[0]


def pair_ids_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts between two texts: [SEP] for BERT, </s></s> for RoBERTa; empty for GPT-2."""
    for probe in _probes(tokenizer):
        with suppress(Exception):  # a tokenizer of words cannot encode a word that it does not have
            both = list(tokenizer(probe, probe, split_special_tokens=True)["input_ids"])
            plain = list(tokenizer(probe, add_special_tokens=False, split_special_tokens=True)["input_ids"])
            _, rest = _around(plain, both)
            second = [first for first in range(len(rest)) if list(rest[first : first + len(plain)]) == plain]
            return rest[: second[-1]] if plain and second else ()
    return ()


def second_type_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token type that the tokenizer gives the second text of a pair: 1 for BERT, 0 where it gives none."""
    for probe in _probes(tokenizer):
        with suppress(Exception):  # a tokenizer of words cannot encode a word that it does not have
            types = tokenizer(probe, probe).get("token_type_ids")
            return int(types[-1]) if types else 0
    return 0


def _added_ids(tokenizer: PreTrainedTokenizerBase, argument: str = "text") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and behind a text, or behind a target."""
    for probe in _probes(tokenizer):
        with suppress(Exception):  # a tokenizer of words cannot encode a word that it does not have
            with_special = list(tokenizer(**{argument: probe})["input_ids"])
            plain = list(tokenizer(**{argument: probe}, add_special_tokens=False)["input_ids"])
            return _around(plain, with_special)
    return (), ()


def _around(plain: list[int], with_special: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for first in range(len(with_special) - len(plain) + 1):
        if with_special[first : first + len(plain)] == plain:
            return tuple(with_special[:first]), tuple(with_special[first + len(plain) :])
    return (), ()


def eos_id_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that ends a text, or None where the tokenizer names none."""
    eos_id = tokenizer.eos_token_id
    assert eos_id is None or isinstance(eos_id, int)
    return eos_id


def stop_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[int, ...]:
    """Every id that ends an answer: the tokenizer's EOS and those of the model's generation settings."""
    ids = {eos_id_of(tokenizer), *eos_ids_of(getattr(model, "generation_config", None), name)}
    return tuple(sorted(i for i in ids if i is not None))


def _encodes_some_text(tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int]) -> bool:
    """Whether some text of its vocabulary is encoded to more than unknown and special tokens."""
    empty = {*tokenizer.all_special_ids, tokenizer.unk_token_id}
    for text in _probes(tokenizer, vocabulary):
        with suppress(Exception):  # a tokenizer of words cannot encode a word that it does not have
            if set(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]) - empty:
                return True
    return False


def _probes(tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int] | None = None) -> Iterator[str]:
    """Texts that it should be able to encode: a letter, then some tokens of its vocabulary that are not special."""
    yield _PROBE
    yield from islice(_texts(tokenizer, tokenizer.get_vocab() if vocabulary is None else vocabulary), _MOST_PROBES)


def _texts(tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int]) -> Iterator[str]:
    special = set(tokenizer.all_special_ids)
    for index in vocabulary.values():
        if index not in special:
            with suppress(Exception):
                text = tokenizer.decode([index])
                if isinstance(text, str) and text.strip():
                    yield text
