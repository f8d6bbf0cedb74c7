"""/v1/aliases: other names, switched from one moment to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path

from softprompt.server.clients.asking import TheClient
from softprompt.server.clients.client import Client
from softprompt.server.clients.quotas import Amounts, Quotas, TheQuotas
from softprompt.server.errors import ApiError
from softprompt.server.parts import part
from softprompt.server.prompts.model import Alias, Target
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.prompts.schemas import AliasIn, AliasList, AliasOut, Deleted, alias_out
from softprompt.server.refusals import refusals
from softprompt.storage.library import NAME

router = APIRouter(tags=["aliases"])
TheRegistry = Annotated[PromptRegistry, part(PromptRegistry)]
AliasName = Annotated[str, Path(pattern=f"^{NAME.pattern}$", description="The other name.", examples=["coach"])]


@router.get("/v1/aliases", summary="List aliases")
async def list_aliases(client: TheClient, registry: TheRegistry) -> AliasList:
    """Your aliases, and those that everybody may use."""
    found = sorted(registry.aliases(client), key=lambda alias: alias.name)
    return AliasList(data=[alias_out(each, client.id) for each in found])


@router.put("/v1/aliases/{alias}", summary="Set an alias", responses=refusals(403, 404, 408, 409, 413))
async def set_alias(
    alias: AliasName, wanted: AliasIn, client: TheClient, registry: TheRegistry, quotas: TheQuotas
) -> AliasOut:
    """Make a name mean a prompt, or several by share, from the next request on; running requests end as they began.

    With shares each request draws its prompt; one that carries `user` draws the same one each time. Targets are names
    as you see them, also where another uses a shared alias of yours.
    """
    if wanted.shared and not client.is_admin:
        raise ApiError(403, "only an admin's key may share an alias with everybody", param="shared")
    made = Alias(name=alias, targets=_targets(wanted), owner=client.id, is_shared=wanted.shared)
    is_new = registry.own_alias(alias, client.id) is None
    await asyncio.to_thread(_put, quotas, client, Amounts(aliases=int(is_new)), partial(registry.put_alias, made))
    return alias_out(made, client.id)


@router.delete("/v1/aliases/{alias}", summary="Delete an alias", responses=refusals(404))
async def delete_alias(alias: AliasName, client: TheClient, registry: TheRegistry) -> Deleted:
    """Your alias is none any more; what it pointed to stays."""
    await asyncio.to_thread(registry.remove_alias, alias, client.id)
    return Deleted(id=alias, object="alias")


def _put(quotas: Quotas, client: Client, wanted: Amounts, put: Callable[[], None]) -> None:
    with quotas.reserved(client, wanted):
        put()


def _targets(wanted: AliasIn) -> tuple[Target, ...]:
    if wanted.model is not None:
        return (Target(wanted.model),)
    return tuple(Target(each.model, each.share) for each in wanted.targets or ())
