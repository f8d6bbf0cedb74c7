"""How far one reads to follow a value: the functions and files that a step, a request or a load passes, as Markdown.

    python tools/walk.py                          # of the package that is installed
    PYTHONPATH=../old/src python tools/walk.py    # of another commit, in a worktree

It traces the embedded base with `sys.setprofile` and counts the package's own frames only. A resumed generator or
coroutine is a call; comprehensions belong to the function around them. "Changes of file" are calls whose file is not
that of the call before. The second table counts the source itself; a circle is a set of modules that import each other,
by whatever way, `TYPE_CHECKING` too.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import uvicorn

import softprompt
from softprompt.base import Base, load_base
from softprompt.config import SamplingConfig, ServerConfig, TrainConfig
from softprompt.data import rows_from_texts
from softprompt.embedded import base_folder, prompts_folder
from softprompt.engine import Engine, Request
from softprompt.server.start import serving_app
from softprompt.storage import load_prompt
from softprompt.training import Event, StepDone, train

ROOT = Path(softprompt.__file__).parent
WORDS = ("light", "time", "hope", "water", "stone", "fire", "wind", "salt")
TEXTS = [f"A row about {word}, neither long nor short." for word in WORDS]
INLINE = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}


class Walk:
    """The package's own calls in every thread, in order, while `recording()`."""

    def __init__(self) -> None:
        self.calls: dict[int, list[CodeType]] = defaultdict(list)  # by thread
        self._is_on = False

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record this thread, and those that were started with `profile`."""
        self.calls.clear()
        self.start()
        try:
            yield
        finally:
            self.stop()

    def start(self) -> None:
        self._is_on = True
        sys.setprofile(self.profile)

    def stop(self) -> None:
        self._is_on = False
        sys.setprofile(None)

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        if self._is_on and event == "call":
            code = frame.f_code
            if code.co_filename.startswith(str(ROOT)) and code.co_name not in INLINE:
                self.calls[threading.get_ident()].append(code)


def row(what: str, calls: list[CodeType]) -> str:
    files = [code.co_filename for code in calls]
    changes = sum(one != other for one, other in itertools.pairwise(files))
    return f"| {what} | {len(set(calls))} | {len(set(files))} | {len(calls)} | {changes} |"


def training_step(base: Base, walk: Walk) -> list[CodeType]:
    """From the end of one step to the end of the next, the events between them included."""

    def sink(event: Event) -> None:
        if isinstance(event, StepDone):
            walk.stop()
            if event.step == 2:
                walk.calls.clear()
                walk.start()

    train(base, rows_from_texts(TEXTS), TrainConfig(virtual_tokens=4, batch_rows=8, max_steps=3), sink=sink)
    walk.stop()
    return walk.calls[threading.get_ident()]


def engine_calls(base: Base, walk: Walk) -> tuple[list[CodeType], list[CodeType]]:
    """`Engine.add`, and one step that decodes one token of one row."""
    engine = Engine(base)
    ids = base.bos_ids + base.encode(TEXTS[0])
    for prompt in (None, load_prompt(prompts_folder() / "quotes", base=base)):  # the first is to warm up
        request = Request(ids=ids, prompt=prompt, sampling=SamplingConfig(max_new_tokens=8, min_new_tokens=8))
        with walk.recording():
            engine.add(request)
        added = list(walk.calls[threading.get_ident()])
        engine.step()
        engine.step()
        with walk.recording():
            engine.step()
        decoded = list(walk.calls[threading.get_ident()])
        while engine.step():
            pass
    return added, decoded


def streamed_completion(base: Base, walk: Walk) -> tuple[list[CodeType], list[CodeType]]:
    """A stream of one token behind a prompt: the event loop's calls, and those of the thread that runs the engine."""
    threading.setprofile(walk.profile)  # the threads that start from here on
    with tempfile.TemporaryDirectory() as state:
        config = ServerConfig(state=state, library=str(prompts_folder()))
        port = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(serving_app(base, config), log_level="critical"))
        loop = threading.Thread(target=server.run, kwargs={"sockets": [port]})
        loop.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{port.getsockname()[1]}/v1/completions"
        body = {"model": "quotes", "prompt": TEXTS[0], "max_tokens": 1, "stream": True, "temperature": 0}
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        for _ in range(2):  # the first is to warm up
            walk.calls.clear()
            walk._is_on = True
            with urllib.request.urlopen(request) as answer:
                answer.read()
            time.sleep(0.05)
            walk._is_on = False
        server.should_exit = True
        loop.join()
        port.close()
    threading.setprofile(None)  # type: ignore[arg-type]
    others = {thread: calls for thread, calls in walk.calls.items() if thread != loop.ident}
    engine = max(others.values(), key=len)
    return walk.calls[loop.ident or 0], engine


def loaded_prompt(walk: Walk) -> list[CodeType]:
    folder = prompts_folder() / "quotes"
    load_prompt(folder)
    with walk.recording():
        load_prompt(folder)
    return walk.calls[threading.get_ident()]


def main() -> None:
    walk, base = Walk(), load_base(str(base_folder()), dtype="float32", device="cpu")
    print("| walk | functions | files | calls | changes of file |\n| --- | --- | --- | --- | --- |")
    print(row("one training step, 8 rows", training_step(base, walk)))
    added, decoded = engine_calls(base, walk)
    print(row("`Engine.add`", added))
    print(row("one greedy decode step, one row", decoded))
    loop, engine = streamed_completion(base, walk)
    print(row("one streamed completion of one token: event loop", loop))
    print(row("... and the engine's thread", engine))
    print(row("`load_prompt`", loaded_prompt(walk)))
    print()
    print_source()


# -- the source -------------------------------------------------------------------------------------------------------


def print_source() -> None:
    trees = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = sorted(map(length, functions))
    p95 = lengths[int(0.95 * len(lengths))]
    num_lines = sum(len(path.read_text().splitlines()) for path in trees)
    share = sum(length(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)) / num_lines
    found = circles(trees)
    print("| files | lines | imports | circles | functions: number, median, p95, longest |")
    print("| --- | --- | --- | --- | --- |")
    sizes = f"{len(lengths):,}, {statistics.median(lengths):.0f}, {p95}, {lengths[-1]}"
    print(f"| {len(trees)} | {num_lines:,} | {share:.1%} | {len(found)} | {sizes} |")
    for circle in found:
        print("circle:", ", ".join(circle))


def length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def module_name(path: Path) -> str:
    return ".".join(("softprompt", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def circles(trees: dict[Path, ast.Module]) -> list[list[str]]:
    """The sets of modules that reach each other by imports at the top of a file."""
    graph = import_graph(trees)
    reached = {module: reachable(graph, module) for module in graph}
    groups = {frozenset(other for other in reached[module] if module in reached[other]) for module in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def import_graph(trees: dict[Path, ast.Module]) -> dict[str, set[str]]:
    names = {module_name(path) for path in trees}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                targets = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[module_name(path)] |= {target if target in names else node.module for target in targets} & names
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, left = set(), [start]
    while left:
        for other in graph[left.pop()] - seen:
            seen.add(other)
            left.append(other)
    return seen


if __name__ == "__main__":
    main()
