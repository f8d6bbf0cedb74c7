"""The bodies of /v1/classify and /v1/embeddings: vLLM's and OpenAI's fields, and the bodies of their answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.config import JsonDict

from softprompt.server.inference.schema import MOST_TEXTS, PRIORITIES, Body

_IDS: JsonDict = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_FIELDS: JsonDict = {"type": "object", "additionalProperties": {"type": "string"}}
_ITEM: JsonDict = {"anyOf": [{"type": "string"}, _FIELDS]}
_INPUT: JsonDict = {
    "anyOf": [{"type": "string"}, _FIELDS,
              {"type": "array", "items": _ITEM, "minItems": 1, "maxItems": MOST_TEXTS},
              _IDS,
              {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MOST_TEXTS}]
}  # fmt: skip
Input = Annotated[Any, WithJsonSchema(_INPUT)]  # Any: checked in one pass, as `Prompt` is

_CLASSIFY_EXAMPLE: JsonDict = {"model": "reviews", "input": ["The lid is broken.", "Best mug I ever had."]}
_EMBED_EXAMPLE: JsonDict = {"model": "base", "input": "The lid is broken.", "encoding_format": "float"}


class PoolingBody(Body):
    """The fields of both endpoints. Unknown fields are ignored."""

    model: str = Field(description="Name of a soft prompt, or of the base (`base` always means it).", max_length=512)
    input: Input = Field(description="A text, a list of texts, the token ids of one, or a list of such lists. A text "
                                     "is put in the prompt's own form; an object has the fields of its template by "
                                     "name. Token ids are read as they stand.")  # fmt: skip
    add_special_tokens: Literal[True] = Field(True, description="vLLM's. Token ids are read as they stand, so to leave "
                                                                "special tokens out, send ids.")  # fmt: skip
    priority: int = Field(0, gt=-PRIORITIES, lt=PRIORITIES,
                          description="Lower is served first; below 0 for admin keys only.")  # fmt: skip
    user: str | None = Field(
        None, description="The end user: an alias with several targets keeps to one of them for each user."
    )


class ClassifyBody(PoolingBody):
    """Texts to classify, by a prompt with labels."""

    model_config = ConfigDict(json_schema_extra={"examples": [_CLASSIFY_EXAMPLE]})

    use_activation: bool = Field(True, description="vLLM's: false gives each label's score before the softmax.")


class EmbeddingsBody(PoolingBody):
    """Texts to embed, by an `embed` prompt or the bare encoder."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EMBED_EXAMPLE]})

    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Numbers, or base64 of their little-endian float32 bytes."
    )
    dimensions: int | None = Field(None, ge=1, description="Refused, unless it is the vectors' own width.")


class PoolingTokensDetails(BaseModel):
    """Details of `prompt_tokens`."""

    cached_tokens: Literal[0] = 0
    virtual_tokens: int = Field(description="Virtual tokens of the soft prompt; counted in no total.")


class PoolingUsage(BaseModel):
    """Tokens of one request."""

    prompt_tokens: int = Field(description="Tokens of the texts, special ones included and virtual ones not.")
    total_tokens: int
    completion_tokens: Literal[0] = 0
    prompt_tokens_details: PoolingTokensDetails


_USAGE: JsonDict = {
    "prompt_tokens": 12, "total_tokens": 12, "completion_tokens": 0,
    "prompt_tokens_details": {"cached_tokens": 0, "virtual_tokens": 40},
}  # fmt: skip


class ClassifiedText(BaseModel):
    """The label of one text."""

    index: int
    label: str = Field(description="The likeliest label.")
    probs: list[float] = Field(description="The probability of each label, in the order of `labels`.")
    num_classes: int
    confidence: float | None = Field(None, description="That of `label`; null without `use_activation`.")
    unsure: bool | None = Field(None, description="Whether that is below the threshold that was chosen on validation "
                                                  "rows; null for a prompt without one.")  # fmt: skip


class Classification(BaseModel):
    """Response of /v1/classify, vLLM's; `labels` and what is calibrated are ours."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "classify-0a1b", "object": "list", "created": 1789000000, "model": "reviews",
                    "system_fingerprint": "fp_5b1c0d2e3f4a6978", "labels": ["negative", "positive"],
                    "is_calibrated": True,
                    "data": [{"index": 0, "label": "negative", "probs": [0.9, 0.1], "num_classes": 2,
                              "confidence": 0.9, "unsure": False}],
                    "usage": _USAGE,
                }
            ]
        }
    )  # fmt: skip

    id: str
    object: Literal["list"]
    created: int
    model: str
    system_fingerprint: str = Field(description="Hash of base and soft prompt.")
    labels: list[str] = Field(description="The prompt's labels, in the order of `probs`.")
    is_calibrated: bool = Field(description="Whether probabilities are by a temperature fitted on validation rows.")
    data: list[ClassifiedText]
    usage: PoolingUsage


class Embedding(BaseModel):
    """The vector of one text, of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of little-endian float32.")


class Embeddings(BaseModel):
    """Response of /v1/embeddings."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "embd-0a1b", "object": "list", "created": 1789000000, "model": "base",
                    "system_fingerprint": "fp_5b1c0d2e3f4a6978",
                    "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}], "usage": _USAGE,
                }
            ]
        }
    )  # fmt: skip

    id: str
    object: Literal["list"]
    created: int
    model: str
    system_fingerprint: str = Field(description="Hash of base and soft prompt.")
    data: list[Embedding]
    usage: PoolingUsage
