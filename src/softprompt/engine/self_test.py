"""Whether a base answers over held keys and values as it does on concatenated embeddings: found out on a few tokens.

A soft prompt is run, its keys and values are put before a second row, and that row is read in pieces; the truth is one
plain forward. A wrong soft prompt has to fail, or the comparison says nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt.base import Base
from softprompt.families import Forward, Piece, Store, held_rows, is_native
from softprompt.splice import Stretch, splice_stretches

_IDS = (3, 1, 4, 1, 5, 9)
_NUM_VIRTUAL = 3
_CAPACITY = 16
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # relative; some families compute softmax in float32
_TOLERANCE_16_BIT = 0.1


@torch.inference_mode()
def why_not_held(base: Base, forward: Forward) -> str | None:
    """Why rows of this base have to run one at a time; None where they need not."""
    if forward.packing.carrier is None:
        return forward.packing.note
    ids = tuple(token % base.vocab_size for token in _IDS)
    right, wrong = (_some_prompt(base, seed) for seed in (1, 2))
    try:
        held = _held_logits(base, forward, right, ids)
    except Exception as error:  # whatever a model that nobody knew does with rows that it does not understand
        return f"{type(error).__name__}: {error}".split("\n")[0]
    if not _is_close(held, _plain_logits(base, forward, right, ids)):
        return "held rows failed their test on this base: its answers differ"
    if _is_close(held, _plain_logits(base, forward, wrong, ids)):
        return "held rows could not be tested on this base: it answers alike whatever the soft prompt"
    return None


@torch.inference_mode()
def sample_store(base: Base, forward: Forward) -> Store:
    """A store that one token of the base has been written to, so that it knows the attention modules."""
    store = Store(1, 1)
    _hidden(base, forward, Stretch(None, (0,), 0, 1), store, 0)
    return store


def _some_prompt(base: Base, seed: int) -> Tensor:
    """[P, H], of the size of the base's embeddings."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_NUM_VIRTUAL, base.hidden_size, generator=generator) * base.embedding_rms


def _held_logits(base: Base, forward: Forward, prompt: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Logits [V] behind the last id, of a row whose soft prompt comes from another."""
    store = Store(2, _CAPACITY)
    _run(base, forward, Stretch(prompt, ids[:1], 0, _NUM_VIRTUAL + 1), store, 1)
    store.write(0, store.read(1, _NUM_VIRTUAL), _NUM_VIRTUAL)
    half, last = len(ids) // 2, len(ids) - 1
    _run(base, forward, Stretch(prompt, ids, _NUM_VIRTUAL, half), store, 0)
    _run(base, forward, Stretch(prompt, ids, _NUM_VIRTUAL + half, last - half), store, 0)
    return _run(base, forward, Stretch(prompt, ids, _NUM_VIRTUAL + last, 1), store, 0)


def _run(base: Base, forward: Forward, stretch: Stretch, store: Store, row: int) -> Tensor:
    return forward.logits(_hidden(base, forward, stretch, store, row)[-1:])[0]


def _hidden(base: Base, forward: Forward, stretch: Stretch, store: Store, row: int) -> Tensor:
    pieces = [Piece(store, row, stretch.first, stretch.length)]
    rows = held_rows(pieces, base.device, is_native(base.device, base.dtype))
    return forward.packed_hidden_states(*splice_stretches(base, [stretch]), rows)


def _plain_logits(base: Base, forward: Forward, prompt: Tensor, ids: tuple[int, ...]) -> Tensor:
    embeds_SH, positions_S = splice_stretches(base, [Stretch(prompt, ids, 0, _NUM_VIRTUAL + len(ids))])
    mask = torch.ones_like(positions_S)[None]
    return forward.logits(forward.hidden_states(embeds_SH[None], mask, positions_S[None])[:, -1])[0]


def _is_close(ours: Tensor, truth: Tensor) -> bool:
    tolerance = _TOLERANCE.get(truth.dtype, _TOLERANCE_16_BIT)
    return bool((ours - truth).abs().max() <= tolerance * truth.abs().max())
