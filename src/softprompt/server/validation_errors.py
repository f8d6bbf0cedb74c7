"""pydantic's validation errors as one short sentence: the field, the value, what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.errors import truncated
from softprompt.server.errors import ApiError, encodable

_SOURCES = ("body", "query", "path", "header", "cookie")  # the first item of FastAPI's `loc`
_LONGEST_FIELD, _LONGEST_VALUE, _LONGEST_WHY = 60, 40, 300  # characters
_SUBJECT = re.compile(r"^(Input|Value|String|List|Tuple|Dictionary|Object|Data|JSON input) should ")
_DEMANDS = ("must ", "should ")


def validation_error(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """An error response for the first of the problems."""
    first = problems[0]
    path = [str(part) for part in first["loc"]]
    field = ".".join(path[1:] if path[:1] and path[0] in _SOURCES else path)
    if first["type"] == "json_invalid":
        return _not_json(first)
    shown = encodable(truncated(field, _LONGEST_FIELD))
    return ApiError(400, encodable(_sentence(first, shown)), "invalid_value", shown or None)


def _sentence(problem: Mapping[str, Any], field: str) -> str:
    kind, subject = problem["type"], field or "the body"
    if kind == "missing":
        return f"{subject} is missing; give it" if field else "the body is missing; send a JSON object"
    if not field and isinstance(problem.get("input"), bytes):
        return "the body's Content-Type is not JSON; send Content-Type: application/json"
    if kind == "extra_forbidden":
        return f"there is no field {field!r} here; leave it out"
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    why = truncated(_SUBJECT.sub("it must ", message).replace(" after validation", ""), _LONGEST_WHY)
    why = f"it {why}" if why.startswith(_DEMANDS) else why
    if kind in ("value_error", "assertion_error"):
        return f"{subject}: {why}"
    return f"{subject} is {_shown(problem.get('input'))}; {why}"


def _not_json(problem: Mapping[str, Any]) -> ApiError:
    context = problem.get("ctx") or {}
    why = truncated(str(context.get("error", problem["msg"])), _LONGEST_WHY)
    position = next((f" at character {part}" for part in problem["loc"] if isinstance(part, int)), "")
    return ApiError(400, encodable(f"the body is not JSON: {why}{position}; send a JSON object"), "invalid_json")


def _shown(value: object) -> str:
    """A value in few characters: the items of a list or an object are the client's, and may be long."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _LONGEST_VALUE else f"a text of {len(value):,} characters"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value):,}"
    if isinstance(value, int) and value.bit_length() > 4 * _LONGEST_VALUE:  # Python refuses to print very long ones
        return "a very large number"
    return json.dumps(value) if value is None or isinstance(value, bool | int | float) else f"a {type(value).__name__}"
