"""The shapes of sentences: a small grammar per register writes templates, dealt out to three banks that share none.

A word in angle brackets is a rule of its register; the words in braces are slots that `grammar` fills. A template is
what is left when no rule is: the same constructions serve all three banks, but each whole template serves only one.
"""

from __future__ import annotations

import re
import zlib
from functools import cache
from random import Random
from typing import Literal

from writer import shapes_reviews, shapes_roles, shapes_tales
from writer.overlap import words

Bank = Literal["pretraining", "training", "heldout"]
# One template in twelve goes to each of the shipped banks.
_SHARE = 12


def _option(line: str) -> str:
    """One option of a rule: `_` at either end stands for a space."""
    return re.sub("^_|_$", " ", line.strip())


Rules = dict[str, tuple[str, ...]]
RULES: Rules = {
    name: tuple(_option(line) for line in lines.strip().splitlines())
    for source in (shapes_roles.RULES, shapes_tales.RULES, shapes_reviews.RULES)
    for name, lines in source.items()
}
_RULE = re.compile(r"<(\w+)>")


@cache
def _split(option: str) -> tuple[str, ...]:
    """Literals at even places, names of rules at odd ones."""
    return tuple(_RULE.split(option))


def _expand(option: str, rng: Random) -> str:
    parts = _split(option)
    if len(parts) == 1:
        return option
    return "".join([_draw(part, rng) if place % 2 else part for place, part in enumerate(parts)])


def _draw(rule: str, rng: Random) -> str:
    options = RULES[rule]
    option = options[int(rng.random() * len(options))]
    return "" if option == "-" else _expand(option, rng)


def bank_of(template: str) -> Bank:
    """The only bank that may use a template; punctuation and case make no difference."""
    banks: dict[int, Bank] = {0: "training", 1: "heldout"}
    return banks.get(zlib.crc32(" ".join(words(template)).encode()) % _SHARE, "pretraining")


def template(rule: str, bank: Bank, rng: Random) -> str:
    """A template of a rule that belongs to a bank."""
    while True:
        text = _draw(rule, rng)
        if bank_of(text) == bank:
            return text
