"""What pydantic finds wrong with a request, as one sentence: the field, the value, what to do. Never long."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.errors import truncated
from softprompt.server.errors import ApiError

_PLACES = ("body", "query", "path", "header", "cookie")  # FastAPI's first word of where
_LONGEST_PLACE, _LONGEST_VALUE, _LONGEST_WHY = 60, 40, 300  # characters
_SUBJECT = re.compile(r"^(Input|Value|String|List|Tuple|Dictionary|Object|Data|JSON input) should ")
_DEMANDS = ("must ", "should ")


def validation_error(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of the problems, as a client is told it."""
    first = problems[0]
    places = [str(part) for part in first["loc"]]
    where = ".".join(places[1:] if places[:1] and places[0] in _PLACES else places)
    if first["type"] == "json_invalid":
        return _not_json(first)
    shown = encodable(truncated(where, _LONGEST_PLACE))
    return ApiError(400, encodable(_sentence(first, shown)), "invalid_value", shown or None)


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: half a surrogate pair is written as `\\ud800`."""
    return text.encode("utf-8", "backslashreplace").decode()


def _sentence(problem: Mapping[str, Any], where: str) -> str:
    kind, subject = problem["type"], where or "the body"
    if kind == "missing":
        return f"{subject} is missing; give it" if where else "the body is missing; send a JSON object"
    if not where and isinstance(problem.get("input"), bytes):
        return "the body is not said to be JSON; send it with Content-Type: application/json"
    if kind == "extra_forbidden":
        return f"there is no field {where!r} here; leave it out"
    told = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    why = truncated(_SUBJECT.sub("it must ", told).replace(" after validation", ""), _LONGEST_WHY)
    why = f"it {why}" if why.startswith(_DEMANDS) else why
    if kind in ("value_error", "assertion_error"):
        return f"{subject}: {why}"
    return f"{subject} is {_shown(problem.get('input'))}; {why}"


def _not_json(problem: Mapping[str, Any]) -> ApiError:
    context = problem.get("ctx") or {}
    why = truncated(str(context.get("error", problem["msg"])), _LONGEST_WHY)
    at = next((f" at character {part}" for part in problem["loc"] if isinstance(part, int)), "")
    return ApiError(400, encodable(f"the body is not JSON: {why}{at}; send a JSON object"), "invalid_json")


def _shown(value: object) -> str:
    """A value in few characters: what a list or an object holds is the client's, and may be long."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _LONGEST_VALUE else f"a text of {len(value):,} characters"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value):,}"
    if isinstance(value, int) and value.bit_length() > 4 * _LONGEST_VALUE:  # Python refuses to print very long ones
        return "a very large number"
    return json.dumps(value) if value is None or isinstance(value, bool | int | float) else f"a {type(value).__name__}"
