"""What is malformed is told in one short sentence: the field, the value, what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import FastAPI, Query
from pydantic import BaseModel, Field, model_validator
from support.app_server import served

from softprompt.errors import DataError, truncated
from softprompt.server.app import create_app
from softprompt.server.errors import ApiError
from softprompt.server.validation_errors import validation_error

JSON = {"content-type": "application/json"}
DEEP = "[" * 100_000


class Inner(BaseModel):
    share: float = Field(1.0, gt=0, allow_inf_nan=False)


class Sent(BaseModel):
    model_config = {"extra": "forbid"}

    name: str = Field(max_length=8)
    count: int = Field(1, ge=0, strict=True)
    parts: list[Inner] = Field([], max_length=2)

    @model_validator(mode="after")
    def _sane(self) -> Sent:
        if self.name == "two":
            raise ValueError("give one of the two")
        return self


@pytest.fixture(scope="module")
def http() -> Iterator[httpx2.Client]:
    app: FastAPI = create_app(())

    @app.post("/take")
    async def take(sent: Sent, limit: Annotated[int, Query(ge=1)] = 1) -> None:
        return None

    with served(app) as url, httpx2.Client(base_url=url, headers=JSON) as client:
        yield client


def error(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 400
    found: dict[str, Any] = answer.json()["error"]
    assert len(found["message"]) < 400
    return found


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "name is missing; give it"),
        ({"name": 5}, "name is 5; it must be a valid string"),
        ({"name": "a" * 9}, "name is 'aaaaaaaaa'; it must have at most 8 characters"),
        ({"name": "a" * 10**5}, "name is a text of 100,000 characters; it must have at most 8 characters"),
        ({"name": "\ud800" * 9}, "name is "),
        ({"name": "a", "count": -1}, "count is -1; it must be greater than or equal to 0"),
        ({"name": "a", "count": "6"}, "count is '6'; it must be a valid integer"),
        ({"name": "a", "count": True}, "count is true; it must be a valid integer"),
        ({"name": "a", "count": -(10**200)}, "count is a very large number; it must be greater than or equal to 0"),
        ({"name": "a", "count": {"a": "b"}}, "count is an object; it must be a valid integer"),
        ({"name": "a", "parts": [{"share": 0}]}, "parts.0.share is 0; it must be greater than 0"),
        ({"name": "a", "parts": [{"share": float("nan")}]}, "parts.0.share is NaN; it must be a finite number"),
        ({"name": "a", "parts": [{}] * 3}, "parts is a list of 3; it must have at most 2 items, not 3"),
        ({"name": "a", "more": 1}, "there is no field 'more' here; leave it out"),
        ({"name": "a", "\ud800": 1}, "the body is '\\ud800'; it must be a valid string"),
        ({"name": "two"}, "the body: give one of the two"),
        ([], "the body is a list of 0; it must be a valid dictionary or object to extract fields from"),
    ],
)
def test_an_invalid_body_is_described_in_one_sentence(http: httpx2.Client, body: Any, message: str) -> None:
    assert error(http.post("/take", content=json.dumps(body)))["message"].startswith(message)


def test_a_field_of_any_length_is_shortened(http: httpx2.Client) -> None:
    found = error(http.post("/take", json={"name": "a", "x" * 10**5: 1}))
    assert found["param"] == "x" * 57 + "..."
    assert len(found["message"]) < 110


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is missing; send a JSON object"),
        (b"{", "the body is not JSON: Expecting property name enclosed in double quotes at character 1; send a JSON"),
        (DEEP.encode(), ""),
        (b'{"name": "\xff"}', ""),
        (b'{"name": "a", "count": 1' + b"0" * 5_000 + b"}", ""),
    ],
)
def test_a_body_that_is_not_json_is_described_with_its_position(
    http: httpx2.Client, content: bytes, message: str
) -> None:
    assert error(http.post("/take", content=content))["message"].startswith(message)


def test_a_body_without_a_json_content_type_is_refused(http: httpx2.Client) -> None:
    told = error(http.post("/take", content=b"{}", headers={"content-type": "text/plain"}))
    assert told["message"] == "the body's Content-Type is not JSON; send Content-Type: application/json"


def test_an_invalid_query_parameter_is_named(http: httpx2.Client) -> None:
    found = error(http.post("/take?limit=0", json={"name": "a"}))
    assert found == {
        "message": "limit is '0'; it must be greater than or equal to 1", "type": "invalid_request_error",
        "param": "limit", "code": "invalid_value",
    }  # fmt: skip


def test_an_unknown_path_or_method_has_an_error_envelope(http: httpx2.Client) -> None:
    absent = http.get("/" + "n" * 5_000)
    assert (absent.status_code, len(absent.json()["error"]["message"])) == (404, 115)
    wrong = http.delete("/take")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "DELETE /take: Method Not Allowed"


def test_half_a_surrogate_pair_in_a_field_or_a_reason_is_escaped(tmp_path: Path) -> None:
    told = validation_error(
        [{"type": "x", "loc": ("body", "\udc00" * 99), "msg": "Input should be \ud800", "input": None}]
    )
    told.message.encode()
    assert told.message.endswith("is null; it must be \\ud800")
    assert (told.param or "").encode()


def test_an_error_quotes_little_of_what_a_client_sent() -> None:
    """One place cuts for all: a message that echoed a value whole once came back with megabytes."""
    sent = "x" * 2**20
    for error in (ApiError(400, f"stop is {sent!r}", None, sent), ApiError.of(DataError(f"{sent} is no label"))):
        told = error.envelope()["error"]
        assert len(told["message"]) == 2_000 and told["message"].endswith("...")
        assert told["param"] is None or len(told["param"]) == 100
    assert truncated("as it is", 8) == "as it is" and truncated("as it was", 8) == "as it..."
