"""Ten thousand prompts: how long they take to load, and what each keeps in memory."""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.prompt_server import made_prompt, memory_registry

from softprompt.server.clients.keys import Client
from softprompt.server.prompts.library_watcher import LibraryWatcher
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.prompts.repository import PromptRepository
from softprompt.server.state.database import Database
from softprompt.server.state.schema import PromptRow
from softprompt.storage.save import adapter_to_bytes

ANYBODY = Client("ann", "ann", is_admin=False)


def write(base, folder: Path, count: int) -> None:
    """So many adapters, without waiting for the disk each time."""
    for seed in range(count):
        place = folder / f"p{seed:05d}"
        place.mkdir(parents=True)
        for name, data in adapter_to_bytes(made_prompt(base, seed)).items():
            (place / name).write_bytes(data)


def measured(work):
    """What it gives, its seconds, and the bytes by which this process has grown."""
    gc.collect()
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    found = work()
    seconds = time.perf_counter() - began
    gc.collect()
    return found, seconds, process.memory_info().rss - before


@pytest.mark.slow
def test_ten_thousand_prompts_of_a_library_load_within_a_minute(tiny_llama, tmp_path, capsys):
    count = 10_000
    write(tiny_llama, tmp_path, count)
    registry = memory_registry("tiny")
    watched = LibraryWatcher(tmp_path, tiny_llama, registry)
    _, seconds, grown = measured(watched.scan)
    assert len(registry.models(ANYBODY)) == count + 1 and not watched.problems
    _, again_s, _ = measured(watched.scan)
    began = time.perf_counter()
    watched.scan(["p00007"])
    one_s = time.perf_counter() - began
    with capsys.disabled():
        print(json.dumps({"prompts": count, "load_s": round(seconds, 2), "bytes_per_prompt": grown // count,
                          "scan_again_s": round(again_s, 2), "one_changed_s": round(one_s, 4)}))  # fmt: skip
    assert seconds < 60 and grown / count < 20_000 and again_s < 5 and one_s < 0.5


@pytest.mark.slow
def test_ten_thousand_kept_prompts_load_within_a_minute(tiny_llama, tmp_path, capsys):
    count = 10_000
    write(tiny_llama, tmp_path / "prompts", count)
    database = Database.in_folder(tmp_path)
    with database.session() as session:
        session.add_all(
            PromptRow(id=f"p{seed:05d}", owner=f"key-{seed % 100}", name=f"n{seed}", folder=f"prompts/p{seed:05d}",
                      source="upload", job=None, is_shared=False, is_pinned=False, created=1.0)
            for seed in range(count)
        )  # fmt: skip
    registry = PromptRegistry("tiny", PromptRepository(tmp_path, database, tiny_llama))
    _, seconds, grown = measured(registry.load)
    assert len(registry.models(Client("key-7"))) == count // 100 + 1 and not registry.problems
    _, keep_s, _ = measured(lambda: registry.keep(made_prompt(tiny_llama, 1), name="x", owner="a", source="job"))
    database.close()
    with capsys.disabled():
        print(json.dumps({"prompts": count, "load_s": round(seconds, 2), "bytes_per_prompt": grown // count,
                          "keep_one_s": round(keep_s, 4)}))  # fmt: skip
    assert seconds < 60 and grown / count < 20_000 and keep_s < 2


@pytest.mark.medium
def test_a_library_of_three_hundred_loads_quickly(tiny_llama, tmp_path):
    write(tiny_llama, tmp_path, 300)
    registry = memory_registry("tiny")
    _, seconds, _ = measured(LibraryWatcher(tmp_path, tiny_llama, registry).scan)
    assert seconds < 10 and len(list(registry.all_prompts())) == 300


@pytest.mark.medium
def test_every_kept_prompt_is_whole_after_a_kill_at_any_moment(tmp_path):
    program = Path(__file__).parents[1] / "support" / "killed_while_keeping.py"
    path = os.pathsep.join([str(program.parents[1]), *sys.path])
    places = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(program), str(tmp_path)]
    done = subprocess.run(command, env=places, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
