"""What the routes of one app work with, found by its type: `TheBase = Annotated[Base, part(Base)]`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request

Part = TypeVar("Part")


def give_parts(app: FastAPI, parts: Iterable[object]) -> None:
    """Parts of an app, one of each type."""
    app.state.parts = {type(each): each for each in parts}


def part_of(app: FastAPI, kind: type[Part]) -> Part:
    """The app's part of that type. Raises KeyError where it has none."""
    found: Part = app.state.parts[kind]
    return found


def part_if_any(app: FastAPI, kind: type[Part]) -> Part | None:
    """The app's part of that type, or None: an app may be made without some."""
    found: Part | None = app.state.parts.get(kind)
    return found


def part(kind: type[Part]) -> Any:  # Any: a FastAPI dependency
    """A dependency that gives a route the app's part of that type."""

    async def find(request: Request) -> Part:
        return part_of(request.app, kind)

    return Depends(find)
