"""/v1/prompts: prompts are listed, added, changed and deleted at run time; /v1/aliases: other names for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from pydantic import TypeAdapter

from softprompt.base import Base
from softprompt.config import ServerConfig
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.auth import CurrentAdmin, CurrentClient
from softprompt.server.clients.keys import Client
from softprompt.server.clients.quotas import Amounts, Quotas, QuotasDep
from softprompt.server.dependencies import dependency
from softprompt.server.error_schemas import error_responses
from softprompt.server.errors import ApiError, encodable
from softprompt.server.forms import checked, is_form, read_json
from softprompt.server.prompts.adapter_import import Hub, read_adapter_form, read_folder, read_upload, upload_limits
from softprompt.server.prompts.library_watcher import LibraryWatcher
from softprompt.server.prompts.model import LIBRARY, Alias, Model, Target
from softprompt.server.prompts.pins import Pins
from softprompt.server.prompts.registry import PromptRegistry, unknown
from softprompt.server.prompts.schemas import (
    AliasIn,
    AliasList,
    AliasOut,
    Change,
    Deleted,
    FromUpload,
    ProblemOut,
    PromptIn,
    PromptList,
    PromptOut,
    alias_out,
    prompt_out,
)
from softprompt.storage.library import NAME

router = APIRouter(tags=["prompts"], responses=error_responses(400, 401, 429, 503))
_aliases = APIRouter(tags=["aliases"])
_Kept = TypeVar("_Kept")
TheRegistry = Annotated[PromptRegistry, dependency(PromptRegistry)]
TheLibrary = Annotated[LibraryWatcher, dependency(LibraryWatcher)]
ThePins = Annotated[Pins, dependency(Pins)]
TheHub = Annotated[Hub, dependency(Hub)]
TheBase = Annotated[Base, dependency(Base)]
LibraryName = Annotated[
    str, InPath(pattern=f"^{NAME.pattern}$", description="Its folder's name.", examples=["coach-v3"])
]
AliasName = Annotated[str, InPath(pattern=f"^{NAME.pattern}$", description="The other name.", examples=["coach"])]
PromptName = Annotated[str, InPath(description="Its name, `:` included.", examples=["coach-v3"])]
TheConfig = Annotated[ServerConfig, dependency(ServerConfig)]

_PROMPT_IN = TypeAdapter(PromptIn)
_FORM: dict[str, Any] = FromUpload.model_json_schema()
_FORM["properties"]["files"] = {
    "type": "array",
    "items": {"type": "string", "format": "binary"},
    "description": "adapter_model.safetensors, adapter_config.json and, where there is one, softprompt.json.",
}
_FORM["required"] = ["name", "files"]
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": PromptIn.model_json_schema()},
            "multipart/form-data": {"schema": _FORM},
        },
    }
}


@router.get("/v1/prompts", summary="List prompts")
async def list_prompts(
    client: CurrentClient,
    registry: TheRegistry,
    library: TheLibrary,
    base: TheBase,
    after: Annotated[str, Query(max_length=256, description="The last `id` of the page before.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000, description="Prompts of a page.")] = 100,
) -> PromptList:
    """Your prompts and those that everybody may use, by name, with where each comes from."""
    found = sorted(
        (each for each in registry.models(client) if each.prompt and each.id > after), key=lambda model: model.id
    )
    aliases = registry.alias_names(client)
    problems = sorted({**library.problems, **registry.problems}.items()) if client.is_admin else None
    return PromptList(
        data=[_prompt_out(each, base, client, aliases) for each in found[:limit]],
        has_more=len(found) > limit,
        aliases=[alias_out(each, client.id) for each in registry.aliases(client)],
        problems=None if problems is None else [_problem_out(name, problem) for name, problem in problems],
    )


def _problem_out(name: str, problem: str) -> ProblemOut:
    """With a name that can be sent: a folder's may be bytes that are not text."""
    return ProblemOut(name=encodable(name), problem=encodable(problem))


@router.get("/v1/prompts/{name:path}", summary="Retrieve a prompt", responses=error_responses(404))
async def retrieve_prompt(name: PromptName, client: CurrentClient, registry: TheRegistry, base: TheBase) -> PromptOut:
    """One prompt with the whole record of its training."""
    model = _found(name, client, registry)
    return _prompt_out(model, base, client, registry.alias_names(client), with_run=True)


@router.post("/v1/prompts", summary="Add a prompt", openapi_extra=_BODY, responses=error_responses(403, 408, 409, 413))
async def add_prompt(
    request: Request, client: CurrentClient, registry: TheRegistry, pins: ThePins, hub: TheHub, base: TheBase,
    config: TheConfig, quotas: QuotasDep,
) -> PromptOut:  # fmt: skip
    """Serve an adapter from now on: uploaded files (never a pickle), a repository on the Hub, or, for admins, a folder.

    It must have been made for this base. A name that you use already is refused (409) unless `overwrite` is set;
    running requests finish with the prompt they began with.
    """
    body: PromptIn | FromUpload
    if is_form(request):
        limits = {name: min(most, config.max_upload_bytes) for name, most in upload_limits(base).items()}
        fields, files = await read_adapter_form(request, limits)
        body = checked(FromUpload, fields)
        await _check_allowed(body, "upload", client, registry, quotas)
        prompt, source = await asyncio.to_thread(read_upload, files, base), "upload"
    else:
        body = await read_json(request, _PROMPT_IN, config.max_body_bytes)
        source = "hub" if body.folder is None else "folder"
        await _check_allowed(body, source, client, registry, quotas)
        prompt = await _fetched(body, hub, base, client)
    keep = partial(registry.keep, prompt, name=body.name, owner=client.id, source=source,
                   is_shared=body.shared, overwrite=body.overwrite)  # fmt: skip
    more = registry.growth(body.name, client.id, prompt)
    model = await asyncio.to_thread(_within_quotas, quotas, client, more, keep)
    await pins.follow()
    return _prompt_out(model, base, client, registry.alias_names(client), with_run=True)


@router.post(
    "/v1/prompts/{name}/load", summary="Load a prompt of the library again", responses=error_responses(403, 404)
)
async def load_prompt(
    name: LibraryName, client: CurrentAdmin, registry: TheRegistry, library: TheLibrary, pins: ThePins, base: TheBase
) -> PromptOut:
    """Serve a prompt of the library that was deleted, or read its folder now. For admins."""
    model = await asyncio.to_thread(library.load, name)
    await pins.follow()
    return _prompt_out(model, base, client, registry.alias_names(client), with_run=True)


@router.patch("/v1/prompts/{name:path}", summary="Rename, pin or share a prompt",
              responses=error_responses(403, 404, 408, 409, 413))  # fmt: skip
async def change_prompt(
    name: PromptName, change: Change, client: CurrentClient, registry: TheRegistry, pins: ThePins, base: TheBase
) -> PromptOut:
    """Fields left out stay. A pinned prompt's keys and values stay in memory, computed once for all requests."""
    model = _changeable(name, client, registry)
    if change.shared is not None and not client.is_admin:
        raise ApiError(403, "only an admin's key may share a prompt with everybody", param="shared")
    if change.pinned and not model.is_pinned and model.prompt is not None:
        await pins.add(model.prompt)
    apply = partial(registry.change, name=change.name, is_pinned=change.pinned, is_shared=change.shared)
    try:
        changed = await asyncio.to_thread(apply, model)
    finally:
        await pins.follow()
    return _prompt_out(changed, base, client, registry.alias_names(client), with_run=True)


@router.delete("/v1/prompts/{name:path}", summary="Delete a prompt", responses=error_responses(403, 404))
async def delete_prompt(name: PromptName, client: CurrentClient, registry: TheRegistry, pins: ThePins) -> Deleted:
    """Your prompt is deleted, with its file. One of the library is only unloaded (for admins): its folder stays, and it
    stays unloaded, also after a restart, until it is loaded again with `POST /v1/prompts/{name}/load`."""
    await _delete(name, client, registry, pins)
    return Deleted(id=name, object="prompt")


@router.delete("/v1/models/{model:path}", summary="Delete a model", tags=["models"],
               responses=error_responses(403, 404))  # fmt: skip
async def delete_model(model: PromptName, client: CurrentClient, registry: TheRegistry, pins: ThePins) -> Deleted:
    """The same as deleting a prompt, as OpenAI has it for fine-tuned models."""
    await _delete(model, client, registry, pins)
    return Deleted(id=model, object="model")


@_aliases.get("/v1/aliases", summary="List aliases")
async def list_aliases(client: CurrentClient, registry: TheRegistry) -> AliasList:
    """Your aliases, and those that everybody may use."""
    found = sorted(registry.aliases(client), key=lambda alias: alias.name)
    return AliasList(data=[alias_out(each, client.id) for each in found])


@_aliases.put("/v1/aliases/{alias}", summary="Set an alias", responses=error_responses(403, 404, 408, 409, 413))
async def set_alias(
    alias: AliasName, body: AliasIn, client: CurrentClient, registry: TheRegistry, quotas: QuotasDep
) -> AliasOut:
    """Make a name mean a prompt, or several by share, from the next request on.

    Running requests finish with the prompt they began with.

    With shares each request draws its prompt; one that carries `user` draws the same one each time. Targets are names
    as you see them, also where another uses a shared alias of yours.
    """
    if body.shared and not client.is_admin:
        raise ApiError(403, "only an admin's key may share an alias with everybody", param="shared")
    made = Alias(name=alias, targets=_targets(body), owner=client.id, is_shared=body.shared)
    more = Amounts(aliases=int(registry.own_alias(alias, client.id) is None))
    await asyncio.to_thread(_within_quotas, quotas, client, more, partial(registry.put_alias, made))
    return alias_out(made, client.id)


@_aliases.delete("/v1/aliases/{alias}", summary="Delete an alias", responses=error_responses(404))
async def delete_alias(alias: AliasName, client: CurrentClient, registry: TheRegistry) -> Deleted:
    """Your alias is deleted; the prompts that it pointed to stay."""
    await asyncio.to_thread(registry.remove_alias, alias, client.id)
    return Deleted(id=alias, object="alias")


router.include_router(_aliases)


async def _fetched(body: PromptIn, hub: Hub, base: Base, client: Client) -> SoftPrompt:
    if body.folder is not None:
        return await asyncio.to_thread(read_folder, Path(body.folder), base)
    assert body.hub is not None
    return await hub.pull(body.hub, body.revision, is_admin=client.is_admin)


def _within_quotas(quotas: Quotas, client: Client, more: Amounts, keep: Callable[[], _Kept]) -> _Kept:
    with quotas.reserved(client, more):
        return keep()


async def _check_allowed(
    body: PromptIn | FromUpload, source: str, client: Client, registry: PromptRegistry, quotas: Quotas
) -> None:
    """Before anything is fetched, check that this client may have this prompt under that name."""
    if source == "folder" and not client.is_admin:
        raise ApiError(403, "only an admin's key may name a folder of the server; upload the files", param="folder")
    if body.shared and not client.is_admin:
        raise ApiError(403, "only an admin's key may share a prompt with everybody", param="shared")
    model = Model(id=body.name, owner=client.id, source=source, is_shared=body.shared)
    registry.check_free(model, overwrite=body.overwrite)
    await asyncio.to_thread(quotas.check, client, registry.growth(body.name, client.id))


def _found(name: PromptName, client: Client, registry: PromptRegistry) -> Model:
    model = registry.find(name, client)
    if model.prompt is None:
        raise unknown(f"{name!r} is the base and no prompt; see /v1/models")
    return model


def _changeable(name: PromptName, client: Client, registry: PromptRegistry) -> Model:
    model = _found(name, client, registry)
    if model.owner != client.id and not client.is_admin:
        raise ApiError(403, f"{name!r} is shared with you and not yours to change", param="name")
    return model


async def _delete(name: PromptName, client: Client, registry: PromptRegistry, pins: Pins) -> None:
    model = _changeable(name, client, registry)
    await asyncio.to_thread(registry.unload if model.source == LIBRARY else registry.delete, model)
    await pins.follow()


def _prompt_out(
    model: Model, base: Base, client: Client, aliases: dict[tuple[str, str], list[str]], *, with_run: bool = False
) -> PromptOut:
    return prompt_out(model, base, client.id, aliases.get((model.owner, model.id), []), with_run=with_run)


def _targets(body: AliasIn) -> tuple[Target, ...]:
    if body.model is not None:
        return (Target(body.model),)
    return tuple(Target(each.model, each.share) for each in body.targets or ())
