"""One soft prompt in training: its parameters, its optimiser and the best prompt so far. The loop drives several.

The optimiser moves the prompt's own vectors, or a re-parameterisation that is folded into them. In either case training
ends in a plain [P, H] tensor: `fold()` is validated, saved and served. Every form begins exactly at the given start.

P prompt length, H hidden size, M bottleneck, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt.compute_share import yield_point
from softprompt.config import TrainConfig
from softprompt.loss import ObjectiveWeights
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row
from softprompt.training.events import Checkpoint, within
from softprompt.training.plan import Plan, rate_factor
from softprompt.types import Example, ExampleSet, PromptRecord

Score = Callable[[SoftPrompt], float]  # higher is better

_HEAD = "head/"  # before the names of a head's weights among the parameters
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of each parameter


class Trial:
    """A candidate in training. `start` [P, H] has the device and dtype that it trains in.

    `head` is what its rows with columns are trained for, and the weights that the head starts from.
    """

    def __init__(
        self, *, name: str | None, plan: Plan, data: ExampleSet, validation_data: ExampleSet | None,
        start: Tensor, record: PromptRecord, head: ObjectiveWeights | None = None, score: Score | None = None,
        group: int = 0, task_line: str = "",
        notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.name, self.plan, self.data, self.validation_data = name, plan, data, validation_data
        self.examples: Sequence[Example] = data.examples
        self.validation: Sequence[Example] = validation_data.examples if validation_data is not None else ()
        self.start, self.record, self.score, self.group = start, record, score, group
        self.task_line = task_line  # what its rows are trained for, and the settings that follow
        self.notes = notes  # what the user should know about how its rows were read and its start was made
        self.step = 0
        self.is_dropped = False
        self.is_diverged = False  # its loss or its prompt is no longer a number
        self.best: SoftPrompt | None = None
        self.best_step = 0
        self.best_value = math.inf  # of the best validation, lower for better
        self.losses: list[float] = []  # nats per counted target or label, one per step
        self.validations: list[tuple[int, float | None, float | None]] = []  # step, nats per text token, score
        self._validations_without_gain = 0
        self._mean_PH: Tensor | None = None  # of the prompts after the last steps, as many as are averaged
        self._mean_head: dict[str, Tensor] = {}  # of the head's weights after the same steps
        self._objective = None if head is None else head.objective
        self._head_start = {} if head is None else dict(head.weights)
        self._rows = [training_row(example, plan.config) for example in data.examples]
        self._steps = [
            (rows, epoch + (index + 1) / len(steps))
            for epoch, steps in enumerate(plan.epochs)
            for index, rows in enumerate(steps)
        ][: plan.num_steps]
        self._ends_of_epochs = {step for step, (_, epoch) in enumerate(self._steps, start=1) if epoch == int(epoch)}
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        config, peak = self.plan.config, self.plan.learning_rate
        self._parameters = make_parameters(config, self.start, self.plan.embedding_rms)
        for name, weight in self._head_start.items():
            self._parameters.leaves[f"{_HEAD}{name}"] = _leaf(weight.to(self.start))
            assert config.head_learning_rate is not None, "the task's defaults are filled in"
            self._parameters.rate_scales[f"{_HEAD}{name}"] = config.head_learning_rate / peak
        self._peaks = [peak * self._parameters.rate_scales[name] for name in self._parameters.leaves]
        groups = [{"params": [leaf]} for leaf in self._parameters.leaves.values()]
        self._optimizer = torch.optim.AdamW(groups, lr=peak, weight_decay=config.weight_decay)

    @property
    def is_over(self) -> bool:
        patience = self.plan.config.patience
        has_stalled = patience is not None and self._validations_without_gain >= patience
        return self.is_dropped or self.is_diverged or has_stalled or self.step >= self.plan.num_steps

    @property
    def num_head_parameters(self) -> int:
        """Trained numbers besides the prompt's."""
        return sum(weight.numel() for weight in self._head_start.values())

    @property
    def can_be_ranked(self) -> bool:
        """Whether it has validation rows or a score."""
        return bool(self.validation) or self.score is not None

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step, for the prompt's own vectors."""
        return self.plan.learning_rate * self._rate_factor

    @property
    def _rate_factor(self) -> float:
        config = self.plan.config
        return rate_factor(config.schedule, config.warmup_steps, self.plan.num_steps, self.step)

    def prompt(self) -> Tensor:
        """The prompt [P, H] that the next step runs, outside of any graph."""
        with torch.no_grad():
            return self._parameters.fold().detach().clone()

    def averaged(self) -> Tensor:
        """The prompt [P, H] that is validated and kept: the mean over the last steps, or else the current one.

        Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407), here under the run's own schedule.
        """
        return self.prompt() if self._mean_PH is None else self._mean_PH.clone()

    def head(self) -> ObjectiveWeights | None:
        """What the rows with columns are trained for, with the head's weights as leaves outside of any graph."""
        if self._objective is None:
            return None
        leaves = {name: _leaf(weight) for name, weight in self._head_weights().items()}
        return ObjectiveWeights(self._objective, leaves)

    def averaged_head(self) -> ObjectiveWeights | None:
        """The same with the weights that are validated and kept; see `averaged`."""
        if self._objective is None:
            return None
        weights = {name: weight.detach() for name, weight in self._head_weights().items()}
        return ObjectiveWeights(self._objective, weights if self._mean_PH is None else self._mean_head)

    def _head_weights(self) -> dict[str, Tensor]:
        return within(_HEAD, self._parameters.leaves)

    def snapshot(self) -> SoftPrompt:
        """The prompt so far; of a run that has diverged, the best one or the start."""
        prompt, head = self.averaged(), self.averaged_head()
        weights = {} if head is None else head.weights
        is_finite = all(bool(tensor.isfinite().all()) for tensor in (prompt, *weights.values()))
        self.is_diverged = self.is_diverged or not is_finite
        if self.is_diverged:
            return self.best or SoftPrompt(self.start, self.record, self._head_start)
        return SoftPrompt(prompt, self.record, weights)

    def check_diverged(self, loss: float, grad_norm: float) -> None:
        """Call it after each step, with the step's loss and gradient norm."""
        self.is_diverged = not (math.isfinite(loss) and math.isfinite(grad_norm))

    def next_rows(self) -> tuple[list[Row], float]:
        """The rows of the next step, and the epochs done after it."""
        indices, epoch = self._steps[self.step]
        return [self._rows[index] for index in indices], epoch

    def update(self, gradient_PH: Tensor, head_gradients: Mapping[str, Tensor] | None = None) -> Tensor:
        """One optimiser step; the gradient's norm over all parameters, before clipping."""
        self._optimizer.zero_grad(set_to_none=True)
        self._parameters.fold().backward(gradient_PH)
        for name, gradient in (head_gradients or {}).items():
            self._parameters.leaves[f"{_HEAD}{name}"].grad = gradient
        limit = self.plan.config.max_grad_norm
        leaves = list(self._parameters.leaves.values())
        norm: Tensor = torch.nn.utils.clip_grad_norm_(leaves, math.inf if limit is None else limit)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * self._rate_factor
        self._optimizer.step()
        self.step += 1
        self._average()
        return norm

    def _average(self) -> None:
        num_averaged = self.step - self.plan.first_averaged_step
        if num_averaged == 0:
            self._mean_PH = self.prompt()
            self._mean_head = {name: weight.detach().clone() for name, weight in self._head_weights().items()}
        elif num_averaged > 0:
            assert self._mean_PH is not None
            self._mean_PH += (self.prompt() - self._mean_PH) / (num_averaged + 1)
            for name, weight in self._head_weights().items():
                self._mean_head[name] += (weight.detach() - self._mean_head[name]) / (num_averaged + 1)

    @property
    def validation_is_due(self) -> bool:
        every = self.plan.config.validate_every
        by_steps = every is not None and self.step % every == 0
        return by_steps or (self._ended_epoch and every is None) or self.step == self.plan.num_steps

    @property
    def saving_is_due(self) -> bool:
        every = self.plan.config.save_every
        by_steps = every is not None and self.step % every == 0
        return by_steps or self._ended_epoch or self.validation_is_due

    @property
    def _ended_epoch(self) -> bool:
        return self.step in self._ends_of_epochs

    def record_validation(self, loss: float | None) -> Checkpoint:
        """Rank the current prompt by its validation loss, or by the caller's score where there is one.

        The first mean replaces whatever single step was best before: on a few validation rows one of those may be the
        best by luck, and is far from it elsewhere.
        """
        prompt = self.snapshot()
        score = self.score(prompt) if self.score is not None and not self.is_diverged else None
        self.validations.append((self.step, loss, score))
        value = -score if score is not None else loss
        is_first_mean = self._mean_PH is not None and self.best_step < self.plan.first_averaged_step
        is_best = not self.is_diverged and (value is None or is_first_mean or value < self.best_value)
        if is_best:
            self.best, self.best_step = prompt, self.step
            self.best_value = math.inf if value is None else value
        self._validations_without_gain = 0 if is_best else self._validations_without_gain + 1
        return Checkpoint(
            step=self.step, prompt=prompt, validation_loss=loss, is_best=is_best, score=score, candidate=self.name
        )

    def state(self) -> dict[str, Any]:
        """The part of the state that is JSON."""
        return {
            "step": self.step, "dropped": self.is_dropped, "diverged": self.is_diverged, "best_step": self.best_step,
            "best_value": None if math.isinf(self.best_value) else self.best_value,
            "validations_without_gain": self._validations_without_gain,
            "losses": list(self.losses), "validations": [list(item) for item in self.validations],
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state: parameters, AdamW's moments, the mean so far, the best prompt."""
        found = {f"parameter/{name}": leaf.detach().cpu().clone() for name, leaf in self._parameters.leaves.items()}
        for name, leaf in self._parameters.leaves.items():
            kept = self._optimizer.state.get(leaf, {})
            found |= {f"{moment}/{name}": kept[moment].detach().cpu().clone() for moment in _MOMENTS if moment in kept}
        if self._mean_PH is not None:
            found["mean"] = self._mean_PH.cpu().clone()
        found |= {f"mean_head/{name}": weight.cpu().clone() for name, weight in self._mean_head.items()}
        if self.best is not None:
            found["best"] = self.best.tensor
            found |= {f"best_head/{name}": weight for name, weight in self.best.head.items()}
        return found

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from the `state()` and `tensors()` of the same trial."""
        self.step, self.is_dropped, self.best_step = state["step"], state["dropped"], state["best_step"]
        self.is_diverged = state["diverged"]
        self.best_value = math.inf if state["best_value"] is None else state["best_value"]
        self._validations_without_gain = state["validations_without_gain"]
        self.losses = [math.nan if loss is None else loss for loss in state["losses"]]
        self.validations = [(step, loss, score) for step, loss, score in state["validations"]]
        best_head = within("best_head/", tensors)
        self.best = SoftPrompt(tensors["best"], self.record, best_head) if "best" in tensors else None
        self._mean_head = {name: own.to(self.start).clone() for name, own in within("mean_head/", tensors).items()}
        self._mean_PH = tensors["mean"].to(self.start).clone() if "mean" in tensors else None
        with torch.no_grad():
            for name, value in within("parameter/", tensors).items():
                self._parameters.leaves[name].copy_(value)
        self._restore_optimizer(tensors)

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        for moment in _MOMENTS:
            for name, value in within(f"{moment}/", tensors).items():
                leaf = self._parameters.leaves[name]
                self._optimizer.state[leaf][moment] = (
                    value.clone() if moment == "step" else value.to(leaf.device).clone()
                )


def training_row(example: Example, config: TrainConfig) -> Row:
    """The example's row under prompt 0; its EOS counts as `eos_weight` text tokens."""
    yield_point()
    weights = [
        config.eos_weight if is_eos else float(counted)
        for counted, is_eos in zip(example.target_mask, example.eos_mask, strict=True)
    ]
    return Row.of(example, 0, weights, with_branches=config.loss == "labels")


@dataclass(frozen=True)
class Parameters:
    """Named leaves, each with its learning rate as a multiple of the plan's, and the function that makes the prompt."""

    leaves: dict[str, Tensor]
    rate_scales: dict[str, float]
    fold: Callable[[], Tensor]  # [P, H], differentiable in the leaves


def make_parameters(config: TrainConfig, start_PH: Tensor, embedding_rms: float) -> Parameters:
    """The parameters of a run, beginning at `start_PH`, on its device and in its dtype."""
    if config.reparameterisation == "residual-mlp":
        return _residual_mlp(start_PH, config.bottleneck, embedding_rms, config.seed)
    if config.reparameterisation == "low-rank":
        return _low_rank(start_PH, config.bottleneck, embedding_rms, config.seed)
    prompt = _leaf(start_PH)
    return Parameters({"prompt": prompt}, {"prompt": 1.0}, lambda: prompt)


def _residual_mlp(start_PH: Tensor, bottleneck: int, rms: float, seed: int) -> Parameters:
    """Residual Prompt Tuning (Razdaibiedina et al. 2023, arXiv 2305.03937): E + MLP(E), the MLP shared by all tokens.

    Ours has no layer normalisation: the input E is divided by the RMS of the start, the output is multiplied by that of
    the embeddings. The up-projection begins at zero. The projections' rates are divided by their widths, so that the
    first step moves the prompt about as far through them as by itself.
    """
    hidden = start_PH.shape[1]
    unit = float(start_PH.square().mean().sqrt()) or rms
    prompt = _leaf(start_PH)
    down_HM = _leaf(_normal((hidden, bottleneck), seed, start_PH) / math.sqrt(hidden))
    up_MH = _leaf(torch.zeros(bottleneck, hidden).to(start_PH))

    def fold() -> Tensor:
        return prompt + torch.relu(prompt / unit @ down_HM) @ up_MH * rms

    scale = 1.0 / (rms * bottleneck)
    scales = {"prompt": 1.0, "down": 1.0 / (rms * hidden), "up": scale}
    return Parameters({"prompt": prompt, "down": down_HM, "up": up_MH}, scales, fold)


def _low_rank(start_PH: Tensor, rank: int, rms: float, seed: int) -> Parameters:
    """Ultra-low-dimensional prompt tuning (Wu et al. 2025, arXiv 2502.04501): few numbers per token, a fixed random
    projection, and a learnt scale and shift of every embedding dimension; ours is added to the start.
    """
    num_tokens, hidden = start_PH.shape
    origin = start_PH.detach().clone()
    projection_RH = _normal((rank, hidden), seed, start_PH) * (rms / math.sqrt(rank))
    codes_PR = _leaf(torch.zeros(num_tokens, rank).to(start_PH))
    scale_H = _leaf(torch.ones(hidden).to(start_PH))
    shift_H = _leaf(torch.zeros(hidden).to(start_PH))

    def fold() -> Tensor:
        return origin + codes_PR @ projection_RH * scale_H + shift_H

    leaves = {"codes": codes_PR, "scale": scale_H, "shift": shift_H}
    return Parameters(leaves, {"codes": 1.0 / rms, "scale": 1.0 / rms, "shift": 1.0}, fold)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(True)


def _normal(shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(like)
