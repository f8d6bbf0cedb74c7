"""One frozen encoder-decoder as three functions: the encoder, the decoder, and the head.

A row is [soft prompt, text] for the encoder, every token of which sees every other one, and [decoder's prompt, start,
answer] for the decoder, causal, each of whose tokens also sees all states of its row's encoder (cross attention).
Both take input embeddings in the scale of `Base.token_inputs`. Positions are counted from the first virtual token of
each side.

B batch, S encoder slots, T decoder slots, H embedding width, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache

from softprompt.base import Base
from softprompt.errors import BaseModelError
from softprompt.families.batch import BatchMask, CachedBatch, CrossBatch, PackedBatch, Segment
from softprompt.families.forward import Forward, ModelCache, Packing
from softprompt.families.frozen_linear import FrozenLinearKernels
from softprompt.families.head import Head
from softprompt.families.packing_check import checked_packing
from softprompt.families.patches import install_kernels
from softprompt.families.probes import (
    NUM_IDS,
    NUM_VIRTUAL,
    is_close,
    max_batchable_length,
    own_logits,
    probe_ids,
    refused,
    some_prompt,
    why,
)
from softprompt.families.token_positions import token_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TESTED = frozenset({"bart", "mbart", "mt5", "pegasus", "t5", "umt5"})  # `tests/families/test_families_seq2seq.py`
_PADDED = Packing(None, "rows run padded by length")
_CHUNKS = (2, 1, 1)  # of the decoder's tokens, over a cache


@dataclass(frozen=True)
class Seq2SeqForward(Forward):
    """How one encoder-decoder runs. `backbone` is both halves, for what counts or copies weights; it is never run."""

    encoder: nn.Module = field(kw_only=True)
    decoder: nn.Module = field(kw_only=True)
    decoder_scale: float = 1.0  # the decoder multiplies the embeddings that it is given by this
    state_scale: float = 1.0  # the decoder's last states are multiplied by this before the head (T5 v1.0)

    @property
    def state_width(self) -> int:
        """D, the width of the encoder's states."""
        config: Any = self.encoder.config  # Any: transformers' settings
        return int(config.hidden_size)

    def encode(self, embeds_BSH: Tensor, mask_BS: Tensor) -> Tensor:
        """The encoder's states [B, S, D] of input embeddings; `mask_BS` is 0 at pads, which lie behind a row."""
        with self.head.kernels.active():
            states: Tensor = self.encoder(inputs_embeds=embeds_BSH, attention_mask=mask_BS)[0]
        return states

    def decode(
        self, embeds_BTH: Tensor, states_BSD: Tensor, mask_BS: Tensor, cache: ModelCache | None = None
    ) -> Tensor:
        """The states [B, T, D] of the decoder's input embeddings, as the head takes them.

        Pads lie behind a row, where nothing of it sees them. `states_BSD` and `mask_BS` are the encoder's. With a
        `cache` of one row the embeddings are those behind the ones that were decoded over it before.
        """
        kept: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, **cache.as_argument()}
        with self.head.kernels.active():
            output = self.decoder(
                inputs_embeds=embeds_BTH if self.decoder_scale == 1.0 else embeds_BTH / self.decoder_scale,
                encoder_hidden_states=states_BSD,
                encoder_attention_mask=mask_BS,
                **kept,
            )
        if cache is not None:
            cache.keep(output)
        return self._scaled(output[0])

    def encode_packed(self, embeds_SH: Tensor, positions_S: Tensor, batch: PackedBatch) -> Tensor:
        """The encoder's states [S, D] of packed rows, each of which sees itself alone; see `packing`."""
        mask = BatchMask.of(batch, embeds_SH)
        with self.head.kernels.active(), token_positions(positions_S):
            states: Tensor = self.encoder(inputs_embeds=embeds_SH[None], attention_mask=mask)[0][0]
        return states

    def decode_packed(
        self,
        embeds_TH: Tensor,
        positions_T: Tensor,
        batch: PackedBatch | CachedBatch,
        states_SD: Tensor,
        cross: PackedBatch | CrossBatch,
    ) -> Tensor:
        """The decoder's states [T, D] of a packed or cached batch, as the head takes them.

        `cross` says which of the encoder's states [S, D], or of their cached keys and values, each row sees.
        """
        with self.head.kernels.active(), token_positions(positions_T):
            output = self.decoder(
                inputs_embeds=(embeds_TH if self.decoder_scale == 1.0 else embeds_TH / self.decoder_scale)[None],
                attention_mask=BatchMask.of(batch, embeds_TH),
                encoder_hidden_states=states_SD[None],
                encoder_attention_mask=BatchMask.of(cross, embeds_TH),
                use_cache=False,
            )
        return self._scaled(output[0][0])

    def packed_pairs(
        self,
        embeds_SH: Tensor,
        num_read: Sequence[int],
        embeds_TH: Tensor,
        num_written: Sequence[int],
        texts: Sequence[int] | None = None,
        checkpoint: bool = False,
    ) -> Tensor:
        """The decoder's states [T, D] of packed pairs: texts, and what is written behind each of them.

        `num_read` positions of each text lie one behind the other in `embeds_SH`, `num_written` of each answer in
        `embeds_TH`. `texts` are the numbers of the answers' texts, by default one answer for each; a text of several
        answers is encoded once.
        """
        reading, writing = _segments(num_read), _segments(num_written)
        owners = range(len(reading)) if texts is None else texts
        across = tuple(
            replace(own, prefix=(reading[owner].first, reading[owner].length))
            for own, owner in zip(writing, owners, strict=True)
        )
        device = embeds_SH.device
        batch = PackedBatch(reading, checkpoint=checkpoint, is_causal=False)
        states_SD = self.encode_packed(embeds_SH, _positions(num_read, device), batch)
        return self.decode_packed(
            embeds_TH,
            _positions(num_written, device),
            PackedBatch(writing, checkpoint=checkpoint),
            states_SD,
            PackedBatch(across, checkpoint=checkpoint, is_causal=False, is_cross=True),
        )

    def new_cache(self) -> ModelCache:
        """An empty cache for one row: the decoder's own keys and values, and those of the encoder's states."""
        return ModelCache(EncoderDecoderCache(DynamicCache(), DynamicCache()), "past_key_values")

    def _scaled(self, states: Tensor) -> Tensor:
        return states if self.state_scale == 1.0 else states * self.state_scale


def seq2seq_forward(forward: Forward) -> Seq2SeqForward:
    """The same value, of an encoder-decoder's base."""
    assert isinstance(forward, Seq2SeqForward), type(forward)
    return forward


def find_seq2seq_forward(base: Base) -> Seq2SeqForward:
    """The forward of an encoder-decoder, checked.

    Raises BaseModelError where encoder and decoder on embeddings are not the model on its token ids, and of a family
    that is not on the tested list where a batch or a cache changes them, or no gradient reaches a soft prompt.
    """
    probe = _probe(base)
    install_kernels(base.model)
    forward = _like_own_ids(base, probe)
    if not _is_tested(base.model):
        _check_batch(base, forward, probe)
        _check_prompt(base, forward, probe)
        _check_cache(base, forward, probe)
    forward = replace(forward, packing=_packing(base, forward, probe))
    return replace(forward, max_batchable_length=max_batchable_length(base.model))


def _segments(lengths: Sequence[int]) -> tuple[Segment, ...]:
    """Of rows without a prefix, one behind the other."""
    firsts = accumulate(lengths, initial=0)
    return tuple(Segment(first, length) for first, length in zip(firsts, lengths, strict=False))


def _positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths]).to(device)


def _packing(base: Base, forward: Seq2SeqForward, probe: _Probe) -> Packing:
    """How rows run packed, each behind its soft prompt."""
    texts = [_behind(base, probe, 1), probe.text[:3], _behind(base, probe, 2)]
    answers = [probe.answer[:3], probe.answer, probe.answer[:1]]

    def alone() -> Tensor:
        rows = zip(texts, answers, strict=True)
        return torch.cat([_logits(forward, [text], [answer])[0] for text, answer in rows])

    def packed(packing: Packing) -> Tensor:
        own = replace(forward, packing=packing)
        lengths = [list(map(len, rows)) for rows in (texts, answers)]
        return own.head(own.packed_pairs(torch.cat(texts), lengths[0], torch.cat(answers), lengths[1]))

    return checked_packing(base, "rows run packed, encoder and decoder", alone, packed)


def _is_tested(model: PreTrainedModel) -> bool:
    """Whether the family is on the tested list, and its code transformers' own."""
    return model.config.model_type in TESTED and type(model).__module__.startswith("transformers.models.")


@dataclass(frozen=True)
class _Probe:
    """Rows: a text, and the same behind a soft prompt. Each with what the decoder reads, and the model's logits."""

    text: Tensor  # [S, H] input embeddings
    answer: Tensor  # [T, H]
    truth: Tensor  # [T, V]


def _probe(base: Base) -> _Probe:
    if base.decoder_start_id is None:
        raise refused(base, "neither its config.json nor its generation_config.json has a decoder_start_token_id")
    ids = probe_ids(base)
    start = torch.tensor([[base.decoder_start_id]], device=base.device)
    answer = torch.cat([start, ids.flip(1)[:, : sum(_CHUNKS) - 1]], dim=1)
    truth = own_logits(base.model, input_ids=ids, decoder_input_ids=answer)
    if not truth.isfinite().any():
        raise BaseModelError(f"base {base.name!r} computes NaN in {base.dtype}; load it in float32 or bfloat16")
    return _Probe(base.token_inputs(ids)[0], base.token_inputs(answer)[0], truth)


def _like_own_ids(base: Base, probe: _Probe) -> Seq2SeqForward:
    failure = "its answers on the embeddings of a text are not those on the text's token ids"
    for forward in _ways(base):
        try:
            if is_close(_logits(forward, [probe.text], [probe.answer])[0], probe.truth):
                return forward
        except Exception as error:  # another way may work
            failure = why(base.model, error)
    raise refused(base, failure)


def _ways(base: Base) -> Iterator[Seq2SeqForward]:
    """Decoders that scale their embeddings, and last states that are scaled for the head, or not."""
    model: Any = base.model  # Any: `get_encoder` is transformers' own look-up
    encoder, decoder, linear = model.get_encoder(), model.get_decoder(), model.get_output_embeddings()
    if linear is None or encoder is model or decoder is model:
        raise refused(base, "its encoder, decoder and output embeddings cannot be run apart")
    head = Head(linear, kernels=FrozenLinearKernels(), added=_added(model))
    width = linear.weight.shape[-1]
    for state_scale in (1.0, width**-0.5):
        for decoder_scale in dict.fromkeys((1.0, base.embedding_scale)):
            yield Seq2SeqForward(
                nn.ModuleList([encoder, decoder]), head, None, _PADDED, is_causal=False,
                encoder=encoder, decoder=decoder, decoder_scale=decoder_scale, state_scale=state_scale,
            )  # fmt: skip


def _added(model: Any) -> Tensor | None:  # Any: a model that may have it
    """What is added to the logits [V]: BART's `final_logits_bias`; None where it is all zeros."""
    found = getattr(model, "final_logits_bias", None)
    return found[0] if isinstance(found, Tensor) and bool(found.any()) else None


def _check_batch(base: Base, forward: Seq2SeqForward, probe: _Probe) -> None:
    """Rows of several lengths in one batch have the logits of each alone, and no token sees a later one."""
    rows = [(probe.text, probe.answer), (probe.text[:2], probe.answer), (probe.text, probe.answer[:2])]
    batch = _logits(forward, *zip(*rows, strict=True))
    alone = [_logits(forward, [text], [answer])[0] for text, answer in rows]
    if not all(is_close(mine, theirs) for mine, theirs in zip(batch, alone, strict=True)):
        raise refused(base, "rows of several lengths in one batch change each other's answers")
    if not is_close(alone[2], alone[0][:2]):
        raise refused(base, "its decoder is not causal: a later token changes earlier answers")


def _check_prompt(base: Base, forward: Seq2SeqForward, probe: _Probe) -> None:
    first, second = (_behind(base, probe, seed) for seed in (1, 2))
    logits = _logits(forward, [first, second], [probe.answer] * 2)
    if torch.equal(*logits):
        raise refused(base, "it answers alike whatever the soft prompt")
    if not _reaches_prompt(forward, first, probe.answer):
        raise refused(base, "no finite gradient reaches a soft prompt")


def _behind(base: Base, probe: _Probe, seed: int) -> Tensor:
    return torch.cat([base.virtual_inputs(some_prompt(base, seed)), probe.text])


@torch.enable_grad()
def _reaches_prompt(forward: Seq2SeqForward, row: Tensor, answer: Tensor) -> bool:
    leaf = row.detach().requires_grad_(True)
    logits = _logits(forward, [leaf], [answer])[0]
    (gradient,) = torch.autograd.grad(logits[-1].log_softmax(-1).max(), leaf)
    own = gradient[:NUM_VIRTUAL]
    return bool(own.isfinite().all()) and bool(own.any())


def _check_cache(base: Base, forward: Seq2SeqForward, probe: _Probe) -> None:
    """An answer in chunks over a cache has the logits of the whole one."""
    states, mask = forward.encode(probe.text[None], _ones(1, NUM_IDS, base)), _ones(1, NUM_IDS, base)
    cache, parts = forward.new_cache(), []
    for end, length in zip(accumulate(_CHUNKS), _CHUNKS, strict=True):
        hidden = forward.decode(probe.answer[None, end - length : end], states, mask, cache)
        parts.append(forward.head(hidden)[0])
    if not is_close(torch.cat(parts), probe.truth):
        raise refused(base, "its answers over a cache are not those without")


def _ones(rows: int, slots: int, base: Base) -> Tensor:
    return torch.ones(rows, slots, dtype=torch.long, device=base.device)


def _logits(forward: Seq2SeqForward, texts: Sequence[Tensor], answers: Sequence[Tensor]) -> list[Tensor]:
    """[T, V] of each row, given its [S, H] and its [T, H], in one padded batch."""
    embeds, inputs = pad_sequence(list(texts), batch_first=True), pad_sequence(list(answers), batch_first=True)
    lengths = torch.tensor([len(text) for text in texts], device=embeds.device)
    mask = (torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]).long()
    hidden = forward.decode(inputs, forward.encode(embeds, mask), mask)
    return [forward.head(own)[: len(answer)] for own, answer in zip(hidden, answers, strict=True)]
