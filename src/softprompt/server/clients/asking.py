"""Who asks, as a route's dependency: `async def route(client: TheClient)`."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from softprompt.server.clients.client import Client
from softprompt.server.clients.key_ring import KeyRing
from softprompt.server.clients.limiter import Limiter
from softprompt.server.clients.rate_headers import count_request
from softprompt.server.errors import ApiError
from softprompt.server.parts import part_if_any

_BEARER = HTTPBearer(auto_error=False, description="An API key, sp-...; where the server asks for one.")


async def _client(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> Client:
    ring = part_if_any(request.app, KeyRing)  # without one no keys are asked for
    client = Client() if ring is None else await ring.client(credentials.credentials if credentials else None)
    request.state.client = client  # the log and the traces name it
    limiter = part_if_any(request.app, Limiter)
    if limiter is not None:
        count_request(request.scope, limiter, client)
    return client


TheClient = Annotated[Client, Depends(_client)]
"""The holder of the request's key; where no keys are asked for, the operator. Refuses with 401, and with
429 where its requests are used up: every route that asks for the client counts as one."""


async def _admin(client: TheClient) -> Client:
    if not client.is_admin:
        raise ApiError(403, "this needs an admin's API key; the operator makes one with softprompt keys create --admin")
    return client


TheAdmin = Annotated[Client, Depends(_admin)]
"""The same, refused with 403 where the key is not an admin's."""
