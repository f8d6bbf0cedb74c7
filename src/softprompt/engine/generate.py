"""Answers to a list of texts or requests, all at once: an engine that runs until everybody is answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from softprompt.base import Base
from softprompt.config import EngineConfig, SamplingConfig
from softprompt.data import Input, form_ids
from softprompt.data.form import input_list
from softprompt.engine.engine import Engine
from softprompt.engine.request import Aborted, Answer, Failed, Finished, Request
from softprompt.errors import BaseModelError, ConfigError, TimeLimitError
from softprompt.families import Forward
from softprompt.prompt import SoftPrompt
from softprompt.settings import check_kinds

_STEPS_WORTH_ARRANGING = 100  # arranging the weights of a base takes about as long as it saves in so many steps


def generate(
    base: Base,
    requests: Sequence[Request | Input],
    prompt: SoftPrompt | SamplingConfig | None = None,
    sampling: SamplingConfig | None = None,
    *,
    forward: Forward | None = None,
    config: EngineConfig | None = None,
) -> list[Answer]:
    """One answer per text, in order: `.text` is what was said, `.log_probs` how sure the base was of each token.

    A text is put as the rows were that `prompt` was trained on, in its template say; so are fields of a template by
    name and lists of chat messages. Without `prompt` the bare base answers. A `Request` has ids and a prompt of its
    own, and `sampling` is for those without their own. (Settings may also be given third, as before texts were taken.)

    `config` is that of the engine: memory, and whether it generates with int8 weights.

    Exact, but for int8 weights: a row's answer is the one it gives alone, and the one of transformers' `generate` on
    concatenated embeddings whose processors are fed the text's real ids.

    Raises DataError for one text in the place of a list and for an input that the prompt does not take, LengthError
    where a prompt, its text and the new tokens exceed the base's positions, PromptError where a prompt has another
    width than the base, ConfigError where more than one choice is asked for or a guide cannot be followed to its end,
    TimeLimitError where a request's time is over, and BaseModelError where the base computes NaN.
    """
    if isinstance(prompt, SamplingConfig):
        if sampling is not None:
            raise ConfigError("sampling is given twice, third and by its name; give it once")
        prompt, sampling = None, prompt
    check_kinds(base=(base, Base), prompt=(prompt, SoftPrompt), sampling=(sampling, SamplingConfig))
    if prompt is not None and prompt.record.form.task != "generate":
        task = prompt.record.form.task
        raise ConfigError(f"the prompt is for task {task}, which writes no text; softprompt.predict answers with it")
    given = input_list(requests, "requests", also=(Request,))
    made = [item if isinstance(item, Request) else _request(base, prompt, item) for item in given]
    wanted = [_with_defaults(request, sampling or SamplingConfig()) for request in made]
    num_steps = sum(request.sampling.max_new_tokens for request in wanted if request.sampling is not None) // 16
    engine = Engine(base, config, forward=forward, arrange=num_steps >= _STEPS_WORTH_ARRANGING)
    ids = [engine.add(request) for request in wanted]
    ends = {end.request: end for end in _ends(engine)}
    return [_answer(ends[request]) for request in ids]


def _request(base: Base, prompt: SoftPrompt | None, item: Input) -> Request:
    return Request(form_ids(base, None if prompt is None else prompt.record.form, item), prompt)


def _with_defaults(request: Request, sampling: SamplingConfig) -> Request:
    if request.num_choices != 1:
        raise ConfigError(f"num_choices is {request.num_choices}; generate gives one answer, an Engine gives more")
    num_log_probs = 0 if request.num_log_probs is None else request.num_log_probs
    return replace(request, sampling=request.sampling or sampling, num_log_probs=num_log_probs)


def _ends(engine: Engine) -> Iterator[Finished | Aborted | Failed]:
    while engine.has_work:
        yield from (event for event in engine.step() if isinstance(event, Finished | Aborted | Failed))


def _answer(end: Finished | Aborted | Failed) -> Answer:
    if isinstance(end, Failed):
        raise ConfigError(end.why) if end.is_request_fault else BaseModelError(end.why)
    if isinstance(end, Aborted):
        raise TimeLimitError("a request's time was over before its answer")
    return end.answers[0]
