"""Where a soft prompt starts from. Every start is [P, H] float32 on the CPU and a function of its seed alone.

Vocabulary and class-label starts: Lester, Al-Rfou and Constant (2021), section 3.2. `peft` is the N(0, 1) that PEFT's
PromptEmbedding draws, about a hundred times the size of a real token's embedding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.config import Start
from softprompt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StartTexts:
    """The texts that a start may draw on, as token ids."""

    data: Sequence[Sequence[int]] = ()  # the training rows, special tokens left out
    instruction: Sequence[int] = ()  # --init-text
    labels: Sequence[Sequence[int]] = ()  # one sequence per class


def starting_tensor(
    base: Base, kind: Start, num_virtual_tokens: int, seed: int, texts: StartTexts
) -> tuple[Tensor, tuple[str, ...]]:
    """The start [P, H] and notes about it for the user.

    Raises ConfigError where the start has nothing to draw on.
    """
    if kind == "peft":
        return _normal(base, num_virtual_tokens, seed), ()
    if kind == "random":
        return _normal(base, num_virtual_tokens, seed) * base.embedding_rms, ()
    ids, notes = _START_IDS[kind](base, num_virtual_tokens, random.Random(seed), texts)
    return base.embed(torch.tensor(ids)).float().cpu(), notes


def _normal(base: Base, num_virtual_tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_virtual_tokens, base.hidden_size, generator=generator)


def _data_ids(base: Base, count: int, draw: random.Random, texts: StartTexts) -> tuple[list[int], tuple[str, ...]]:
    """Tokens of the training text, drawn by how often they occur, without repeats as long as there are others."""
    occurrences = [token for row in texts.data for token in row]
    if not occurrences:
        raise ConfigError("init 'data' needs training text to draw tokens from; there is none")
    draw.shuffle(occurrences)
    distinct = list(dict.fromkeys(occurrences))
    return [distinct[i % len(distinct)] for i in range(count)], ()


def _text_ids(base: Base, count: int, draw: random.Random, texts: StartTexts) -> tuple[list[int], tuple[str, ...]]:
    ids = list(texts.instruction)
    if not ids:
        raise ConfigError("init 'text' needs an init_text that has at least one token")
    if len(ids) == count:
        return ids, ()
    what = f"repeated to fill {count}" if len(ids) < count else f"cut to the first {count}"
    return [ids[i % len(ids)] for i in range(count)], (f"init text has {len(ids)} tokens; {what} virtual tokens",)


def _vocab_ids(base: Base, count: int, draw: random.Random, texts: StartTexts) -> tuple[list[int], tuple[str, ...]]:
    special = set(base.tokenizer.all_special_ids)
    size = min(len(base.tokenizer), base.vocab_size)
    ordinary = [token for token in range(size) if token not in special]
    return [draw.choice(ordinary) for _ in range(count)], ()


def _label_ids(base: Base, count: int, draw: random.Random, texts: StartTexts) -> tuple[list[int], tuple[str, ...]]:
    """The labels' first tokens, one class after the other, then tokens of the training text."""
    labels = [label[0] for label in texts.labels if label]
    if not labels:
        raise ConfigError("init 'labels' needs a set with labels (a completion that repeats); this one has none")
    rest, _ = _data_ids(base, max(count - len(labels), 0), draw, texts) if count > len(labels) else ([], ())
    return (labels + rest)[:count], ()


_START_IDS = {"data": _data_ids, "text": _text_ids, "vocab": _vocab_ids, "labels": _label_ids}
