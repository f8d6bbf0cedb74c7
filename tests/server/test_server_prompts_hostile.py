"""Uploads that mean harm, or are merely wrong: each gets one sentence, and the server goes on as it was."""

import io
import json
import os
import pickle
import select
import socket
import struct
import threading
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save
from support.prompt_server import as_upload, made_prompt, prompt_server, upload
from support.tiny_bases import random_prompt

from softprompt.storage.save import adapter_to_bytes

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "softprompt.json"


@pytest.fixture(scope="module")
def server(tiny_llama, tmp_path_factory):
    with prompt_server(tiny_llama, tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest.fixture
def ann(server):
    with server.client("ann") as client:
        yield client


@pytest.fixture(autouse=True)
def unharmed(server, tiny_llama):
    """Whatever came before: nothing new is kept, and a sound prompt is still taken."""
    before = sorted(os.walk(server.state / "prompts"))
    yield
    assert sorted(os.walk(server.state / "prompts")) == before
    with server.client("ann") as client:
        assert upload(client, "sound", made_prompt(tiny_llama, 1)).status_code == 200
        assert client.delete("/v1/prompts/sound").status_code == 200


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refused(answer, *statuses):
    assert answer.status_code in (statuses or (400,)), (answer.status_code, answer.text[:500])
    error = answer.json()["error"]
    assert 0 < len(error["message"]) < 1_000 and "Traceback" not in error["message"]
    return error["message"]


def send(client, contents, **fields):
    files = [("files", (name, data)) for name, data in contents.items()]
    return client.post("/v1/prompts", data={"name": "bad", **fields}, files=files)


def changed(base, **contents):
    """A sound adapter with some of its files changed; None leaves one out."""
    sound = {name: data for name, data in adapter_to_bytes(made_prompt(base, 1)).items() if name != "README.md"}
    wanted = {WEIGHTS: contents.get("weights", sound[WEIGHTS]), CONFIG: contents.get("config", sound[CONFIG]),
              RECORD: contents.get("record", sound[RECORD])}  # fmt: skip
    return {name: data for name, data in wanted.items() if data is not None}


def record_with(base, **changes):
    """The record's bytes, with some of its fields changed."""
    return json.dumps({**json.loads(adapter_to_bytes(made_prompt(base, 1))[RECORD]), **changes}).encode()


def zip_bomb():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 20_000_000)
    return packed.getvalue()


def header(value):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text


def weights_that_mean_harm(base):
    tensor = torch.as_tensor(random_prompt(base, 4))
    nan, inf = tensor.clone(), tensor.clone()
    nan[1, 2], inf[0, 0] = float("nan"), float("inf")
    near_the_end = tensor.float().clone()
    near_the_end[0, 0] = -3e38
    entry = {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]}
    huge = {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 256]}
    return {
        "empty": b"",
        "short": b"\x08",
        "near float32's end": save({"prompt_embeddings": near_the_end}, metadata={"format": "pt"}),
        "zip bomb": zip_bomb(),
        "pickle": pickle.dumps({"prompt_embeddings": tensor.numpy()}),
        "gzip": b"\x1f\x8b" + bytes(100),
        "claims 2^60 bytes": struct.pack("<Q", 2**60) + b"{}" + bytes(200),
        "claims 2^64-1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
        "no JSON": header(b"x" * 50) + bytes(256),
        "deep JSON": header(b"[" * 100_000) + bytes(256),
        "shape beyond all": header({"prompt_embeddings": huge}) + bytes(256),
        "offsets beyond the end": header({"prompt_embeddings": {**entry, "data_offsets": [0, 2**40]}}) + bytes(256),
        "negative offsets": header({"prompt_embeddings": {**entry, "data_offsets": [-256, 0]}}) + bytes(256),
        "NaN": save({"prompt_embeddings": nan}),
        "infinity": save({"prompt_embeddings": inf}),
        "whole numbers": save({"prompt_embeddings": torch.ones(4, 16, dtype=torch.int64)}),
        "another name": save({"weights": tensor}),
        "two tensors": save({"prompt_embeddings": tensor, "more": tensor.clone()}),
        "one dimension": save({"prompt_embeddings": tensor[0].clone()}),
        "no rows": save({"prompt_embeddings": tensor[:0].clone()}),
        "another width": save({"prompt_embeddings": torch.zeros(4, 15)}),
        "another length": save({"prompt_embeddings": torch.zeros(5, 16)}),
        "changed by a bit": save({"prompt_embeddings": tensor * (1 + 2**-20)}),
        "cut off": save({"prompt_embeddings": tensor})[:-1],
    }  # fmt: skip


def test_harmful_weights_are_refused(ann, tiny_llama):
    for kind, weights in weights_that_mean_harm(tiny_llama).items():
        message = refused(send(ann, changed(tiny_llama, weights=weights)))
        if kind in ("zip bomb", "pickle", "gzip"):
            assert "safetensors" in message and ("code" in message), kind


def test_a_pickle_is_never_opened(ann, tiny_llama, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    pickle.loads(trap).close()  # the control: it does spring
    (tmp_path / "sprung").unlink()
    for name in ("adapter_model.bin", "model.pt", "x.pkl"):
        assert "pickle" in refused(send(ann, {**changed(tiny_llama, weights=None), name: trap}))
    refused(send(ann, changed(tiny_llama, weights=trap)))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "config",
    [
        None, b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 5_000,
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}).encode(),
        json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 4}).encode(),
        json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 10**30}).encode(),
        json.dumps({"peft_type": ["PROMPT_TUNING"], "task_type": {}, "num_virtual_tokens": "4"}).encode(),
        b'{"num_virtual_tokens": ' + b"9" * 10_000 + b"}",
    ],
)  # fmt: skip
def test_a_malformed_config_is_refused(ann, tiny_llama, config):
    refused(send(ann, changed(tiny_llama, config=config)))


def deep(levels):
    return {} if levels == 0 else {"a": deep(levels - 1)}


@pytest.mark.parametrize(
    "changes",
    [
        {"form": {"kind": 123}},
        {"form": {"kind": "plain", "template": ["{text}"]}},
        {"form": {"kind": "template", "labels": [1, 2]}},
        {"form": {"kind": "plain", "surprise": 1}},
        {"form": [1]},
        {"form": {"labels": 5}},
        {"run": [1]},
        {"run": deep(200)},
        {"run": {"text": "half a character: \ud800"}},
        {"parent": 5},
        {"base_name": ["x"]},
        {"base_fingerprint": "0" * 64},
        {"content_hash": "0" * 64},
        {"content_hash": None},
        {"format_version": 2},
        {"format_version": True},
        {"format_version": "1"},
    ],
)
def test_a_false_or_malformed_record_is_refused(ann, tiny_llama, changes):
    refused(send(ann, changed(tiny_llama, record=record_with(tiny_llama, **changes))))


def test_a_prompt_of_another_base_is_refused(ann, tiny_llama, tiny_gpt2):
    message = refused(upload(ann, "bad", made_prompt(tiny_gpt2, 1)))
    assert "tiny-gpt2" in message and "tiny-llama" in message


def test_a_prompt_that_leaves_no_room_for_text_is_refused(ann, tiny_llama):
    assert "96" in refused(upload(ann, "bad", made_prompt(tiny_llama, 1, length=96)))


@pytest.mark.parametrize(
    "name",
    ["../../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "a b", "a\0b", "a\nb", "x" * 65, "-x", ".x", "ä", "base",
     "tiny", "a%2e%2e", "$(touch x)", "' OR 1=1 --"],
)  # fmt: skip
def test_an_illegal_or_reserved_name_is_refused(ann, server, tiny_llama, name):
    refused(upload(ann, name, made_prompt(tiny_llama, 1)), 400, 409)
    refused(ann.post("/v1/prompts", json={"name": name, "hub": "me/x"}), 400, 409)
    assert not (server.state / "x").exists()


@pytest.mark.parametrize(
    "path", ["%2e%2e%2f%2e%2e%2fx", "..%2f..%2fx", "a%00b", "%ff%fe", "x" * 5_000, "%0d%0aX-A:%20b"]
)
def test_a_url_path_that_leads_elsewhere_is_refused(ann, path):
    for answer in (
        ann.get(f"/v1/prompts/{path}"),
        ann.delete(f"/v1/prompts/{path}"),
        ann.delete(f"/v1/models/{path}"),
        ann.patch(f"/v1/prompts/{path}", json={"name": "x"}),
        ann.put(f"/v1/aliases/{path}", json={"model": "base"}),
        ann.delete(f"/v1/aliases/{path}"),
    ):
        assert answer.status_code in (400, 404), (answer.status_code, answer.text[:200])


@pytest.mark.parametrize(
    "filename", ["../../adapter_config.json", "/tmp/x", "adapter_config.json\0.bin", "x" * 5_000, ""]
)
def test_an_uploads_file_name_is_never_used_as_a_path(ann, tiny_llama, filename):
    refused(send(ann, {**changed(tiny_llama), filename: b"{}"}))


def test_a_file_or_field_that_comes_twice_is_refused(ann, tiny_llama):
    files = as_upload(made_prompt(tiny_llama, 1))
    refused(ann.post("/v1/prompts", data={"name": "bad"}, files=[*files, files[0]]))
    refused(ann.post("/v1/prompts", data={"name": ["bad", "worse"]}, files=files))
    refused(ann.post("/v1/prompts", data={"name": "bad", "colour": "red"}, files=files))
    refused(ann.post("/v1/prompts", data={"name": "bad", "overwrite": "perhaps"}, files=files))
    refused(ann.post("/v1/prompts", data={"name": "bad", **{f"f{n}": "x" for n in range(50)}}, files=files))
    refused(ann.post("/v1/prompts", data={"name": "bad", "overwrite": "x" * 100_000}, files=files))
    refused(ann.post("/v1/prompts", files=files))


def test_a_file_that_is_too_large_is_refused(ann, tiny_llama):
    refused(send(ann, changed(tiny_llama, config=b" " * (2**20 + 1))), 413)
    refused(send(ann, changed(tiny_llama, weights=bytes(3 * 2**20))), 413)
    refused(send(ann, changed(tiny_llama, weights=bytes(40 * 2**20))), 413)


def test_a_body_is_refused_before_it_is_read(server):
    """It says that it is enormous, and is told so although nothing of it was sent."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"POST /v1/prompts HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                     b"Content-Length: 1000000000000\r\n\r\n")  # fmt: skip
        assert line.recv(4096).startswith(b"HTTP/1.1 413")


def test_an_endless_body_is_refused_while_it_is_sent(server):
    host, port = server.url.removeprefix("http://").split(":")
    chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
    begin = b'--b\r\nContent-Disposition: form-data; name="files"; filename="adapter_model.safetensors"\r\n\r\n'
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"POST /v1/prompts HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n" % (len(begin), begin))  # fmt: skip
        for _ in range(3_000):  # 200 MB
            if select.select([line], [], [], 0)[0]:
                break
            line.sendall(chunk)
        assert line.recv(4096).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b'{"name": "x"}', "application/json"),
        (b'{"name": "x", "hub": "a/b", "folder": "c"}', "application/json"),
        (b'{"name": "x", "hub": 5}', "application/json"),
        (b'{"name": "\\ud800", "hub": "a/b"}', "application/json"),
        (b"\xff\xff", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"x", "multipart/form-data"),
        (b"x", "multipart/form-data; boundary="),
        (b"--b\r\n\r\n", "multipart/form-data; boundary=b"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", "multipart/form-data; boundary=b"),
        (b"--b\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\nx", "multipart/form-data; boundary=b"),
        (b"x", "multipart/form-data; boundary=" + "b" * 10_000),
        (b"a=b", "application/x-www-form-urlencoded"),
        (b"x", ""),
    ],
)  # fmt: skip
def test_a_malformed_body_is_refused(ann, content, kind):
    refused(ann.post("/v1/prompts", content=content, headers={"Content-Type": kind}), 400, 413)


def test_a_link_out_of_an_adapters_folder_is_refused(server, tiny_llama, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(adapter_to_bytes(made_prompt(tiny_llama, 1))[WEIGHTS])
    place = tmp_path / "adapter"
    place.mkdir()
    for name, data in changed(tiny_llama).items():
        (place / name).write_bytes(data)
    (place / WEIGHTS).unlink()
    (place / WEIGHTS).symlink_to(secret)
    with server.client("admin") as admin:
        assert "link" in refused(admin.post("/v1/prompts", json={"name": "bad", "folder": str(place)}))
        (place / WEIGHTS).unlink()
        os.mkfifo(place / WEIGHTS)
        refused(admin.post("/v1/prompts", json={"name": "bad", "folder": str(place)}))
        refused(admin.post("/v1/prompts", json={"name": "bad", "folder": "/proc/self"}))


def test_random_bytes_never_break_the_server(ann, tiny_llama):
    """Sound files with a few bytes changed: refused, or taken where it did not matter; never a failure."""
    chance = np.random.default_rng(5)
    sound = changed(tiny_llama)
    for _ in range(150):
        name = list(sound)[chance.integers(3)]
        data = bytearray(sound[name])
        for _ in range(int(chance.integers(1, 4))):
            data[int(chance.integers(len(data)))] = int(chance.integers(256))
        answer = send(ann, {**sound, name: bytes(data)}, overwrite="true")
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 200:
            assert ann.get("/v1/prompts/bad").status_code == ann.get("/v1/prompts").status_code == 200
            assert ann.delete("/v1/prompts/bad").status_code == 200


def test_one_of_many_simultaneous_uploads_gets_the_name(server, tiny_llama):
    answers = []

    def ask(seed):
        with server.client("crowd") as client:
            answers.append(upload(client, "one", made_prompt(tiny_llama, seed)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
    with server.client("crowd") as client:
        (winner,) = [answer.json() for answer in answers if answer.status_code == 200]
        assert client.get("/v1/prompts/one").json()["content_hash"] == winner["content_hash"]
        client.delete("/v1/prompts/one")
