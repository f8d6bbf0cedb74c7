"""The frozen base as a value: model, tokenizer and what every other room asks about them.

It knows nothing of soft prompts. Nothing changes it: no active prompt, no hook, no state on the module.

Per-layer embeddings are what Gemma-3n and Gemma-4 look up of a token id for each layer, besides its input embedding.
They lie behind the input embedding, in one vector wider than H, so that whatever lays out rows handles one tensor. A
virtual token has no id; it gets the per-layer embeddings that the model itself gives to the vectors of an image or a
sound: those of id 0 in Gemma-3n, those of the pad in Gemma-4.

H width of the input embeddings, L layers, E width of a per-layer embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softprompt.base.fingerprint import fingerprint
from softprompt.base.generation import GenerationRules
from softprompt.base.tokens import encode_text, encode_with_spans, pair_ids_of, second_type_of, target_bos_ids_of
from softprompt.config import Kernels
from softprompt.errors import EncodingError
from softprompt.types import BaseKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # more than a second to import, and loading a base imports it


@dataclass(frozen=True, eq=False)
class Base:
    """One language model in eval mode with no trainable parameter, and its tokenizer.

    B batch, T tokens, H width of the input embeddings, W of all that a forward takes of a token, V vocabulary.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # Hub id, or the name of its folder or file
    folder: str | None  # of its checkpoint, or its GGUF file, for the fingerprint; None for a model made in Python
    max_length: int  # positions that a whole sequence may use (tokens, virtual ones included)
    bos_ids: tuple[int, ...]  # added by the tokenizer before a text
    eos_id: int | None  # ends a text; None where the tokenizer has none
    stop_ids: tuple[int, ...] = ()  # every id that ends an answer
    source: str | None = None  # for loading it again: Hub id or absolute path; None for a model made in Python
    rules: GenerationRules = GenerationRules()  # on the tokens of answers, by its generation settings
    kernels: Kernels = "measured"  # how its products run on a CPU
    kind: BaseKind = "causal"
    end_ids: tuple[int, ...] = ()  # added by the tokenizer behind a text; empty for a causal base
    embedding_scale: float = 1.0  # of an encoder that multiplies its embeddings outside of their table (Pegasus)

    def __repr__(self) -> str:
        kind, dtype = self.model.config.model_type, str(self.dtype).removeprefix("torch.")
        size = f"{self.num_parameters:,} parameters, {dtype} on {self.device}, {self.max_length:,} positions"
        return f"Base({self.name!r}, {kind}, {size})"

    @property
    def device(self) -> torch.device:
        """Where token ids and prompts meet. Of a base that is spread over devices, the input embeddings'."""
        hook = getattr(self.embedding, "_hf_hook", None)  # Accelerate's; the weight may lie elsewhere between calls
        device = getattr(hook, "execution_device", None)
        return self.embedding.weight.device if device is None else torch.device(device)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> nn.Embedding:
        module = self.model.get_input_embeddings()
        assert isinstance(module, nn.Embedding), type(module)  # checked when the base was loaded
        return module

    @property
    def hidden_size(self) -> int:
        """H, the width of one input embedding (OPT's may differ from its hidden states')."""
        return self.embedding.embedding_dim

    @property
    def vocab_size(self) -> int:
        return self.embedding.num_embeddings

    @property
    def num_parameters(self) -> int:
        """Parameters of the base, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def mask_id(self) -> int | None:
        """The id that stands for a word to be found; None where the tokenizer or the model has no masked words."""
        mask_id: int | None = self.tokenizer.mask_token_id if self.kind == "encoder" else None
        return mask_id if self.model.get_output_embeddings() is not None else None

    @property
    def decoder_start_id(self) -> int | None:
        """Of an encoder-decoder: the id that the decoder begins with; None for other kinds, or where none is set."""
        if self.kind != "seq2seq":
            return None
        own = getattr(self.model, "generation_config", None)
        for config in (own, self.model.config):
            found = getattr(config, "decoder_start_token_id", None)
            if isinstance(found, int):
                return found
        return None

    @cached_property
    def decoder_start_ids(self) -> tuple[int, ...]:
        """Of an encoder-decoder: what the decoder reads before the first id of a target.

        Its start token, then what stands before every target of its family: BART's BOS, mBART-50's language.
        Empty for other kinds, and where no start token is set.
        """
        if self.decoder_start_id is None:
            return ()
        forced = self.rules.forced_bos_token_id
        return (self.decoder_start_id, *((forced,) if forced is not None else target_bos_ids_of(self.tokenizer)))

    @cached_property
    def pair_ids(self) -> tuple[int, ...]:
        """The ids between two texts that are read as one: the tokenizer's own, empty where it has none."""
        return pair_ids_of(self.tokenizer)

    @cached_property
    def second_type(self) -> int:
        """The token type of the second of two texts in a row; 0, that of all other tokens, where the base has none."""
        has_types = self.kind == "encoder" and (getattr(self.model.config, "type_vocab_size", 0) or 0) > 1
        return second_type_of(self.tokenizer) if has_types else 0

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square of the input-embedding table as the model scales it."""
        return embedding_rms(self.embedding, self.device) * self.embedding_scale

    @cached_property
    def per_layer(self) -> PerLayerEmbeddings | None:
        """Of a base that looks its token ids up again for its layers."""
        return per_layer_embeddings(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """What this base computes, as a short hash; see `softprompt.base.fingerprint`."""
        return fingerprint(self.model, self.tokenizer, self.folder)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., H] of token ids [...], in the base's dtype, without gradient."""
        with torch.no_grad():
            found: Tensor = self.embedding(ids.to(self.device))
            return found.clone() if self.embedding_scale == 1.0 else found * self.embedding_scale

    def token_inputs(self, ids: Tensor) -> Tensor:
        """What a forward takes of token ids [...]: [..., W], which is `embed` but for per-layer embeddings."""
        embeds = self.embed(ids)
        return embeds if self.per_layer is None else self.per_layer.behind(embeds, ids)

    def virtual_inputs(self, vectors: Tensor) -> Tensor:
        """What a forward takes of vectors without token ids [..., H]: [..., W]; gradients flow into them."""
        vectors = vectors.to(device=self.device, dtype=self.dtype)
        return vectors if self.per_layer is None else self.per_layer.behind_virtual(vectors)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, nothing added in front or behind; a special token written inside it is only text.

        Raises EncodingError where the tokenizer cannot encode it, or gives ids that the base does not embed.
        """
        return self.encode_with(self.tokenizer, text, split_special_tokens=True)

    def can_encode(self, text: str) -> bool:
        """Whether `encode` gives ids for a text of ours; a tokenizer of words without an unknown token may not."""
        try:
            return bool(self.encode(text))
        except EncodingError:
            return False

    def encode_with_spans(self, text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """The ids of `encode`, and for each the characters of the text that it is made of: first, end.

        Raises EncodingError as `encode` does, and for a tokenizer that does not say.
        """
        return encode_with_spans(self.tokenizer, text, self.name, self.vocab_size)

    def encode_with(self, tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> tuple[int, ...]:
        """See `encode`: by a copy of this base's tokenizer, under options of its own."""
        return encode_text(tokenizer, text, self.name, self.vocab_size, **options)

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Text of token ids, special tokens left out, spaces exactly as the tokens have them."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def decode_after(self, before: list[int] | tuple[int, ...], ids: list[int] | tuple[int, ...]) -> str:
        """Text that `ids` add behind `before`: some tokenizers drop a space at the very start of a text."""
        head, whole = self.decode(tuple(before)), self.decode((*before, *ids))
        return whole[len(head) :] if whole.startswith(head) else self.decode(tuple(ids))


RMS_CHUNK_ROWS = 16_384


def embedding_rms(embedding: nn.Embedding, device: torch.device) -> float:
    """Root mean square over all entries of the table [V, H], in float64, after the module's own scaling.

    `device` is the device of its ids. Gemma-3's embedding module multiplies what it looks up; the table's raw weights
    would be off by that factor. Each row is summed by one thread, and the rows' sums exactly: learning rates follow
    from the result, so its bits must not depend on the number of threads.
    """
    sums: list[float] = []
    with torch.no_grad():
        for first in range(0, embedding.num_embeddings, RMS_CHUNK_ROWS):
            last = min(first + RMS_CHUNK_ROWS, embedding.num_embeddings)
            ids = torch.arange(first, last, device=device)
            sums += embedding(ids).double().square_().sum(dim=1).tolist()
    return math.sqrt(math.fsum(sums) / (embedding.num_embeddings * embedding.embedding_dim))


_KINDS = ("gemma3n_text", "gemma4_text")


@dataclass(frozen=True)
class PerLayerEmbeddings:
    """The per-layer lookup of one model."""

    text_model: Any  # Any: transformers' text model, which has `get_per_layer_inputs`
    virtual_id: int  # a virtual token gets the embeddings of this id
    hidden_size: int  # H

    def behind(self, embeds: Tensor, ids: Tensor) -> Tensor:
        """[..., H + L * E] of input embeddings [..., H] and their token ids [...]."""
        with torch.no_grad():
            own: Tensor = self.text_model.get_per_layer_inputs(ids.to(embeds.device))
        return torch.cat([embeds, own.flatten(-2).to(embeds)], dim=-1)

    def behind_virtual(self, vectors: Tensor) -> Tensor:
        """[..., H + L * E] of vectors without token ids [..., H]; gradients flow into them."""
        ids = torch.full(vectors.shape[:-1], self.virtual_id, device=vectors.device)
        return self.behind(vectors, ids)

    def arguments(self, inputs: Tensor) -> dict[str, Tensor]:
        """What the model's forward takes: input embeddings [..., H] and per-layer inputs [..., L, E]."""
        embeds, own = inputs.split([self.hidden_size, inputs.shape[-1] - self.hidden_size], dim=-1)
        num_layers = self.text_model.config.num_hidden_layers
        return {"inputs_embeds": embeds, "per_layer_inputs": own.unflatten(-1, (num_layers, -1))}


def per_layer_embeddings(model: PreTrainedModel) -> PerLayerEmbeddings | None:
    """The per-layer embeddings of a model; None where it has none."""
    text = model.config.get_text_config(decoder=True)
    if text.model_type not in _KINDS or not text.hidden_size_per_layer_input:
        return None
    text_model = next(module for module in model.modules() if hasattr(module, "get_per_layer_inputs"))
    virtual_id = 0 if text.model_type == "gemma3n_text" else text.pad_token_id or 0
    return PerLayerEmbeddings(text_model, virtual_id, text.hidden_size)
