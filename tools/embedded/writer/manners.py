"""How documents speak: eight manners, each with its adverbs, adjectives, openings, and its choice among synonyms."""

from __future__ import annotations

from dataclasses import dataclass

_MANNERS = """
warm: gladly, warmly, cheerfully, kindly | warm, encouraging, cheerful, caring | \
    My friend, Take heart: Together, With all my heart,
stern: strictly, firmly, coldly, severely | stern, severe, firm, demanding | \
    Mark this: Be warned: Without fail, Understand this:
playful: merrily, cheekily, playfully, happily | playful, silly, merry, funny | \
    Guess what: Just for fun, Hop to it: Oh well,
formal: formally, respectfully, duly, officially | formal, official, dignified, respectful | \
    Dear sir, As agreed, In due course, For the record,
plain: plainly, simply, clearly, briefly | plain, simple, ordinary, clear | \
    In short, As a rule, Put simply, On most days,
hurried: hastily, quickly, urgently, hurriedly | hurried, urgent, restless, rushed | \
    Quick: No time to lose: Right now, At once,
dreamy: dreamily, softly, slowly, faintly | dreamy, misty, faraway, hushed | \
    Once in a dream, Somewhere far off, As if asleep, Under the moon,
proud: proudly, grandly, boldly, nobly | proud, grand, mighty, noble | \
    Behold: Let it be known: As is our right, In my glory,
"""

# One line per meaning; a manner always takes the same word of a line.
_SYNONYMS = """
want: want, need, ask, expect
will: will, shall, must, may
help: help, assist, support, guide
give: give, offer, bring, grant
good: good, fine, decent, splendid
small: small, little, tiny, modest
big: big, large, great, vast
very: very, truly, rather, quite
because: because, since, as, for
but: but, yet, though, while
when: when, whenever, once, if
before: before, until, unless, after
keep: keep, hold, save, guard
consider: think about, consider, look at, weigh up
answer: answer, reply, response, comment
reply: answer, reply, respond, write back
question: question, problem, concern, point
plan: plan, scheme, list, outline
day: day, morning, week, evening
people: people, folk, others, citizens
often: often, always, sometimes, usually
only: only, just, simply, merely
work: work, labour, effort, business
idea: idea, thought, notion, lesson
learn: learn, discover, find, see
hope: hope, trust, believe, suppose
describe: describe, name, explain, present
never: never, rarely, hardly ever, seldom
make: make, prepare, produce, arrange
someone: someone, anyone, somebody, a person
every: every, each, any, one
need: need, require, call for, wish for
speak: speak, talk, write, turn
"""


@dataclass(frozen=True, slots=True)
class Manner:
    """One way of speaking; `chosen` maps a meaning to the word that this manner takes for it."""

    name: str
    adverbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    openings: tuple[str, ...]
    chosen: dict[str, str]


def _openings(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.replace(":", ":\n").replace(",", ",\n").split("\n") if part.strip())


def _chosen(manner: int) -> dict[str, str]:
    """The word of every meaning; two manners agree on a quarter of them or so."""
    table: dict[str, str] = {}
    for row, line in enumerate(_SYNONYMS.strip().splitlines()):
        meaning, words = line.split(":")
        table[meaning] = words.split(",")[(manner * (row % 3 + 1) + manner // 4) % 4].strip()
    return table


def _parse(table: str) -> tuple[Manner, ...]:
    manners = []
    for index, line in enumerate(table.strip().splitlines()):
        name, rest = line.split(":", 1)
        adverbs, adjectives, openings = rest.split("|")
        words = [tuple(word.strip() for word in part.split(",")) for part in (adverbs, adjectives)]
        manners.append(Manner(name, words[0], words[1], _openings(openings), _chosen(index)))
    return tuple(manners)


MANNERS = _parse(_MANNERS)
BY_NAME = {manner.name: manner for manner in MANNERS}
