"""Writes `made_by_340f1cc/`: one of each thing that users of commit 340f1cc have on their disks.

Run it with that commit's sources and these tests' `support`, on a machine with PostgreSQL:

    git worktree add --detach /tmp/then 340f1cc
    PYTHONPATH=/tmp/then/src:tests python tests/compat/make_340f1cc.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import insert, select, text
from support.material import save_base, sentence, write_csv, write_jsonl
from support.postgres_server import postgres

from softprompt.cli.main import main
from softprompt.server.state.database import Database
from softprompt.server.state.schema import Table
from softprompt.storage import RunFolder

PLACE = Path(__file__).parent / "made_by_340f1cc"
WORK = Path("/tmp/softprompt-340f1cc")  # the run's record names it
TRAIN = (
    "train", "--base", "base", "--data", "texts.csv", "--text-column", "prompt", "--virtual-tokens", "2", "--dtype",
    "float32", "--device", "cpu", "--rows", "12", "--validation", "4", "--epochs", "4", "--batch-rows", "4",
    "--micro-batch-rows", "4", "--save-every", "4", "--schedule", "cosine", "--relative-learning-rate", "0.1",
)  # fmt: skip
STOP_AFTER = 6  # of 12 steps
ADAPTER = ("adapter_model.safetensors", "softprompt.json", "README.md", "adapter_config.json")
AFTER_NUMBERS_THAT_WERE_GIVEN = (
    "SELECT setval(pg_get_serial_sequence('job_events', 'number'), max(number)) FROM job_events"
)
SERVE = (
    "--base", "base", "--dtype", "float32", "--device", "cpu", "--state", "state", "--library", "library",
    "--require-keys", "--port", "0",
)  # fmt: skip
SETTINGS = {"virtual_tokens": 2, "batch_rows": 4}


def make() -> None:
    shutil.rmtree(PLACE, ignore_errors=True)
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    os.chdir(WORK)
    save_base(Path("base"))
    write_csv(Path("texts.csv"), [{"prompt": sentence(row)} for row in range(16)])
    write_jsonl(Path("rows.jsonl"), [{"text": sentence(row)} for row in range(8)])
    run_training()
    expected = run_server()
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    dump_postgresql()
    shutil.move(WORK, PLACE)


def run_training() -> None:
    """`run` is interrupted, and `adapter` is what it would have become."""
    command("finished")
    Path("adapter").mkdir()
    for name in ADAPTER:
        shutil.copy(Path("finished") / name, Path("adapter") / name)
    shutil.rmtree("finished")
    append, lines = RunFolder.append_metrics, list[object]()

    def append_and_interrupt(folder: RunFolder, metrics: Any) -> None:
        append(folder, metrics)
        lines.append(metrics)
        if len(lines) == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGINT)

    RunFolder.append_metrics = append_and_interrupt  # type: ignore[method-assign]
    command("run")
    RunFolder.append_metrics = append  # type: ignore[method-assign]


def command(out: str) -> None:
    sys.argv = ["softprompt", *TRAIN, "--out", out]
    with suppress(SystemExit):  # 130 where it was interrupted
        main()


def run_server() -> dict[str, Any]:
    """A state with keys, a file, jobs that are finished and paused, prompts and aliases; and what it answers."""
    for name in ("kept", "gone"):
        shutil.copytree("adapter", Path("library") / name)
    keys = {name: create_key(name, *flags) for name, flags in (("ada", ()), ("root", ("--admin",)))}
    log = open("log", "w+")  # noqa: SIM115
    server = subprocess.Popen([sys.executable, "-m", "softprompt", "serve", *SERVE], stdout=log, stderr=log)
    try:
        url = wait_for_url(server)
        expected = ask_everything(url, keys)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        log.close()
    Path("log").unlink()
    shutil.rmtree("library")
    assert not list(Path("state").glob("*-wal"))
    return {"keys": keys, **expected}


def ask_everything(url: str, keys: dict[str, str]) -> dict[str, Any]:
    ada, root = (httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
                 for key in (keys["ada"], keys["root"]))  # fmt: skip
    files = [("files", (name, Path("adapter", name).read_bytes())) for name in ADAPTER if name != "README.md"]
    checked(ada.post("/v1/prompts", data={"name": "coach"}, files=files))
    checked(ada.patch("/v1/prompts/coach", json={"pinned": True}))
    checked(ada.put("/v1/aliases/helper", json={"model": "coach"}))
    checked(root.patch("/v1/prompts/kept", json={"pinned": True}))
    checked(root.delete("/v1/prompts/gone"))
    upload = {"file": ("rows.jsonl", Path("rows.jsonl").read_bytes())}
    file = checked(ada.post("/v1/files", data={"purpose": "fine-tune"}, files=upload))["id"]
    finished = wait_for_job(ada, create_job(ada, file, 1), "succeeded")
    paused = create_job(ada, file, 30)
    wait_for_steps(ada, paused)
    checked(ada.post(f"/v1/fine_tuning/jobs/{paused}/pause"))
    wait_for_job(ada, paused, "paused")
    models = ("base", "coach", "helper", finished["fine_tuned_model"])
    return {
        "file": file, "finished_job": finished, "paused_job": paused,
        "answers": {model: answer(ada, model) for model in models},
    }  # fmt: skip


def answer(client: httpx2.Client, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": "w5 w9 w20", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    choice = checked(client.post("/v1/completions", json=body))["choices"][0]
    return {"text": choice["text"], "token_logprobs": choice["logprobs"]["token_logprobs"]}


def create_job(client: httpx2.Client, file: str, epochs: int) -> str:
    method = {"type": "supervised", "supervised": {"hyperparameters": {**SETTINGS, "epochs": epochs}}}
    body = {"model": "base", "training_file": file, "method": method, "suffix": f"epochs-{epochs}", "seed": 1}
    return str(checked(client.post("/v1/fine_tuning/jobs", json=body))["id"])


def wait_for_job(client: httpx2.Client, job: str, status: str) -> dict[str, Any]:
    while (found := checked(client.get(f"/v1/fine_tuning/jobs/{job}")))["status"] != status:
        assert found["status"] not in ("failed", "cancelled"), found
        time.sleep(0.02)
    return found


def wait_for_steps(client: httpx2.Client, job: str) -> None:
    while not any(
        each["type"] == "metrics" for each in checked(client.get(f"/v1/fine_tuning/jobs/{job}/events"))["data"]
    ):
        time.sleep(0.001)


def create_key(name: str, *flags: str) -> str:
    make_key = [sys.executable, "-m", "softprompt", "keys", "create", name, *flags, "--state", "state", "--json"]
    made = subprocess.run(make_key, check=True, capture_output=True, text=True)
    return str(json.loads(made.stdout)["key"])


def wait_for_url(server: subprocess.Popen[bytes]) -> str:
    while (found := re.search(r"^(http://\S+)/v1 serves", Path("log").read_text(), re.MULTILINE)) is None:
        assert server.poll() is None, Path("log").read_text()
        time.sleep(0.05)
    return found[1]


def checked(response: httpx2.Response) -> dict[str, Any]:
    assert response.status_code == 200, (response.status_code, response.text)
    return response.json()  # type: ignore[no-any-return]


def dump_postgresql() -> None:
    """The same rows on PostgreSQL, as pg_dump writes them; lines that only psql reads are left out."""
    with postgres() as url:
        source, target = Database.in_folder(Path("state")), Database(url)
        with source.session() as reading, target.session() as writing:
            for table in Table.metadata.sorted_tables:
                for row in reading.execute(select(table)):
                    writing.execute(insert(table).values(**row._mapping))
            writing.execute(text(AFTER_NUMBERS_THAT_WERE_GIVEN))
        source.close()
        target.close()
        dumped = subprocess.run(["pg_dump", "--inserts", "--no-owner", url], check=True, capture_output=True, text=True)
    kept = (
        line for line in dumped.stdout.splitlines(keepends=True) if line.strip() and not line.startswith(("\\", "--"))
    )
    Path("state.sql").write_text("".join(kept))


if __name__ == "__main__":
    make()
