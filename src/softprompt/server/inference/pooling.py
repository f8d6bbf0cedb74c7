"""/v1/classify and /v1/embeddings: texts as pooling requests of the engine, and their values as labels or vectors.

A text is put in the prompt's own form. One that is too long is refused, as for generation: nothing is cut unseen.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Response

from softprompt.config import PredictConfig
from softprompt.engine import Aborted, Failed, Pooled, PoolingRequest
from softprompt.engine.pooling import BARE_EMBEDDING
from softprompt.errors import SoftpromptError
from softprompt.evaluation.calibrate import probabilities
from softprompt.evaluation.predict import Sureness, sureness
from softprompt.prompt.calibration import rounded
from softprompt.server.errors import ApiError
from softprompt.server.inference.build import InferenceDependencies, resolve_model, tokenised
from softprompt.server.inference.generation import error_for
from softprompt.server.inference.pooling_rows import Item, rows_of_item
from softprompt.server.inference.pooling_schema import ClassifyBody, EmbeddingsBody, PoolingBody
from softprompt.server.inference.respond import ClientDisconnectedError, unless_disconnected
from softprompt.server.inference.tokenise import input_items, num_characters_of
from softprompt.server.prompts.capabilities import Capability, label_names, require
from softprompt.server.prompts.model import Model
from softprompt.server.telemetry.metrics import End
from softprompt.splice import Row
from softprompt.types import InputForm

Json = dict[str, Any]  # Any: JSON

_MOST_ROWS = 2**14  # of one request: a text of a prompt with label likelihood is a row for each label
_FLOATS_AT_ONCE = 2**15  # written between two turns of the event loop
_CLIENT_CLOSED_REQUEST = 499  # nobody reads it


@dataclass(frozen=True)
class PooledTexts:
    """One HTTP request's texts with their values."""

    model: Model
    fingerprint: str  # of base and soft prompt
    ends: Sequence[Pooled]

    def head(self, prefix: str) -> Json:
        """The fields that both answers begin with."""
        return {"id": f"{prefix}-{secrets.token_hex(16)}", "object": "list", "created": int(time.time()),
                "model": self.model.id, "system_fingerprint": self.fingerprint}  # fmt: skip

    def usage(self) -> Json:
        """Tokens of the texts; virtual ones are counted apart and in no total."""
        num_tokens = sum(end.num_prompt_tokens for end in self.ends)
        details = {"cached_tokens": 0, "virtual_tokens": sum(end.num_virtual_tokens for end in self.ends)}
        return {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0,
                "prompt_tokens_details": details}  # fmt: skip


async def classify(body: ClassifyBody, deps: InferenceDependencies) -> Response:
    """The label of each text. Raises ApiError."""
    found = await _pooled(body, deps, "classify")
    if found is None:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    labels = label_names(found.model)
    assert found.model.prompt is not None, "the bare base has no labels"
    sure = sureness(found.model.prompt, PredictConfig())
    data = [_classified(labels, index, end.values, sure, body.use_activation) for index, end in enumerate(found.ends)]
    more = {"labels": list(labels), "is_calibrated": sure.temperature is not None, "usage": found.usage()}
    return await _response({**found.head("classify"), **more}, data)


async def embed(body: EmbeddingsBody, deps: InferenceDependencies) -> Response:
    """The vector of each text. Raises ApiError."""
    found = await _pooled(body, deps, "embed")
    if found is None:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    width = len(found.ends[0].values)
    if body.dimensions not in (None, width):
        raise ApiError(400, f"dimensions is {body.dimensions}, and the vectors of {found.model.id!r} have {width}; "
                            "leave it out", "unsupported_parameter", "dimensions")  # fmt: skip
    written = _base64 if body.encoding_format == "base64" else list
    data = [
        {"object": "embedding", "index": index, "embedding": written(end.values)}
        for index, end in enumerate(found.ends)
    ]
    return await _response({**found.head("embd"), "usage": found.usage()}, data)


def _classified(
    labels: Sequence[str], index: int, values: Sequence[float], sure: Sureness, has_activation: bool
) -> Json:
    """As `softprompt predict` has them: confidences are rounded alike before they are compared with the threshold."""
    best = max(range(len(values)), key=values.__getitem__)
    found = {"index": index, "label": labels[best], "num_classes": len(labels)}
    if not has_activation:
        return {**found, "probs": list(values), "confidence": None, "unsure": None}
    shares = probabilities(np.array([values]), sure.temperature or 1.0)[0].tolist()
    (confidence,) = rounded([shares[best]])
    unsure = None if sure.threshold is None else confidence < sure.threshold
    return {**found, "probs": shares, "confidence": confidence, "unsure": unsure}


def _base64(values: Sequence[float]) -> str:
    numbers = array("f", values)
    if not _IS_LITTLE_ENDIAN:
        numbers.byteswap()
    return base64.b64encode(numbers).decode()


_IS_LITTLE_ENDIAN = array("H", [1]).tobytes()[0] == 1


async def _pooled(body: PoolingBody, deps: InferenceDependencies, capability: Capability) -> PooledTexts | None:
    """The values of all texts; None where the client has disconnected. Raises ApiError."""
    model = resolve_model(body, deps)
    require(model, deps.base, capability)
    items = input_items(body.input, deps.base, deps.tokenisers.max_characters)
    num_rows = _num_rows_each(model)
    if len(items) * num_rows > _MOST_ROWS:
        raise ApiError(400, f"{len(items)} texts with {num_rows} labels are {len(items) * num_rows:,} rows; one "
                            f"request may ask for {_MOST_ROWS:,}; send fewer", "invalid_value", "input")  # fmt: skip

    def work() -> list[PoolingRequest]:
        found = [_request(body, deps, model, item, number) for number, item in enumerate(items)]
        for request in found:
            deps.engine.check_pooling(request)
        return found

    requests = await tokenised(deps, num_rows * num_characters_of(items), work)
    try:
        ends = await unless_disconnected(deps.http.receive, _ends(deps, model, requests))
    except ClientDisconnectedError:
        return None
    return PooledTexts(model, model.fingerprint(deps.base), ends)


async def _ends(deps: InferenceDependencies, model: Model, requests: Sequence[PoolingRequest]) -> list[Pooled]:
    """The engine's values, counted, limited and logged. Raises ApiError where one of them ends without."""
    num_tokens = sum(request.num_prompt_tokens for request in requests)
    num_virtual = sum(request.num_virtual for request in requests)
    deps.limiter.admit(deps.client, num_answers=len(requests), num_tokens=num_tokens)
    counts = deps.metrics.generation_started(model.id)
    if model.alias is not None:
        deps.metrics.drawn(model.alias, model.id)
    end: End | None = "abort"  # None: refused, so there was no answer
    try:
        ends = [_pooled_end(each, request) for each, request in
                zip(await deps.engine.pool(requests), requests, strict=True)]  # fmt: skip
        end = "stop"
        return ends
    except Exception as error:
        end = None if isinstance(error, SoftpromptError) else "error"
        raise
    finally:
        if end is not None:
            counts.ended(end, num_tokens, num_virtual)
        deps.limiter.ended(deps.client, num_answers=len(requests))
        deps.log.model, deps.log.num_prompt_tokens, deps.log.num_new_tokens = model.id, num_tokens, 0


def _pooled_end(end: object, request: PoolingRequest) -> Pooled:
    if isinstance(end, Failed | Aborted):
        raise error_for(end, request.timeout_s)
    assert isinstance(end, Pooled), end
    return end


def _num_prompt_tokens(row: Row) -> int:
    """Of the text: what is read, but for the label."""
    if row.columns:
        return len(row.ids)
    return len(row.source) or sum(not wanted for wanted in row.targets or ())


def _form(model: Model) -> InputForm:
    return BARE_EMBEDDING if model.prompt is None else model.prompt.record.form


def _num_rows_each(model: Model) -> int:
    """Rows that one text is in the engine."""
    form = _form(model)
    return max(1, len(form.labels)) if form.task == "generate" else 1


def _request(
    body: PoolingBody, deps: InferenceDependencies, model: Model, item: Item, number: int
) -> PoolingRequest:  # fmt: skip
    rows = rows_of_item(deps.base, model, item, number)
    return PoolingRequest(
        rows=rows,
        num_prompt_tokens=_num_prompt_tokens(rows[0]),
        prompt=model.prompt,
        client=deps.client.id,
        priority=body.priority,
        timeout_s=deps.config.request_timeout_s,
    )


async def _response(head: Json, data: Sequence[Json]) -> Response:
    """The body, `data` last, written in pieces: other requests get their turn between them."""
    pieces = [json.dumps(head, separators=(",", ":"))[:-1], ',"data":[']
    num_floats = 0
    for number, item in enumerate(data):
        pieces.append(("," if number else "") + json.dumps(item, separators=(",", ":")))
        num_floats += len(item.get("embedding", ()))
        if num_floats > _FLOATS_AT_ONCE:
            num_floats = 0
            await asyncio.sleep(0)
    return Response("".join([*pieces, "]}"]), media_type="application/json")
