"""The slow truth: one row at a time, `model(inputs_embeds=cat(prompt, embed(ids)))`, no padding, cache or chunks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import RepetitionPenaltyLogitsProcessor

from softprompt.base import Base

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # relative to the largest logit or gradient


def plain_logits(base: Base, ids: Sequence[int], prompt: Tensor | None) -> Tensor:
    """[P + T, V] for one row alone; gradients flow into the prompt."""
    text = base.embedding(torch.tensor(list(ids), dtype=torch.long))
    whole = text if prompt is None else torch.cat([prompt.to(text.dtype), text])
    more = per_layer_inputs(base, ids, len(whole) - len(text))
    logits: Tensor = base.model(inputs_embeds=whole[None], use_cache=False, **more).logits[0]
    return logits


def per_layer_inputs(base: Base, ids: Sequence[int], num_virtual: int) -> dict[str, Tensor]:
    """What Gemma-3n and Gemma-4 look up of token ids a second time; other bases nothing."""
    decoder = base.model.get_decoder()
    if not hasattr(decoder, "embed_tokens_per_layer"):
        return {}
    config = decoder.config
    virtual = config.vocab_size if config.model_type == "gemma3n_text" else config.pad_token_id  # an image's
    return {"per_layer_inputs": decoder.get_per_layer_inputs(torch.tensor([[virtual] * num_virtual + list(ids)]))}


def plain_nats(base: Base, ids: Sequence[int], targets: Sequence[bool], prompt: Tensor | None) -> Tensor:
    """Nats of each target [N] of one row."""
    logits = plain_logits(base, ids, prompt)
    num_virtual = 0 if prompt is None else prompt.shape[0]
    columns = [column for column, wanted in enumerate(targets) if wanted]
    slots = [num_virtual + column - 1 for column in columns]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide[slots], torch.tensor([ids[c] for c in columns]), reduction="none")


@torch.no_grad()
def plain_greedy(
    base: Base, ids: Sequence[int], prompt: Tensor | None, num_new: int, penalty: float = 1.0
) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Greedy ids (the stop id included), each step's raw log-probabilities [V] and the scores [V] it chose by.

    A full forward for every token. The penalty sees the text's real ids and the answer's.
    """
    own, log_probs, scores = list(ids), [], []
    for _ in range(num_new):
        logits = plain_logits(base, own, prompt)[-1:].float()
        seen = torch.tensor([own])
        scores.append((logits if penalty == 1.0 else RepetitionPenaltyLogitsProcessor(penalty)(seen, logits))[0])
        log_probs.append(torch.log_softmax(logits, dim=-1)[0])
        own.append(int(scores[-1].argmax()))
        if own[-1] in base.stop_ids:
            break
    return own[len(ids) :], log_probs, scores


class TrueDouble(TorchFunctionMode):
    """Inside it float64 stays float64: families that compute a norm or a softmax in float32 do not.

    Without it two exact ways to one result differ by float32's rounding inside the family's own modules.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype is torch.float64:
            if func is torch.Tensor.float or (
                func in (torch.Tensor.to, torch.Tensor.type) and torch.float32 in args[1:]
            ):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).abs().max() / truth.abs().max())


def assert_same_answer(
    answer_ids: Sequence[int], log_probs: Sequence[float], truth: tuple, stop_ids: Sequence[int]
) -> None:
    """Tokens equal until a step whose two candidates lie within 1e-4; log-probabilities to 1e-5 up to there."""
    true_ids, true_log_probs, scores = truth
    ended = [i for i in true_ids if i not in stop_ids]
    for step, (ours, theirs) in enumerate(zip(answer_ids, true_ids, strict=False)):
        if ours != theirs:
            assert abs(float(scores[step][ours] - scores[step][theirs])) < 1e-4, (step, ours, theirs)
            return
        assert log_probs[step] == pytest.approx(float(true_log_probs[step][ours]), abs=1e-5), step
    assert list(answer_ids) == ended
