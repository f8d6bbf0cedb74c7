"""The routes of inference: generation, whose events are the response, pooling, and the list of models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response

from softprompt.base import Base
from softprompt.server.clients.auth import CurrentClient
from softprompt.server.dependencies import dependency
from softprompt.server.error_schemas import Responses, error_responses
from softprompt.server.inference.build import CurrentDependencies, build_chat, build_completion
from softprompt.server.inference.format import ChatFormat, CompletionFormat
from softprompt.server.inference.pooling import classify, embed
from softprompt.server.inference.pooling_schema import Classification, ClassifyBody, Embeddings, EmbeddingsBody
from softprompt.server.inference.respond import respond
from softprompt.server.inference.response_schema import ChatCompletion, Completion, ModelList, ModelObject, describe
from softprompt.server.inference.schema import ChatBody, CompletionBody
from softprompt.server.prompts.registry import PromptRegistry

router = APIRouter(responses=error_responses(401, 429))

BaseDep = Annotated[Base, dependency(Base)]
RegistryDep = Annotated[PromptRegistry, dependency(PromptRegistry)]

_EVENTS = {"text/event-stream": {"schema": {"type": "string"},
                                 "example": 'data: {"id":"...","choices":[...]}\n\ndata: [DONE]\n\n'}}  # fmt: skip
_ERRORS = error_responses(400, 403, 408, 413, 503, meanings={
    404: "There is no such model; the message has the nearest names.", 500: "The answer could not be generated."
})  # fmt: skip


def _answers(description: str) -> Responses:
    return {200: {"description": description, "content": _EVENTS}, **_ERRORS}


@router.get("/v1/models", summary="List models", tags=["models"])
def list_models(client: CurrentClient, base: BaseDep, registry: RegistryDep) -> ModelList:
    """The base and every soft prompt that the key may use, each with its record."""
    return ModelList(data=[describe(model, base, registry.base.id) for model in registry.models(client)])


@router.get("/v1/models/{model:path}", summary="Retrieve a model", tags=["models"],
            responses=error_responses(400, 404))  # fmt: skip
def retrieve_model(
    model: Annotated[str, Path(description="Its name, `/` and `:` included.", examples=["quotes"])],
    client: CurrentClient,
    base: BaseDep,
    registry: RegistryDep,
) -> ModelObject:
    """One model with its record; an alias gives the model that it means now."""
    return describe(registry.resolve(model, client), base, registry.base.id)


@router.post("/v1/completions", summary="Continue texts", tags=["inference"], response_model=Completion,
             responses=_answers("The answers, or, with `stream`, events that end with `[DONE]`."))  # fmt: skip
async def create_completion(body: CompletionBody, deps: CurrentDependencies) -> Response:
    """Raw text or token ids, continued under a soft prompt or by the bare base.

    OpenAI's fields and vLLM's sampling fields; fields that would change the answer and are not supported (`suffix`,
    tools, ...) are refused, others are ignored.
    """
    generation = await build_completion(body, deps)
    return await respond(deps.http, generation, CompletionFormat(generation, deps.texts))


@router.post("/v1/chat/completions", summary="Continue a conversation", tags=["inference"],
             response_model=ChatCompletion,
             responses=_answers("The answer, or, with `stream`, events that end with `[DONE]`."))  # fmt: skip
async def create_chat_completion(body: ChatBody, deps: CurrentDependencies) -> Response:
    """The assistant's next turn. The input's form is the one that the prompt was trained on.

    A prompt trained on chat, and the bare base, read the whole conversation by the base's chat template (or a plain
    default); any other prompt reads the last user message, put through the template of its training.
    """
    generation = await build_chat(body, deps)
    return await respond(deps.http, generation, ChatFormat(generation, deps.texts))


@router.post("/classify", summary="Classify texts, at vLLM's path", tags=["inference"], response_model=Classification,
             responses=_ERRORS, name="classify")  # fmt: skip
@router.post("/v1/classify", summary="Classify texts", tags=["inference"], response_model=Classification,
             responses=_ERRORS, name="create_classification")  # fmt: skip
async def create_classification(body: ClassifyBody, deps: CurrentDependencies) -> Response:
    """The likeliest of the prompt's labels for each text, with the probability of each of them.

    By the head that was trained beside the prompt, by the label words at a mask, or by the likelihood of each label
    behind the text, as the prompt was trained. A model without labels is refused.
    """
    return await classify(body, deps)


@router.post("/v1/embeddings", summary="Embed texts", tags=["inference"], response_model=Embeddings,
             responses=_ERRORS)  # fmt: skip
async def create_embeddings(body: EmbeddingsBody, deps: CurrentDependencies) -> Response:
    """One vector for each text, of length 1: by a prompt that was trained to embed, or by the bare encoder, whose
    vector is the mean over the states of all tokens of the text.

    Models that generate are refused.
    """
    return await embed(body, deps)
