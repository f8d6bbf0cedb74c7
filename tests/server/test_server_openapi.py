"""The API's description: complete, with examples that are right, and changed only on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from softprompt.server.app import create_app
from softprompt.server.start import ROUTERS

Json = dict[str, Any]

# What clients build on. To change the API on purpose, change this list with it, and docs/http-api.md; a client that is
# not changed should go on working. One line: method, path, operationId, and the parameters' names.
OPERATIONS = """
GET / index
GET /version server_version
GET /health health
GET /ready ready
GET /metrics metrics
POST /v1/files upload_file
GET /v1/files list_files after limit order purpose
GET /v1/files/{file_id} retrieve_file file_id
DELETE /v1/files/{file_id} delete_file file_id
GET /v1/files/{file_id}/content retrieve_file_content file_id
POST /v1/fine_tuning/jobs create_job
GET /v1/fine_tuning/jobs list_jobs after limit
GET /v1/fine_tuning/jobs/{fine_tuning_job_id} retrieve_job fine_tuning_job_id
POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel cancel_job fine_tuning_job_id
POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/pause pause_job fine_tuning_job_id
POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/resume resume_job fine_tuning_job_id
GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/events list_job_events after fine_tuning_job_id limit
GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints list_job_checkpoints after fine_tuning_job_id limit
GET /v1/prompts list_prompts after limit
POST /v1/prompts add_prompt
GET /v1/prompts/{name} retrieve_prompt name
PATCH /v1/prompts/{name} change_prompt name
DELETE /v1/prompts/{name} delete_prompt name
POST /v1/prompts/{name}/load load_prompt name
DELETE /v1/models/{model} delete_model model
GET /v1/aliases list_aliases
PUT /v1/aliases/{alias} set_alias alias
DELETE /v1/aliases/{alias} delete_alias alias
GET /v1/models list_models
GET /v1/models/{model} retrieve_model model
POST /v1/completions create_completion
POST /v1/chat/completions create_chat_completion
POST /classify classify
POST /v1/classify create_classification
POST /v1/embeddings create_embeddings
"""
WITHOUT_KEY = {"/", "/version", "/health", "/ready"}
FIELDS = {
    "CompletionBody": "add_special_tokens best_of cache_salt echo frequency_penalty guided_choice guided_json "
    "ignore_eos logit_bias logprobs max_tokens min_p min_tokens model n presence_penalty priority prompt "
    "repetition_penalty response_format seed stop stop_token_ids stream stream_options structured_outputs "
    "temperature top_k top_p user",
    "ChatBody": "cache_salt frequency_penalty guided_choice guided_json ignore_eos logit_bias logprobs "
    "max_completion_tokens max_tokens messages min_p min_tokens model n presence_penalty priority repetition_penalty "
    "response_format seed stop stop_token_ids stream stream_options structured_outputs "
    "temperature top_k top_logprobs top_p user",
    "ClassifyBody": "add_special_tokens input model priority use_activation user",
    "EmbeddingsBody": "add_special_tokens dimensions encoding_format input model priority user",
    "CreateJob": "hyperparameters integrations metadata method model seed suffix training_file validation_file",
    "Change": "name pinned shared",
    "AliasIn": "model shared targets",
}


@pytest.fixture(scope="module")
def told() -> Json:
    return create_app((), ROUTERS).openapi()


def operations(told: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_the_description_has_the_operations_that_clients_know(told: Json) -> None:
    lines = []
    for method, path, found in operations(told):
        names = sorted(each["name"] for each in found.get("parameters", []))
        lines.append(" ".join([method, path, found["operationId"], *names]))
    assert sorted(lines) == sorted(OPERATIONS.split("\n")[1:-1])
    schemas = told["components"]["schemas"]
    assert {name: " ".join(sorted(schemas[name]["properties"])) for name in FIELDS} == FIELDS


def test_each_operation_describes_its_purpose_and_its_parameters(told: Json) -> None:
    known_tags = {tag["name"] for tag in told["tags"]}
    for method, path, found in operations(told):
        where = f"{method} {path}"
        assert found["summary"] and found["description"], where
        assert found["tags"] and set(found["tags"]) <= known_tags, where
        for parameter in found.get("parameters", []):
            assert parameter.get("description"), f"{where}: {parameter['name']}"
            assert parameter["in"] == "query" or parameter["schema"].get("examples"), f"{where}: {parameter['name']}"
    assert told["info"]["title"] == "softprompt"
    assert told["info"]["version"][0].isdigit()


def test_each_operation_describes_its_errors(told: Json) -> None:
    for method, path, found in operations(told):
        where, answers = f"{method} {path}", found["responses"]
        assert "422" not in answers, where  # what FastAPI would answer
        for status, answer in answers.items():
            assert answer["description"], (where, status)
            if status != "200" and not (status == "503" and path in ("/health", "/ready")):
                assert schema_name(answer) == "ErrorBody", (where, status)
        wanted = {"default"} if path in WITHOUT_KEY else {"default", "401", "429"}
        wanted |= {"400", "408", "413"} if "requestBody" in found else set()
        wanted |= {"404"} if "{" in path else set()
        assert wanted <= answers.keys(), where
    assert told["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    without_key = {path for _, path, found in operations(told) if not found.get("security")}
    assert without_key == WITHOUT_KEY


def test_streams_and_uploads_are_described(told: Json) -> None:
    paths = told["paths"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert "[DONE]" in paths[path]["post"]["responses"]["200"]["content"]["text/event-stream"]["example"]
    file = paths["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert file["properties"]["file"] | {"description": ""} == {"type": "string", "format": "binary", "description": ""}
    adapter = paths["/v1/prompts"]["post"]["requestBody"]["content"]
    assert adapter.keys() == {"application/json", "multipart/form-data"}
    assert adapter["multipart/form-data"]["schema"]["properties"]["files"]["items"]["format"] == "binary"


def test_every_json_schema_has_a_valid_example(told: Json) -> None:
    num_examples = 0
    for method, path, found in operations(told):
        bodies = [found["requestBody"]] if "requestBody" in found else []
        for each in [*bodies, *found["responses"].values()]:
            content = each.get("content", {}).get("application/json")
            if content is not None:
                for example in examples(content["schema"], told, f"{method} {path}"):
                    check(example, content["schema"], told)
                    num_examples += 1
    assert num_examples > 100
    with pytest.raises(jsonschema_rs.ValidationError):  # control: a wrong one is seen
        check({"model": 5}, {"$ref": "#/components/schemas/CompletionBody"}, told)


def schema_name(answer: Json) -> str:
    return str(answer["content"]["application/json"]["schema"]["$ref"]).rpartition("/")[2]


def check(example: Any, schema: Json, told: Json) -> None:
    jsonschema_rs.Draft202012Validator({**schema, "components": told["components"]}).validate(example)


def examples(schema: Json, told: Json, where: str) -> list[Any]:
    """Those of a schema itself, or one made of its parts' examples. Fails where a part has none."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return examples(told["components"]["schemas"][name], told, f"{where} {name}")
    if "examples" in schema:
        return list(schema["examples"])
    for name in ("const", "default"):
        if name in schema:
            return [schema[name]]
    if "anyOf" in schema:
        return [None] if {"type": "null"} in schema["anyOf"] else examples(schema["anyOf"][0], told, where)
    if "properties" in schema:
        return [{name: examples(part, told, f"{where}.{name}")[0] for name, part in schema["properties"].items()}]
    if schema.get("type") == "array":
        return [examples(schema["items"], told, f"{where}[]")]
    assert schema.get("type") in ("boolean", "null"), f"{where} has no example: {schema}"
    return [False if schema["type"] == "boolean" else None]
