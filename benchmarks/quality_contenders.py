"""What the bench of a real base measures on a set: each contender with the settings that make it what it is."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from quality_cases import Case
from quality_product import rows_file, train_as_command
from quality_scoring import Scores, as_prompt, context_ids, score_rows, shots, text_figures, with_system, with_template
from quality_store import (
    BARE,
    BEST,
    GRID,
    IN_CONTEXT,
    INSTRUCTION,
    NOTEBOOK,
    OURS,
    PROBE,
    RANDOM,
    WORDS,
    Result,
    Settings,
    Store,
    commit,
)

from softprompt import Base, SoftPrompt, TrainConfig, load_prompt, save_prompt, train
from softprompt.config import NOTEBOOK_PRESET
from softprompt.data import Rows, render_rows, task_of
from softprompt.errors import DivergedError
from softprompt.families import forward_of
from softprompt.training import TrainResult

GRID_SETS = ("smollm2-sst2-200", "smollm2-quotes-25", "smollm2-roles-50")
GRID_RATES = (3e-3, 1.5e-2, 6e-2, 3e-1)  # 0.02 to 2.3 times the RMS of SmolLM2's embeddings
GRID_HELD_OUT = 5  # the last fifth of the training rows chooses
SHORT_SETS = ("smollm2-quotes-25",)  # with the notebook's own four vectors too
PROBE_CS, PROBE_FOLDS = np.logspace(-5, 1, 7), 5
LENGTH = 20
PEFT = {
    **NOTEBOOK_PRESET,
    "loss": "tokens",
    "averaging": 0.0,
}  # run by our trainer, whose runs equal PEFT's (tests/training)
TRAINING_COST = 2.3  # forward passes that a step on the same tokens takes: backward computes no gradient of a weight
FIRST, LATER, SEARCH, CHOSEN = range(4)  # stages, in the order in which a bench of all sets comes to them

_DIVERGED = 1e3  # nats per token


@dataclass(frozen=True)
class Contender:
    """What is measured, and the settings that make it what it is. `seeded`: every seed gives another."""

    name: str
    run: Callable[[Case, int], Result]
    settings: Settings
    seeded: bool = False
    passes: float = 0  # over the training rows, counted in forward passes, for the estimate of the time
    stage: int = LATER
    after: tuple[str, ...] = ()  # contenders that it needs: with its own seed, or the only one


def contenders_of(
    case: Case, store: Store, others: dict[str, Settings], grid_sets: Collection[str] = GRID_SETS
) -> Iterator[Contender]:
    """In the order of the tables."""
    yield from _untrained(case)
    lengths = (4, LENGTH) if case.name in SHORT_SETS else (LENGTH,)
    for length in lengths:
        stage = FIRST if length == LENGTH else LATER
        notebook = {**PEFT, "virtual_tokens": length}
        yield _trained(case, f"{NOTEBOOK}, P={length}", notebook, store, stage)
        yield _ours(case, f"{OURS}, P={length}", {"virtual_tokens": length}, store, stage)
    for name, settings in others.items():
        yield _ours(case, name, settings, store)
    yield _random(case, store, f"{OURS}, P={LENGTH}")
    if case.name in grid_sets:
        yield from _search(case, store)


def _untrained(case: Case) -> Iterator[Contender]:
    yield Contender(
        BARE, _bare, {"templates": list(case.templates)}, stage=FIRST, passes=max(1, len(case.templates))
    )  # fmt: skip
    if case.has_labels:
        yield Contender(WORDS, _bag_of_words, {})
        yield Contender(PROBE, _linear_probe, {"cs": PROBE_CS.tolist()}, passes=1, stage=FIRST)
    if not case.templates:
        yield Contender(INSTRUCTION, _instruction, {"instruction": case.instruction})
    rows = [row.key for row in render_rows(shots(case))]
    yield Contender(IN_CONTEXT, _in_context, {"rows": rows})


def _bare(case: Case, seed: int) -> Result:
    """The bare base, with the written template that does best on the training rows where there are templates."""
    began = time.perf_counter()
    if not case.templates:
        return result_of(score_rows(case.base, case.test, None), began)
    known = {text: score_rows(case.base, with_template(case.train, text), None) for text in case.templates}
    best = min(known, key=lambda text: worth(known[text]))
    return result_of(score_rows(case.base, with_template(case.test, best), None), began, repr(best))


def worth(scores: Scores) -> tuple[float, float]:
    """Lower is better: the share of wrong labels or answers, then the loss."""
    mean = sum(scores.sums) / sum(scores.counts)
    if scores.loss is not None:
        return mean, scores.loss
    return (1 - statistics.mean(scores.greedy), mean) if scores.greedy else (mean, 0.0)


def _instruction(case: Case, seed: int) -> Result:
    """In front of a text; as the system message of a chat."""
    began = time.perf_counter()
    if case.test.form.kind == "chat":
        return result_of(text_figures(case.base, with_system(case.test, case.instruction), None), began)
    prompt = as_prompt(case.base, case.base.encode(case.instruction))
    return result_of(text_figures(case.base, case.test, prompt), began)


def _in_context(case: Case, seed: int) -> Result:
    began = time.perf_counter()
    ids = context_ids(case.base, shots(case))
    return result_of(score_rows(case.base, case.test, as_prompt(case.base, ids)), began, f"{len(ids)} tokens in front")


def _config(case: Case, settings: Settings) -> TrainConfig:
    """With the defaults for the rows' task, so that a change of them is measured anew."""
    return TrainConfig(**settings).resolved(task_of(case.train.form))


def _ours(case: Case, name: str, settings: Settings, store: Store, stage: int = LATER) -> Contender:
    """As the command trains: where rows have labels, some of them are kept to choose the checkpoint."""

    def run(case: Case, seed: int) -> Result:
        began = time.perf_counter()
        config = TrainConfig(**{**settings, "seed": seed})
        kept = train_as_command(case.base, case.train, config, rows_file(case, store.folder))
        found = _keep_and_score(case, name, seed, store, kept.result, began)
        return replace(found, recommendation=kept.recommendation, resolved=_resolved(kept.result, config))

    config = _config(case, settings)
    passes = config.epochs * TRAINING_COST
    return Contender(name, run, asdict(config), seeded=True, passes=passes, stage=stage)


def _resolved(result: TrainResult, config: TrainConfig) -> Settings:
    """What the plan decided that the settings left open."""
    asked = asdict(config)
    found = {name: value for name, value in asdict(result.plan.config).items() if value != asked[name]}
    return {**found, "learning_rate": result.plan.learning_rate}


def _keep_and_score(
    case: Case, name: str, seed: int, store: Store, result: TrainResult, began: float, note: str = ""
) -> Result:
    save_prompt(result.prompt, store.prompt_folder(name, seed), overwrite=True)
    kept = f", step {result.kept_step} of {len(result.losses)}" if result.validation_losses or result.scores else ""
    note = note or f"training loss {statistics.mean(result.losses[-10:]):.2f}{kept}"
    return result_of(score_rows(case.base, case.test, result.prompt), began, note)


def _trained(case: Case, name: str, settings: Settings, store: Store, stage: int = LATER) -> Contender:
    def run(case: Case, seed: int) -> Result:
        return _train_and_score(case, name, settings, seed, store)

    config = _config(case, settings)
    passes = config.epochs * TRAINING_COST
    return Contender(name, run, asdict(config), seeded=True, passes=passes, stage=stage)


def _train_and_score(case: Case, name: str, settings: Settings, seed: int, store: Store, note: str = "") -> Result:
    began = time.perf_counter()
    result = train(case.base, case.train, TrainConfig(**{**settings, "seed": seed}))
    return _keep_and_score(case, name, seed, store, result, began, note)


def _random(case: Case, store: Store, like: str) -> Contender:
    def run(case: Case, seed: int) -> Result:
        """Directions drawn at random, each as long as the trained vector in its place."""
        began = time.perf_counter()
        trained = load_prompt(store.prompt_folder(like, seed)).tensor
        drawn = torch.randn(trained.shape, generator=torch.Generator().manual_seed(seed))
        vectors = drawn / drawn.norm(dim=1, keepdim=True) * trained.norm(dim=1, keepdim=True)
        return result_of(score_rows(case.base, case.test, SoftPrompt(vectors)), began)

    settings = asdict(_config(case, {"virtual_tokens": LENGTH}))
    return Contender(RANDOM, run, settings, seeded=True, stage=FIRST, after=(like,))


def grid_settings(instruction: str) -> dict[str, Settings]:
    """What a user of PEFT might try: its three starts at four rates, all else as in the notebook, P = 20."""
    starts = {
        "N(0,1)": {"init": "peft"},
        "vocabulary": {"init": "vocab"},
        "instruction": {"init": "text", "init_text": instruction},
    }
    return {
        f"{start}, {rate:g}": {**PEFT, "virtual_tokens": LENGTH, **own, "learning_rate": rate}
        for (start, own), rate in itertools.product(starts.items(), GRID_RATES)
    }


def _search(case: Case, store: Store) -> Iterator[Contender]:
    """The grid on four fifths of the training rows, chosen on the others; then its winner on all of them."""
    tried = {f"{GRID}{name}": settings for name, settings in grid_settings(case.instruction).items()}
    for name, settings in tried.items():
        config = _config(case, settings)
        yield Contender(
            name, _grid_run(settings), asdict(config), stage=SEARCH,
            passes=config.epochs * TRAINING_COST * (1 - 1 / GRID_HELD_OUT),
        )  # fmt: skip

    def run(case: Case, seed: int) -> Result:
        name = winner(store, tried)
        return _train_and_score(case, BEST, tried[name], seed, store, note=name.removeprefix(GRID))

    passes = PEFT["epochs"] * TRAINING_COST
    yield Contender(BEST, run, tried, seeded=True, passes=passes, stage=CHOSEN, after=tuple(tried))


def _grid_run(settings: Settings) -> Callable[[Case, int], Result]:
    def run(case: Case, seed: int) -> Result:
        began = time.perf_counter()
        count = len(case.train) - max(1, len(case.train) // GRID_HELD_OUT)
        rows, chooses = case.train.select(range(count)), case.train.select(range(count, len(case.train)))
        try:
            prompt = train(case.base, rows, TrainConfig(**{**settings, "seed": seed})).prompt
        except DivergedError:
            return Result([_DIVERGED], [1], time.perf_counter() - began, "diverged")
        return result_of(score_rows(case.base, chooses, prompt), began, f"{len(chooses)} of the training rows")

    return run


def winner(store: Store, names: Collection[str]) -> str:
    """Of the grid: the fewest wrong labels, then the lowest loss, on the rows that choose."""

    def value(name: str) -> tuple[float, float]:
        found = store.results(name)[0]
        return found.mean, math.inf if found.loss is None else found.loss

    return min(names, key=value)


def result_of(scores: Scores, began: float, note: str = "") -> Result:
    return Result(
        scores.sums, scores.counts, time.perf_counter() - began, note, scores.greedy, scores.loss, commit()
    )  # fmt: skip


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
    truth = [[row.text for row in render_rows(rows)] for rows in (case.train, case.test)]
    num_folds = max(2, min(PROBE_FOLDS, *Counter(truth[0]).values()))
    model = GridSearchCV(pipeline, {"logisticregression__C": PROBE_CS}, cv=num_folds)
    model.fit(last_states(case.base, case.train), truth[0])
    return _predicted(truth[1], model.predict(last_states(case.base, case.test)), began)


@torch.no_grad()
def last_states(base: Base, rows: Rows) -> np.ndarray:
    """[N, D]: the last hidden state of each row's last token before the completion."""
    forward, states = forward_of(base), []
    for row in render_rows(rows):
        ids = torch.tensor(base.bos_ids + base.encode(row.prompt))
        mask, positions = torch.ones_like(ids)[None], torch.arange(len(ids))[None]
        states.append(forward.hidden_states(base.embed(ids)[None], mask, positions)[0, -1].float().numpy())
    return np.stack(states)


def _predicted(truth: Sequence[str], found: Sequence[str], began: float) -> Result:
    errors = [float(own != guess) for own, guess in zip(truth, found, strict=True)]
    return result_of(Scores(errors, [1] * len(errors)), began)
