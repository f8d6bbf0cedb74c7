"""JSON schemas as guides read them: closed objects and bounded integers by default, so that small models end.

The JSON Schema standard lets an object without `additionalProperties` have any others, and an integer any number of
digits; a small model then goes on for ever. What a schema says itself counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from softprompt.errors import ConfigError

Schema = dict[str, Any] | bool  # Any: JSON
LARGEST_INTEGER = 10**15 - 1
DEEPEST = 120  # levels; llguidance reads 127

_SUBSCHEMAS = (
    "additionalProperties", "items", "contains", "not", "if", "then", "else", "propertyNames", "unevaluatedProperties",
    "unevaluatedItems", "additionalItems",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_COMBINING = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")
_OPENING = ("additionalProperties", "unevaluatedProperties", "patternProperties")
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def read_schema(text: str) -> Schema:
    """The schema with its defaults. Raises ConfigError for a text that is none."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema is not JSON: {error}") from error
    if _depth(schema) > DEEPEST:
        raise ConfigError(f"json_schema is nested more than {DEEPEST} levels deep; make it flatter")
    if not isinstance(schema, dict | bool):
        raise ConfigError("json_schema cannot be followed: schema must be an object or boolean")
    return schema if isinstance(schema, bool) else _with_defaults(schema)


def _depth(value: Any) -> int:  # Any: JSON
    levels, level = 0, [value]
    while level := [each for item in level for each in _items(item)]:
        levels += 1
    return levels


def _items(value: Any) -> list[Any]:  # Any: JSON
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _with_defaults(schema: dict[str, Any]) -> dict[str, Any]:
    is_closing = not any(_combines(each) for each in _all(schema))
    return _rewritten(schema, is_closing)


def _rewritten(schema: dict[str, Any], is_closing: bool) -> dict[str, Any]:
    found = {key: _rewritten_value(key, value, is_closing) for key, value in schema.items()}
    if is_closing and _names_all(schema):
        found["additionalProperties"] = False
    if _is_integer(schema):
        found |= _missing_bounds(schema)
    return found


def _names_all(schema: dict[str, Any]) -> bool:
    """Whether its `properties` are all that the object is meant to have."""
    named, required = schema.get("properties"), schema.get("required")
    if not isinstance(named, dict) or any(key in schema for key in _OPENING):
        return False
    return not isinstance(required, list) or all(isinstance(name, str) and name in named for name in required)


def _rewritten_value(key: str, value: Any, is_closing: bool) -> Any:  # Any: JSON
    if key in _MAPS and isinstance(value, dict):
        return {name: _if_schema(each, is_closing) for name, each in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [_if_schema(each, is_closing) for each in value]
    return _if_schema(value, is_closing) if key in _SUBSCHEMAS else value


def _if_schema(value: Any, is_closing: bool) -> Any:  # Any: JSON
    return _rewritten(value, is_closing) if isinstance(value, dict) else value


def _all(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and all within it."""
    yield schema
    for key, value in schema.items():
        within = (
            value.values() if key in _MAPS and isinstance(value, dict)
            else value if key in _LISTS and isinstance(value, list)
            else [value] if key in _SUBSCHEMAS else []
        )  # fmt: skip
        for each in within:
            if isinstance(each, dict):
                yield from _all(each)


def _combines(schema: dict[str, Any]) -> bool:
    """Whether several schemas describe one object: each closed, they would leave nothing."""
    several = schema.get("allOf")
    has_own = "properties" in schema and any(key in schema for key in _COMBINING)
    return has_own or (isinstance(several, list) and len(several) > 1)


def _is_integer(schema: dict[str, Any]) -> bool:
    kind = schema.get("type")
    is_listed = "enum" in schema or "const" in schema
    return not is_listed and (kind == "integer" or (isinstance(kind, list) and "integer" in kind))


def _missing_bounds(schema: dict[str, Any]) -> dict[str, int]:
    """The default limits on the sides that have none, where they leave something between."""
    given = [schema[key] for key in _BOUNDS if isinstance(schema.get(key), int | float)]
    if any(abs(bound) >= LARGEST_INTEGER for bound in given):
        return {}
    found = {} if "minimum" in schema or "exclusiveMinimum" in schema else {"minimum": -LARGEST_INTEGER}
    has_most = "maximum" in schema or "exclusiveMaximum" in schema
    return found if has_most else {**found, "maximum": LARGEST_INTEGER}
