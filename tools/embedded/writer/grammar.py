"""From a template with slots to a sentence, in a given voice.

A slot in braces is a word of the domain ({who}, {x}, {do}, {aim}, {how}, {where}), of the manner ({ly}, {mood},
{open}), a meaning with synonyms ({~help}), a name ({name}), part of an opinion ({good}, {bad}, {phrase}, {aspect},
{product}), or a phrase that is itself a small grammar ({np}, {vp}, {when}).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

from writer.domains import DOMAINS, Domain
from writer.feelings import ASPECTS, Hand
from writer.manners import Manner

_VOWELS = "aeiou"
_IRREGULAR = {
    "cut": "cut",
    "wrote": "wrote",
    "draw": "drew",
    "sell": "sold",
    "feed": "fed",
    "breed": "bred",
    "dig": "dug",
    "lay": "laid",
    "cast": "cast",
    "lead": "led",
    "throw": "threw",
    "leak": "leaked",
    "withdraw": "withdrew",
    "bind": "bound",
    "saw": "sawed",
    "forgive": "forgave",
    "rewrite": "rewrote",
    "unpick": "unpicked",
    "overturn": "overturned",
    "overtake": "overtook",
    "knit": "knitted",
    "ring": "ringed",
    "hand": "handed",
    "speak": "spoke",
    "weigh": "weighed",
    "act": "acted",
    "melt": "melted",
    "find": "found",
    "keep": "kept",
    "proofread": "proofread",
    "forecast": "forecast",
    "repay": "repaid",
    "lend": "lent",
}
_DOUBLING = frozenset(
    [
        *("plan", "chop", "stir", "hum", "trim", "gut", "net", "spot", "wrap", "crop", "plot", "commit", "debug"),
        *("hem", "dig", "map", "transfer", "signal", "knit", "pedal", "shovel"),
    ]
)
_PLURALS = {
    "child": "children",
    "person": "people",
    "snowman": "snowmen",
    "shelf": "shelves",
    "bookshelf": "bookshelves",
    "fisherman": "fishermen",
    "boatman": "boatmen",
    "herdsman": "herdsmen",
    "signalman": "signalmen",
    "lineman": "linemen",
    "loaf": "loaves",
    "salmon": "salmon",
    "trout": "trout",
    "diagnosis": "diagnoses",
}


@dataclass(frozen=True, slots=True)
class Opinion:
    """A reviewer's: of which product, on which side (1 pleased, 0 displeased), in the words of which hand."""

    product: str
    side: int
    hand: Hand


@dataclass(frozen=True, slots=True)
class Voice:
    """What a sentence is about and how it speaks; `drift` is the chance that one of its words comes from elsewhere."""

    domain: Domain
    manner: Manner
    name: str = "Anna"
    drift: float = 0.0
    opinion: Opinion | None = None


Piece = Callable[[Random, Voice], str]


def _head(verb: str) -> tuple[str, str]:
    head, _, rest = verb.partition(" ")
    return head, f" {rest}" if rest else ""


def _stem(verb: str) -> str:
    if verb in _DOUBLING and verb[-1] not in "e":
        return verb + verb[-1]
    return verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb


@cache
def third_person(verb: str) -> str:
    """'carry on' -> 'carries on'."""
    head, rest = _head(verb)
    return _with_s(head) + rest


@cache
def gerund(verb: str) -> str:
    """'chop up' -> 'chopping up'."""
    head, rest = _head(verb)
    return _stem(head) + "ing" + rest


@cache
def past(verb: str) -> str:
    """'carry on' -> 'carried on'."""
    head, rest = _head(verb)
    if head in _IRREGULAR:
        return _IRREGULAR[head] + rest
    if head.endswith("y") and head[-2] not in _VOWELS:
        return head[:-1] + "ied" + rest
    return _stem(head) + "ed" + rest


def _with_s(word: str) -> str:
    if word.endswith("y") and word[-2] not in _VOWELS:
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "sh", "ch", "x", "z")) else "s")


@cache
def plural(noun: str) -> str:
    """'flower bed' -> 'flower beds'."""
    first, space, last = noun.rpartition(" ")
    return first + space + (_PLURALS.get(last) or _with_s(last))


def _pick(rng: Random, words: tuple[str, ...]) -> str:
    return words[int(rng.random() * len(words))]


def _domain(rng: Random, voice: Voice) -> Domain:
    if voice.drift and rng.random() < voice.drift:
        return DOMAINS[int(rng.random() * len(DOMAINS))]
    return voice.domain


def _opinion(voice: Voice) -> Opinion:
    assert voice.opinion is not None, "a template of a review needs an opinion"
    return voice.opinion


_WORDS: dict[str, Piece] = {
    "product": lambda rng, voice: _opinion(voice).product,
    "aspect": lambda rng, voice: _pick(rng, ASPECTS),
    "good": lambda rng, voice: _pick(rng, _opinion(voice).hand.words[_opinion(voice).side]),
    "bad": lambda rng, voice: _pick(rng, _opinion(voice).hand.words[1 - _opinion(voice).side]),
    "phrase": lambda rng, voice: _pick(rng, _opinion(voice).hand.phrases[_opinion(voice).side]),
    "who": lambda rng, voice: _pick(rng, _domain(rng, voice).people),
    "whos": lambda rng, voice: plural(_pick(rng, _domain(rng, voice).people)),
    "x": lambda rng, voice: _pick(rng, _domain(rng, voice).things),
    "xs": lambda rng, voice: plural(_pick(rng, _domain(rng, voice).things)),
    "do": lambda rng, voice: _pick(rng, _domain(rng, voice).acts),
    "does": lambda rng, voice: third_person(_pick(rng, _domain(rng, voice).acts)),
    "did": lambda rng, voice: past(_pick(rng, _domain(rng, voice).acts)),
    "doing": lambda rng, voice: gerund(_pick(rng, _domain(rng, voice).acts)),
    "aim": lambda rng, voice: _pick(rng, _domain(rng, voice).aims),
    "how": lambda rng, voice: _pick(rng, _domain(rng, voice).qualities),
    "where": lambda rng, voice: _pick(rng, _domain(rng, voice).places),
    "topic": lambda rng, voice: voice.domain.name,
    "ly": lambda rng, voice: _pick(rng, voice.manner.adverbs),
    "mood": lambda rng, voice: _pick(rng, voice.manner.adjectives),
    "open": lambda rng, voice: _pick(rng, voice.manner.openings),
    "name": lambda rng, voice: voice.name,
    "num": lambda rng, voice: _pick(rng, ("two", "three", "four", "five", "ten", "twelve")),
}

# Phrases shared by every bank of templates: none reaches eight words.
_PHRASES: dict[str, tuple[str, ...]] = {
    "np": (
        "the {x}",
        "a {x}",
        "the {how} {x}",
        "a {how} {x}",
        "the {mood} {x}",
        "{~every} {x}",
        "{xs}",
        "{how} {xs}",
        "the {~small} {x}",
        "a {~big} {x}",
        "the {x} {where}",
        "the {~good} {x}",
        "my {x}",
        "your {x}",
    ),
    "vp": (
        "{do} {np}",
        "{do} {np}",
        "{~keep} {np}",
        "{~consider} {np}",
        "{ly} {do} {np}",
        "{~make} {np}",
        "find {aim}",
        "{do} the {xs} {ly}",
        "{~learn} {aim}",
    ),
    "vping": (
        "{doing} {np}",
        "{doing} {np}",
        "{ly} {doing} {np}",
        "{doing} the {xs}",
        "looking for {aim}",
        "{doing} {np} {where}",
    ),
    "vps": ("{does} {np}", "{does} {np}", "{ly} {does} {np}", "needs {aim}", "{does} the {xs}", "asks for {aim}"),
    "vped": ("{did} {np}", "{did} {np}", "{ly} {did} {np}", "{did} the {xs}", "looked for {aim}", "found {aim}"),
    "when": (
        "{where}",
        "{~every} {~day}",
        "{ly}",
        "{~before} the {~work}",
        "with {aim}",
        "{~often} {ly}",
        "this {~day}",
    ),
}


def _piece(slot: str) -> Piece:
    if slot.startswith("~"):
        meaning = slot[1:]
        return lambda rng, voice: voice.manner.chosen[meaning]
    if slot in _WORDS:
        return _WORDS[slot]
    options = _PHRASES[slot]
    return lambda rng, voice: _fill(_pick(rng, options), rng, voice)


@cache
def _compiled(template: str) -> tuple[str | Piece, ...]:
    """The literals and slots of a template, in order; an unknown slot raises KeyError."""
    parts = re.split(r"\{([^}]*)\}", template)
    return tuple(_piece(part) if index % 2 else part for index, part in enumerate(parts) if index % 2 or part)


def _fill(template: str, rng: Random, voice: Voice) -> str:
    return "".join([part if isinstance(part, str) else part(rng, voice) for part in _compiled(template)])


_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU]|honest|hour)")
_ONE = re.compile(r"\b([Aa])n (?=one|uni|use|eu)")


def sentence(template: str, rng: Random, voice: Voice) -> str:
    """One sentence: slots filled, articles agreed, first letter in capitals."""
    text = _ONE.sub(r"\1 ", _ARTICLE.sub(r"\1n ", _fill(template, rng, voice))).strip()
    start = 1 if text[0] == '"' else 0
    return text[:start] + text[start].upper() + text[start + 1 :]
