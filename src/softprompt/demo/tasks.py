"""The demo's three tasks: their rows, their settings, and five templates that a person might write instead."""

from __future__ import annotations

from dataclasses import dataclass

from softprompt.config import DataConfig, TrainConfig
from softprompt.embedded import data_file

INPUTS = (
    "I want you to act as a motivational coach. ",
    "There are two nice things that should matter to you:",
)
REVIEW_TEMPLATE = "Review: {text}\nSentiment:"
REVIEW_COMPLETION = " {label}"
WRITTEN_TEMPLATES = (
    REVIEW_TEMPLATE,
    "{text}\nIs this review positive or negative?\nAnswer:",
    "Classify the review as positive or negative.\nReview: {text}\nLabel:",
    "{text}\nOverall, this review is",
    "A customer wrote: {text}\nThe customer's opinion is",
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One soft prompt to train. `data.test` holds rows that share no template with the training rows."""

    name: str
    data: DataConfig
    train: TrainConfig


TASKS = (
    Task(
        name="coach",
        data=DataConfig(
            data=str(data_file("coach-prompts.csv")),
            text_column="prompt",
            rows=50,
            test=str(data_file("coach-prompts-heldout.csv")),
        ),
        train=TrainConfig(virtual_tokens=8, epochs=12),
    ),
    Task(
        name="quotes",
        data=DataConfig(
            data=str(data_file("quotes.jsonl")),
            text_column="quote",
            rows=50,
            test=str(data_file("quotes-heldout.jsonl")),
        ),
        train=TrainConfig(virtual_tokens=8, epochs=12),
    ),
    Task(
        name="reviews",
        data=DataConfig(
            data=str(data_file("reviews.csv")),
            template=REVIEW_TEMPLATE,
            completion=REVIEW_COMPLETION,
            rows=200,
            test=str(data_file("reviews-heldout.csv")),
        ),
        train=TrainConfig(virtual_tokens=20, epochs=6),
    ),
)
