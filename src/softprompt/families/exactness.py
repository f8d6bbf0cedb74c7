"""Find out how a base runs on embeddings, and refuse it where it does not answer as its model does on token ids.

The truth is the model itself: on its own token ids, and on a soft prompt and a text as one plain run of embeddings.
What we do must equal it: backbone and head apart, positions given or left to the model, rows of several lengths in one
batch, a row in chunks over a cache. Where that fails there is a slower way: the model runs whole, rows run alone, texts
are prefilled whole, every token runs its row anew. Where even that differs, or the model raises, the base is refused in
one sentence before anything is trained.

A family of the tested list (`TESTED_FAMILIES`) is only compared on ids: its tests have the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from softprompt.base import Base
from softprompt.errors import BaseModelError
from softprompt.families.batch import PackedBatch, Segment
from softprompt.families.encoder import encoder_forward
from softprompt.families.forward import CacheKind, Forward, ModelCache, Packing
from softprompt.families.frozen_linear import FrozenLinearKernels
from softprompt.families.head import Head, head_of
from softprompt.families.kernel_choice import kernel_table
from softprompt.families.packing_check import checked_packing
from softprompt.families.patches import install_kernels
from softprompt.families.probes import (
    NUM_IDS,
    NUM_VIRTUAL,
    first_positions,
    is_close,
    max_batchable_length,
    own_logits,
    probe_ids,
    refused,
    some_prompt,
    why,
)
from softprompt.families.seq2seq import find_seq2seq_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# For these training, generation and comparison are tested exact (`tests/families`).
TESTED_FAMILIES = frozenset(
    {
        "bloom", "falcon", "gemma", "gemma2", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "mpt", "opt",
        "phi", "phi3", "qwen2", "qwen3",
    }
)  # fmt: skip

# In transformers itself these do not agree with their own answers: there is no truth to equal.
INCONSISTENT_FAMILIES = {
    **dict.fromkeys(
        ("axk2", "dots3_note_text", "glm_moe_dsa"),
        "its answers from its cache are not those without, once it leaves keys out",
    ),
    "moshi": "its answers from its cache are not those without, at the edge of its window",
    "prophetnet": "transformers' own generate does not run on it",
    "xlm": "its generate puts a mask token behind the text, which its forward does not",
}

_PREFIX_IDS, _PACKED_IDS = (2, 7, 1), ((3, 1, 4, 1), (5, 9))  # of the probe of packed rows
_ALONE = Packing(None, "rows run one at a time: in one batch they change each other's answers")
_STATES = Packing(None, "rows run padded by length: the family keeps states that packed rows would run into")
_NO_CACHE = Packing(None, "rows run padded by length, and answers whole for every token: the family has no cache")
_CHUNKS = (3, 3, 1)  # of a soft prompt and a text, over a cache
_WHOLE_THEN_STEPS = (5, 1, 1)
_CACHES: tuple[tuple[CacheKind, tuple[int, ...]], ...] = (
    ("own", _CHUNKS), ("own", _WHOLE_THEN_STEPS), ("all", _CHUNKS), ("all", _WHOLE_THEN_STEPS),
)  # fmt: skip
_FORWARDS: WeakKeyDictionary[Base, Forward] = WeakKeyDictionary()


def forward_of(base: Base) -> Forward:
    """The forward of a base, checked once.

    Raises BaseModelError where the base does not answer on embeddings as its model does on token ids.
    """
    if base not in _FORWARDS:
        forward = _found(base)
        forward.head.kernels.choose(kernel_table(base).choices)
        _FORWARDS[base] = forward
    return _FORWARDS[base]


@torch.no_grad()
def _found(base: Base) -> Forward:
    try:
        if base.kind == "seq2seq":
            _refuse_by_name(base)
            return find_seq2seq_forward(base)
        forward = encoder_forward(base) if base.kind == "encoder" else _causal_forward(base)
        if forward.max_batchable_length is None:
            forward = replace(forward, max_batchable_length=max_batchable_length(base.model))
        return forward
    except BaseModelError:
        raise
    except Exception as error:  # whatever a model that nobody knew does with embeddings
        raise refused(base, why(base.model, error)) from error


def _causal_forward(base: Base) -> Forward:
    _refuse_by_name(base)
    forward = _like_own_ids(base)
    if not _is_tested(base.model):
        forward = _checked(base, forward)
    if forward.packing not in (_ALONE, _STATES, _NO_CACHE):
        forward = replace(forward, packing=_packing(base, forward))
    return forward


def _refuse_by_name(base: Base) -> None:
    reason = INCONSISTENT_FAMILIES.get(base.model.config.model_type)
    if reason is not None:
        raise refused(base, reason)


def _is_tested(model: PreTrainedModel) -> bool:
    """Whether the family is on the tested list, and its code transformers' own."""
    return model.config.model_type in TESTED_FAMILIES and type(model).__module__.startswith("transformers.models.")


def _like_own_ids(base: Base) -> Forward:
    """The first way to run embeddings that equals the model on its own token ids."""
    ids = probe_ids(base)
    truth = own_logits(base.model, input_ids=ids)
    if not truth.isfinite().any():
        raise BaseModelError(f"base {base.name!r} computes NaN in {base.dtype}; load it in float32 or bfloat16")
    install_kernels(base.model)
    embeds = base.token_inputs(ids)[0]
    failure = "its answers on the embeddings of a text are not those on the text's token ids"
    for forward in _ways(base):
        try:
            if is_close(_logits(forward, [embeds])[0], truth):
                return forward
        except Exception as error:  # another way may work
            failure = why(base.model, error)
    raise refused(base, failure)


def _ways(base: Base) -> Iterator[Forward]:
    """Backbone and head apart or the whole model; positions given, from where the model counts, or left to it."""
    kernels = FrozenLinearKernels()
    whole = Forward(base.model, Head(kernels=kernels), None, per_layer=base.per_layer)
    head = head_of(base, kernels)
    backbones = [whole] if head is None else [replace(whole, backbone=base.model.base_model, head=head), whole]
    for first_position in first_positions(base, base.model):
        for forward in backbones:
            yield replace(forward, first_position=first_position)


@dataclass(frozen=True)
class _Probe:
    """A text, the text with another last token, and the text behind one soft prompt and behind another: [S, H] each."""

    text: Tensor
    other_text: Tensor
    spliced: Tensor
    otherwise: Tensor
    truth_of_text: Tensor  # [S, V], as the two below
    truth: Tensor  # of `spliced`

    @property
    def rows(self) -> list[Tensor]:
        return [self.text, self.other_text, self.spliced, self.otherwise]


def _probe(base: Base, forward: Forward) -> _Probe:
    ids = probe_ids(base, NUM_IDS + 1)
    changed = torch.cat([ids[:, : NUM_IDS - 1], ids[:, NUM_IDS:]], dim=1)
    text = base.token_inputs(ids[:, :NUM_IDS])[0]
    spliced, otherwise = (torch.cat([base.virtual_inputs(some_prompt(base, seed)), text]) for seed in (1, 2))
    return _Probe(
        text=text,
        other_text=base.token_inputs(changed)[0],
        spliced=spliced,
        otherwise=otherwise,
        truth_of_text=own_logits(base.model, input_ids=ids[:, :NUM_IDS]),
        truth=own_logits(base.model, **forward.arguments(spliced[None].clone())),  # CTRL scales its inputs in place
    )


def _checked(base: Base, forward: Forward) -> Forward:
    """The forward of a family that is not on the tested list, as far as it is exact for this base."""
    probe = _probe(base, forward)
    forward, (text, other_text, spliced, otherwise) = _batched_or_alone(base, forward, probe)
    if not is_close(other_text[:-1], text[:-1]):
        kind = base.model.config.model_type
        raise BaseModelError(f"base {base.name!r} ({kind}) is not causal: a later token changes earlier answers")
    if torch.equal(spliced[NUM_VIRTUAL:], otherwise[NUM_VIRTUAL:]):
        raise refused(base, "it answers alike whatever the soft prompt")
    if not _reaches_prompt(forward, probe.spliced, base.hidden_size):
        raise refused(base, "no finite gradient reaches a soft prompt")
    return _with_cache(forward, probe)


@torch.enable_grad()
def _reaches_prompt(forward: Forward, row: Tensor, width: int) -> bool:
    leaf = row.detach().requires_grad_(True)
    logits = _logits(forward, [leaf])[0]
    (gradient,) = torch.autograd.grad(logits[-1].log_softmax(-1).max(), leaf)
    own = gradient[:NUM_VIRTUAL, :width]
    return bool(own.isfinite().all()) and bool(own.any())


def _batched_or_alone(base: Base, forward: Forward, probe: _Probe) -> tuple[Forward, list[Tensor]]:
    """Rows of several lengths in one batch, or each alone where the batch changes their logits."""
    alone = replace(forward, max_batchable_length=0, packing=_ALONE)
    for way, run in ((forward, _logits), (alone, _each_alone)):
        with suppress(Exception):  # the other way may work; if it raises too, so does the last one below
            logits = run(forward, probe.rows)
            if is_close(logits[0], probe.truth_of_text) and is_close(logits[2], probe.truth):
                return way, logits
    _each_alone(forward, probe.rows)
    raise refused(base, "its answers behind a soft prompt are not those on one run of embeddings")


def _each_alone(forward: Forward, rows: Sequence[Tensor]) -> list[Tensor]:
    return [_logits(forward, [row])[0] for row in rows]


def _with_cache(forward: Forward, probe: _Probe) -> Forward:
    """With the first cache over which a row in chunks has the logits of the whole row."""
    for kind, chunks in _CACHES:
        way = replace(forward, cache=kind, supports_chunked_prefill=chunks == _CHUNKS)
        with suppress(Exception):  # this family has no such cache
            logits, cache = _logits_in_chunks(way, probe.spliced, chunks)
            if is_close(logits, probe.truth):
                return _unpacked(way, _STATES) if _has_states(cache) else way
    return _unpacked(replace(forward, cache="none"), _NO_CACHE)


def _unpacked(forward: Forward, why: Packing) -> Forward:
    return forward if forward.packing is _ALONE else replace(forward, packing=why)


def _logits_in_chunks(forward: Forward, row: Tensor, chunks: Sequence[int]) -> tuple[Tensor, ModelCache]:
    cache = forward.new_cache()
    assert cache is not None
    parts = []
    for end, length in zip(accumulate(chunks), chunks, strict=True):
        mask, positions = torch.ones(1, end), torch.arange(end - length, end)[None]
        own = row[None, end - length : end]
        hidden = forward.hidden_states(own, mask.long().to(row.device), positions.to(row.device), cache)
        parts.append(forward.logits(hidden)[0])
    return torch.cat(parts), cache


def _has_states(cache: ModelCache) -> bool:
    """Whether a layer keeps more of a row than keys and values: packed rows would run into each other there."""
    layers = getattr(cache.value, "layers", None)
    return not isinstance(cache.value, Cache) or any(
        hasattr(layer, name) for layer in layers or () for name in ("conv_states", "recurrent_states")
    )


def _packing(base: Base, forward: Forward) -> Packing:
    """How rows run packed, behind one pass of their soft prompt."""

    def packed(packing: Packing) -> Tensor:
        hidden = replace(forward, packing=packing).packed_hidden_states(*_packed_probe(base))
        return forward.logits(hidden)[len(_PREFIX_IDS) :]

    note = "rows run packed behind one pass of the soft prompt"
    return checked_packing(base, note, lambda: _rows_one_by_one(base, forward), packed)


def _rows_one_by_one(base: Base, forward: Forward) -> Tensor:
    rows = [_inputs(base, _PREFIX_IDS + row) for row in _PACKED_IDS]
    return torch.cat([_logits(forward, [row])[0][len(_PREFIX_IDS) :] for row in rows])


def _packed_probe(base: Base) -> tuple[Tensor, Tensor, PackedBatch]:
    num_before = len(_PREFIX_IDS)
    segments, positions = [Segment(0, num_before)], list(range(num_before))
    for row in _PACKED_IDS:
        segments.append(Segment(len(positions), len(row), (0, num_before)))
        positions += range(num_before, num_before + len(row))
    ids = _PREFIX_IDS + tuple(i for row in _PACKED_IDS for i in row)
    return _inputs(base, ids), torch.tensor(positions, device=base.device), PackedBatch(tuple(segments))


def _inputs(base: Base, ids: tuple[int, ...]) -> Tensor:
    return base.token_inputs(torch.tensor([i % base.vocab_size for i in ids]))


def _logits(forward: Forward, rows: Sequence[Tensor]) -> list[Tensor]:
    """[S, V] of each row [S, H] of a batch, pads behind the shorter ones as in `softprompt.splice`."""
    embeds = pad_sequence(list(rows), batch_first=True)
    slots = torch.arange(embeds.shape[1], device=embeds.device)
    positions = torch.stack([slots.where(slots < len(row), 0) for row in rows])
    logits = forward.logits(forward.hidden_states(embeds, torch.ones_like(positions), positions))
    return [own[: len(row)] for own, row in zip(logits, rows, strict=True)]
