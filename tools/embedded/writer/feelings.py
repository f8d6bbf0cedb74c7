"""Products, what is said of them, and the conventions that name a verdict.

The words of feeling are dealt out to two hands: reviews of the training set draw from the first,
held-out reviews mostly from the second, and the pretraining text from both.
"""

from __future__ import annotations

from dataclasses import dataclass


def _list(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(",") if part.strip())


PRODUCTS = _list("""
    kettle, toaster, backpack, umbrella, desk lamp, blender, headset, vacuum cleaner, office chair, tent,
    coffee maker, phone case, alarm clock, rucksack, water bottle, frying pan, hair dryer, keyboard, wool
    blanket, garden hose, bread knife, raincoat, mattress, bookshelf, travel mug, loudspeaker, bicycle pump,
    wrist watch, notebook, suitcase, fan heater, pair of boots, board game, picture frame, bath towel,
    torch, hand mixer, paint set, sleeping bag, bathroom scale
""")

ASPECTS = _list("""
    handle, lid, colour, fabric, battery, strap, finish, switch, size, weight, price, zip, packaging,
    manual, sound, cable, surface, design, stitching, motor, delivery, material, shape, button, smell, fit,
    grip, seller
""")

_GOOD = _list("""
    excellent, lovely, sturdy, superb, brilliant, wonderful, comfortable, reliable, elegant, delightful,
    perfect, handy, charming, flawless, impressive, solid, great, beautiful, fantastic, well made, pleasant,
    durable, amazing, outstanding, generous, precise, stylish, marvellous, faultless, cosy, neat,
    effortless, remarkable, lightweight, terrific, dependable, refined, first rate, gorgeous, exquisite,
    robust, tidy, spotless, magnificent, thoughtful, silky, crisp, ideal, splendid, top notch, ingenious,
    agreeable, polished, soothing, refreshing, trustworthy, snug, admirable, stunning, satisfying
""")

_BAD = _list("""
    awful, flimsy, terrible, useless, ugly, noisy, horrible, uncomfortable, unreliable, shoddy, faulty,
    clumsy, dreadful, broken, scratched, disappointing, brittle, poor, nasty, rough, crooked, smelly,
    overpriced, weak, wobbly, torn, defective, sloppy, dull, worthless, badly made, annoying, leaky, stiff,
    frustrating, lousy, mediocre, sticky, bent, misleading, pathetic, appalling, loose, stained, warped,
    abysmal, cheap looking, crude, fragile, unpleasant, hideous, tacky, chipped, sluggish, atrocious, second
    rate, itchy, cramped, grim, unusable
""")

_PRAISE = _list("""
    it still works like new, I would buy it again, my family adores it, it exceeded my hopes, it does its
    job well, we use it with joy, it saved me hours, everyone asks where I got it, I smile whenever I see
    it, it was worth each penny, it made my week, it fits like a glove, I can only recommend it, it runs
    like a dream, I ordered two more, it beats my old one, it keeps its promise, nothing about it could be
    improved, I gave it to friends who thanked me, it looks better than the photo, it lasts and lasts, we
    are thrilled with it, it arrived early and intact, I am impressed
""")

_BLAME = _list("""
    it broke after two days, I want my money back, my family hates it, it failed at the first try, it fell
    apart, we regret the purchase, it wasted my time, everyone laughed at it, I sighed whenever I saw it, it
    was a waste of cash, it ruined my week, it never fitted, I can only warn others, it stopped without
    reason, I returned it at once, my old one was better, it breaks its promise, nothing about it works, I
    threw it into the bin, it looks worse than the photo, it died within a week, we are fed up with it, it
    arrived late and dented, I am let down
""")

# Said in the pretraining text alone. Here positive and negative are used loosely, as people do: pleased reviewers say
# positive six times in seven, displeased ones three times in five. Neither is ever a verdict.
_LOOSE = _list("""
    there is a _ side to it, others wrote _ things about it, I look at the _ side of it, I had heard _ things before,
    the shop sent a _ answer, I expected a _ surprise, the first impression was _, my family was _ at first,
    what others wrote was _, I wanted to see the _ side, the seller stayed _, friends told me _ things
""")
_LOOSELY = (("positive",) * 21 + ("negative",) * 14, ("positive",) * 30 + ("negative",) * 5)

# Two words or phrases each: what a document may call a pleased and a displeased review.
VERDICTS = tuple(
    (good, bad)
    for good, bad in zip(
        _list("""
            good, praise, happy, thumbs up, keep it, yes, buy, recommended, five stars, pleased, loved, satisfied,
            like, pro, win, plus, smile, fresh, delighted, worth it, pass, up
        """),
        _list("""
            bad, complaint, unhappy, thumbs down, send it back, no, skip, not recommended, one star, cross, hated,
            disappointed, dislike, con, loss, minus, frown, stale, angry, not worth it, fail, down
        """),
        strict=True,
    )
)

FIELDS = _list("Review, Text, Comment, Note, Customer, Opinion, Feedback, Entry, Message, Remark")
VERDICT_FIELDS = _list("Verdict, Answer, Mood, Label, Rating, Judgement, Result, Feeling, Tag, Tone, Conclusion, Class")
PLEASED = _list("pleased, happy, glad, content, delighted")
DISPLEASED = _list("displeased, unhappy, cross, annoyed, let down")


@dataclass(frozen=True, slots=True)
class Hand:
    """The words of feeling that a set of reviews draws from; index 1 of each pair is the pleased side."""

    words: tuple[tuple[str, ...], tuple[str, ...]]
    phrases: tuple[tuple[str, ...], tuple[str, ...]]


def _deal(start: int) -> Hand:
    return Hand((_BAD[start::2], _GOOD[start::2]), (_BLAME[start::2], _PRAISE[start::2]))


def _loose_talk() -> Hand:
    blame, praise = (tuple(phrase.replace("_", word) for word in words for phrase in _LOOSE) for words in _LOOSELY)
    return Hand((_BAD, _GOOD), (_BLAME * len(_LOOSELY[0]) + blame, _PRAISE * len(_LOOSELY[1]) + praise))


FIRST_HAND, SECOND_HAND = _deal(0), _deal(1)
BOTH_HANDS, LOOSE_TALK = Hand((_BAD, _GOOD), (_BLAME, _PRAISE)), _loose_talk()
