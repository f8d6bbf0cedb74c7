"""Objects that the routes of an app share, found by type: `Annotated[AsyncEngine, dependency(AsyncEngine)]`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request

Shared = TypeVar("Shared")


def set_dependencies(app: FastAPI, objects: Iterable[object]) -> None:
    """Give an app its shared objects, one of each type."""
    app.state.dependencies = {type(each): each for each in objects}


def dependency_of(app: FastAPI, kind: type[Shared]) -> Shared:
    """The app's object of that type. Raises KeyError if it has none."""
    found: Shared = app.state.dependencies[kind]
    return found


def dependency(kind: type[Shared]) -> Any:  # Any: a FastAPI dependency
    """A FastAPI dependency on the app's object of that type."""

    async def find(request: Request) -> Shared:
        return dependency_of(request.app, kind)

    return Depends(find)
