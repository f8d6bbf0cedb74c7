"""Go over every causal class of the installed transformers: `python tests/families/family_scan.py` writes
docs/families.md. Each is exact, or refused by name, or listed as not built from a tiny config; there is nothing else.

`python tests/families/family_scan.py KIND ...` prints some of them only.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers as hf
from support.family_configs import KINDS, NOT_BUILT, class_of, tiny_model
from support.slow_truth import plain_greedy, plain_logits, plain_nats, relative_error
from support.tiny_bases import build_tokenizer, random_ids, random_prompt

from softprompt.base import Base, freeze_base
from softprompt.config import SamplingConfig
from softprompt.engine import Answer, Engine, Request, generate
from softprompt.errors import BaseModelError
from softprompt.families import Forward, forward_of
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row, target_states
from softprompt.training.step import accumulate_gradient

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
NUM_NEW = 8
TOLERANCE = 1e-4  # relative, float32
Truth = tuple[list[int], list[torch.Tensor], list[torch.Tensor]]  # ids, log-probabilities [V], scores [V]
ROWS = (random_ids(11, 1, 90), random_ids(4, 2, 90))  # longer than every tiny window; above 90 stand images


@dataclass(frozen=True)
class Outcome:
    kind: str
    model_class: str
    result: str  # exact, refused or not built
    training: str = ""
    answers: str = ""
    reason: str = ""


def outcome_of(kind: str) -> Outcome:
    """Raises AssertionError, or whatever comes, where a family is neither exact nor refused."""
    name = class_of(kind).__name__
    if kind in NOT_BUILT:
        return Outcome(kind, name, "not built", reason=NOT_BUILT[kind])
    model = tiny_model(kind)
    pristine = deepcopy(model)
    try:
        base = freeze_base(model, build_tokenizer(has_bos=False), name="tiny")
        forward = forward_of(base)
    except BaseModelError as error:
        return Outcome(kind, name, "refused", reason=str(error).partition(": ")[2] or str(error))
    assert_exact(base, forward, pristine)
    training, answers = runners_of(base, forward)
    first = forward.first_position
    note = f"positions count from {first}, as in its forward; transformers' `generate` counts from 0" if first else ""
    return Outcome(kind, name, "exact", training, answers, note)


def runners_of(base: Base, forward: Forward) -> tuple[str, str]:
    training = (
        "packed" if forward.packing.carrier else "one row at a time" if forward.max_batchable_length == 0 else "padded"
    )
    if Engine(base).runners.is_batchable:
        return training, "together"
    return training, "one row at a time" + ("" if forward.cache != "none" else ", without a cache")


def assert_exact(base: Base, forward: Forward, pristine: hf.PreTrainedModel) -> None:
    """Logits, answers and gradients are those of a copy of the model that we never touched."""
    untouched = freeze_base(pristine, base.tokenizer, name="untouched")
    prompts = [random_prompt(base, 3, seed=3), random_prompt(base, 5, seed=5)]
    assert_logits(base, forward, untouched, prompts)
    assert_answers(base, untouched, prompts)
    assert_gradient(base, forward, untouched, prompts)


@torch.no_grad()
def assert_logits(base: Base, forward: Forward, untouched: Base, prompts: list[torch.Tensor]) -> None:
    own = [row(ids, None) for ids in ROWS]
    for ids, ours in zip(ROWS, logits_at_targets(base, forward, own, prompts), strict=True):
        truth = untouched.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        assert relative_error(ours, truth) < TOLERANCE, "logits of ids"
        assert relative_error(ours, truth.roll(1, 0)) > TOLERANCE, "this check would pass anything"
    behind = [row(ids, owner) for owner, ids in enumerate(ROWS)]
    for owner, ours in enumerate(logits_at_targets(base, forward, behind, prompts)):
        truth = plain_logits(untouched, ROWS[owner], prompts[owner])[len(prompts[owner]) - 1 : -1]
        assert relative_error(ours, truth) < TOLERANCE, "logits behind a soft prompt"
        wrong = plain_logits(untouched, ROWS[owner], prompts[owner].flip(0))[len(prompts[owner]) - 1 : -1]
        assert relative_error(ours, wrong) > TOLERANCE, "a shuffled soft prompt passes"


def row(ids: tuple[int, ...], owner: int | None) -> Row:
    return Row(ids, owner, [float(owner is not None or column > 0) for column in range(len(ids))])


def logits_at_targets(
    base: Base, forward: Forward, rows: list[Row], prompts: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    hidden, targets = target_states(base, forward, rows, prompts)
    return forward.logits(hidden).split([int((targets.rows == number).sum()) for number in range(len(rows))])


def assert_answers(base: Base, untouched: Base, prompts: list[torch.Tensor]) -> None:
    requests = [Request(ROWS[0], None), Request(ROWS[1], None), *map(Request, ROWS, map(SoftPrompt, prompts))]
    answers = generate(base, requests, SamplingConfig(max_new_tokens=NUM_NEW))
    for request, answer in zip(requests[:2], answers[:2], strict=True):
        truth = own_greedy(untouched, request.ids)
        if counts_otherwise(untouched, request.ids, truth):
            truth = plain_greedy(untouched, request.ids, None, NUM_NEW)
        assert_same(answer, truth, base.stop_ids)
    for prompt, request, answer in zip(prompts, requests[2:], answers[2:], strict=True):
        truth = plain_greedy(untouched, request.ids, prompt, NUM_NEW)
        assert_same(answer, truth, base.stop_ids)


def assert_same(answer: Answer, truth: Truth, stop_ids: tuple[int, ...]) -> None:
    """Tokens, up to a tie, and their log-probabilities."""
    true_ids, true_log_probs, scores = truth
    for step, (ours, theirs) in enumerate(zip(answer.ids, true_ids, strict=False)):
        if ours != theirs:
            assert abs(float(scores[step][ours] - scores[step][theirs])) < TOLERANCE, f"token {step}: {ours}, {theirs}"
            return
        off = abs(answer.log_probs[step] - float(true_log_probs[step][ours]))
        assert off < TOLERANCE * float(scores[step].abs().max()), f"log-probability of token {step} is off by {off}"
    assert list(answer.ids) == [token for token in true_ids if token not in stop_ids], "length"


@torch.no_grad()
def own_greedy(base: Base, ids: tuple[int, ...]) -> Truth:
    """As `plain_greedy`, by transformers' `generate` on token ids."""
    given = torch.tensor([ids])
    out = base.model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=NUM_NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    scores = [step[0] for step in out.logits]
    return out.sequences[0, len(ids) :].tolist(), [step.log_softmax(-1) for step in scores], scores


@torch.no_grad()
def counts_otherwise(base: Base, ids: tuple[int, ...], generated: Truth) -> bool:
    """RoBERTa's kin: `generate` counts their positions from 0, their own forward from behind the pad's id."""
    if not isinstance(forward_of(base).first_position, int) or not forward_of(base).first_position:
        return False
    given = torch.tensor([ids])
    own = base.model(given).logits[0, -1]
    from_zero = base.model(given, position_ids=torch.arange(len(ids))[None]).logits[0, -1]
    assert relative_error(generated[2][0], from_zero) < TOLERANCE < relative_error(own, from_zero)
    return True


def assert_gradient(base: Base, forward: Forward, untouched: Base, prompts: list[torch.Tensor]) -> None:
    rows = [row(ids, owner) for owner, ids in enumerate(ROWS)]
    ours, theirs = ([prompt.clone().requires_grad_(True) for prompt in prompts] for _ in range(2))
    nats = sum(list(accumulate_gradient(base, forward, ours, rows, len(rows))))
    for owner, ids in enumerate(ROWS):
        own = plain_nats(untouched, ids, [True] * len(ids), theirs[owner])
        assert abs(float(nats[owner] - own.sum())) < TOLERANCE * float(own.sum()), "loss"
        own.mean().backward()
        assert relative_error(ours[owner].grad, theirs[owner].grad) < 10 * TOLERANCE, "gradient"


def causal_part() -> str:
    """The page up to the other kinds of bases."""
    return PAGE.read_text(encoding="utf-8").partition("\n## ")[0] + "\n"


def write_section(title: str, text: str) -> None:
    """Replace a section of the page, or add it at the end; the text without its heading."""
    found = PAGE.read_text(encoding="utf-8")
    before, _, behind = found.partition(f"\n## {title}\n")
    _, heading, others = behind.partition("\n## ")
    PAGE.write_text(f"{before.rstrip()}\n\n## {title}\n\n{text}{heading}{others}", encoding="utf-8")


def page(outcomes: list[Outcome]) -> str:
    counts = ", ".join(
        f"{sum(one.result == result for one in outcomes)} {result}" for result in ("exact", "refused", "not built")
    )
    rows = [
        f"| {one.kind} | {one.model_class} | {one.result} | {one.training} | {one.answers} | {one.reason} |"
        for one in outcomes
    ]
    return _INTRODUCTION.format(version=hf.__version__, number=len(outcomes), counts=counts) + "\n".join(rows) + "\n"


_INTRODUCTION = """# Families

Made by `tests/families/family_scan.py` with transformers {version}, from a tiny seeded model of each of its {number}
causal model types: {counts}.

- **exact**: logits and greedy answers are those of the model itself on token ids (`model(input_ids=...)` and
  `generate`), and behind a soft prompt those of plain runs of concatenated embeddings; so are loss and gradient.
  Gemma-3n and Gemma-4 look each token id up once more for every layer (per-layer embeddings); a virtual token gets
  there what the model gives the vectors of an image: the embeddings of id 0 in Gemma-3n, of the pad in Gemma-4.
- **refused**: training, answers and scores alike end in one sentence with the reason, before anything is trained.
- **not built**: no tiny model could be made here. What a real one is, the check finds out that every base meets when it
  is first used (`families/exactness.py`).

Training runs rows packed into one sequence, padded to one length, or one at a time. Answers run together over kept keys
and values, or one row at a time (without a cache: the whole row for every token, which is slow).

| model type | class | outcome | training | answers | reason |
| --- | --- | --- | --- | --- | --- |
"""


def write_page(outcomes: list[Outcome]) -> None:
    _, heading, others = PAGE.read_text(encoding="utf-8").partition("\n## ")
    PAGE.write_text(page(outcomes) + heading + others, encoding="utf-8")


def scan(known: Iterable[str], outcome_of: Callable[[str], Any], write: Callable[[list[Any]], None]) -> None:
    """Print the outcome of the kinds on the command line; without any, of all known ones, and write those down."""
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    kinds, outcomes, failures = sys.argv[1:], [], 0
    for kind in kinds or known:
        try:
            outcomes.append(outcome_of(kind))
            print(outcomes[-1], flush=True)
        except Exception as error:
            failures += 1
            print("FAILED", kind, f"{type(error).__name__}: {error}".split("\n")[0][:300], flush=True)
            if os.environ.get("TRACE"):
                raise
    if not kinds and not failures:
        write(outcomes)


if __name__ == "__main__":
    scan(KINDS, outcome_of, write_page)
