"""Sets of the bench that no pretraining text has: tickets of an invented company, booking notes, a shop's chats.

Every row is a function of the seed and of its number, so a set of 50 rows is the start of one of 200. Test rows are
made of other sentence frames and other fillers than training rows: no text of one is in the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

Record = dict[str, Any]

SEED = 15
_MOST_DRAWS = 50  # for each row, of which one is new


@dataclass(frozen=True)
class TicketWords:
    """What the tickets of one part are made of; `complaints` by team."""

    openings: tuple[str, ...]
    complaints: dict[str, tuple[str, ...]]
    closings: tuple[str, ...]
    products: tuple[str, ...]
    times: tuple[str, ...]


# The company's own names for its teams: what a ticket is about a base knows, which team that is it cannot.
TEAM_TASKS = {
    "amber": "payments and invoices",
    "birch": "parcels and delivery",
    "cobalt": "passwords and access",
    "lotus": "broken devices",
    "quartz": "how to set things up",
    "willow": "customers who want to leave",
}
TEAMS = tuple(TEAM_TASKS)

TRAIN_TICKETS = TicketWords(
    openings=(
        "Hello,", "Hi there,", "Good morning,", "To whom it may concern,", "Dear Velmora,", "Quick one:", "Again me.",
        "Sorry to bother you,",
    ),
    complaints={
        "amber": (
            "my card was charged twice for the {product} {when}",
            "the invoice for the {product} shows a higher price than I agreed to {when}",
            "I still wait for the refund of the {product} that you promised {when}",
            "the discount code did not come off the bill for my {product} {when}",
            "you billed me for two units of the {product}, I ordered one {when}",
            "the receipt for the {product} has the wrong tax number on it {when}",
        ),
        "birch": (
            "the {product} should have been here {when} and the tracking page does not move",
            "the courier left my {product} with a stranger {when}",
            "the box of the {product} came open and half empty {when}",
            "you sent the {product} to the house where I lived before, {when}",
            "nobody rang, yet the driver wrote {when} that I was out when he brought the {product}",
            "I got the charger but not the {product} itself in the delivery {when}",
        ),
        "cobalt": (
            "{when} the {product} page says my password is wrong although it is not",
            "the code to sign in to my {product} account never arrives, I tried {when}",
            "I changed my phone {when} and cannot log in to the {product} any more",
            "my {product} profile got locked after three tries {when}",
            "the reset link for the {product} account had expired when I opened it {when}",
            "somebody else signed in to my {product} account {when}",
        ),
        "lotus": (
            "the {product} made a grinding noise and stopped by itself {when}",
            "the screen of my {product} went black {when}",
            "the {product} got so hot {when} that I pulled the plug",
            "one button of the {product} fell off {when}",
            "the battery of the {product} lasted ten minutes {when}",
            "water came out of the bottom of the {product} {when}",
        ),
        "quartz": (
            "I unpacked the {product} {when}; which cable goes where?",
            "how do I pair the {product} with my phone? I tried {when}",
            "is there a manual that says how the {product} is mounted? I looked {when}",
            "where in the menu of the {product} can I change the language? I searched {when}",
            "what do I have to press first to start the {product}? I got it {when}",
            "can the {product} run on a timer, and how do I set one? I wanted that {when}",
        ),
        "willow": (
            "please end my {product} subscription, I decided so {when}",
            "I do not need the {product} plan any longer and wanted out {when}",
            "close my {product} account for good, as I asked {when}",
            "delete everything you know about me, I stopped using the {product} {when}",
            "I am moving to another maker, so stop the {product} contract {when}",
            "how long is the notice period? I want to quit the {product} service {when}",
        ),
    },
    closings=("Thanks.", "Please help.", "Best, Ada", "Waiting for your answer.", "Regards, Tom", "", "That is all."),
    products=(
        "Trellick", "Ovanta", "Quillo 3", "Brindex", "Sorrel Max", "Pemberix", "Nuvano", "Halvard Mini", "Zephlo",
        "Corvatta",
    ),
    times=("last Monday", "two days ago", "on the 4th", "this week", "on Friday night", "in spring", "around noon"),
)  # fmt: skip

TEST_TICKETS = TicketWords(
    openings=(
        "Good evening.", "Greetings from Leeds.", "Attention support!", "Hey Velmora people,", "I am writing again.",
        "Hallo,", "One more thing.", "Dear Sir or Madam,",
    ),
    complaints={
        "amber": (
            "money for the {product} left my bank account two times {when}",
            "{when} I paid for the {product}, but the bill lists it as unpaid",
            "why did the {product} cost eleven euros more than the shop said {when}?",
            "the sum you sent back for the {product} {when} is too small",
            "I need a proper bill with my firm's name for the {product} of {when}",
            "a fee that I never heard of was taken with the {product} {when}",
        ),
        "birch": (
            "no sign of the {product} yet, it was shipped {when}",
            "{when} the postman threw the package with the {product} over the fence",
            "the carton with my {product} was soaked when it reached me {when}",
            "the neighbours have no package either, so where did the {product} go {when}?",
            "could you bring the {product} to my office instead, the van comes {when}",
            "a lamp was in the package {when}, but I had ordered the {product}",
        ),
        "cobalt": (
            "{when} it threw me out of the {product} site and will not let me in again",
            "the login of the {product} portal asks for a PIN that I never set, {when}",
            "my user name for the {product} is said not to exist {when}",
            "which mail address did I register the {product} with? I get no further than the login {when}",
            "two-step sign-in for the {product} sends texts to my old number {when}",
            "it says too many attempts when I enter my credentials for the {product} {when}",
        ),
        "lotus": (
            "{when} smoke came out of the {product}",
            "my {product} does not switch on at all {when}",
            "a crack runs through the lid of the {product}, I saw it {when}",
            "the motor in the {product} hums but nothing turns {when}",
            "the {product} switches itself off after a minute, first {when}",
            "the lower half of the display on the {product} flickers {when}",
        ),
        "quartz": (
            "how does one connect the {product} to the router? {when} I gave up",
            "could you explain step by step how to install the {product}, mine came {when}",
            "what does the blue light on the new {product} mean, and what comes next? {when} I stopped there",
            "I want to use the {product} in the garden, how do I configure that? {when} would be good",
            "is an app needed for the first start of the {product}? we begin {when}",
            "which settings do you recommend for a new {product}? I am a beginner {when}",
        ),
        "willow": (
            "{when} is my last day with the {product}, cancel it please",
            "I hereby terminate the agreement about the {product}, effective {when}",
            "do not renew the {product} membership {when}",
            "we no longer want to be customers; wipe our data on the {product} {when}",
            "take me off the {product} programme {when}, I have had enough",
            "what must I do to get rid of the {product} plan {when}?",
        ),
    },
    closings=("Cheers.", "Yours, Priya", "I hope to read from you soon.", "", "With kind wishes, Lee", "Over to you."),
    products=("Mirrowby", "Tandrel", "Okapi One", "Fenwickle", "Auralee", "Drovio 7", "Wexley Pro", "Juniver"),
    times=("yesterday", "at half past nine", "since the weekend", "three weeks back", "today", "in November"),
)  # fmt: skip

TICKET_TEMPLATE, TICKET_COMPLETION = "Ticket: {text}\nTeam:", " {label}"
_TASKS = "; ".join(f"{team}: {task}" for team, task in TEAM_TASKS.items())
TICKET_TEMPLATES = (
    TICKET_TEMPLATE,
    f"Which of the teams {', '.join(TEAMS)} answers this ticket?\n{{text}}\nAnswer:",
    f"Teams and what they do: {_TASKS}.\nTicket: {{text}}\nTeam:",
    f"Send each ticket to the right team ({_TASKS}).\n\nTicket: {{text}}\n\nThis ticket goes to the team called",
    f"{{text}}\n\nThe customer's ticket is for one of these teams. {_TASKS}.\nThe right team is",
)
TICKET_INSTRUCTION = f"Name the team that answers the ticket. {_TASKS}.\n"


def tickets(num_train: int, num_test: int, seed: int = SEED) -> tuple[list[Record], list[Record]]:
    """Rows `text`, `label`, the teams in a drawn order of equal shares."""
    return (
        _distinct("tickets to train on", num_train, seed, lambda *which: _ticket(TRAIN_TICKETS, *which)),
        _distinct("tickets to test", num_test, seed, lambda *which: _ticket(TEST_TICKETS, *which)),
    )


def _ticket(words: TicketWords, draw: random.Random, number: int) -> Record:
    block, index = divmod(number, len(TEAMS))
    team = random.Random(f"teams:{block}").sample(TEAMS, len(TEAMS))[index]
    complaint = draw.choice(words.complaints[team])
    sentence = complaint.format(product=draw.choice(words.products), when=draw.choice(words.times))
    ends_itself = sentence[-1] in "?!"
    opening = draw.choice(words.openings)
    starts_sentence = opening[-1] in ".!:"
    text = f"{opening} {_capital(sentence) if starts_sentence else sentence}{'' if ends_itself else '.'}"
    return {"text": f"{text} {draw.choice(words.closings)}".strip(), "label": team}


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


# Booking notes to records: every answer follows from its note, to the character.

RECORD_TEMPLATE, RECORD_COMPLETION = "Note: {note}\nRecord:", " {record}"
_RECORD_FORM = "YYYY-MM-DDTHH:MM|room"
_RECORD_EXAMPLE = ("Tuesday 7th of May 2019, 4:30 pm, room 12", "2019-05-07T16:30|12")
RECORD_TEMPLATES = (
    RECORD_TEMPLATE,
    f"Rewrite the note as {_RECORD_FORM}.\nNote: {{note}}\nRecord:",
    f"Note: {_RECORD_EXAMPLE[0]}\nRecord: {_RECORD_EXAMPLE[1]}\n\nNote: {{note}}\nRecord:",
    f"{{note}}\nThe date, the time (24 hours) and the room of this booking as {_RECORD_FORM}:",
    "Write date, time and room of each booking as an ISO 8601 date and time, a bar and the room, like "
    f"{_RECORD_EXAMPLE[1]}.\nBooking: {{note}}\nAnswer:",
)
RECORD_INSTRUCTION = f"Rewrite the note as {_RECORD_FORM}.\n"
TRAIN_NOTES = (
    "{weekday} {ordinal} of {month} {year}, {clock}, room {room}",
    "please book room {room} for {month} {day}, {year} at {clock}",
    "We meet on the {ordinal} of {month} {year} in room {room}, {clock} sharp",
    "Room {room}: {weekday}, {day} {month} {year}, from {clock}",
    "{clock} on {month} {ordinal}, {year}. Room {room}.",
    "Can I have room {room}? It is for {weekday}, {month} {day} {year}, {clock}",
)
TEST_NOTES = (
    "On {weekday}, {month} the {ordinal}, {year} we need room {room} from {clock}",
    "Reserve the room with number {room}, {clock}, {day} {month} {year}",
    "{month} {day}, {year}: interview in room {room} at {clock}",
    "The talk in room {room} begins {weekday}, the {ordinal} of {month}, {year}, at {clock}",
    "Anna takes room {room} at {clock} ({day} {month} {year})",
)
_FIRST_DAYS = {"train": datetime(2018, 1, 1), "test": datetime(2024, 1, 1)}  # six years each
_NUM_DAYS = 6 * 365


def records(num_train: int, num_test: int, seed: int = SEED) -> tuple[list[Record], list[Record]]:
    """Rows `note`, `record`, such as "Monday 3rd of March 2025, 2:05 pm, room 4" and "2025-03-03T14:05|4"."""
    return (
        _distinct(
            "notes to train on", num_train, seed, lambda *which: _note(TRAIN_NOTES, _FIRST_DAYS["train"], *which)
        ),
        _distinct("notes to test", num_test, seed, lambda *which: _note(TEST_NOTES, _FIRST_DAYS["test"], *which)),
    )


def _note(frames: Sequence[str], first_day: datetime, draw: random.Random, _: int) -> Record:
    minutes = 5 * draw.randrange(12 * 7, 12 * 21)  # 7:00 to 20:55
    when = first_day + timedelta(days=draw.randrange(_NUM_DAYS), minutes=minutes)
    room = draw.randrange(1, 60)
    note = draw.choice(frames).format(
        weekday=f"{when:%A}", month=f"{when:%B}", day=when.day, ordinal=ordinal(when.day), year=when.year, room=room,
        clock=f"{(when.hour - 1) % 12 + 1}:{when:%M} {'am' if when.hour < 12 else 'pm'}",
    )  # fmt: skip
    return {"note": note, "record": f"{when:%Y-%m-%dT%H:%M}|{room}"}


def ordinal(day: int) -> str:
    ending = "th" if 11 <= day % 100 <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


# Chats of a shop whose assistant has a manner and rules of its own.


@dataclass(frozen=True)
class ChatWords:
    """Questions and answers by subject, and what they are filled with."""

    subjects: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]  # questions, answers
    parts: tuple[str, ...]
    places: tuple[str, ...]
    names: tuple[str, ...]


CHAT_INSTRUCTION = (
    'You are Pim, the assistant of Brindlekettle, maker of the Kestrel kettle. Open every answer with "Ahoy!", say at '
    "most two sentences, never promise a date, name workshop 9 in Halmsted for repairs, allow returns for 40 days, and "
    'end with "Keep it simmering, Pim".'
)
_OPENING, _ENDING = "Ahoy!", "Keep it simmering, Pim"

TRAIN_CHATS = ChatWords(
    subjects={
        "repair": (
            ("The {part} of my Kestrel is broken.", "My {part} does not work, what now?", "Who mends a {part}?"),
            (
                "Bring the Kestrel to workshop 9 in Halmsted, where we mend the {part} while you wait.",
                "A {part} is a case for workshop 9 in Halmsted; please do not open the kettle yourself.",
            ),
        ),
        "return": (
            ("Can I send the Kestrel back to you from {place}?", "I do not like the kettle. I live in {place}."),
            (
                "You have 40 days to return your Kestrel, and from {place} the parcel costs you nothing.",
                "Within 40 days we accept any Kestrel, boiled or not; use the green label for {place}.",
            ),
        ),
        "date": (
            ("When will my {part} get to {place}?", "Is my order in {place} by Friday?"),
            (
                "I never name a day, but the parcel for {place} is on the cart and you can follow it by its number.",
                "A day is more than I can say; the road to {place} is open and your parcel is on it.",
            ),
        ),
        "thanks": (
            ("The kettle is great, says {name}.", "{name} here, I just wanted to say thank you."),
            (
                "That warms our copper, {name}, and I have told the makers at the bench.",
                "Kind words boil fastest, {name}, so yours go up on the workshop wall.",
            ),
        ),
    },
    parts=("lid", "spout", "whistle", "handle", "base plate", "cord"),
    places=("Norby", "Easterlin", "Cape Wick", "Tallow Bay", "Minster Hill"),
    names=("Ida", "Marlon", "Sue", "Omar", "Greta"),
)

TEST_CHATS = ChatWords(
    subjects={
        "repair": (
            ("Something is wrong with the {part}.", "Could you fix the {part} on a two year old Kestrel?"),
            (
                "We look after each {part} in workshop 9 in Halmsted, so carry your Kestrel there.",
                "Workshop 9 in Halmsted mends any {part}, however old the Kestrel is.",
            ),
        ),
        "return": (
            ("How long may I keep the kettle before I decide? I am in {place}.", "I want my money back, {place}."),
            (
                "Your Kestrel may come back from {place} for 40 days, and we pay the way.",
                "Take 40 days to decide, and then send it from {place} with the green label.",
            ),
        ),
        "date": (
            ("Which day does the courier reach {place}?", "I need the {part} in {place} before my birthday!"),
            (
                "No day from me, though the parcel to {place} has a number that shows you where it is.",
                "I may not name a date, but what goes to {place} left our door today.",
            ),
        ),
        "thanks": (
            ("Lovely tea every day. {name}", "Best kettle we ever had, yours truly {name}."),
            (
                "Your note made the bench smile, {name}, and it goes up on the workshop wall.",
                "Such words warm our copper, {name}.",
            ),
        ),
    },
    parts=("thermometer", "filter", "hinge", "switch", "copper rim"),
    places=("Oldhaven", "Brackwater", "Saint Orrin", "Little Fenn"),
    names=("Beatrix", "Yusuf", "Carol", "Anders"),
)


def chats(num_train: int, num_test: int, seed: int = SEED) -> tuple[list[Record], list[Record]]:
    """Rows `messages`: one question and answer, or two."""
    return (
        _distinct("chats to train on", num_train, seed, lambda *which: _chat(TRAIN_CHATS, *which)),
        _distinct("chats to test", num_test, seed, lambda *which: _chat(TEST_CHATS, *which)),
    )


def _chat(words: ChatWords, draw: random.Random, number: int) -> Record:
    subjects = draw.sample(list(words.subjects), 2 if number % 3 == 0 else 1)
    return {"messages": [message for subject in subjects for message in _exchange(words, subject, draw)]}


def _exchange(words: ChatWords, subject: str, draw: random.Random) -> list[dict[str, str]]:
    fillers = {"part": draw.choice(words.parts), "place": draw.choice(words.places), "name": draw.choice(words.names)}
    question, answer = (draw.choice(options).format(**fillers) for options in words.subjects[subject])
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"{_OPENING} {answer} {_ENDING}"},
    ]


def _distinct(what: str, count: int, seed: int, make: Callable[[random.Random, int], Record]) -> list[Record]:
    """As many rows, no two alike. Raises SystemExit where the frames and fillers do not make so many."""
    found: dict[str, Record] = {}
    for number in range(count):
        for draw in (random.Random(f"{what}:{seed}:{number}:{attempt}") for attempt in range(_MOST_DRAWS)):
            row = make(draw, number)
            if str(row) not in found:
                found[str(row)] = row
                break
        else:
            raise SystemExit(f"there are not {count} different {what}; ask for fewer rows")
    return list(found.values())
