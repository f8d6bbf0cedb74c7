"""Go over every class for masked words of the installed transformers: `python tests/families/encoder_scan.py` writes
the section "Encoders" of docs/families.md. Each is exact or refused by name.

`python tests/families/encoder_scan.py KIND ...` prints some of them only.
"""

from __future__ import annotations

import os
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers as hf
from family_scan import scan, write_section
from support.encoders import build_encoder_tokenizer
from support.family_configs import class_of, tiny_model
from support.slow_truth import TrueDouble, relative_error
from support.tiny_bases import LIMIT, VOCAB, random_ids, random_prompt
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from softprompt.base import Base, freeze_base
from softprompt.errors import BaseModelError
from softprompt.families import Forward, forward_of
from softprompt.splice import Row, column_states

TITLE = "Encoders"
TOLERANCE = 1e-8  # relative, float64 throughout
# Text-to-text models are no encoders here: they are listed with the encoder-decoders.
KINDS = tuple(kind for kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES if kind not in ("bart", "mbart", "mvp"))
_NOT_DECODER = {"is_decoder": False, "pad_token_id": 0}
_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": LIMIT, "global_attn_every_n_layers": 2, "local_attention": 8, "pad_token_id": 0,
}  # fmt: skip
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 28, "patch_size": 14}  # fmt: skip
_XLM = {"emb_dim": 16, "n_words": VOCAB, "causal": False}
CHANGES: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "deberta-v2": {"conv_kernel_size": 3, "position_buckets": 6, "pos_att_type": ["c2p", "p2c"],
                   "relative_attention": True},
    "esm": {"token_dropout": False},
    "esmc": {"num_key_value_heads": 4},
    "flaubert": _XLM,
    "longformer": {"attention_window": [6, 6], "max_position_embeddings": 2 * LIMIT},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 8},
    "modernvbert": {"text_config": _TEXT, "vision_config": _VISION, "image_token_id": 90},
    "neomme": {"head_dim": 16},
    "perceiver": {"d_latents": 16, "num_latents": 8, "num_self_attends_per_block": 1, "num_self_attention_heads": 2,
                  "num_cross_attention_heads": 2},
    "ultravbert": {"text_config": _TEXT, "vision_config": _VISION, "image_token_id": 90},
    "xlm": _XLM,
}  # fmt: skip
NOTES = {"big_bird": "with attention_type original_full; block_sparse is refused"}
IDS = [random_ids(length, seed, 85) for seed, length in enumerate((40, 11, 5))]  # longer than every tiny window


@dataclass(frozen=True)
class Outcome:
    kind: str
    model_class: str
    result: str  # exact or refused
    rows: str = ""  # packed, padded or one at a time
    reason: str = ""


def outcome_of(kind: str) -> Outcome:
    """Raises AssertionError, or whatever comes, where a family is neither exact nor refused."""
    name = class_of(kind, MODEL_FOR_MASKED_LM_MAPPING).__name__
    model = tiny_encoder(kind)
    pristine = deepcopy(model)
    try:
        base = freeze_base(model, build_encoder_tokenizer(), name="tiny")
        assert base.kind == "encoder"
        forward = forward_of(base)
    except BaseModelError as error:
        return Outcome(kind, name, "refused", reason=str(error).partition(": ")[2] or str(error))
    with TrueDouble():
        assert_exact(base, forward, pristine)
    rows = "packed" if forward.can_pack else "one at a time" if forward.max_batchable_length == 0 else "padded"
    return Outcome(kind, name, "exact", rows, NOTES.get(kind, ""))


def tiny_encoder(kind: str) -> hf.PreTrainedModel:
    model = tiny_model(kind, MODEL_FOR_MASKED_LM_MAPPING, **{**_NOT_DECODER, **CHANGES.get(kind, {})})
    return model if kind == "mra" else model.double()  # float32 inside, whatever its dtype


def assert_exact(base: Base, forward: Forward, pristine: hf.PreTrainedModel) -> None:
    """States, logits and gradients are those of a copy of the model that we never touched."""
    assert_own_ids(base, forward, pristine)
    assert_behind_prompts(base, forward, pristine)


@torch.no_grad()
def assert_own_ids(base: Base, forward: Forward, pristine: hf.PreTrainedModel) -> None:
    states, owners = column_states(base, forward, [Row(ids, None, columns=range(len(ids))) for ids in IDS], [])
    for number, ids in enumerate(IDS):
        truth = pristine.base_model(input_ids=torch.tensor([ids]))[0][0]
        assert relative_error(states[owners == number], truth) < TOLERANCE, "states of ids"
        assert relative_error(states[owners == number], truth.roll(1, 0)) > TOLERANCE, "this check would pass anything"
        own = pristine(input_ids=torch.tensor([ids])).logits[0]
        assert relative_error(forward.logits(states[owners == number]), own) < TOLERANCE, "logits of ids"


def assert_behind_prompts(base: Base, forward: Forward, pristine: hf.PreTrainedModel) -> None:
    """Each placement of the virtual tokens in one batch, with the gradient of the prompts."""
    lengths = (3, 5, 3)
    ours, theirs = (
        [random_prompt(base, length, seed).requires_grad_(True) for seed, length in enumerate(lengths)]
        for _ in range(2)
    )
    rows = [Row(ids, n, columns=range(len(ids)), num_before=n % 2) for n, ids in enumerate(IDS)]
    states, owners = column_states(base, forward, rows, ours)
    loss = torch.zeros((), dtype=torch.float64)
    for number, row in enumerate(rows):
        truth = plain_states(base, pristine, row, theirs[number])
        own = states[owners == number]
        assert relative_error(own, truth) < TOLERANCE, "states behind a soft prompt"
        with torch.no_grad():
            wrong = plain_states(base, pristine, replace(row, num_before=1 - row.num_before), theirs[number])
        assert relative_error(own, wrong) > TOLERANCE, "another placement passes"
        pull = torch.randn(truth.shape, generator=torch.Generator().manual_seed(number)).double()
        loss = loss + (own * pull).sum() - (truth * pull).sum()
    loss.backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine.grad, -other.grad) < 10 * TOLERANCE, "gradient"


def plain_states(base: Base, pristine: hf.PreTrainedModel, row: Row, prompt: Tensor) -> Tensor:
    """[T, D] at a row's ids, the row run alone by the model itself."""
    with torch.no_grad():
        text = pristine.get_input_embeddings()(torch.tensor(row.ids))
    before = row.num_before
    whole = torch.cat([text[:before], prompt.to(text.dtype), text[before:]])
    states = pristine.base_model(inputs_embeds=whole[None])[0][0]
    return torch.cat([states[:before], states[before + len(prompt) :]])


def section(outcomes: list[Outcome]) -> str:
    """The section of the page, without its heading."""
    counts = ", ".join(f"{sum(one.result == result for one in outcomes)} {result}" for result in ("exact", "refused"))
    rows = [f"| {one.kind} | {one.model_class} | {one.result} | {one.rows} | {one.reason} |" for one in outcomes]
    return _INTRODUCTION.format(version=hf.__version__, number=len(outcomes), counts=counts) + "\n".join(rows) + "\n"


_INTRODUCTION = """Made by `tests/families/encoder_scan.py` with transformers {version}, from a tiny seeded model of
each of its {number} model types for masked words that are no encoder-decoders: {counts}.

- **exact**: the hidden states are the model's own on token ids, and behind a soft prompt, in front of all tokens or
  behind [CLS], those of a plain run of concatenated embeddings; so are the logits of its masked-LM head and the
  gradient. The second of two texts in a row, a question's context, has the token type that the tokenizer gives it
  (1 for BERT); all other tokens have type 0, the virtual ones too, as in PEFT.
- **refused**: in one sentence with the reason, before anything is trained.

Of an encoder every token sees every other one, the soft prompt the text too: what a soft prompt computes depends on the
row and is computed for each of them, where a causal base runs it once per step. Rows still run **packed** into one
sequence without pads, each seeing itself alone, where the family asks transformers for its attention; ModernBERT's
windows reach as far ahead as back. Other families, DeBERTa among them, run **padded**: pads are masked. A few change a
row's states with the pads beside it (a convolution, a Fourier transform): their rows run **one at a time**.

A checkpoint is loaded with its masked-LM head if its `config.json` names a class that has one. Otherwise, for a bare
encoder, a classifier's checkpoint or ELECTRA's discriminator, it is loaded without: only what asks for masked words
(`--task cloze`) is refused, by name. A pooler that the checkpoint lacks is taken off, for nothing reads it.

| model type | class | outcome | rows | reason |
| --- | --- | --- | --- | --- |
"""


if __name__ == "__main__":
    scan(KINDS, outcome_of, lambda outcomes: write_section(TITLE, section(outcomes)))
