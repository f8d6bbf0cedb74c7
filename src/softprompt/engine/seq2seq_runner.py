"""How the sequences of an encoder-decoder run: the encoder reads [soft prompt, text] once, in a sequence's first step;
then every step runs the decoder's new positions over its own cached keys and values and those of the encoder's states.

A preempted sequence frees both, and reads its text again. Nothing is shared between sequences: what the encoder makes
of a soft prompt depends on the text behind it.

S encoder positions, D hidden width, H embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from softprompt.base import Base, free_bytes
from softprompt.config import EngineConfig
from softprompt.engine.kv_cache import KVCache
from softprompt.engine.model_runner import KV_SHARE, MemoryCost, RunnerKind, Runners, step_limits, weights_note
from softprompt.engine.prefix_cache import PrefixCache
from softprompt.engine.request import Request
from softprompt.engine.scheduler import Plan
from softprompt.engine.sequence import RunnerOutput, Sequence
from softprompt.families import Forward, Seq2SeqForward, seq2seq_forward
from softprompt.splice import TokenSpan, embed_spans

_NUM_MEASURED = 4  # positions of each side whose cache is measured


def make_seq2seq_runners(
    base: Base, forward: Forward, config: EngineConfig, prepack: bool, kind: RunnerKind
) -> Runners:
    """As `make_runners`, of an encoder-decoder."""
    own = seq2seq_forward(forward)
    notes = weights_note(base, forward, prepack)
    kv_bytes = config.kv_bytes or int(free_bytes(base.device) * KV_SHARE)
    cost = MemoryCost(_bytes_per_position(base, own))
    eager = EagerSeq2SeqRunner(base, own, kv_bytes, cost)
    return Runners(
        batched=eager,
        eager=eager,
        kv_cache=KVCache(kv_bytes, cost.bytes_per_position, base.max_length),
        prefix_cache=PrefixCache(0),
        is_batchable=False,
        max_batchable_length=math.inf,
        limits=step_limits(base, config),
        notes=("answers run one at a time over transformers' own cache", *notes),
    )


class EagerSeq2SeqRunner:
    """One sequence at a time through transformers' own encoder, decoder and cache: slow, and right for every base."""

    supports_chunked_prefill = False

    def __init__(self, base: Base, forward: Seq2SeqForward, budget_bytes: int, cost: MemoryCost) -> None:
        self.base = base
        self.forward = forward
        self.budget_bytes = budget_bytes
        self.cost = cost
        self.num_bytes = 0

    def can_ever_fit(self, request: Request) -> bool:
        num_before = request.num_virtual_of_decoder + len(self.base.decoder_start_ids)
        return self.cost.of(request.max_length + num_before) <= self.budget_bytes

    def should_wait_for_prefix(self, sequence: Sequence) -> bool:
        return False

    def start(self, sequence: Sequence) -> bool:
        needed = self._cost_of(sequence)
        if self.num_bytes + needed > self.budget_bytes:
            return False
        self.num_bytes += needed
        sequence.model_cache = self.forward.new_cache()
        return True

    def grow(self, sequence: Sequence) -> bool:
        return True

    def stop(self, sequence: Sequence) -> None:
        self.num_bytes -= self._cost_of(sequence)
        sequence.model_cache, sequence.encoded, sequence.computed = None, None, 0
        sequence.num_to_encode = sequence.request.num_encoded

    def run(self, plan: Plan) -> RunnerOutput:
        return RunnerOutput(torch.stack([self._run_one(sequence, count) for sequence, count in plan]), [])

    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        """Memory is that of the running sequences."""
        assert self.num_bytes == sum(map(self._cost_of, running))

    def _cost_of(self, sequence: Sequence) -> int:
        return self.cost.of(sequence.request.num_encoded + sequence.max_length)

    def _run_one(self, sequence: Sequence, count: int) -> Tensor:
        """The last hidden state [D]."""
        if sequence.encoded is None:
            sequence.encoded = _encoded(self.base, self.forward, text_span(sequence.request))
            sequence.num_to_encode = 0
        embeds_TH, _ = embed_spans(self.base, [answer_span(sequence, count)])
        sequence.computed += count
        states_BSD = sequence.encoded[None]
        mask_BS = torch.ones(states_BSD.shape[:2], dtype=torch.long, device=states_BSD.device)
        return self.forward.decode(embeds_TH[None], states_BSD, mask_BS, sequence.model_cache)[0, -1]


def text_span(request: Request) -> TokenSpan:
    """What the encoder reads: the soft prompt and the text."""
    prompt = request.prompt
    vectors = None if prompt is None else prompt.tensor[: prompt.num_virtual_tokens]
    return TokenSpan(vectors, request.ids, 0, request.num_encoded)


def answer_span(sequence: Sequence, count: int) -> TokenSpan:
    """The next positions of what the decoder reads: its soft prompt, its start and the answer."""
    prompt = sequence.request.prompt
    vectors = None if prompt is None else prompt.tensor[prompt.num_virtual_tokens :]
    return TokenSpan(vectors if sequence.num_virtual else None, sequence.ids, sequence.computed, count)


def _encoded(base: Base, forward: Seq2SeqForward, span: TokenSpan) -> Tensor:
    """The encoder's states [S, D] of one row."""
    embeds_SH, _ = embed_spans(base, [span])
    return forward.encode(embeds_SH[None], torch.ones(1, span.length, dtype=torch.long, device=embeds_SH.device))[0]


@torch.inference_mode()
def _bytes_per_position(base: Base, forward: Seq2SeqForward) -> int:
    """Bytes that a position of either side takes: keys and values, and an encoder's state."""
    span = TokenSpan(None, base.decoder_start_ids * _NUM_MEASURED, 0, _NUM_MEASURED)
    states_SD, cache = _encoded(base, forward, span), forward.new_cache()
    mask_BS = torch.ones(1, _NUM_MEASURED, dtype=torch.long, device=states_SD.device)
    forward.decode(embed_spans(base, [span])[0][None], states_SD[None], mask_BS, cache)
    return math.ceil(cache.num_bytes() / (2 * _NUM_MEASURED)) + states_SD[0].nbytes
