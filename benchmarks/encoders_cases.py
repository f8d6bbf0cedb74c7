"""Rows and contenders of `encoders.py`: who learns SST-2 from which rows on all-MiniLM-L6-v2, and what each predicts.

A seed draws its own training rows; the smaller number is the beginning of the larger one's, so the two are nested. The
first rows of the shuffled training file chose our recipe (`--choose`) and are in no draw. A result has 1 for each row
that is predicted wrong.

N rows, D hidden width.
"""

from __future__ import annotations

import json
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from encoders_peft import PEFT_RATES, peft_predictions
from quality_store import Result, Settings, commit

OURS, PROBE, WORDS = "ours by default", "linear probe", "bag of words"
PEFT = {"PEFT, its guides' 1e-3": PEFT_RATES[0], "PEFT, the Trainer's 5e-5": PEFT_RATES[1]}
NAMES = ("negative", "positive")
CHOOSING = 1_000  # rows that only choose recipes
SIZES = (200, 1_000)
SEEDS = (0, 1, 2, 3, 4)
CS, FOLDS = np.logspace(-4, 2, 7), 5
LENGTH = 20
BATCH_ROWS = 8  # ours by default, and the Trainer's


class Texts(NamedTuple):
    """Texts with the number of each one's label."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Contender:
    """What is measured, and the settings that make it what it is; `run` gives a prediction for each text to score."""

    name: str
    settings: Settings
    run: Callable[[Texts, Sequence[str], int], Sequence[int]]  # training rows, texts, seed


def read_sst2(file: Path) -> Texts:
    """Lines of a label and a text."""
    pairs = [line.partition(" ")[::2] for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return Texts(tuple(text for _, text in pairs), tuple(int(label) for label, _ in pairs))


def draw(material: Path, seed: int, size: int) -> Texts:
    """The training rows of a seed."""
    rows = _shuffled(material)[CHOOSING:]
    random.Random(f"draw {seed}").shuffle(rows)
    return _texts(rows[:size])


def scored(material: Path, choose: bool) -> Texts:
    """The dev rows; to choose a recipe, the rows that are kept for that."""
    return _texts(_shuffled(material)[:CHOOSING]) if choose else read_sst2(material / "sst2" / "dev.txt")


def _shuffled(material: Path) -> list[tuple[str, int]]:
    rows = list(zip(*read_sst2(material / "sst2" / "train.txt"), strict=True))
    random.Random("encoders").shuffle(rows)
    return rows


def _texts(rows: Sequence[tuple[str, int]]) -> Texts:
    return Texts(tuple(text for text, _ in rows), tuple(label for _, label in rows))


def contenders(dtype: str, recipes: dict[str, Settings]) -> list[Contender]:
    """In the order of the tables; `recipes` are settings of ours beside the default ones."""
    found = [ours(name, own, dtype) for name, own in {OURS: {}, **recipes}.items()]
    epochs = found[0].settings["epochs"]
    return [
        Contender(WORDS, {"words": ["counts", "tf-idf"], "cs": CS.tolist()}, bag_of_words),
        Contender(PROBE, {"pooling": ["cls", "mean"], "cs": CS.tolist(), "dtype": dtype}, _probe(dtype)),
        *(_peft(name, rate, epochs) for name, rate in PEFT.items()),
        *found,
    ]


def measured(contender: Contender, train: Texts, test: Texts, seed: int) -> Result:
    """Its errors on the rows to score, and the seconds that training and predicting took."""
    began = time.perf_counter()
    found = contender.run(train, test.texts, seed)
    errors = [float(own != guess) for own, guess in zip(test.labels, found, strict=True)]
    return Result(errors, [1] * len(errors), time.perf_counter() - began, commit=commit())


def ours(name: str, given: Settings, dtype: str) -> Contender:
    """softprompt's `train` with the task's defaults, on all rows, none kept for validation."""
    from softprompt import TrainConfig

    config = TrainConfig(**{"task": "classify", "virtual_tokens": LENGTH, **given}).resolved("classify")

    def run(train: Texts, texts: Sequence[str], seed: int) -> Sequence[int]:
        from softprompt import predict
        from softprompt import train as train_prompt

        rows = [{"text": text, "label": NAMES[label]} for text, label in zip(*train, strict=True)]
        prompt = train_prompt(base(dtype), rows, TrainConfig(**{**asdict(config), "seed": seed})).prompt
        return [NAMES.index(str(answer.label)) for answer in predict(base(dtype), prompt, texts)]

    settings: Settings = json.loads(json.dumps({**asdict(config), "dtype": dtype}))  # as the store has it
    return Contender(name, settings, run)


def _peft(name: str, rate: float, epochs: int) -> Contender:
    settings = {"rate": rate, "epochs": epochs, "virtual_tokens": LENGTH, "batch_rows": BATCH_ROWS}

    def run(train: Texts, texts: Sequence[str], seed: int) -> Sequence[int]:
        request = {**settings, "texts": train.texts, "labels": train.labels, "seed": seed, "base": str(base_folder())}
        return peft_predictions(request, texts)

    return Contender(name, settings, run)


def _probe(dtype: str) -> Callable[[Texts, Sequence[str], int], Sequence[int]]:
    def run(train: Texts, texts: Sequence[str], seed: int) -> Sequence[int]:
        """Logistic regression on the bare base's last states; pooling and L2 by five folds of the training rows."""
        from sklearn.linear_model import LogisticRegression

        searches = [_searched(LogisticRegression(max_iter=5_000), states, train.labels) for states in
                    bare_states(dtype, train.texts)]  # fmt: skip
        best = max((0, 1), key=lambda pooling: searches[pooling].best_score_)
        return [int(label) for label in searches[best].predict(bare_states(dtype, tuple(texts))[best])]

    return run


def bag_of_words(train: Texts, texts: Sequence[str], seed: int) -> Sequence[int]:
    """Logistic regression on counts or TF-IDF of words; which of them and L2 by five folds of the training rows."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipelines = [make_pipeline(words(), LogisticRegression(max_iter=5_000)) for words in
                 (CountVectorizer, TfidfVectorizer)]  # fmt: skip
    searches = [_searched(each, train.texts, train.labels, "logisticregression__C") for each in pipelines]
    best = max(searches, key=lambda search: float(search.best_score_))
    return [int(label) for label in best.predict(texts)]


def _searched(model: Any, inputs: Any, labels: Sequence[int], name: str = "C") -> Any:  # Any: scikit-learn's, untyped
    from sklearn.model_selection import GridSearchCV

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a solver that ends at its most iterations
        return GridSearchCV(model, {name: CS}, cv=FOLDS).fit(inputs, labels)


@cache
def base(dtype: str) -> Any:  # Any: a Base
    from softprompt import load_base

    return load_base("minilm", dtype=dtype, device="cpu")


def base_folder() -> Path:
    from softprompt.base.source import minilm_folder

    return minilm_folder()


@cache
def bare_states(dtype: str, texts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] each, by transformers alone: the state of [CLS], and the mean over the tokens."""
    import torch

    found, each = [], base(dtype)
    with torch.no_grad():
        for text in texts:
            ids = each.tokenizer(text, truncation=True, max_length=each.max_length, return_tensors="pt")["input_ids"]
            states_TD = each.model.base_model(input_ids=ids).last_hidden_state[0].float()
            found.append(torch.stack([states_TD[0], states_TD.mean(dim=0)]).numpy())
    both = np.stack(found)
    return both[:, 0], both[:, 1]
