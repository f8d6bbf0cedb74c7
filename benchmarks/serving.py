"""`softprompt serve` under load, as a process of its own, over real HTTP.

    python benchmarks/serving.py --model build/bloom                 # bloomz-560m's shape, seeded random weights
    python benchmarks/serving.py --model build/bloom --cases job,cost --rounds 3
    python benchmarks/serving.py --quick                             # the embedded base, only to see that all runs
    python benchmarks/serving.py --model build/bloom --cases soak --minutes 30
    python benchmarks/serving.py --model embedded --dtype float32 --cases soak --minutes 10 --prefix-bytes 8388608

Cases: `cost` (the server's own processor time per token beside the bare engine's, 16 streams), `streams` (closed loops
of 1 to 128 streams), `open` (Poisson arrivals at shares of the capacity), `idle` (1,000 open connections that say
nothing), `job` (a fine-tuning job beside 8 streams), `soak` (with `--prefix-bytes`: no jobs, and texts that share
beginnings, more of them than fit, under a few salts). 12 tokens of text, 50 of answer, every stream its own soft
prompt (P = 4), greedy, streamed. The load runs in a process of its own, on the same cores; its processor time is
reported. Prints Markdown tables; the last line is JSON, which `--out` keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from serving_load import load
from training_cases import answer_child, call_child, make_model

Request = dict[str, Any]

CASES = ("cost", "streams", "open", "idle", "job", "soak")
TEXT_TOKENS, NEW_TOKENS, VIRTUAL_TOKENS, NUM_PROMPTS = 12, 50, 4, 128
STREAMS = (1, 2, 4, 8, 16, 32, 64, 128)
LOADS = (0.5, 0.8, 0.95)  # of the closed loop's requests per second at 32 streams
COST_STREAMS, JOB_STREAMS, NUM_IDLE = 16, 8, 1_000
BEGINNINGS = {"beginnings": 200, "beginning_tokens": 64, "salts": 4}  # of the soak's texts, with --prefix-bytes


@dataclass
class Server:
    """A running `softprompt serve`."""

    url: str
    process: psutil.Process

    def get(self, path: str) -> Any:  # Any: JSON, or text
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            data = answer.read().decode()
            return json.loads(data) if answer.headers["content-type"].startswith("application/json") else data

    def post(self, path: str, body: Request) -> Any:  # Any: JSON
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def metric(self, name: str) -> float:
        """The sum over a metric's labels."""
        lines = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(float(value) for value in lines)

    def cpu_s(self) -> tuple[float, float]:
        """Processor seconds of the whole process, and of the thread that speaks HTTP."""
        whole = self.process.cpu_times()
        main = next(thread for thread in self.process.threads() if thread.id == self.process.pid)
        return whole.user + whole.system, main.user_time + main.system_time


@contextmanager
def serving(flags: argparse.Namespace, folder: Path, *more: str) -> Iterator[Server]:
    command = [
        sys.executable, "-m", "softprompt", "serve", "--base", flags.model, "--dtype", flags.dtype, "--port", "0",
        "--library", str(folder / "library"), "--state", str(folder / "state"), *more,
    ]  # fmt: skip
    log = (folder / "server.log").open("ab")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        url = next(found[0] for line in process.stdout if (found := re.findall(r"http://127\.0\.0\.1:\d+", line)))
        server = Server(url, psutil.Process(process.pid))
        _wait(lambda: server.get("/ready"), 300)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        log.close()


def _wait(holds: Any, seconds: float) -> None:  # Any: a call that raises until it holds
    end = time.monotonic() + seconds
    while True:
        try:
            holds()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def run_load(flags: argparse.Namespace, server: Server, **settings: Any) -> Request:
    request = {
        "url": server.url, "loop": "closed", "seconds": flags.seconds, "streams": 1, "vocab": flags.vocab,
        "text_tokens": TEXT_TOKENS, "new_tokens": NEW_TOKENS, "seed": 0,
        "models": [f"p{number}" for number in range(NUM_PROMPTS)], **settings,
    }  # fmt: skip
    found = call_child(__file__, kind="load", threads=None, **request)
    if found["errors"]:
        raise SystemExit(f"the load met errors: {found['errors']}")
    return found


def run_cost(flags: argparse.Namespace, folder: Path) -> Request:
    """Processor time per token: the bare engine, and the server with as many streams, in turn."""
    rounds = []
    for number in range(flags.rounds):
        bare = call_child(
            __file__, kind="bare", threads=None, model=flags.model, dtype=flags.dtype, library=str(folder / "library"),
            streams=COST_STREAMS, seconds=flags.seconds, seed=number, vocab=flags.vocab,
        )  # fmt: skip
        with serving(flags, folder) as server:
            run_load(flags, server, streams=COST_STREAMS, seconds=5, seed=99)
            before = server.cpu_s()
            found = run_load(flags, server, streams=COST_STREAMS, seed=number)
            whole, http = (after - first for after, first in zip(server.cpu_s(), before, strict=True))
        tokens = found["tokens"]
        rounds.append({
            "bare_ms": bare["cpu_s"] / bare["tokens"] * 1e3, "bare_tokens_per_s": bare["tokens_per_s"],
            "server_ms": whole / tokens * 1e3, "http_ms": http / tokens * 1e3, "load_ms": found["cpu_s"] / tokens * 1e3,
            "tokens_per_s": found["tokens_per_s"],
        })  # fmt: skip
    found = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {"rounds": rounds, **found, "own_share": found["http_ms"] / found["bare_ms"],
            "whole_share": found["server_ms"] / found["bare_ms"] - 1}  # fmt: skip


def run_streams(flags: argparse.Namespace, folder: Path) -> Request:
    with serving(flags, folder) as server:
        run_load(flags, server, streams=COST_STREAMS, seconds=5, seed=99)
        return {str(count): run_load(flags, server, streams=count) for count in flags.streams}


def run_open(flags: argparse.Namespace, folder: Path) -> Request:
    with serving(flags, folder) as server:
        capacity = run_load(flags, server, streams=32)["requests_per_s"]
        rates = {share: share * capacity for share in LOADS}
        loads = {
            str(share): run_load(flags, server, loop="open", rate=rate, count=max(20, int(rate * flags.seconds)))
            for share, rate in rates.items()
        }
        return {"capacity": capacity, "loads": loads}


def run_idle(flags: argparse.Namespace, folder: Path) -> Request:
    with serving(flags, folder) as server:
        run_load(flags, server, streams=8, seconds=5, seed=99)
        without, before = run_load(flags, server, streams=8), server.process.memory_info().rss
        beside = run_load(flags, server, streams=8, idle=NUM_IDLE)
        return {"without": without, "beside": beside, "grown_bytes": server.process.memory_info().rss - before}


def run_job(flags: argparse.Namespace, folder: Path) -> Request:
    """8 streams without a job, the job alone, and both."""
    rounds = []
    for number in range(flags.rounds):
        with serving(flags, folder) as server:
            run_load(flags, server, streams=JOB_STREAMS, seconds=5, seed=99)
            without = run_load(flags, server, streams=JOB_STREAMS, seed=2 * number)
            base_bytes = server.process.memory_info().rss
            job = start_job(server)
            _wait_for_training(server)
            alone = training_speed(server, flags.seconds)
            before, began = server.metric("softprompt:training_tokens_total"), time.perf_counter()
            beside = run_load(flags, server, streams=JOB_STREAMS, seed=2 * number + 1)
            speed = (server.metric("softprompt:training_tokens_total") - before) / (time.perf_counter() - began)
            peak = peak_bytes(server.process.pid)
            server.post(f"/v1/fine_tuning/jobs/{job}/cancel", {})
            rounds.append({
                "without": without, "beside": beside, "alone_tokens_per_s": alone, "training_tokens_per_s": speed,
                "resident_bytes": base_bytes, "peak_bytes": peak,
            })  # fmt: skip
    return {"rounds": rounds, **job_ratios(rounds)}


def job_ratios(rounds: Sequence[Request]) -> Request:
    def ratio(part: str) -> float:
        return statistics.median(
            each["beside"]["between_ms"][part] / each["without"]["between_ms"][part] for each in rounds
        )

    gaps = [each["beside"]["between_ms"]["max"] / each["without"]["between_ms"]["p50"] for each in rounds]
    shares = [each["training_tokens_per_s"] / each["alone_tokens_per_s"] for each in rounds]
    return {"p50": ratio("p50"), "p95": ratio("p95"), "p99": ratio("p99"), "longest_gap": max(gaps),
            "training_share": statistics.median(shares)}  # fmt: skip


def start_job(server: Server) -> str:
    """A job that outlasts the case: rows of 35 to 110 words."""
    chance = random.Random(0)
    rows = [
        json.dumps({"text": " ".join(f"w{chance.randrange(3, 3_000)}" for _ in range(chance.randint(35, 110)))})
        for _ in range(256)
    ]
    boundary = "softprompt-benchmark"
    parts = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--{boundary}\r\n'
        'Content-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n'
        "Content-Type: application/jsonl\r\n\r\n" + "\n".join(rows) + f"\r\n--{boundary}--\r\n"
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urllib.request.urlopen(
        urllib.request.Request(server.url + "/v1/files", parts.encode(), headers), timeout=60
    ) as answer:
        file = json.loads(answer.read())["id"]
    settings = {"epochs": 1_000, "virtual_tokens": VIRTUAL_TOKENS, "validate_every": 100_000}
    method = {"type": "supervised", "supervised": {"hyperparameters": settings}}
    job = server.post("/v1/fine_tuning/jobs", {"training_file": file, "model": "base", "method": method})
    return str(job["id"])


def _wait_for_training(server: Server) -> None:
    end = time.monotonic() + 120
    while server.metric("softprompt:training_tokens_total") == 0:
        if time.monotonic() > end:
            raise SystemExit("the job has not begun within two minutes")
        time.sleep(0.2)
    time.sleep(3)


def training_speed(server: Server, seconds: float) -> float:
    """Tokens per second."""
    before, began = server.metric("softprompt:training_tokens_total"), time.perf_counter()
    time.sleep(seconds)
    return (server.metric("softprompt:training_tokens_total") - before) / (time.perf_counter() - began)


def run_soak(flags: argparse.Namespace, folder: Path) -> Request:
    """Streams, jobs and nothing else for `minutes`; resident bytes every tenth of them."""
    sizes, loads, has_prefixes = [], [], flags.prefix_bytes is not None
    more = ("--prefix-bytes", str(flags.prefix_bytes)) if has_prefixes else ()
    with serving(flags, folder, *more) as server:
        for number in range(10):
            job = start_job(server) if number % 3 == 0 and not has_prefixes else None
            settings = {"streams": JOB_STREAMS, "seconds": flags.minutes * 6, "seed": number}
            loads.append(run_load(flags, server, **settings, **(BEGINNINGS if has_prefixes else {})))
            if job is not None:
                server.post(f"/v1/fine_tuning/jobs/{job}/cancel", {})
            time.sleep(2)
            sizes.append(server.process.memory_info().rss)
        cache = {name: int(server.metric(f"softprompt:prefix_cache_{name}")) for name in
                 ("bytes", "entries", "queries_total", "hits_total")}  # fmt: skip
    return {"resident_bytes": sizes, "requests": sum(each["requests"] for each in loads),
            "tokens": sum(each["tokens"] for each in loads), "prefix_cache": cache}  # fmt: skip


def peak_bytes(process: int) -> int:
    """The most that a process has had in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024


def run_bare(request: Request) -> Request:
    """The engine and nothing around it, as many requests at once as the server gets."""
    from softprompt import BaseConfig, Engine, Library, SamplingConfig, load_base
    from softprompt.engine import Request as Generation

    base = load_base(BaseConfig(base=request["model"], dtype=request["dtype"]))
    library = Library(request["library"])
    prompts = [library.load(f"p{number}") for number in range(request["streams"])]
    engine, chance = Engine(base), random.Random(request["seed"])
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True)

    def add(number: int) -> None:
        ids = tuple(chance.randrange(3, request["vocab"]) for _ in range(TEXT_TOKENS))
        owner[engine.add(Generation(ids, prompts[number], sampling))] = number

    def run(seconds: float) -> tuple[float, float, int]:
        for number in range(request["streams"]):
            add(number)
        began, cpu, before = time.perf_counter(), time.process_time(), engine.stats().num_new_tokens
        while engine.has_work:
            for event in engine.step():
                if type(event).__name__ == "Finished" and time.perf_counter() - began < seconds:
                    add(owner.pop(event.request))
        return time.perf_counter() - began, time.process_time() - cpu, engine.stats().num_new_tokens - before

    owner: dict[int, int] = {}
    run(5)
    seconds, cpu_s, tokens = run(request["seconds"])
    return {"tokens_per_s": tokens / seconds, "cpu_s": cpu_s, "tokens": tokens}


def make_library(flags: argparse.Namespace, folder: Path) -> None:
    made = call_child(__file__, kind="library", threads=None, model=flags.model, folder=str(folder))
    flags.vocab, flags.model = made["vocab"], made["model"]


def run_make_library(request: Request) -> Request:
    import torch

    from softprompt import BaseConfig, SoftPrompt, load_base, save_prompt

    folder = Path(request["folder"])
    model = request["model"] if request["model"] == "embedded" else with_words(Path(request["model"]), folder / "base")
    base = load_base(BaseConfig(base=model))
    chance = torch.Generator().manual_seed(0)
    for number in range(NUM_PROMPTS):
        tensor = torch.randn(VIRTUAL_TOKENS, base.hidden_size, generator=chance) * base.embedding_rms
        save_prompt(SoftPrompt(tensor), folder / "library" / f"p{number}", base=base)
    return {"vocab": base.vocab_size, "model": model}


def with_words(model: Path, folder: Path) -> str:
    """The model with a word for each token: the shapes' own tokenizer knows four, and an answer would have no text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    folder.mkdir()
    for file in model.glob("*"):
        if "token" not in file.name:
            (folder / file.name).symlink_to(file.resolve())
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *(f"w{number}" for number in range(3, AutoConfig.from_pretrained(model).vocab_size)),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


RUNS = {
    "cost": run_cost, "streams": run_streams, "open": run_open, "idle": run_idle, "job": run_job, "soak": run_soak,
}  # fmt: skip


def tables(report: Request) -> Iterator[str]:
    """Markdown, a part for each case."""
    if found := report.get("cost"):
        yield "| | tokens/s | processor ms per token |\n| --- | --- | --- |"
        yield f"| bare engine | {found['bare_tokens_per_s']:.0f} | {found['bare_ms']:.2f} |"
        yield f"| server, whole process | {found['tokens_per_s']:.0f} | {found['server_ms']:.2f} |"
        yield f"| of it the HTTP thread | | {found['http_ms']:.3f} ({found['own_share']:.1%} of the bare engine) |"
        yield f"| the load | | {found['load_ms']:.3f} |\n"
    if found := report.get("streams"):
        yield from _loads("streams", found)
    if found := report.get("open"):
        yield from _loads(f"of {found['capacity']:.2f} requests/s", found["loads"])
    if found := report.get("idle"):
        yield from _loads("idle", {"0": found["without"], f"{NUM_IDLE:,}": found["beside"]})
        yield f"{found['grown_bytes'] / 2**20:.0f} MiB more in memory.\n"
    if found := report.get("job"):
        one = found["rounds"][-1]
        yield from _loads(f"{JOB_STREAMS} streams", {"without a job": one["without"], "beside it": one["beside"]})
        yield (
            f"Between tokens: p50 {found['p50']:.2f}x, p95 {found['p95']:.2f}x, p99 {found['p99']:.2f}x; longest gap "
            f"{found['longest_gap']:.2f} medians; training at {found['training_share']:.2f} of its speed alone "
            f"({one['alone_tokens_per_s']:.0f} tokens/s); resident {one['resident_bytes'] / 2**20:,.0f} MiB before the "
            f"job, peak {one['peak_bytes'] / 2**20:,.0f} MiB.\n"
        )
    if found := report.get("soak"):
        sizes = ", ".join(f"{size / 2**20:,.0f}" for size in found["resident_bytes"])
        cache = found["prefix_cache"]
        yield (
            f"{found['requests']:,} requests, {found['tokens']:,} tokens; resident MiB: {sizes}; beginnings held: "
            f"{cache['entries']:,} in {cache['bytes'] / 2**20:.1f} MiB, {cache['hits_total']:,} hits in "
            f"{cache['queries_total']:,} looks\n"
        )


def _loads(name: str, loads: Request) -> Iterator[str]:
    yield f"| {name} | requests/s | tokens/s | first token ms p50 / p95 / p99 | between ms p50 / p95 / p99 / max |"
    yield "| --- | --- | --- | --- | --- |"
    for key, found in loads.items():
        first, between = found["first_ms"], found["between_ms"]
        yield (
            f"| {key} | {found['requests_per_s']:.2f} | {found['tokens_per_s']:.0f} | {first['p50']:.0f} / "
            f"{first['p95']:.0f} / {first['p99']:.0f} | {between['p50']:.0f} / {between['p95']:.0f} / "
            f"{between['p99']:.0f} / {between['max']:.0f} |"
        )
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model; default: bloomz-560m's shape, made anew")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cases", default="cost,streams,open,idle,job")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one load")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak")
    parser.add_argument("--prefix-bytes", type=int, help="of the soak's server; see above")
    parser.add_argument("--streams", default=",".join(map(str, STREAMS)))
    parser.add_argument("--quick", action="store_true", help="the embedded base, two seconds a load")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        kinds = {"load": load, "bare": run_bare, "library": run_make_library, "model": make_model}
        answer_child(flags.child, kinds)
        return
    measure(flags)


def measure(flags: argparse.Namespace) -> None:
    cases = flags.cases.split(",")
    flags.streams = [int(count) for count in flags.streams.split(",")]
    if flags.quick:
        flags.model, flags.dtype, flags.seconds, flags.minutes = "embedded", "float32", 2.0, 0.2
        flags.streams = [1, 4]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if flags.model is None:
            flags.model = str(folder / "model")
            call_child(__file__, kind="model", threads=None, shape="bloom", folder=flags.model)
        make_library(flags, folder)
        report: Request = {"model": flags.model, "dtype": flags.dtype, "cores": os.cpu_count()}
        for case in (case for case in CASES if case in cases):
            report[case] = RUNS[case](flags, folder)
            print(f"{case}: done", file=sys.stderr)
    text = "\n".join(tables(report))
    print(text)
    print(json.dumps(report))
    if flags.out:
        flags.out.mkdir(parents=True, exist_ok=True)
        (flags.out / "serving.json").write_text(json.dumps(report))
        (flags.out / "serving.md").write_text(text)


if __name__ == "__main__":
    main()
