"""The head of a task that is trained beside the soft prompt, computed by transformers' own class over given states.

`AutoModelForSequenceClassification`, `...TokenClassification` and `...QuestionAnswering` have, besides the backbone,
modules of their own: `classifier` of BERT, dense and out_proj of RoBERTa, `score` of decoders. Their weights, under
their names there, are what PEFT saves as `modules_to_save`. The headed model is built on the meta device, without
memory for weights; given states stand in for its backbone, and its own forward does the rest, without dropout. So a
family needs no code of its own here.

A pooler inside the backbone (BERT's) is the frozen base's own. A masked language model is loaded without one; then it
is that of its checkpoint. Where neither has one it is part of the head and is trained, as a pooler that lies outside
the backbone (DeBERTa's) always is. It is made for [CLS]: a mean over the tokens goes past it, straight into the head.
On all-MiniLM-L6-v2, whose pooler nobody trained, that is worth one to two points of accuracy.

B texts, T tokens, N states, D hidden width, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

from softprompt.base import Base
from softprompt.errors import AdapterError, BaseModelError, ConfigError, shortened
from softprompt.guard import cause_of
from softprompt.types import HEADED_TASKS, InputForm, Task

Position = Literal["first", "last", "mean"]
Pool = Callable[[Tensor], Tensor]  # [B, T, D] to [B, D]

_CLASSES: Mapping[str, Any] = {
    "classify": AutoModelForSequenceClassification,
    "tag": AutoModelForTokenClassification,
    "answer": AutoModelForQuestionAnswering,
}
_MOST_LABELS = 100_000
MOST_MODELS = 64  # of one base that are kept: adapters may come with any number of labels
_PROBE_STATES = 3
_CLOSE = 0.05  # to the logits of a state that is read, as a share of the distance to those of one that is not


@dataclass(frozen=True)
class TaskHead:
    """How the states of one base become the logits of one task."""

    base: Base
    task: Task
    num_labels: int
    reads_mean: bool = False  # the states are means over tokens

    def start(self, seed: int) -> dict[str, Tensor]:
        """New weights, float32 on the CPU, by their names in transformers' class; drawn as it draws them."""
        return self._model.start(seed)

    def logits(self, weights: Mapping[str, Tensor], states_ND: Tensor) -> Tensor:
        """Logits [N, C] of states; gradients flow into both. Of task "answer", C is 2: start and end of the span.

        They are float32, of a float64 base float64. Of task "classify" there is one state for each text.
        """
        if self.task == "classify":
            return self._model.logits(weights, states_ND[:, None])
        return self._model.logits(weights, states_ND[None])[0]

    def last_inputs(self, weights: Mapping[str, Tensor], states_ND: Tensor) -> Tensor | None:
        """What the head's last linear layer reads [N, F]; None of a head that does not end in one."""
        states = states_ND[:, None] if self.task == "classify" else states_ND[None]
        found = self._model.last_inputs(weights, states)
        return None if found is None else found.flatten(0, -2)

    @property
    def last_layer(self) -> str:
        """The name of that layer; its weights are its `weight` [C, F] and, where it has one, its `bias` [C]."""
        return self._model.last_layer or ""

    @property
    def position(self) -> Position:
        """Whose state transformers' class reads of a whole input, and so PEFT's; only of task "classify".

        Raises BaseModelError for a class that reads none of these.
        """
        found = self._model.position
        if found is None:
            raise BaseModelError(
                f"base {self.base.name!r} ({self.base.model.config.model_type}): transformers' classifier, and so "
                "PEFT's pooling, reads neither the first nor the last state nor their mean; use another pooling"
            )
        return found

    def check(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Raises AdapterError where names or shapes are not those of this head."""
        shapes = self._model.shapes
        here = f"the {self.task} head of base {self.base.name!r} ({self.base.model.config.model_type})"
        for name in sorted(set(weights) - set(shapes)):
            raise AdapterError(f"{where} has the weight {name!r}, but {here} has {', '.join(sorted(shapes))}")
        for name in sorted(set(shapes) - set(weights)):
            raise AdapterError(
                f"{where} lacks the weight {name!r} of {here}; it was left out when the adapter was saved "
                "(modules_to_save), and the base does not have it: train the head here, or save that module too"
            )
        for name, shape in shapes.items():
            if weights[name].shape != shape:
                raise AdapterError(
                    f"{where} has {name} of the shape {list(weights[name].shape)}; {here} has {list(shape)} there for "
                    f"{self.num_labels} labels"
                )

    @property
    def _model(self) -> _HeadedModel:
        known = _MODELS.setdefault(self.base, {})
        key = (self.task, self.num_labels, self.reads_mean)
        found = known.get(key)
        if found is None:
            found = known[key] = _headed_model(self.base, *key)
            for oldest in list(known)[:-MOST_MODELS]:
                known.pop(oldest, None)
        return found


def task_head(base: Base, form: InputForm) -> TaskHead | None:
    """The head of the form's task on this base; None for a task without one.

    Raises BaseModelError where transformers has no such head for the base's family.
    """
    if form.task not in HEADED_TASKS:
        return None
    if base.kind == "seq2seq":
        raise BaseModelError(
            f"base {base.name!r} is an encoder-decoder, which has no head for the task {form.task}; give a causal base "
            "or an encoder, or train it to write the answer (generate)"
        )
    num_labels = 2 if form.task == "answer" else len(form.labels)
    if not 0 < num_labels <= _MOST_LABELS:
        raise ConfigError(f"a head for the task {form.task} has 1 to {_MOST_LABELS:,} labels, not {num_labels:,}")
    head = TaskHead(base, form.task, num_labels, reads_mean=form.task == "classify" and form.pooling == "mean")
    _ = head._model
    return head


class _Drawing(TorchDispatchMode):
    """Within it random numbers come from a generator of its own, in this thread alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # Any: torch's own
        is_random = any(argument.name == "generator" for argument in func._schema.arguments)
        own = {"generator": self._generator} if is_random else {}
        return func(*args, **{**(kwargs or {}), **own})


class _Output:
    """What a head reads of its backbone's output. A head that asks for the pooled state is noticed."""

    past_key_values = hidden_states = attentions = cross_attentions = None

    def __init__(self, backbone: _GivenStates, states: Tensor) -> None:
        self.last_hidden_state, self._backbone = states, backbone

    @property
    def pooler_output(self) -> Tensor:
        self._backbone.is_pooled = True
        return self._backbone.pool(self.last_hidden_state)

    def __getitem__(self, index: int | slice) -> Any:  # Any: a tensor, or some of them
        if index == 0:
            return self.last_hidden_state
        return self.pooler_output if index == 1 else (self.last_hidden_state, self.pooler_output)[index]


class _GivenStates(nn.Module):
    """The backbone of a headed model: whatever it is called with, it returns the given states [B, T, D].

    `pooler` is that of the headed model's own backbone; its weights are those of a head that has to train it.
    """

    def __init__(self, backbone: Any) -> None:  # Any: a PreTrainedModel with or without a pooler
        super().__init__()
        self.config = backbone.config
        self.pooler: nn.Module | None = getattr(backbone, "pooler", None)
        self.activation: Pool | None = getattr(backbone, "pooler_activation", None)
        self.pool = _pool_of(self.pooler, self.activation)
        self.is_pooled = False
        self.states: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> _Output:
        assert self.states is not None
        return _Output(self, self.states)


def _pool_of(pooler: nn.Module | None, activation: Pool | None) -> Pool:
    """A backbone's own pooling. ALBERT's pooler is a linear layer, with its activation beside it."""

    def pool(states_BTD: Tensor) -> Tensor:
        assert pooler is not None
        pooled: Tensor = pooler(states_BTD) if activation is None else activation(pooler(states_BTD[:, 0]))
        return pooled

    return pool


class _HeadedModel:
    """A headed model of transformers over given states."""

    def __init__(self, model: Any, base: Base, width: int, reads_mean: bool) -> None:  # Any: whatever class it has
        self._model, self._lock = model.eval(), RLock()
        self._width, self._device = width, base.device
        name = model.base_model_prefix
        self._given = _GivenStates(getattr(model, name))
        setattr(model, name, self._given)
        self.last_layer = self._find_last_layer()
        own = (_past_pooler if reads_mean else _own_pool(base, self._given, name)) if self._given.is_pooled else None
        if own is not None or not self._given.is_pooled:
            self._given.pooler = None
        self._given.pool = self._given.pool if own is None else own
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def logits(self, weights: Mapping[str, Tensor], states_BTD: Tensor) -> Tensor:
        """[B, C] of a head that pools, else [B, T, C]."""
        wide = torch.promote_types(states_BTD.dtype, torch.float32)
        moved = {name: weight.to(device=states_BTD.device, dtype=wide) for name, weight in weights.items()}
        with self._lock:  # the weights of a call stand in the module while it runs
            return self._run(moved, states_BTD.to(wide))

    def last_inputs(self, weights: Mapping[str, Tensor], states_BTD: Tensor) -> Tensor | None:
        """[B, F] of a head that pools, else [B, T, F]."""
        if self.last_layer is None:
            return None
        read: list[Tensor] = []
        layer = self._model.get_submodule(self.last_layer)
        with self._lock:
            hook = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
            try:
                logits = self.logits(weights, states_BTD)
            finally:
                hook.remove()
        return read[-1][: len(logits)] if read else None

    def start(self, seed: int) -> dict[str, Tensor]:
        """As transformers initialises them, by its own code."""
        model = copy.deepcopy(self._model).float().to_empty(device="cpu")
        with torch.no_grad(), _Drawing(seed):
            model.apply(model._init_weights)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    def _find_last_layer(self) -> str | None:
        """The linear layer whose outputs are the logits."""
        made: dict[str, Tensor] = {}
        hooks = [
            layer.register_forward_hook(lambda _, __, output, name=name: made.update({name: output}))
            for name, layer in self._model.named_modules()
            if isinstance(layer, nn.Linear)
        ]
        try:
            logits = self._run({}, torch.empty(1, 1, self._width, device="meta"))
        finally:
            for hook in hooks:
                hook.remove()
        last = next(reversed(made), None)
        return last if last is not None and made[last].shape[-1] == logits.shape[-1] else None

    @cached_property
    def position(self) -> Position | None:
        """Found by a probe."""
        states_TD = torch.randn(_PROBE_STATES, self._width, generator=torch.Generator().manual_seed(0))
        read: dict[Position, Tensor] = {"first": states_TD[0], "last": states_TD[-1], "mean": states_TD.mean(dim=0)}
        weights = self.start(seed=0)
        with torch.no_grad():
            whole = self.logits(weights, states_TD[None].to(self._device))
            alone = self.logits(weights, torch.stack(list(read.values()))[:, None].to(self._device))
        distances = dict(zip(read, (alone - whole).abs().amax(dim=1).tolist(), strict=True))
        nearest = min(read, key=lambda name: distances[name])
        return None if distances[nearest] > _CLOSE * max(distances.values()) else nearest

    def _run(self, weights: Mapping[str, Tensor], states_BTD: Tensor) -> Tensor:
        ids_BT = torch.full(states_BTD.shape[:2], self._real_id, device=states_BTD.device)
        self._given.states = states_BTD
        try:
            output = functional_call(self._model, dict(weights), (), {"input_ids": ids_BT, "return_dict": True})
        finally:
            self._given.states = None
        if hasattr(output, "start_logits"):
            return torch.stack([output.start_logits, output.end_logits], dim=-1)
        logits: Tensor = output.logits
        return logits

    @property
    def _real_id(self) -> int:
        """Any token but the pad, which decoders leave out when they look for the last one."""
        return int(self._model.config.get_text_config().pad_token_id == 0)


_MODELS: WeakKeyDictionary[Base, dict[tuple[Task, int, bool], _HeadedModel]] = WeakKeyDictionary()


def _headed_model(base: Base, task: Task, num_labels: int, reads_mean: bool) -> _HeadedModel:
    """Raises BaseModelError where transformers has none for the family, or one that cannot be used."""
    failure: Exception | None = None
    for width in dict.fromkeys((base.model.config.get_text_config().hidden_size, base.hidden_size)):  # OPT's is H
        try:
            with torch.device("meta"):
                model = _CLASSES[task].from_config(_config(base, num_labels), attn_implementation="eager")
            return _HeadedModel(model, base, width, reads_mean)
        except Exception as error:  # whatever a class that nobody tried does with given states
            failure = failure or error
    assert failure is not None
    is_unknown = "Unrecognized configuration class" in str(failure)
    raise BaseModelError(
        f"base {base.name!r} ({base.model.config.model_type}) cannot be trained for the task {task}: transformers has "
        f"no {_CLASSES[task].__name__} of its family"
        + ("" if is_unknown else f" that reads given states ({shortened(cause_of(failure))})")
    ) from failure


def _config(base: Base, num_labels: int) -> PretrainedConfig:
    config = copy.deepcopy(base.model.config)
    config.num_labels = num_labels
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    text = config.get_text_config()
    text.pad_token_id = 0 if text.pad_token_id is None else text.pad_token_id  # decoders' heads ask for one
    return config


def _past_pooler(states_BTD: Tensor) -> Tensor:
    return states_BTD[:, 0]


def _own_pool(base: Base, given: _GivenStates, prefix: str) -> Pool | None:
    """The frozen base's own pooling, or that of its checkpoint, in its dtype; None where there is no pooler."""
    assert given.pooler is not None, "a head that pools is of a backbone with a pooler"
    pooler = getattr(base.model.base_model, "pooler", None) or _stored_pooler(base, given.pooler, prefix)
    if pooler is None:
        return None
    pool, dtype = _pool_of(pooler, given.activation), base.dtype
    return lambda states_BTD: pool(states_BTD.to(dtype)).to(states_BTD.dtype)


def _stored_pooler(base: Base, like: nn.Module, prefix: str) -> nn.Module | None:
    """The pooler in the safetensors of the base's checkpoint, frozen."""
    names = {f"{front}pooler.{name}": name for name in like.state_dict() for front in (f"{prefix}.", "")}
    found: dict[str, Tensor] = {}
    for file in sorted(Path(base.folder).glob("*.safetensors")) if base.folder is not None else ():
        with safe_open(file, "pt") as tensors:
            found |= {names[key]: tensors.get_tensor(key) for key in names.keys() & set(tensors.keys())}
    if {name: own.shape for name, own in found.items()} != {name: own.shape for name, own in like.state_dict().items()}:
        return None
    pooler = copy.deepcopy(like).to_empty(device=base.device).to(base.dtype)
    pooler.load_state_dict(found)
    return pooler.eval().requires_grad_(False)
