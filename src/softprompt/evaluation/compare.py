"""Before and after: the bare base and each prompt on one copy of the base, by answers and by held-out figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from softprompt.base import Base
from softprompt.config import SamplingConfig, ScoreConfig
from softprompt.data import Input, Rows, build_examples, form_ids
from softprompt.data.form import input_list
from softprompt.engine import Request, generate
from softprompt.errors import ConfigError, shortened
from softprompt.evaluation.baselines import Baselines, Verdict, baselines, verdicts
from softprompt.evaluation.classification import Accuracy, accuracies
from softprompt.evaluation.ensemble import Ensembles, check_ensembles, vote_accuracies
from softprompt.evaluation.head_figures import head_figures
from softprompt.evaluation.heldout import HeldOutLoss, contenders, held_out_losses
from softprompt.evaluation.predict import Prediction, predict
from softprompt.evaluation.scores import TaskScore, check_scores, task_scores
from softprompt.families import Forward, forward_of
from softprompt.prompt import SoftPrompt
from softprompt.settings import check_kinds
from softprompt.training import peak_bytes
from softprompt.types import InputForm, brief_repr, finite

BARE = "base"  # the name of the bare base beside prompts


@dataclass(frozen=True)
class InputAnswers:
    """One input's answers. `answers` maps a prompt's name, or None for the bare base, to text."""

    __repr__ = brief_repr

    input: str
    answers: Mapping[str | None, str]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. All prompts ran on one copy of the base."""

    __repr__ = brief_repr

    base_name: str
    prompts: Mapping[str, int]  # name -> virtual tokens
    answered: tuple[InputAnswers, ...]
    losses: tuple[HeldOutLoss, ...]
    accuracies: tuple[Accuracy, ...]
    base_bytes: int  # parameters of the one base
    prompt_bytes: int  # all prompts together, those that vote included
    peak_bytes: int  # peak resident size of this process
    scores: tuple[TaskScore, ...] = ()  # of greedy answers, if requested
    ensembles: Mapping[str, int] = field(default_factory=dict)  # name -> number of prompts that vote
    baselines: Mapping[str, Baselines] = field(default_factory=dict)  # by labelled set

    @property
    def verdicts(self) -> list[Verdict]:
        """Each prompt's accuracy beside the baselines, on each labelled set."""
        return verdicts(self.accuracies, self.baselines)

    def to_json(self) -> dict[str, Any]:
        """JSON values only; the bare base is named `base` among the answers, and NaN is null."""
        record = asdict(self)
        record["answered"] = [
            {"input": item.input, "answers": {name or BARE: text for name, text in item.answers.items()}}
            for item in self.answered
        ]
        record["losses"] = [{**asdict(loss), "perplexity": loss.perplexity} for loss in self.losses]
        record["verdicts"] = [
            {"held_out": item.baselines.held_out, "prompt": item.prompt, "is_better": item.is_better, "text": item.text}
            for item in self.verdicts
        ]
        clean: dict[str, Any] = json.loads(json.dumps(finite(record), allow_nan=False))
        return clean


def compare(
    base: Base,
    prompts: Mapping[str, SoftPrompt],
    inputs: Sequence[Input] = (),
    *,
    held_out: Mapping[str, Rows] | None = None,
    ensembles: Ensembles | None = None,
    sampling: SamplingConfig | None = None,
    scoring: ScoreConfig | None = None,
    seed: int = 0,
    raw: bool = False,
) -> Comparison:
    """Answers for every input, and held-out loss, perplexity and accuracy for every set, base first.

    `scoring` adds scores of greedy answers to the sets that have completions or chats, and calibrates the accuracy.
    `ensembles` (name -> prompts by name) vote on the labels of the sets that have some, beside the prompts.

    An input is a text, fields of a template or chat messages, and each prompt gets it in its own form (`form_ids`),
    for example a text in its template. The bare base gets the first prompt's form, and for fields the first template
    among the prompts. With `raw`, texts are used unchanged. All answer freely, prompts with labels too; a prompt with a
    head answers by it, and so do label words at a mask. What a head finds in a set is measured by its own scores,
    beside the bare base where that needs no head, and else beside what needs no model.

    Raises DataError or LengthError for an input or a set that cannot be used, ConfigError for a prompt
    called `base`, an ensemble with the name of a prompt, and a score or an ensemble that no set suits,
    MissingDependencyError for a score without torchmetrics.
    """
    check_kinds(base=(base, Base), sampling=(sampling, SamplingConfig), scoring=(scoring, ScoreConfig))
    _check_named("prompts", prompts, SoftPrompt)
    _check_named("held_out", held_out or {}, Rows)
    inputs, ensembles = input_list(inputs, "inputs"), ensembles or {}
    scoring, sets = scoring or ScoreConfig(), dict(held_out or {})
    _check_contenders(prompts, ensembles)
    heads = {name: prompt for name, prompt in prompts.items() if prompt.record.form.task != "generate"}
    texts = {name: prompt for name, prompt in prompts.items() if name not in heads}
    _check_heads(heads, len(prompts), ensembles, scoring, raw)
    with_text = sets if texts or ensembles or not heads else {}  # sets on which text is scored
    check_scores(scoring, with_text)
    check_ensembles(ensembles, with_text)
    forward = forward_of(base)
    voters = [prompt for members in ensembles.values() for prompt in members.values()]
    max_length = _max_row_tokens(base, [*prompts.values(), *voters])
    examples = {name: build_examples(base, rows, eos=True, max_length=max_length) for name, rows in with_text.items()}
    found = _all_accuracies(base, forward, texts, ensembles, with_text, max_length, scoring.calibrate)
    own_sets = {f"{name} (heads)" if with_text else name: rows for name, rows in sets.items()} if heads else {}
    of_heads = head_figures(base, forward, heads, own_sets, max_length, seed)
    return Comparison(
        base_name=base.name,
        prompts={name: prompt.num_virtual_tokens for name, prompt in prompts.items()},
        answered=tuple(_answer_all(base, forward, prompts, inputs, sampling or SamplingConfig(), raw)),
        losses=(*held_out_losses(base, forward, texts, examples, seed), *of_heads.losses),
        accuracies=(*found, *of_heads.accuracies),
        baselines={**_baselines(base, forward, found, sets), **of_heads.baselines},
        base_bytes=sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters()),
        prompt_bytes=sum(prompt.num_bytes for prompt in [*prompts.values(), *voters]),
        scores=(*task_scores(base, forward, texts, with_text, scoring, max_length, seed), *of_heads.scores),
        ensembles={name: len(members) for name, members in ensembles.items()},
        peak_bytes=peak_bytes(),
    )


def _check_named(name: str, given: object, kind: type[Any]) -> None:
    """Raises ConfigError for values without names, or of another kind."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {shortened(given)}; it must be a mapping, like {{'a name': {kind.__name__}}}")
    for key, value in given.items():
        check_kinds(**{f"{name}[{key!r}]": (value, kind)})


def _check_contenders(prompts: Mapping[str, SoftPrompt], ensembles: Ensembles) -> None:
    if BARE in prompts or BARE in ensembles:
        raise ConfigError(f"a prompt is called {BARE!r}, which is the bare base's name; rename it")
    both = sorted(prompts.keys() & ensembles.keys())
    if both:
        raise ConfigError(f"a prompt and an ensemble are both called {both[0]!r}; rename one")


def _check_heads(
    heads: Mapping[str, SoftPrompt], num_prompts: int, ensembles: Ensembles, scoring: ScoreConfig, raw: bool
) -> None:
    """Raises ConfigError for what a prompt that writes no text cannot do."""
    for name, members in ensembles.items():
        for own, member in members.items():
            if member.record.form.task != "generate":
                raise ConfigError(
                    f"{own} of {name} is for task {member.record.form.task}; such prompts do not vote yet"
                )
    for name, prompt in heads.items():
        if raw:
            raise ConfigError(
                f"raw continues a text, and {name} (task {prompt.record.form.task}) writes none; leave it out"
            )
        if scoring.score and len(heads) == num_prompts:
            what = f"score {scoring.score[0]!r} is about written answers"
            raise ConfigError(f"{what}, and {name} has the scores of its own task; leave it out")
        if scoring.calibrate:
            raise ConfigError(
                f"calibrate is about label likelihoods, and {name} has the logits of its own; leave it out"
            )


def _max_row_tokens(base: Base, prompts: Sequence[SoftPrompt]) -> int:
    """The most tokens of a held-out row: one limit for all contenders, so that all are measured on the same tokens."""
    return base.max_length - max((prompt.num_virtual_tokens for prompt in prompts), default=0)


def _all_accuracies(
    base: Base, forward: Forward, prompts: Mapping[str, SoftPrompt], ensembles: Ensembles, sets: Mapping[str, Rows],
    max_length: int, calibrate: bool,
) -> tuple[Accuracy, ...]:  # fmt: skip
    """Set by set: the bare base, the prompts, the ensembles."""
    found = accuracies(base, forward, prompts, sets, max_length, calibrate=calibrate)
    found += vote_accuracies(base, forward, ensembles, sets, max_length, calibrate=calibrate)
    order = list(sets)
    return tuple(sorted(found, key=lambda item: order.index(item.held_out)))


def _baselines(
    base: Base, forward: Forward, found: Sequence[Accuracy], sets: Mapping[str, Rows]
) -> dict[str, Baselines]:
    bare = {item.held_out: item.by_likelihood for item in found if item.prompt is None}
    return {name: baselines(base, forward, name, sets[name], share) for name, share in bare.items()}


def _answer_all(
    base: Base, forward: Forward, prompts: Mapping[str, SoftPrompt], inputs: Sequence[Input], sampling: SamplingConfig,
    raw: bool,
) -> list[InputAnswers]:  # fmt: skip
    forms = [prompt.record.form for prompt in prompts.values() if prompt.record.form.task == "generate"]
    heads = {name: prompt for name, prompt in prompts.items() if prompt.record.form.task != "generate"}
    of_heads = {name: [_shown_answer(item) for item in predict(base, own, inputs)] for name, own in heads.items()}
    writers = [(name, own) for name, own in contenders(prompts) if name not in heads and (forms or not heads)]

    def ids(item: Input, prompt: SoftPrompt | None) -> tuple[int, ...]:
        form = _form_for_bare(forms, item) if prompt is None else prompt.record.form
        return form_ids(base, None if raw and isinstance(item, str) else form, item)

    requests = [Request(ids(item, prompt), prompt) for item in inputs for _, prompt in writers]
    texts = iter([answer.text for answer in generate(base, requests, sampling, forward=forward)] if requests else [])
    return [
        InputAnswers(
            _shown(item),
            {name: next(texts) for name, _ in writers} | {name: own[number] for name, own in of_heads.items()},
        )
        for number, item in enumerate(inputs)
    ]


def _shown_answer(found: Prediction) -> str:
    if found.error is not None:
        return f"no answer: {found.error}"
    if found.embedding is not None:
        return f"a vector of {len(found.embedding):,} numbers"
    answer = found.label or found.answer or " ".join(tag or "-" for tag in found.tags or ())
    return f"{answer} ({found.confidence:.3f})"


def _form_for_bare(forms: Sequence[InputForm], item: Input) -> InputForm | None:
    """The first prompt's form; for fields, the first with a template."""
    return next((form for form in forms if form.kind == "template" or not isinstance(item, Mapping)), None)


def _shown(item: Input) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        return ", ".join(f"{name}={text}" for name, text in item.items())
    return ", ".join(f"{message.get('role')}: {message.get('content')}" for message in item)
