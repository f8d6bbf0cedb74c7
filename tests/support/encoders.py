"""Tiny seeded encoders of every family named, with untied heads and weights wide enough that a wrong input shows.

`LIMIT` tokens per row, `VOCAB` of them, two layers (ModernBERT three, every second with a window). A word per id: `w7`
is 7. Nothing is downloaded.

    base = build_encoder("bert")                     # with its masked-LM head, float32
    bare = build_encoder("distilbert", part="bare")  # AutoModel
    save_encoder("roberta", folder, part="classifier", num_labels=3)
    base.encode("w7 w9"), base.bos_ids, base.end_ids, base.mask_id
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from softprompt.base import Base, freeze_base
from softprompt.splice import Row
from support.tiny_bases import LIMIT, VOCAB

Part = Literal["masked", "bare", "classifier", "discriminator"]  # what stands on the encoder

NUM_SPECIAL = 5  # ids below are special, in this order
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
ROBERTA_LIKE = ("roberta", "xlm-roberta")
WITH_TOKEN_TYPES = ("bert", "electra", "deberta", "deberta-v2", "deberta-v3")  # whose tokenizers give them
_SHARED = {"vocab_size": VOCAB, "initializer_range": 0.25, "tie_word_embeddings": False, "type_vocab_size": 2}
_BERT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": LIMIT,
}  # fmt: skip
_ROBERTA = {**_BERT, "max_position_embeddings": LIMIT + 2}  # positions count from behind the pad's id, 1
_DISTILBERT = {
    "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": LIMIT,
}  # fmt: skip
_DEBERTA = {
    **_BERT, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 12, "type_vocab_size": 0,
}  # fmt: skip
_DEBERTA_V3 = {**_DEBERTA, "position_buckets": 6, "norm_rel_ebd": "layer_norm", "share_att_key": True}
_MODERNBERT = {
    **_BERT, "num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 8,
}  # fmt: skip

# name -> (family of transformers, masked language model, settings)
ENCODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (hf.BertConfig, hf.BertForMaskedLM, _BERT),
    "roberta": (hf.RobertaConfig, hf.RobertaForMaskedLM, _ROBERTA),
    "distilbert": (hf.DistilBertConfig, hf.DistilBertForMaskedLM, _DISTILBERT),
    "albert": (hf.AlbertConfig, hf.AlbertForMaskedLM, {**_BERT, "embedding_size": 12}),
    "electra": (hf.ElectraConfig, hf.ElectraForMaskedLM, {**_BERT, "embedding_size": 12}),
    "deberta": (hf.DebertaConfig, hf.DebertaForMaskedLM, _DEBERTA),
    "deberta-v2": (hf.DebertaV2Config, hf.DebertaV2ForMaskedLM, _DEBERTA),
    "deberta-v3": (hf.DebertaV2Config, hf.DebertaV2ForMaskedLM, _DEBERTA_V3),
    "modernbert": (hf.ModernBertConfig, hf.ModernBertForMaskedLM, _MODERNBERT),
    "xlm-roberta": (hf.XLMRobertaConfig, hf.XLMRobertaForMaskedLM, _ROBERTA),
}


def build_encoder_model(
    family: str = "bert", seed: int = 0, dtype: torch.dtype = torch.float32, part: Part = "masked", **changes: Any
) -> hf.PreTrainedModel:
    """The masked language model, the encoder without it, a classifier of sequences, or ELECTRA's discriminator."""
    config_class, masked_class, settings = ENCODERS[family]
    config = config_class(**{**_SHARED, **special_ids(family), **settings, **changes})
    auto = {"bare": hf.AutoModel, "classifier": hf.AutoModelForSequenceClassification}
    auto["discriminator"] = hf.AutoModelForPreTraining
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: hf.PreTrainedModel = masked_class(config) if part == "masked" else auto[part].from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms start at 0 and 1, and would hide what they do
                parameter.add_(0.05 * torch.randn_like(parameter))
            for module in model.modules():
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx].normal_()  # a pad that is seen shall show
    model.config.architectures = [type(model).__name__]
    return model.eval().to(dtype)


def special_ids(family: str) -> dict[str, int]:
    """Of a configuration."""
    first, last = (0, 2) if family in ROBERTA_LIKE else (2, 3)
    pad = 1 if family in ROBERTA_LIKE else 0
    ids = {"pad_token_id": pad, "bos_token_id": first, "eos_token_id": last}
    return {**ids, "cls_token_id": first, "sep_token_id": last} if family == "modernbert" else ids


def build_encoder_tokenizer(family: str = "bert", words: Sequence[str] = ()) -> hf.PreTrainedTokenizerFast:
    """Words apart by spaces; `words` have the first ids behind the special ones, `w7` and so on the others."""
    special = ROBERTA_SPECIAL if family in ROBERTA_LIKE else BERT_SPECIAL
    first, pad, last, unknown, mask = special if family in ROBERTA_LIKE else (special[2], special[0], special[3],
                                                                             special[1], special[4])  # fmt: skip
    known = [*special, *words]
    vocabulary = {name: index for index, name in enumerate([*known, *(f"w{i}" for i in range(len(known), VOCAB))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {last} $B {last}" if family in ROBERTA_LIKE else f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token=first, sep_token=last, pad_token=pad, unk_token=unknown, mask_token=mask,
        model_input_names=names if family in WITH_TOKEN_TYPES else ["input_ids", "attention_mask"],
    )  # fmt: skip


def build_encoder(
    family: str = "bert",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    part: Part = "masked",
    words: Sequence[str] = (),
    **changes: Any,
) -> Base:
    model = build_encoder_model(family, seed, dtype, part, **changes)
    return freeze_base(model, build_encoder_tokenizer(family, words), name=f"tiny-{family}")


def save_encoder(
    family: str, folder: Path, seed: int = 0, part: Part = "masked", words: Sequence[str] = (), **changes: Any
) -> Path:
    """A checkpoint folder; returns it."""
    build_encoder_model(family, seed, part=part, **changes).save_pretrained(folder)
    build_encoder_tokenizer(family, words).save_pretrained(folder)
    return folder


def plain_states(base: Base, row: Row, prompts: Sequence[Tensor]) -> Tensor:
    """[P + T, D], the slow truth: a row alone, its embeddings and the soft prompt in one plain run of the model."""
    text = base.embedding(torch.tensor(list(row.ids), dtype=torch.long))
    before, prompt = row.num_before, [] if row.prompt is None else [prompts[row.prompt].to(text.dtype)]
    whole = torch.cat([text[:before], *prompt, text[before:]])
    states: Tensor = base.model.base_model(inputs_embeds=whole[None])[0][0]
    return states


def plain_columns(base: Base, row: Row, prompts: Sequence[Tensor]) -> Tensor:
    """[N, D], the same at the row's columns."""
    num_virtual = 0 if row.prompt is None else len(prompts[row.prompt])
    slots = [
        row.num_before if column < 0 else column + (num_virtual if column >= row.num_before else 0)
        for column in row.columns
    ]
    return plain_states(base, row, prompts)[slots]
