"""The inference endpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response

from softprompt.base import Base
from softprompt.server.clients.auth import CurrentClient
from softprompt.server.dependencies import dependency
from softprompt.server.error_schemas import Responses, error_responses
from softprompt.server.inference.answers import ChatCompletion, Completion
from softprompt.server.inference.chat import chat
from softprompt.server.inference.chat_body import ChatBody
from softprompt.server.inference.completion_body import CompletionBody
from softprompt.server.inference.completions import complete
from softprompt.server.inference.listing import ModelList, ModelObject, describe
from softprompt.server.inference.parts import TheParts
from softprompt.server.prompts.registry import PromptRegistry

router = APIRouter(responses=error_responses(401, 429))

TheBase = Annotated[Base, dependency(Base)]
TheRegistry = Annotated[PromptRegistry, dependency(PromptRegistry)]

_EVENTS = {"text/event-stream": {"schema": {"type": "string"},
                                 "example": 'data: {"id":"...","choices":[...]}\n\ndata: [DONE]\n\n'}}  # fmt: skip
_REFUSALS = error_responses(400, 403, 408, 413, 503, meanings={404: "No such model; the message has the nearest names.",
                                                    500: "The answer could not be generated."})  # fmt: skip


def _answers(description: str) -> Responses:
    return {200: {"description": description, "content": _EVENTS}, **_REFUSALS}


@router.get("/v1/models", summary="List models", tags=["models"])
def list_models(client: CurrentClient, base: TheBase, registry: TheRegistry) -> ModelList:
    """The base and every soft prompt that the key may use, each with its record."""
    models = registry.models(client)
    return ModelList(data=[describe(model, base, registry.base.id) for model in models])


@router.get("/v1/models/{model:path}", summary="Retrieve a model", tags=["models"], responses=error_responses(400, 404))
def retrieve_model(
    model: Annotated[str, Path(description="Its name, `/` and `:` included.", examples=["quotes"])],
    client: CurrentClient,
    base: TheBase,
    registry: TheRegistry,
) -> ModelObject:
    """One model with its record; an alias gives what it means now."""
    return describe(registry.resolve(model, client), base, registry.base.id)


@router.post("/v1/completions", summary="Continue texts", tags=["inference"], response_model=Completion,
             responses=_answers("The answers, or, with `stream`, events that end with `[DONE]`."))  # fmt: skip
async def create_completion(body: CompletionBody, parts: TheParts) -> Response:
    """Raw text or token ids, continued under a soft prompt or by the bare base.

    OpenAI's fields and vLLM's sampling fields; fields that would change the answer and are not supported (`suffix`,
    tools, ...) are refused, others are ignored.
    """
    return await complete(body, parts)


@router.post("/v1/chat/completions", summary="Continue a conversation", tags=["inference"],
             response_model=ChatCompletion,
             responses=_answers("The answer, or, with `stream`, events that end with `[DONE]`."))  # fmt: skip
async def create_chat_completion(body: ChatBody, parts: TheParts) -> Response:
    """The assistant's next turn. The input's form is the one that the prompt was trained on.

    A prompt trained on chat, and the bare base, read the whole conversation by the base's chat template (or a plain
    default); any other prompt reads the last user message, put through the template of its training.
    """
    return await chat(body, parts)
