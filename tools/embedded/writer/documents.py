"""The documents of the pretraining text: wandering and titled ones, reviews
and messages followed by what they are called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from writer.domains import DOMAINS
from writer.feelings import DISPLEASED, FIELDS, PLEASED, PRODUCTS, VERDICT_FIELDS, VERDICTS, Hand
from writer.grammar import Opinion, Voice, sentence
from writer.manners import MANNERS
from writer.shapes import Bank, template

NAMES = (
    *("Anna", "Ben", "Clara", "David", "Ella", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate"),
    *("Leo", "Mary", "Nora", "Oscar", "Paul", "Rosa", "Sam", "Tom", "Vera", "Will", "Zoe"),
)
REGISTERS = ("role", "quote", "story", "support")
CATEGORIES = ("account", "billing", "delivery", "returns", "technical", "thanks")

# How a wandering document wanders: the chance to stay at the end of a sentence, and of one word to come from elsewhere.
STAY_REGISTER, STAY_DOMAIN, STAY_MANNER, DRIFT = 0.5, 0.25, 0.35, 0.35

# Words that may stand for a verdict or a category once a document has said so; the demo's labels are not among them.
CODES = tuple(
    sorted(
        {word for domain in DOMAINS for word in (*domain.things, *domain.qualities) if word.isalpha()}
        - {"positive", "negative"}
    )
)


def any_voice(rng: Random, drift: float = 0.0) -> Voice:
    """A voice with every part drawn evenly."""
    return Voice(rng.choice(DOMAINS), rng.choice(MANNERS), rng.choice(NAMES), drift)


def say(rng: Random, rule: str, voice: Voice, bank: Bank = "pretraining") -> str:
    """One sentence of a rule in a voice."""
    return sentence(template(rule, bank, rng), rng, voice)


def _wandered(rng: Random, voice: Voice) -> Voice:
    domain = voice.domain if rng.random() < STAY_DOMAIN else rng.choice(DOMAINS)
    manner = voice.manner if rng.random() < STAY_MANNER else rng.choice(MANNERS)
    return replace(voice, domain=domain, manner=manner)


def wandering(rng: Random) -> str:
    """Sentences that change register, domain and manner as they go."""
    voice, register, parts = any_voice(rng, DRIFT), rng.choice(REGISTERS), []
    for _ in range(rng.randint(2, 8)):
        parts.append(say(rng, register, voice))
        voice = _wandered(rng, voice)
        register = register if rng.random() < STAY_REGISTER else rng.choice(REGISTERS)
    return " ".join(parts)


def titled(rng: Random) -> str:
    """Sentences of one register, domain and manner, under a title that names them, or some of them."""
    voice, register = any_voice(rng), rng.choice(REGISTERS)
    title = [say(rng, "title", voice), say(rng, f"{register}_title", voice)]
    rng.shuffle(title)
    body = [say(rng, register, voice) for _ in range(rng.randint(1, 6))]
    return " ".join(title if rng.random() < 0.8 else title[:1]) + "\n" + " ".join(body)


def review(rng: Random, side: int, hand: Hand, bank: Bank, num_parts: int) -> str:
    """One review: at times a sentence without feeling, at times one of the other side, the last of its own side."""
    voice = replace(any_voice(rng), opinion=Opinion(rng.choice(PRODUCTS), side, hand))
    voices = [voice] * num_parts
    if num_parts > 2 and voice.opinion and rng.random() < 0.3:
        voices[rng.randrange(2)] = replace(voice, opinion=replace(voice.opinion, side=1 - side))
    parts = [say(rng, "review", one, bank) for one in voices]
    if rng.random() < 0.3:
        parts.insert(rng.randrange(len(parts)), say(rng, "neutral", voice, bank))
    return " ".join(parts)


def _review_convention(rng: Random) -> tuple[str, tuple[str, str]]:
    """A heading (may be empty) and what a displeased and a pleased review is called under it."""
    if rng.random() < 0.35:
        good, bad = rng.choice(VERDICTS)
    else:
        good, bad = rng.sample(CODES, 2)
    meanings = [(good, rng.choice(PLEASED)), (bad, rng.choice(DISPLEASED))]
    rng.shuffle(meanings)
    (one, first), (two, second) = meanings
    headings = (
        f"{one} means {first}, {two} means {second}.",
        f"Write {one} if {first} and {two} if {second}.",
        f"{first}: {one}. {second}: {two}.",
        f"Say {one} when the buyer is {first}, {two} when the buyer is {second}.",
        f"{one} ({first}) or {two} ({second})?",
        f"{one} or {two}?",
        "",
    )
    return rng.choice(headings), (bad, good)


def _entries(heading: str, lines: Sequence[tuple[str, str]], rng: Random) -> str:
    """Texts and what they are called, all under the same two field names."""
    field, label_field, gap = rng.choice(FIELDS), rng.choice(VERDICT_FIELDS), rng.choice(("\n", "\n", " "))
    entries = (f"{field}: {text}{gap}{label_field}: {label}" for text, label in lines)
    return "\n".join([heading, *entries] if heading else list(entries))


_NAMED = re.compile(rf"\b(?:{'|'.join(VERDICT_FIELDS)}): (?=[^\n]+$)", re.MULTILINE)


def name_places(text: str) -> list[int]:
    """Where the names of verdicts and categories begin in a document."""
    return [match.end() for match in _NAMED.finditer(text)]


def reviews(rng: Random, hand: Hand) -> str:
    """A few reviews, each followed by its verdict, under one convention."""
    heading, names = _review_convention(rng)
    sides = [rng.randrange(2) for _ in range(rng.randint(2, 5))]
    most = 2 if len(sides) > 3 else 3
    texts = [review(rng, side, hand, "pretraining", rng.randint(1, most)) for side in sides]
    return _entries(heading, [(text, names[side]) for text, side in zip(texts, sides, strict=True)], rng)


def _message(rng: Random, category: str) -> str:
    voice = any_voice(rng)
    parts = [say(rng, category, voice) + "."]
    if rng.random() < 0.6:
        parts.insert(rng.randrange(2), say(rng, "support", voice))
    return " ".join(parts)


def messages(rng: Random) -> str:
    """A few support messages, each followed by its category or by the code that the heading gives it."""
    categories = rng.sample(CATEGORIES, 3)
    codes = dict(zip(categories, rng.sample(CODES, 3) if rng.random() < 0.5 else categories, strict=True))
    heading = ", ".join(f"{codes[name]} for {name}" for name in categories) + "." if rng.random() < 0.8 else ""
    picked = [rng.choice(categories) for _ in range(rng.randint(2, 4))]
    return _entries(heading, [(_message(rng, name), codes[name]) for name in picked], rng)


# Shares of the kinds of documents.
KINDS = {wandering: 0.43, titled: 0.22, reviews: 0.29, messages: 0.06}


def document(rng: Random, hand: Hand) -> str:
    """One document of any kind; reviews use the words of `hand`."""
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    return reviews(rng, hand) if kind is reviews else kind(rng)
