"""The data sets that the package ships: coach instructions, quotes and reviews, each with held-out rows apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from writer import domains, manners
from writer.documents import any_voice, review, say
from writer.feelings import FIRST_HAND, SECOND_HAND
from writer.grammar import Voice, sentence
from writer.overlap import shares_window, window_set
from writer.shapes import Bank

# What the demo types in; like the held-out rows it is kept out of everything that is trained on.
DEMO_INPUTS = (
    "I want you to act as a motivational coach.",
    "There are two nice things that should matter to you:",
)
LABELS = ("negative", "positive")
NUM_TEXT_ROWS, NUM_REVIEWS = 100, 200
# Share of held-out reviews' sentences that use the words of the training rows.
FAMILIAR = 0.2

Row = dict[str, object]
COACH_VOICE = Voice(domains.BY_NAME["coaching"], manners.BY_NAME["warm"])
QUOTE_VOICE = Voice(domains.BY_NAME["kindness"], manners.BY_NAME["plain"])


def _bank(heldout: bool) -> Bank:
    return "heldout" if heldout else "training"


def _coach(rng: Random, heldout: bool) -> Row:
    rules = ["opening", *["body"] * rng.randint(1, 3), "request"]
    prompt = " ".join(say(rng, rule, COACH_VOICE, _bank(heldout)) for rule in rules)
    return {"act": sentence("{how} {who}", rng, COACH_VOICE).title(), "prompt": prompt}


def _quote(rng: Random, heldout: bool) -> Row:
    quote = say(rng, "quote", QUOTE_VOICE, _bank(heldout))
    author = sentence("a {mood} {who}", rng, any_voice(rng))
    tags = sorted(rng.sample(QUOTE_VOICE.domain.aims, 2))
    return {"quote": quote, "author": author[0].lower() + author[1:], "tags": tags}


def _review(rng: Random, heldout: bool, side: int) -> Row:
    hand = SECOND_HAND if heldout and rng.random() >= FAMILIAR else FIRST_HAND
    return {"text": review(rng, side, hand, _bank(heldout), rng.randint(2, 3)), "label": LABELS[side]}


def _distinct(make: Callable[[int], Row], column: str, taken: frozenset[str], num_rows: int) -> list[Row]:
    """Rows that differ from one another in `column` and share no eight words with what is taken."""
    rows: dict[str, Row] = {}
    while len(rows) < num_rows:
        row = make(len(rows))
        text = str(row[column])
        if text not in rows and not shares_window(text, taken):
            rows[text] = row
    return list(rows.values())


def _texts(rows: list[Row], column: str) -> Iterator[str]:
    return (str(row[column]) for row in rows)


def _both(
    make: Callable[[Random, bool, int], Row], column: str, num_rows: int, seed: int
) -> tuple[list[Row], list[Row]]:
    rng = Random(f"{seed}-{column}")
    training = _distinct(lambda index: make(rng, False, index), column, window_set(DEMO_INPUTS), num_rows)
    taken = window_set([*_texts(training, column), *DEMO_INPUTS])
    heldout = _distinct(lambda index: make(rng, True, index), column, taken, num_rows)
    return training, heldout


def shipped_sets(seed: int) -> dict[str, list[Row]]:
    """The rows of every file of the data folder, by file name."""
    coach = _both(lambda rng, heldout, _: _coach(rng, heldout), "prompt", NUM_TEXT_ROWS, seed)
    quotes = _both(lambda rng, heldout, _: _quote(rng, heldout), "quote", NUM_TEXT_ROWS, seed)
    reviews = _both(lambda rng, heldout, index: _review(rng, heldout, index % 2), "text", NUM_REVIEWS, seed)
    names = ("coach-prompts.csv", "quotes.jsonl", "reviews.csv")
    files: dict[str, list[Row]] = {}
    for name, (training, heldout) in zip(names, (coach, quotes, reviews), strict=True):
        stem, suffix = name.split(".")
        files[name], files[f"{stem}-heldout.{suffix}"] = training, heldout
    return files


def kept_out(seed: int) -> frozenset[str]:
    """Every eight-word sequence of the shipped rows and of the demo's inputs: the pretraining text has none of them."""
    columns = ("prompt", "quote", "text")
    texts = [str(row[name]) for rows in shipped_sets(seed).values() for row in rows for name in columns if name in row]
    return window_set([*texts, *DEMO_INPUTS])
