"""Guided decoding: answers that must be one of a list or satisfy a JSON schema, by llguidance's grammars.

For each token, a guide lists the ids that are allowed. White space between a JSON text's parts is that of `json.dumps`;
a schema may free it: `"x-guidance": {"whitespace_flexible": true}`. llguidance's limits bound compiling, which any
thread may do; a grammar that proves too large only during an answer fails its request with the reason.

Schemas are read with closed objects and bounded integers, so that small models end: the JSON Schema standard lets an
object without `additionalProperties` have any others, and an integer any number of digits. What a schema sets counts.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions, LLParserLimits
from collections.abc import Iterator
from typing import Any

# As json.dumps writes it: a model that may put spaces wherever JSON allows them may never put anything else.
_WRITTEN: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_JSON_BYTES = frozenset(b'{}[]":,+-.0123456789eEtrufalsn')
_MAX_GRAMMARS = 64  # grammars
_MAX_LEXER_STATES = 2**16  # of one answer, some 300 bytes each; llguidance's own limit is four times that
_REWORDED = {"NoExtensionBias": "no text satisfies it"}  # llguidance's message: ours
_LONGEST_REASON = 200  # characters of llguidance's message that are passed on


class Guide:
    """The state of one answer in its grammar."""

    def __init__(self, matcher: LLMatcher, num_tokens: int, ending_ids: Sequence[int], forbidden_ids: Sequence[int]):
        self._matcher = matcher
        self._bits = np.zeros((num_tokens + 31) // 32, dtype=np.int32)
        self._ending_ids = np.array(ending_ids, dtype=np.int64)
        self._forbidden_ids = np.array(forbidden_ids, dtype=np.int64)
        self._has_ended = False
        self._is_stuck = False

    def allowed(self, width: int) -> NDArray[np.bool_]:
        """Which ids [width] are allowed next: an end only where the grammar is satisfied, ids without a token never.

        All false when llguidance gives up on the grammar.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            self._is_stuck = True
            return np.zeros(width, dtype=np.bool_)
        flags = np.unpackbits(self._bits.view(np.uint8), count=width, bitorder="little").view(np.bool_)
        flags[self._forbidden_ids[self._forbidden_ids < width]] = False
        flags[self._ending_ids[self._ending_ids < width]] = self._matcher.is_accepting()
        self._is_stuck = not flags.any()
        return flags

    def append(self, token: int) -> None:
        if token in self._ending_ids:
            self._has_ended = True
        else:
            self._matcher.consume_token(token)

    @property
    def problem(self) -> str | None:
        """Why no token is allowed although the grammar is not satisfied; None otherwise."""
        if not self._is_stuck:
            return None
        reason = _short(self._matcher.get_error()) or "nothing may follow"
        return f"the answer's JSON schema or choice cannot be followed any further: {reason}; make it simpler"

    @property
    def is_complete(self) -> bool:
        """Whether the grammar is satisfied and nothing can follow."""
        return self._has_ended or (self._matcher.is_stopped() and not self._matcher.is_error())


class GuideCache:
    """The guides of one base, compiled once; its tokenizer is read for the first of them."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._tokenizer: LLTokenizer | None = None
        self._spelt: frozenset[int] = frozenset()  # bytes that some token is
        self._compiled: OrderedDict[tuple[str | None, tuple[str, ...], str | None], LLMatcher] = (
            OrderedDict()
        )  # latest last
        self._lock = threading.Lock()  # of what is compiled; never while something is being compiled
        self._reading = threading.Lock()  # of the tokenizer

    def new_guide(self, sampling: SamplingConfig, ending_ids: Sequence[int], salt: str | None = None) -> Guide | None:
        """A fresh guide, or None where the settings ask for none. Compiled ones are shared within a salt alone.

        Raises ConfigError for a grammar that cannot be used or that this base cannot spell, and
        MissingDependencyError without llguidance.
        """
        if not sampling.is_guided:
            return None
        tokenizer = self._read_tokenizer()
        key = (salt, sampling.choice, sampling.json_schema)
        with self._lock:
            matcher = self._compiled.get(key)
        matcher = matcher or self._matcher(tokenizer, sampling)
        with self._lock:
            self._compiled[key] = matcher  # compiling may take a while, copying takes none
            self._compiled.move_to_end(key)
            if len(self._compiled) > _MAX_GRAMMARS:
                self._compiled.popitem(last=False)
        return Guide(matcher.deep_copy(), tokenizer.vocab_size, ending_ids, (tokenizer.eos_token, *self._base.stop_ids))

    def _matcher(self, tokenizer: LLTokenizer, sampling: SamplingConfig) -> LLMatcher:
        from llguidance import LLMatcher

        name = "choice" if sampling.json_schema is None else "json_schema"
        try:
            matcher = LLMatcher(tokenizer, self._grammar(sampling), log_level=0, limits=_limits())
            matcher.compute_bitmask()  # some grammars fail at their first token
        except ConfigError:
            raise
        except ValueError as error:  # what is no schema to llguidance
            raise ConfigError(f"{name} cannot be followed: {_short(str(error))}") from error
        if matcher.is_error():
            raise ConfigError(f"{name} cannot be followed: {_short(matcher.get_error())}")
        return matcher

    def _grammar(self, sampling: SamplingConfig) -> str:
        from llguidance import LLMatcher

        if sampling.json_schema is None:
            self._check_spelling("choice", frozenset(b"".join(_utf8(text) for text in sampling.choice)))
            return LLMatcher.grammar_from_regex("|".join(map(_as_regex, sampling.choice)))
        schema = bounded_schema(sampling.json_schema)
        self._check_spelling("json_schema", _JSON_BYTES | set(_utf8(json.dumps(schema, ensure_ascii=False))))
        return LLMatcher.grammar_from_json_schema(json.dumps({} if schema is True else schema), defaults=_WRITTEN)

    def _check_spelling(self, name: str, needed: frozenset[int]) -> None:
        """llguidance leaves out what no token spells, and the answer would not be what was asked for."""
        missing = sorted(needed - self._spelt)
        if missing:
            raise ConfigError(
                f"{name} cannot be followed by base {self._base.name!r}: it has no token for {bytes(missing[:8])!r}"
            )

    def _read_tokenizer(self) -> LLTokenizer:
        with self._reading:
            if self._tokenizer is None:
                tokenizer = _tokenizer_of(self._base)
                spellings = map(tokenizer.decode_bytes, ([token] for token in range(tokenizer.vocab_size)))
                self._spelt = frozenset(spelling[0] for spelling in spellings if len(spelling) == 1)
                self._tokenizer = tokenizer
            return self._tokenizer


def _tokenizer_of(base: Base) -> LLTokenizer:
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            "choice and json_schema need llguidance; pip install 'softprompt[guided]'"
        ) from error
    stop_id = next((token for token in base.stop_ids if token < len(base.tokenizer)), None)  # the others `Guide` allows
    try:
        return from_tokenizer(base.tokenizer, eos_token=stop_id)  # type: ignore[arg-type]  # refused below
    except ValueError as error:
        raise ConfigError(
            f"choice and json_schema do not go with base {base.name!r}: llguidance cannot read its tokenizer, "
            f"a {type(base.tokenizer).__name__} ({_short(str(error))})"
        ) from error


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=_MAX_LEXER_STATES)


def _as_regex(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")  # half a surrogate pair is refused by llguidance


def _short(reason: str) -> str:
    """llguidance's first sentence; what follows is its own state."""
    sentence = " ".join(reason.split("<state>")[0].split("; consider")[0].split())
    is_long = len(sentence) > _LONGEST_REASON
    half = _LONGEST_REASON // 2
    return _REWORDED.get(sentence, f"{sentence[:half]} ... {sentence[-half:]}" if is_long else sentence)


Schema = dict[str, Any] | bool  # Any: JSON
LARGEST_INTEGER = 10**15 - 1
DEEPEST = 120  # levels; llguidance reads 127

_SUBSCHEMAS = (
    "additionalProperties", "items", "contains", "not", "if", "then", "else", "propertyNames", "unevaluatedProperties",
    "unevaluatedItems", "additionalItems",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_COMBINING = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")
_OPENING = ("additionalProperties", "unevaluatedProperties", "patternProperties")
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def bounded_schema(text: str) -> Schema:
    """The schema with our defaults. Raises ConfigError for a text that is no schema."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema is not JSON: {error}") from error
    if _depth(schema) > DEEPEST:
        raise ConfigError(f"json_schema is nested more than {DEEPEST} levels deep; make it flatter")
    if not isinstance(schema, dict | bool):
        raise ConfigError("json_schema cannot be followed: schema must be an object or boolean")
    return schema if isinstance(schema, bool) else _with_defaults(schema)


def _depth(value: Any) -> int:  # Any: JSON
    levels, level = 0, [value]
    while level := [each for item in level for each in _items(item)]:
        levels += 1
    return levels


def _items(value: Any) -> list[Any]:  # Any: JSON
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _with_defaults(schema: dict[str, Any]) -> dict[str, Any]:
    is_closing = not any(_combines(each) for each in _all(schema))
    return _rewritten(schema, is_closing)


def _rewritten(schema: dict[str, Any], is_closing: bool) -> dict[str, Any]:
    found = {key: _rewritten_value(key, value, is_closing) for key, value in schema.items()}
    if is_closing and _names_all(schema):
        found["additionalProperties"] = False
    if _is_integer(schema):
        found |= _missing_bounds(schema)
    return found


def _names_all(schema: dict[str, Any]) -> bool:
    """Whether `properties` are meant to be all that the object has."""
    named, required = schema.get("properties"), schema.get("required")
    if not isinstance(named, dict) or any(key in schema for key in _OPENING):
        return False
    return not isinstance(required, list) or all(isinstance(name, str) and name in named for name in required)


def _rewritten_value(key: str, value: Any, is_closing: bool) -> Any:  # Any: JSON
    if key in _MAPS and isinstance(value, dict):
        return {name: _if_schema(each, is_closing) for name, each in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [_if_schema(each, is_closing) for each in value]
    return _if_schema(value, is_closing) if key in _SUBSCHEMAS else value


def _if_schema(value: Any, is_closing: bool) -> Any:  # Any: JSON
    return _rewritten(value, is_closing) if isinstance(value, dict) else value


def _all(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and all within it."""
    yield schema
    for key, value in schema.items():
        within = (
            value.values() if key in _MAPS and isinstance(value, dict)
            else value if key in _LISTS and isinstance(value, list)
            else [value] if key in _SUBSCHEMAS else []
        )  # fmt: skip
        for each in within:
            if isinstance(each, dict):
                yield from _all(each)


def _combines(schema: dict[str, Any]) -> bool:
    """Whether several schemas describe one object: each closed, no object would satisfy all."""
    several = schema.get("allOf")
    has_own = "properties" in schema and any(key in schema for key in _COMBINING)
    return has_own or (isinstance(several, list) and len(several) > 1)


def _is_integer(schema: dict[str, Any]) -> bool:
    kind = schema.get("type")
    is_listed = "enum" in schema or "const" in schema
    return not is_listed and (kind == "integer" or (isinstance(kind, list) and "integer" in kind))


def _missing_bounds(schema: dict[str, Any]) -> dict[str, int]:
    """The default limits on the sides that have none, where an integer lies between."""
    given = [schema[key] for key in _BOUNDS if isinstance(schema.get(key), int | float)]
    if any(abs(bound) >= LARGEST_INTEGER for bound in given):
        return {}
    found = {} if "minimum" in schema or "exclusiveMinimum" in schema else {"minimum": -LARGEST_INTEGER}
    has_most = "maximum" in schema or "exclusiveMaximum" in schema
    return found if has_most else {**found, "maximum": LARGEST_INTEGER}
