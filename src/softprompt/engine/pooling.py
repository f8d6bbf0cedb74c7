"""Pooling requests, as vLLM calls them: a text is read once, and its states become scores of labels or one vector.

Their rows run beside generation, on the same thread: each step of the engine runs a bounded number of them, rows of
different prompts and heads in one forward. Rows with columns are read by their prompt's head (or the model's own, at a
mask); rows with targets give the log-likelihood of a label behind its text, a row for each label.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from softprompt.base import Base
from softprompt.engine.kv_cache import is_out_of_memory
from softprompt.engine.request import Event, Failed, Pooled, check_ids, check_width, nan_message
from softprompt.engine.scheduler import FairQueue
from softprompt.errors import ConfigError, LengthError
from softprompt.families import Forward
from softprompt.loss import Objective, objective, states_of, target_nlls
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row, column_states
from softprompt.types import InputForm, brief_repr

_LOG = logging.getLogger(__name__)
MOST_FORMS = 1_024  # of prompts, whose label words and heads are kept ready
# How texts are embedded by an encoder without a prompt: the mean over the states of all of their tokens.
BARE_EMBEDDING = InputForm(kind="template", template="{text}", completion="", task="embed", pooling="mean")


@dataclass(frozen=True)
class PoolingRequest:
    """One text to classify or to embed."""

    __repr__ = brief_repr

    rows: tuple[Row, ...]  # one with columns, or for each label one whose targets are the label's tokens
    num_prompt_tokens: int  # of the text
    prompt: SoftPrompt | None = None
    form: InputForm | None = None  # of rows with columns; None: the prompt's own
    client: str | None = None  # clients share the engine fairly
    priority: int = 0  # lower is served first
    timeout_s: float | None = None  # aborted this many seconds after it was added

    @property
    def own_form(self) -> InputForm:
        """How its states are read."""
        if self.form is not None:
            return self.form
        return BARE_EMBEDDING if self.prompt is None else self.prompt.record.form

    @property
    def num_virtual(self) -> int:
        """Virtual tokens of its prompt."""
        return 0 if self.prompt is None else self.prompt.num_virtual_tokens

    def num_positions(self, row: Row) -> int:
        """Positions that a forward runs for one of its rows."""
        return row.num_tokens + self.num_virtual * (1 + len(row.others))


def check_pooling(base: Base, request: PoolingRequest) -> None:
    """Raises PromptError, DataError, LengthError or ConfigError for a request that the base cannot answer."""
    check_width(base, request.prompt)
    if base.kind == "seq2seq" and any(row.columns for row in request.rows):
        raise ConfigError(f"base {base.name!r} is an encoder-decoder; its states are read by no head", param="model")
    num_decoder = 0 if request.prompt is None else request.prompt.num_decoder_tokens
    for row in request.rows:
        for ids, num_virtual in ((row.source or row.ids, request.num_virtual), (row.ids, num_decoder)):
            check_ids(base, ids, "the text has token id", "input")
            if num_virtual + len(ids) > base.max_length:
                raise LengthError(
                    f"This model's maximum context length is {base.max_length} tokens. However, your text is "
                    f"{len(ids)} tokens, and {num_virtual} are in the soft prompt; shorten the text",
                    param="input",
                )


@dataclass(eq=False)
class _State:
    """One request from its admission to its terminal event."""

    id: int
    request: PoolingRequest
    num_planned: int = 0  # rows
    values: list[float] = field(default_factory=list)  # of the rows that have run

    @property
    def client(self) -> str | None:
        return self.request.client

    @property
    def order(self) -> tuple[int, int, int]:
        return self.request.priority, self.id, 0

    @property
    def has_more(self) -> bool:
        return self.num_planned < len(self.request.rows)


_Plan = list[tuple[_State, Row]]


class Pooler:
    """The pooling requests of one engine."""

    def __init__(self, base: Base, forward: Forward) -> None:
        self.base = base
        self.forward = forward
        self._waiting: FairQueue[_State] = FairQueue()
        self._alive: dict[int, _State] = {}
        self._objective = lru_cache(MOST_FORMS)(self._objective_of)

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._alive)

    def __contains__(self, request: int) -> bool:
        return request in self._alive

    def __iter__(self) -> Iterator[int]:
        return iter(self._alive)

    def add(self, id: int, request: PoolingRequest) -> None:
        """Admit a request, which was checked."""
        self._alive[id] = _State(id, request)
        self._waiting.add(self._alive[id])

    def drop(self, id: int) -> None:
        """Forget a request."""
        state = self._alive.pop(id)
        if state.has_more:
            self._waiting.remove(state)
        self._waiting.end(state)

    def step(self, max_positions: int) -> list[Event]:
        """Run so many positions of the rows that wait, one row at least; the ends of the requests that are done.

        What fails here fails for the requests of this step alone: nothing of theirs is kept between steps.
        """
        plan = self._plan(max_positions)
        try:
            values = self._run([row for _, row in plan], [state.request for state, _ in plan])
        except Exception as error:
            if not is_out_of_memory(error):
                _LOG.exception("pooling requests failed")
            why = "out of memory" if is_out_of_memory(error) else type(error).__name__
            return self._fail(plan, f"{why}: {error}")
        for (state, row), own in zip(plan, values, strict=True):
            state.values += own
            self._waiting.charge(state, state.request.num_positions(row), 0)
        return [self._end(state) for state in dict.fromkeys(state for state, _ in plan) if not state.has_more]

    def check_integrity(self) -> None:
        """Every request has rows that wait, and without requests nothing is left. Raises AssertionError."""
        assert set(self._waiting) == set(self._alive.values())
        if not self._alive:
            self._waiting.assert_empty()

    def _plan(self, max_positions: int) -> _Plan:
        """The next rows, in the order in which clients take turns; one at least."""
        plan: _Plan = []
        num_left = max_positions
        while len(self._waiting):
            state = self._waiting.pop()
            while state.has_more:
                row = state.request.rows[state.num_planned]
                num_left -= state.request.num_positions(row)
                if plan and num_left < 0:
                    self._waiting.push(state)
                    return plan
                plan.append((state, row))
                state.num_planned += 1
        return plan

    @torch.inference_mode(False)  # a head that is made here may be trained by a job
    @torch.no_grad()
    def _run(self, rows: Sequence[Row], requests: Sequence[PoolingRequest]) -> list[list[float]]:
        """The values of each row."""
        prompts = list(dict.fromkeys(request.prompt for request in requests if request.prompt is not None))
        number_of = {prompt: number for number, prompt in enumerate(prompts)}
        spliced = [
            replace(row, prompt=None if request.prompt is None else number_of[request.prompt])
            for row, request in zip(rows, requests, strict=True)
        ]
        tensors = [prompt.tensor for prompt in prompts]
        values: dict[int, list[float]] = {}
        of_tokens = [number for number, row in enumerate(rows) if not row.columns]
        of_heads = [number for number, row in enumerate(rows) if row.columns]
        if of_tokens:
            losses = target_nlls(self.base, self.forward, [spliced[number] for number in of_tokens], tensors)
            values |= {number: [-sum(own.values())] for number, own in zip(of_tokens, losses, strict=True)}
        if of_heads:
            own = [spliced[number] for number in of_heads]
            found = self._head_values(own, [requests[number] for number in of_heads], tensors)
            values |= dict(zip(of_heads, found, strict=True))
        return [values[number] for number in range(len(rows))]

    def _head_values(
        self, rows: Sequence[Row], requests: Sequence[PoolingRequest], prompts: Sequence[torch.Tensor]
    ) -> list[list[float]]:
        """What the heads give for rows with columns: one forward of all, then each prompt's head over its own rows."""
        states_ND, owners_N = column_states(self.base, self.forward, rows, prompts)
        of_models: dict[tuple[SoftPrompt | None, InputForm], list[int]] = {}
        for number, request in enumerate(requests):
            of_models.setdefault((request.prompt, request.own_form), []).append(number)
        values: dict[int, list[float]] = {}
        for (prompt, form), numbers in of_models.items():
            found, own = self._objective(form), [rows[number] for number in numbers]
            weights = {} if prompt is None else prompt.head
            own_states, own_owners = states_of(numbers, states_ND, owners_N, len(rows))
            outputs = found.outputs(own_states, own_owners, own, weights)
            values |= {number: output.tolist() for number, output in zip(numbers, outputs, strict=True)}
        return [values[number] for number in range(len(rows))]

    def _objective_of(self, form: InputForm) -> Objective:
        found = objective(self.base, self.forward, form)
        assert found is not None, "rows with columns are read by a task's head"
        return found

    def _end(self, state: _State) -> Event:
        """The terminal event of a request whose rows have all run."""
        self.drop(state.id)
        if not all(map(math.isfinite, state.values)):
            return Failed(state.id, nan_message(self.base))
        request = state.request
        return Pooled(state.id, tuple(state.values), request.num_prompt_tokens, request.num_virtual)

    def _fail(self, plan: _Plan, why: str) -> list[Event]:
        states = dict.fromkeys(state for state, _ in plan)
        for state in states:
            self.drop(state.id)
        return [Failed(state.id, why) for state in states]
