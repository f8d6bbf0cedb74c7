"""What the optimiser moves: the soft prompt's own vectors, or a re-parameterisation that is folded into them.

Whatever it is, training ends in a plain [P, H] tensor: `fold()` is what is validated, saved and served. Every form
begins exactly at the start that it is given.

P prompt length, H hidden size, M bottleneck, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.config import TrainConfig


@dataclass(frozen=True)
class Parameters:
    """Named leaves, each with its learning rate as a multiple of the plan's, and how they make the prompt."""

    leaves: dict[str, Tensor]
    rate_scales: dict[str, float]
    fold: Callable[[], Tensor]  # [P, H], differentiable in the leaves


def make_parameters(config: TrainConfig, start_PH: Tensor, embedding_rms: float) -> Parameters:
    """The parameters of a run, at `start_PH` (its device and dtype are theirs)."""
    if config.reparameterisation == "residual-mlp":
        return _residual_mlp(start_PH, config.bottleneck, embedding_rms, config.seed)
    if config.reparameterisation == "low-rank":
        return _low_rank(start_PH, config.bottleneck, embedding_rms, config.seed)
    prompt = _leaf(start_PH)
    return Parameters({"prompt": prompt}, {"prompt": 1.0}, lambda: prompt)


def _residual_mlp(start_PH: Tensor, bottleneck: int, rms: float, seed: int) -> Parameters:
    """Residual Prompt Tuning (Razdaibiedina et al. 2023, arXiv 2305.03937): E + MLP(E), the MLP shared by all tokens.

    Ours has no layer normalisation: E goes in divided by the RMS of the start and what comes out is times that of the
    embeddings. The up-projection begins at zero. The projections' rates are divided by their widths, so that a first
    step moves the prompt about as far through them as by itself.
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
    projection, and a learnt scale and shift of every embedding dimension; here as a change of the start.
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
