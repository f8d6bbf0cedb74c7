"""A real base in the bench: each contender on each set and seed, kept row by row, so that a stopped bench goes on.

Each set has a file in the output folder, written anew after every contender and seed. A contender whose settings are no
longer those of its file is measured again. Intervals are paired over the test rows, as `compare` has them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_cases import Case

from softprompt import Base, SoftPrompt, TrainConfig, load_prompt, save_prompt, train
from softprompt.config import NOTEBOOK_PRESET
from softprompt.data import Rows, build_examples, render_rows
from softprompt.demo.tasks import WRITTEN_TEMPLATES
from softprompt.evaluation.classification import label_scores, labelled_rows
from softprompt.evaluation.heldout import bootstrap_interval
from softprompt.families import forward_of
from softprompt.loss import score_examples

SEEDS = (0, 1, 2, 3, 4)
BARE, OURS, RANDOM = "the bare base", "ours by default", "random vectors of the same norm"
PROBE_CS = np.logspace(-5, 1, 7)
TRAINING_COST = 2.0  # forward passes that a step on the same tokens takes: backward computes no weight's gradient
_TRIAL_ROWS = 8

Settings = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One contender with one seed on the test rows: a row's nats (with labels: whether it is wrong) and its tokens."""

    sums: list[float]
    counts: list[int]
    seconds: float  # training, choice and scoring
    note: str = ""

    @property
    def mean(self) -> float:
        return sum(self.sums) / sum(self.counts)


@dataclass(frozen=True)
class Contender:
    """What is measured, and the settings that make it what it is. `seeded`: every seed gives another."""

    name: str
    run: Callable[[Case, int], Result]
    settings: Settings
    seeded: bool = False
    passes: float = 0  # over the training rows, counted in forward passes, for the estimate of the time


class Bench:
    """The contenders of one set, and the file of what is known of them."""

    def __init__(self, case: Case, folder: Path, num_seeds: int, others: dict[str, Settings] | None = None) -> None:
        self.case, self._file = case, folder / f"{case.name}.json"
        self.contenders = list(_contenders(case, folder, others or {}))
        self._seeds = SEEDS[:num_seeds]
        found = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._known: dict[str, dict[str, Any]] = {
            item.name: found[item.name]
            for item in self.contenders
            if found.get(item.name, {}).get("settings") == item.settings
        }

    @property
    def missing(self) -> list[tuple[Contender, int]]:
        return [
            (item, seed)
            for item in self.contenders
            for seed in (self._seeds if item.seeded else SEEDS[:1])
            if str(seed) not in self._known.get(item.name, {}).get("seeds", {})
        ]

    def estimate(self) -> float:
        """Seconds that what is missing takes, by the speed of this base on a few of the rows."""
        if not self.missing:
            return 0.0
        train_tokens, test_tokens = (_num_tokens(self.case.base, rows) for rows in (self.case.train, self.case.test))
        scored = test_tokens * max(1, len(self.case.train.form.labels))
        tokens = sum(scored + item.passes * train_tokens for item, _ in self.missing)
        return tokens * self._seconds_per_token()

    def _seconds_per_token(self) -> float:
        """Of a forward pass, on rows of this set; the second time, as the first checks the base too."""
        some = self.case.train.select(range(min(_TRIAL_ROWS, len(self.case.train))))
        text_nats(self.case.base, some, None)
        began = time.perf_counter()
        text_nats(self.case.base, some, None)
        return (time.perf_counter() - began) / _num_tokens(self.case.base, some)

    def measure(self) -> None:
        for item, seed in self.missing:
            print(f"{self.case.name}: {item.name}, seed {seed}", flush=True)
            kept = self._known.setdefault(item.name, {"settings": item.settings, "seeds": {}})
            kept["seeds"][str(seed)] = asdict(item.run(self.case, seed))
            self._write()

    def _write(self) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(self._known))
        new.replace(self._file)

    def results(self, name: str) -> list[Result]:
        return [Result(**item) for item in self._known.get(name, {}).get("seeds", {}).values()]

    def table(self) -> str:
        what = "accuracy" if self.case.has_labels else "nats per token"
        head = f"\n{self.case.name}: {len(self.case.train)} rows, {len(self.case.test)} test rows\n\n"
        head += f"| contender | {what} | seeds | minus the bare base | 95 % interval | seconds |\n|" + " --- |" * 6
        return "\n".join([head, *(self._line(item.name) for item in self.contenders if self.results(item.name))])

    def _line(self, name: str) -> str:
        found, bare = self.results(name), self.results(BARE)
        means = [self._shown(item.mean) for item in found]
        spread = f" ± {statistics.stdev(means):{self._form}}" if len(means) > 1 else ""
        figure = f"{statistics.mean(means):{self._form}}{spread}"
        gap = paired(found, bare[0]) if bare and name != BARE else None
        sign = -1 if self.case.has_labels else 1  # rows are counted as wrong, and shown as right
        ends = sorted(100**self.case.has_labels * sign * end for end in gap[1:]) if gap else []
        middle = f"{100**self.case.has_labels * sign * gap[0]:+{self._form}}" if gap else ""
        interval = f"{ends[0]:+{self._form}} to {ends[1]:+{self._form}}" if ends else ""
        seconds = statistics.mean(item.seconds for item in found)
        note = f" ({found[0].note})" if found[0].note else ""
        return f"| {name}{note} | {figure} | {len(found)} | {middle} | {interval} | {seconds:.0f} |"

    @property
    def _form(self) -> str:
        return ".1f" if self.case.has_labels else ".3f"

    def _shown(self, mean: float) -> float:
        return 100 * (1 - mean) if self.case.has_labels else mean


def paired(found: Sequence[Result], bare: Result) -> tuple[float, float, float]:
    """A contender minus the bare base, and the interval over the rows; each row is the mean of the seeds."""
    rows = np.mean([item.sums for item in found], axis=0) - np.array(bare.sums)
    interval = bootstrap_interval(rows.tolist(), bare.counts, 0)
    assert interval is not None, "one test row"
    return float(rows.sum() / sum(bare.counts)), interval.low, interval.high


def _contenders(case: Case, folder: Path, others: dict[str, Settings]) -> Iterator[Contender]:
    if case.has_labels:
        passes = len(WRITTEN_TEMPLATES) * len(case.train.form.labels)
        yield Contender(BARE, _best_template, {"templates": list(WRITTEN_TEMPLATES)}, passes=passes)
        yield Contender("bag of words", _bag_of_words, {})
        yield Contender("linear probe", _linear_probe, {"cs": PROBE_CS.tolist()}, passes=1)
    else:
        yield Contender(BARE, lambda case, _: _scored(case, None, time.perf_counter()), {})
        yield Contender("an instruction's words", _instruction, {"instruction": case.instruction})
    for length in (20,) if case.has_labels else (4, 20):
        yield _trained(f"PEFT's start, 3e-3, P={length}", {**NOTEBOOK_PRESET, "virtual_tokens": length}, folder)
        yield _trained(f"{OURS}, P={length}", {"virtual_tokens": length}, folder)
    for name, settings in others.items():
        yield _trained(name, settings, folder)
    like = f"{OURS}, P=20"
    settings = asdict(TrainConfig(virtual_tokens=20))
    yield Contender(RANDOM, lambda case, seed: _random(case, seed, folder, like), settings, seeded=True)


def _trained(name: str, settings: Settings, folder: Path) -> Contender:
    def run(case: Case, seed: int) -> Result:
        began = time.perf_counter()
        result = train(case.base, case.train, TrainConfig(**{**settings, "seed": seed}))
        save_prompt(result.prompt, _prompt_folder(folder, case, name, seed), overwrite=True)
        return _scored(case, result.prompt, began, f"training loss {statistics.mean(result.losses[-10:]):.2f}")

    config = TrainConfig(**settings)
    return Contender(name, run, asdict(config), seeded=True, passes=config.epochs * TRAINING_COST)


def _prompt_folder(folder: Path, case: Case, name: str, seed: int) -> Path:
    letters = "".join(letter if letter.isalnum() else "-" for letter in name)
    return folder / f"{case.name}-prompts" / f"{letters}-{seed}"


def _random(case: Case, seed: int, folder: Path, like: str) -> Result:
    """Directions drawn at random, each as long as the trained vector in its place."""
    began = time.perf_counter()
    trained = load_prompt(_prompt_folder(folder, case, like, seed)).tensor
    drawn = torch.randn(trained.shape, generator=torch.Generator().manual_seed(seed))
    vectors = drawn / drawn.norm(dim=1, keepdim=True) * trained.norm(dim=1, keepdim=True)
    return _scored(case, SoftPrompt(vectors), began)


def _instruction(case: Case, seed: int) -> Result:
    began = time.perf_counter()
    ids = torch.tensor(case.base.encode(case.instruction))
    return _scored(case, SoftPrompt(case.base.embed(ids).float()), began)


def _best_template(case: Case, seed: int) -> Result:
    """The bare base with the written template that is right most often on the training rows."""
    began = time.perf_counter()
    known = {text: sum(label_errors(case.base, with_template(case.train, text), None)) for text in WRITTEN_TEMPLATES}
    best = min(known, key=known.__getitem__)
    errors = label_errors(case.base, with_template(case.test, best), None)
    return Result(errors, [1] * len(errors), time.perf_counter() - began, repr(best))


def with_template(rows: Rows, template: str) -> Rows:
    return replace(rows, form=replace(rows.form, template=template))


def _bag_of_words(case: Case, seed: int) -> Result:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    began = time.perf_counter()
    known, held_out = render_rows(case.train), render_rows(case.test)
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1_000))
    model.fit([row.prompt for row in known], [row.text for row in known])
    return _predicted([row.text for row in held_out], model.predict([row.prompt for row in held_out]), began)


def _linear_probe(case: Case, seed: int) -> Result:
    """Logistic regression on the last token's last hidden state; its strength by five folds of the training rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    began = time.perf_counter()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000))
    model = GridSearchCV(pipeline, {"logisticregression__C": PROBE_CS}, cv=5)
    truth = [[row.text for row in render_rows(rows)] for rows in (case.train, case.test)]
    model.fit(last_states(case.base, case.train), truth[0])
    return _predicted(truth[1], model.predict(last_states(case.base, case.test)), began)


@torch.no_grad()
def last_states(base: Base, rows: Rows) -> np.ndarray:
    """[N, H]: the last hidden state of each row's last token before the completion."""
    forward, states = forward_of(base), []
    for row in render_rows(rows):
        ids = torch.tensor(base.bos_ids + base.encode(row.prompt))
        mask, positions = torch.ones_like(ids)[None], torch.arange(len(ids))[None]
        states.append(forward.hidden_states(base.embed(ids)[None], mask, positions)[0, -1].float().numpy())
    return np.stack(states)


def _predicted(truth: Sequence[str], found: Sequence[str], began: float) -> Result:
    errors = [float(own != guess) for own, guess in zip(truth, found, strict=True)]
    return Result(errors, [1] * len(errors), time.perf_counter() - began)


def _scored(case: Case, prompt: SoftPrompt | None, began: float, note: str = "") -> Result:
    if case.has_labels:
        sums = label_errors(case.base, case.test, prompt)
        counts = [1] * len(sums)
    else:
        sums, counts = text_nats(case.base, case.test, prompt)
    return Result(sums, counts, time.perf_counter() - began, note)


def label_errors(base: Base, rows: Rows, prompt: SoftPrompt | None) -> list[float]:
    """1 for each row of which another label is the likeliest, else 0."""
    known = labelled_rows(rows)
    (scores_NK,) = label_scores(base, forward_of(base), known.texts, known.labels, [prompt])
    return [float(own != guess) for own, guess in zip(known.own, scores_NK.argmax(axis=1), strict=True)]


def text_nats(base: Base, rows: Rows, prompt: SoftPrompt | None) -> tuple[list[float], list[int]]:
    """Each row's nats and its tokens, the same ones with and without a prompt."""
    examples = build_examples(base, rows, eos=False, max_length=base.max_length - 20).examples
    scores = score_examples(base, forward_of(base), examples, None if prompt is None else prompt.tensor)
    return [score.text_nats for score in scores], [score.num_text for score in scores]


def _num_tokens(base: Base, rows: Rows) -> int:
    return sum(len(base.encode(row.prompt + row.text)) for row in render_rows(rows))


def run(cases: Sequence[Case], folder: Path, num_seeds: int, others: dict[str, Settings]) -> None:
    """Tell how long it takes, measure what is missing, print a table after each set."""
    benches = [Bench(case, folder, num_seeds, others) for case in cases]
    num_missing = sum(len(bench.missing) for bench in benches)
    minutes = sum(bench.estimate() for bench in benches) / 60
    print(f"{num_missing} measurements are missing, about {minutes:.0f} minutes on this machine", flush=True)
    for bench in benches:
        bench.measure()
        print(bench.table(), flush=True)
