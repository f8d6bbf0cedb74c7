"""Go over every encoder-decoder of text of the installed transformers: `python tests/families/seq2seq_scan.py` writes
the section "Encoder-decoders" of docs/families.md. Each is exact or refused by name.

`python tests/families/seq2seq_scan.py KIND ...` prints some of them only.
"""

from __future__ import annotations

import os
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers as hf
from family_scan import scan, write_section
from support.family_configs import DROP, class_of, tiny_model
from support.seq2seq_bases import build_tokenizer
from support.slow_truth import TrueDouble, relative_error
from support.tiny_bases import LIMIT, random_ids, random_prompt
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from softprompt.base import Base, freeze_base
from softprompt.config import SamplingConfig
from softprompt.engine import Engine, Request, generate
from softprompt.errors import BaseModelError
from softprompt.families import Forward, forward_of
from softprompt.prompt import SoftPrompt
from softprompt.splice import Row, target_states

TITLE = "Encoder-decoders"
TOLERANCE = 1e-8  # relative, float64 throughout
_START = {"decoder_start_token_id": 0, "pad_token_id": 0, "is_decoder": DROP, "tie_word_embeddings": DROP,
          "forced_eos_token_id": None, "d_kv": 4, "d_ff": 24, "relative_attention_num_buckets": 8,
          "relative_attention_max_distance": 12}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "led": {"attention_window": [6, 6], "max_encoder_position_embeddings": LIMIT,
            "max_decoder_position_embeddings": LIMIT},
    "m2m_100": {"decoder_start_token_id": 2}, "nllb-moe": {"decoder_start_token_id": 2},  # a pad has no position there
}  # fmt: skip
# Speech and images to text, and pairs of two other models: no language models of text to text by themselves.
NOT_OF_TEXT = ("encoder-decoder", "seamless_m4t", "seamless_m4t_v2", "t5gemma2")
ROWS = [((5, 9, 7, 11, 12, 13, 2), (6, 8, 2)), ((11, 2), (4, 4, 9, 13, 2)), ((*random_ids(20), 2), (7, 2))]


def _kinds() -> tuple[str, ...]:
    found = []
    for kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        config = hf.CONFIG_MAPPING[kind]
        if kind not in NOT_OF_TEXT and getattr(config, "is_encoder_decoder", False) is True:
            found.append(kind)
    return tuple(found)


KINDS = _kinds()


@dataclass(frozen=True)
class Outcome:
    kind: str
    model_class: str
    result: str  # exact or refused
    training: str = ""
    answers: str = ""
    reason: str = ""


def outcome_of(kind: str) -> Outcome:
    """Raises AssertionError, or whatever comes, where a family is neither exact nor refused."""
    name = class_of(kind, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING).__name__
    model = tiny_seq2seq(kind)
    pristine = deepcopy(model)
    try:
        base = freeze_base(model, build_tokenizer(), name="tiny")
        assert base.kind == "seq2seq"
        forward = forward_of(base)
    except BaseModelError as error:
        return Outcome(kind, name, "refused", reason=str(error).partition(": ")[2] or str(error))
    with TrueDouble():
        assert_exact(base, forward, pristine)
        assert_answers(base, pristine)
    answers = "together" if Engine(base).runners.is_batchable else "one row at a time"
    return Outcome(kind, name, "exact", "packed" if forward.can_pack else "padded", answers)


def tiny_seq2seq(kind: str) -> hf.PreTrainedModel:
    fields = hf.CONFIG_MAPPING[kind].__dataclass_fields__
    wanted = {name: value for name, value in _START.items() if name in fields or value is DROP}
    wanted = {**wanted, "decoder_start_token_id": 0, **CHANGES.get(kind, {})}
    model = tiny_model(kind, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, **wanted)
    start = wanted["decoder_start_token_id"]
    model.generation_config = hf.GenerationConfig(decoder_start_token_id=start, pad_token_id=0, eos_token_id=2)
    return model.double()


def assert_exact(base: Base, forward: Forward, pristine: hf.PreTrainedModel) -> None:
    """Logits and gradients are those of a copy of the model that we never touched, on ids and behind soft prompts."""
    lengths = (3, 5, 2)
    ours, theirs = (
        [random_prompt(base, length, seed).requires_grad_(True) for seed, length in enumerate(lengths)]
        for _ in range(2)
    )
    for prompts in (None, ours):
        rows = [
            Row(ids, None if prompts is None else number, [True] * len(ids), source=source)
            for number, (source, ids) in enumerate(ROWS)
        ]
        states, targets = target_states(base, forward, rows, prompts or [])
        loss = torch.zeros((), dtype=torch.float64)
        for number, (source, ids) in enumerate(ROWS):
            own = forward.logits(states[targets.rows == number])
            truth = plain_logits(base, pristine, source, ids, None if prompts is None else theirs[number])
            assert relative_error(own, truth) < TOLERANCE, "logits"
            assert relative_error(own, truth.roll(1, 0)) > TOLERANCE, "this check would pass anything"
            loss = loss + own.logsumexp(-1).sum() - truth.logsumexp(-1).sum()
    loss.backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine.grad, -other.grad) < 10 * TOLERANCE, "gradient"


def plain_logits(
    base: Base, pristine: hf.PreTrainedModel, source: tuple[int, ...], ids: tuple[int, ...], prompt: Tensor | None
) -> Tensor:
    """[T, V] of one row alone: the model on its token ids, or on one run of concatenated embeddings."""
    written = {"decoder_input_ids": torch.tensor([[*base.decoder_start_ids, *ids[:-1]]]), "use_cache": False}
    if prompt is None:
        return pristine(input_ids=torch.tensor([source]), **written).logits[0, -len(ids) :]
    with torch.no_grad():
        text = pristine.get_input_embeddings()(torch.tensor(source)) * base.embedding_scale
    whole = torch.cat([prompt.to(text.dtype), text])
    return pristine(inputs_embeds=whole[None], **written).logits[0, -len(ids) :]


@torch.no_grad()
def assert_answers(base: Base, pristine: hf.PreTrainedModel) -> None:
    """Greedy answers in one batch are those of `generate` on ids, and of a plain run behind a soft prompt."""
    prompt = SoftPrompt(random_prompt(base, 3).float())
    requests = [Request(ROWS[0][0]), Request(ROWS[1][0], prompt), Request(ROWS[2][0], prompt)]
    found = generate(base, requests, SamplingConfig(max_new_tokens=6, ignore_eos=True))
    theirs = pristine.generate(torch.tensor([ROWS[0][0]]), max_new_tokens=6, do_sample=False, eos_token_id=[10_000])
    assert found[0].ids == tuple(theirs[0, 1:].tolist()), "greedy answer"
    for request, answer in zip(requests[1:], found[1:], strict=True):
        logits = plain_logits(base, pristine, request.ids, (*answer.ids, 0), prompt.tensor)
        assert answer.ids == tuple(logits[:-1].argmax(-1).tolist()), "greedy answer behind a soft prompt"


def section(outcomes: list[Outcome]) -> str:
    """The section of the page, without its heading."""
    counts = ", ".join(f"{sum(one.result == result for one in outcomes)} {result}" for result in ("exact", "refused"))
    rows = [
        f"| {one.kind} | {one.model_class} | {one.result} | {one.training} | {one.answers} | {one.reason} |"
        for one in outcomes
    ]
    return _INTRODUCTION.format(version=hf.__version__, number=len(outcomes), counts=counts) + "\n".join(rows) + "\n"


_INTRODUCTION = """Made by `tests/families/seq2seq_scan.py` with transformers {version}, from a tiny seeded model of
each of its {number} encoder-decoders of text to text: {counts}.

- **exact**: logits, gradients and greedy answers are the model's own on token ids (`generate`), and behind a soft
  prompt in front of the encoder's text those of plain runs of concatenated embeddings.
- **refused**: in one sentence with the reason, before anything is trained.

The encoder reads soft prompt and text both ways, so what a soft prompt computes depends on the text and cannot be
shared between rows. Rows still run **packed** where the attention is ours to give (T5's and BART's kin): each encoder
row sees itself alone, T5's biases by distance count within the row, each decoder row sees itself causally and its own
text across. Pegasus and Marian scale their embeddings outside of the table: a text's embeddings are scaled as the
model does it (PEFT leaves them as they are), the soft prompt's vectors stand beside the scaled ones. The logits include
BART's `final_logits_bias` and T5 v1.0's scale.

| model type | class | outcome | training | answers | reason |
| --- | --- | --- | --- | --- | --- |
"""


if __name__ == "__main__":
    scan(KINDS, outcome_of, lambda outcomes: write_section(TITLE, section(outcomes)))
