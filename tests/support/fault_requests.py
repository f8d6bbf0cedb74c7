"""Requests that nobody should send, made by seed: bytes for a socket, over every route that the API describes."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import save

from softprompt.storage.files import CONFIG_NAME, RECORD_NAME, SAFETENSORS_NAME

NAMES = (
    "../../x", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e", "..%252f..%252fx", "....//x", "/etc/passwd", "//", ".",
    "..",
    "x" * 3_000, "%00", "a%00b", "%ff%fe", "%ed%a0%80", "%c0%ae%c0%ae", "\\\\host\\share", "C:%5cwindows", "CON",
    "~root",
    "$(id)", "`id`", "%0d%0aset-cookie:%20a=b", "'; DROP TABLE files;--", "%F0%9F%92%A9",
    "ft:base::ftjob-0:ckpt-step-1",
    "file-" + "0" * 32, "ftjob-" + "0" * 24, "nan", "null", "-1", "{name}", "%", "%zz", "a/b/c/d",
    "state/softprompt.db",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**30, -(10**400), 1e308, float("nan"), float("inf"), "", "x" * 20_000, "\0", "\ud800",
    "../../x",
    [], {}, [[]], {"a": {}}, [None] * 50, {"__class__": "x"}, "\u202e", "9" * 50, [1, "a"], {"": 0}, "base",
)  # fmt: skip
BODIES: tuple[bytes, ...] = (
    b"", b"{", b"}", b"[" * 10_000, b'{"a":' * 10_000, b"[" * 10_000 + b"]" * 10_000, b"null", b"5", b"NaN",
    b"-Infinity",
    b'"x"', b"\xff\xfe{", b'{"model": "\xed\xa0\x80"}', b"\0" * 100, b"\xef\xbb\xbf{}", b'{"n":' + b"9" * 5_000 + b"}",
    b'{"model": "base", "model": 5}', b"'", b"{'a': 1}", b'{"a" "b"}', b"x" * 300_000, b"\x1f\x8b" + bytes(200),
)  # fmt: skip
KINDS = (
    "application/json", "application/json; charset=utf-16", "text/plain", "multipart/form-data", "",
    "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 300, "application/x-www-form-urlencoded",
    "application/octet-stream", "\x7f", "application/json" * 50,
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "X" * 40)
SOUND: Mapping[str, Mapping[str, Any]] = {
    "/v1/completions": {"model": "base", "prompt": "w3", "max_tokens": 2, "n": 1, "stop": ["w5"], "logprobs": 1,
                        "temperature": 1, "seed": 1, "logit_bias": {"5": 1}, "stream": False, "echo": False,
                        "cache_salt": "s"},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "w3"}], "max_tokens": 2,
                             "response_format": {"type": "text"}, "logprobs": True, "top_logprobs": 1},
    "/v1/fine_tuning/jobs": {"model": "base", "training_file": "file-" + "0" * 32, "suffix": "x", "seed": 1,
                             "hyperparameters": {"n_epochs": 1}, "metadata": {"a": "b"},
                             "method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 1}}}},
    "/v1/prompts": {"name": "x", "folder": "/nowhere", "shared": False, "overwrite": True},
    "/v1/prompts/{name}": {"name": "x", "pinned": False, "shared": False},
    "/v1/aliases/{alias}": {"targets": [{"model": "base", "share": 1.0}], "shared": False},
}  # fmt: skip


@dataclass(frozen=True)
class Bad:
    """A request as bytes. One that promises more than it sends has no answer."""

    data: bytes
    is_answered: bool = True


def bad_requests(routes: list[tuple[str, str]], seed: int, count: int) -> Iterator[Bad]:
    """`routes` are methods and paths with their parameters in braces."""
    chance = random.Random(seed)
    uploads = list(_uploads())
    makers: tuple[Callable[[str, str], Bad], ...] = (
        lambda method, path: _request(method, _filled(path, chance), _mutated(path, chance)),
        lambda method, path: _request(method, _filled(path, chance), _mutated(path, chance)),
        lambda method, path: _request(method, _filled(path, chance), chance.choice(BODIES), chance.choice(KINDS)),
        lambda method, path: _request(chance.choice(METHODS), _filled(path, chance), chance.choice(BODIES)),
        lambda method, path: _upload(chance.choice(uploads), chance),
        lambda method, path: _file(chance),
        lambda method, path: _long(chance),
        lambda method, path: _broken_http(method, path, chance),
    )
    for _ in range(count):
        method, path = chance.choice(routes)
        yield chance.choice(makers)(method, path)


def _filled(path: str, chance: random.Random) -> str:
    """Hostile names for the path's parameters, as they are or encoded again, and a hostile query."""
    while "{" in path:
        before, _, rest = path.partition("{")
        name = chance.choice(NAMES)
        name = chance.choice((name, quote(name, safe=""), quote(quote(name, safe=""), safe="")))
        path = before + name.replace("{", "%7B").replace(" ", "%20") + rest.partition("}")[2]
    if chance.random() < 0.4:
        value = quote(str(chance.choice(NAMES)), safe="%")
        path += f"?{chance.choice(('after', 'limit', 'order', 'purpose', 'metadata[a]', 'x'))}={value}"
    return path


def _mutated(path: str, chance: random.Random) -> bytes:
    """A sound body with one to three values that are not."""
    body: Any = json.loads(json.dumps(SOUND.get(path, {"model": "base"})))
    for _ in range(chance.randint(1, 3)):
        place = body
        while True:
            key = chance.choice(list(place)) if isinstance(place, dict) and place else None
            if key is None:
                break
            inner = place[key][0] if isinstance(place[key], list) and place[key] else place[key]
            if isinstance(inner, dict) and inner and chance.random() < 0.6:
                place = inner
                continue
            drawn = chance.random()
            if drawn < 0.7:
                place[key] = deepcopy(chance.choice(VALUES))
            elif drawn < 0.85:
                del place[key]
            else:
                place[chance.choice(("x", "\0", "\ud800", "suffix", "tools", "_" * 500))] = deepcopy(
                    chance.choice(VALUES)
                )
            break
    return json.dumps(body).encode()


def _long(chance: random.Random) -> Bad:
    """A text or a conversation that is much longer than any base."""
    word = chance.choice(("w3 ", " ", "x", "<|end|>", "w3", "\n", "\u00e9"))
    text, turn = word * chance.choice((5_000, 50_000)), {"role": "user", "content": "w3"}
    messages = chance.choice((
        [{**turn, "content": text}], [{**turn, "name": text}], [turn, {**turn, "role": "assistant"}] * 2_500,
        [turn] * 7_000, [{**turn, "content": [{"type": "text", "text": "w3"}] * 4_000}],
        [{**turn, "role": "tool", "tool_call_id": text}], [{**turn, "content": text[:500]}] * 300,
        [{**turn, "role": "assistant", "tool_calls": [{"id": text}]}],
    ))  # fmt: skip
    chat = {"model": chance.choice(("base", "quotes")), "messages": messages, "max_tokens": 1}
    prompt = chance.choice((text, [text], ["w3"] * 1_024, [text[:900]] * 1_024, [[3] * 500] * 200, [3] * 50_000))
    path, body = chance.choice((
        ("/v1/chat/completions", chat), ("/v1/completions", {"model": "base", "prompt": prompt, "max_tokens": 1}),
    ))  # fmt: skip
    return _request("POST", path, json.dumps(body).encode())


def _request(method: str, path: str, body: bytes, kind: str = "application/json", *more: str) -> Bad:
    head = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *more]
    if kind:
        head.append(f"content-type: {kind}")
    head.append("connection: close")
    return Bad("\r\n".join(head).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + body)


def _form(parts: list[tuple[str, str | None, bytes]], path: str) -> Bad:
    body = b""
    for name, filename, data in parts:
        named = "" if filename is None else f'; filename="{filename}"'
        body += f'--b\r\ncontent-disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + data + b"\r\n"
    return _request("POST", path, body + b"--b--\r\n", "multipart/form-data; boundary=b")


def _upload(weights: bytes, chance: random.Random) -> Bad:
    config = b'{"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "token_dim": 16}'
    parts: list[tuple[str, str | None, bytes]] = [
        ("name", None, chance.choice((b"x", b"../../x", b"", b"\xff", b"base", b"x" * 5_000, b"a\0b"))),
        ("files", chance.choice((SAFETENSORS_NAME,) * 6 + ("../../" + SAFETENSORS_NAME, "adapter_model.bin")), weights),
        ("files", CONFIG_NAME, chance.choice((config, config, config, *BODIES))),
    ]
    if chance.random() < 0.3:
        parts.append(("files", RECORD_NAME, chance.choice(BODIES)))
    if chance.random() < 0.2:
        parts.append(chance.choice(parts))
    return _form(parts, "/v1/prompts")


def _file(chance: random.Random) -> Bad:
    lines = (b'{"text": NaN}', b'{"text": "\\ud800"}', b'{"text": ""}', b"[1]", b'{"messages": [{"role": "x"}]}',
    b"\0", b"PK\x03\x04",
             b'{"prompt": "a"}', b'{"prompt": [1], "completion": 2}', b"[" * 10_000, b"\xff",
             b'{"text": "a"} x')  # fmt: skip
    data = chance.choice((b"\n".join(chance.choices(lines, k=chance.randint(1, 20))), *BODIES))
    names = ("../../x.jsonl", "x" * 3_000, "\\..\\x", "a%00.jsonl", "", ".db", "/etc/passwd")
    purpose = chance.choice((b"fine-tune",) * 5 + (b"", b"assistants", b"\xff", b"x" * 9_000))
    return _form([("purpose", None, purpose), ("file", chance.choice(names), data)], "/v1/files")


def _broken_http(method: str, path: str, chance: random.Random) -> Bad:
    path = path.replace("{", "").replace("}", "")
    lines = (f"{method} {path} HTTP/1.1", "host: localhost", "connection: close", "content-type: application/json", "")
    head = "\r\n".join(lines).encode()
    chunked = head + b"transfer-encoding: chunked\r\n\r\n"
    found = chance.choice((
        (chunked + b"zz\r\n{}\r\n0\r\n\r\n", True), (chunked + b"fffffffffffffffff\r\n{}", True),
        (chunked + b"5\r\n{}", False),
        (chunked + b"-1\r\n{}\r\n", True), (chunked + b"2\r\n{}0\r\n\r\n", True),
        (head + b"content-length: -5\r\n\r\n{}", True),
        (head + b"content-length: 99999999999999999999\r\n\r\n{}", True), (head + b"content-length: 500\r\n\r\n{}",
        False),
        (head + b"content-length: 2, 2\r\n\r\n{}", True), (head + b"content-length: 99999999999\r\n\r\n{}", True),
        (head + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", True),
        (head + b"".join(b"x-%d: %s\r\n" % (n, b"y" * 50) for n in range(600)) + b"content-length: 2\r\n\r\n{}", True),
        (head + b"x: " + b"y" * 70_000 + b"\r\n\r\n", True), (head + b"x\r\n\r\n", True), (head + b"x: a\0b\r\n\r\n",
        True),
        (head + b" folded\r\n\r\n", True), (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", False),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", True),
        (b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n", True), (b"GET / HTTP/9.9\r\nhost: localhost\r\n\r\n", True),
        (head.replace(b"localhost", b"evil.example") + b"\r\n", True),
        (head + b"origin: http://evil.example\r\n\r\n", True),
        (head + b"authorization: Bearer \xff\xfe\r\ncontent-length: 2\r\n\r\n{}", True), (bytes(range(256)) * 4, True),
        (head + b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\n\x1f\x8b", True), (b"\r\n" * 500, False),
        (head + b"expect: 100-continue\r\ncontent-length: 2\r\n\r\n{}", True),
        (head + b"upgrade: websocket\r\nconnection: upgrade\r\n\r\n", True),
        (head + b"range: bytes=0-18446744073709551616\r\n\r\n", True),
    ))  # fmt: skip
    return Bad(*found)


def _uploads() -> Iterator[bytes]:
    """What is no safetensors file of a soft prompt of this base."""
    tensor = torch.zeros(4, 16)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(20_000_000))
    yield packed.getvalue()
    yield pickle.dumps({"prompt_embeddings": tensor.numpy()})
    yield b"cos\nsystem\n(S'false'\ntR."
    saved = io.BytesIO()
    torch.save({"prompt_embeddings": tensor}, saved)
    yield saved.getvalue()
    for worst in (float("nan"), float("inf")):
        spoiled = tensor.clone()
        spoiled[1, 2] = worst
        yield save({"prompt_embeddings": spoiled})
    yield save({"prompt_embeddings": torch.zeros(4, 15)})
    yield save({"other": tensor})
    yield save({"prompt_embeddings": tensor})[:-5]
    entry: dict[str, Any] = {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]}
    lies: tuple[dict[str, Any], ...] = ({"shape": [2**62, 2**62]}, {"shape": [-4, 16]}, {"data_offsets": [0, 2**63]},
            {"data_offsets": [256, 0]}, {"dtype": "X"}, {"shape": []}, {"shape": [4.5, 16]}, {"shape": [10**30,
            1]})  # fmt: skip
    for lie in lies:
        text = json.dumps({"prompt_embeddings": {**entry, **lie}}).encode()
        yield struct.pack("<Q", len(text)) + text + bytes(256)
    for claimed in (0, 1, 2**20, 2**40, 2**63, 2**64 - 1):
        yield struct.pack("<Q", claimed) + b"{}" + bytes(100)
    yield struct.pack("<Q", 10_000) + b"[" * 10_000
    yield b""
