"""Seconds from the command to a held-out loss or accuracy: ours by default, PEFT's notebook settings, PEFT's best.

    python benchmarks/quality_time.py ../shared/data --out build/quality-time --bench build/quality
    python benchmarks/quality_time.py ../shared/data --out build/quality-time --bench build/quality --table

Ours is the command `softprompt train` with its defaults; PEFT is a process of its own with transformers' Trainer
(quality_time_peft.py). Both read the base from the same Hugging Face folder, as transformers needs 14 s for the GGUF
file that SmolLM2 comes in. PEFT's best settings are those that the grid of `quality.py --base smollm2` chose, read from
the files in --bench; the search itself is not in the time. A process is timed whole, from its start, imports and
loading included, with nothing else on the machine: the prompts of every epoch are kept as files, whose times make the
curve, and scored on the test rows afterwards. Contenders take turns, seed by seed. What is measured and scored is kept
in --out; only one process may measure there at a time.

The figure to reach is the mean over the seeds of what PEFT's best settings end with; a seed of theirs is timed to what
it ends with itself.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quality_store import BEST, file_name, processor

CASES = ("quotes-25", "sst2-200")
SEEDS = (0, 1, 2, 3, 4)
OURS, NOTEBOOK, WINNER = "ours by default", "PEFT, notebook", "PEFT, best of its grid"
CONTENDERS = (OURS, NOTEBOOK, WINNER)
NOTEBOOK_SETTINGS = "N(0,1), 0.003"
LENGTH, EPOCHS = 20, 6
IDENTITY = ("dtype", "processor", "threads", "test_rows")  # of --out

Run = dict[str, Any]  # JSON: contender, seed, seconds, points


def main() -> None:
    flags = parse()
    flags.out.mkdir(parents=True, exist_ok=True)
    if not flags.table:
        with only_process(flags.out):
            measure(flags)
    for name in flags.cases:
        print(table(name, [run for run in read_runs(flags.out, name) if is_scored(run)]), flush=True)


def measure(flags: argparse.Namespace) -> None:
    """All timed runs first, seed by seed; then the scores."""
    check_setting(flags)
    write_base(flags)
    cases = {name: RowsOnly(name, flags) for name in flags.cases}
    for seed in SEEDS[: flags.seeds]:
        for name, case in cases.items():
            for contender in turned(CONTENDERS, seed):
                folder = flags.out / name / f"{file_name(contender)}-{seed}"
                if not (folder / "run.json").exists():
                    print(f"{time.strftime('%H:%M:%S')} {name}: {contender}, seed {seed}", flush=True)
                    write(folder / "run.json", timed(flags, case, contender, seed, folder))
    for name in flags.cases:
        score_runs(flags, name)


def turned(names: Sequence[str], by: int) -> list[str]:
    return [*names[by % len(names) :], *names[: by % len(names)]]


class RowsOnly:
    """A set without its base: this process holds no weights while another one is timed."""

    def __init__(self, name: str, flags: argparse.Namespace) -> None:
        from quality_cases import real_set
        from quality_product import columns, write_rows

        from softprompt.data import render_rows

        self.name = name
        found = real_set(name, flags.material)
        self.instruction, self.columns = found.instruction, columns(found.train)
        self.pairs = [(row.prompt, row.text) for row in render_rows(found.train)]
        self.file = flags.out / name / "rows.jsonl"
        write_rows(found.train, self.file)
        self.winner = flags.winner or winner_of(flags.bench, name)


def winner_of(bench: Path | None, name: str) -> str:
    """The settings that PEFT's grid chose, such as "vocabulary, 0.06". Raises SystemExit where there are none."""
    file = (bench or Path()) / f"smollm2-{name}.json"
    kept = json.loads(file.read_text())["contenders"] if bench is not None and file.exists() else {}
    seeds = kept.get(BEST, {}).get("seeds", {})
    if not seeds:
        raise SystemExit(
            f"{file} has no winner of PEFT's grid; measure it (quality.py --base smollm2 --cases {name} --only grid), "
            'or give one (--winner "vocabulary, 0.06")'
        )
    return str(next(iter(seeds.values()))["note"])


def timed(flags: argparse.Namespace, case: RowsOnly, contender: str, seed: int, folder: Path) -> Run:
    """One process, from its start to its end, and when each prompt was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if contender == OURS:
        command = our_command(flags, case, seed, folder)
    else:
        settings = NOTEBOOK_SETTINGS if contender == NOTEBOOK else case.winner
        command = peft_command(flags, case, settings, seed, folder)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if flags.threads:
        env["OMP_NUM_THREADS"] = str(flags.threads)
    began = time.time()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    seconds = time.time() - began
    if done.returncode:
        raise SystemExit(f"exit status {done.returncode} from {contender} on {case.name}:\n{done.stderr[-2_000:]}")
    points = [
        {"seconds": file.stat().st_mtime - began, "prompt": str(kept.relative_to(folder))}
        for kept, file in kept_prompts(folder)
    ]
    settings = "" if contender == OURS else NOTEBOOK_SETTINGS if contender == NOTEBOOK else case.winner
    return {"contender": contender, "seed": seed, "seconds": seconds, "settings": settings, "points": points}


def our_command(flags: argparse.Namespace, case: RowsOnly, seed: int, folder: Path) -> list[str]:
    columns = [f"--{name.replace('_', '-')}={value}" for name, value in case.columns.items()]
    return [
        sys.executable, "-m", "softprompt", "train", "--base", str(base_folder(flags)), "--offline", "--device", "cpu",
        "--dtype", flags.dtype, "--data", str(case.file), *columns, "--seed", str(seed), "--keep-checkpoints", "1000",
        "--out", str(folder / "run"),
    ]  # fmt: skip


def peft_command(flags: argparse.Namespace, case: RowsOnly, settings: str, seed: int, folder: Path) -> list[str]:
    start, _, rate = settings.rpartition(", ")
    request = {
        "folder": str(folder), "dtype": flags.dtype, "seed": seed, "virtual_tokens": LENGTH, "epochs": EPOCHS,
        "start": {"text": case.instruction} if start == "instruction" else start, "learning_rate": float(rate),
        "rows": case.pairs, "base": str(base_folder(flags)),
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request))
    return [sys.executable, str(Path(__file__).with_name("quality_time_peft.py")), str(folder / "request.json")]


def base_folder(flags: argparse.Namespace) -> Path:
    return flags.out / "SmolLM2-135M-Instruct"


def write_base(flags: argparse.Namespace) -> None:
    """The base as a folder, in the dtype that it runs in; in a process that ends before anything is timed."""
    if not base_folder(flags).exists():
        code = (
            "import sys, torch; from training_cases import load_gguf, smollm2_file\n"
            "for part in load_gguf(smollm2_file(), getattr(torch, sys.argv[1])): part.save_pretrained(sys.argv[2])"
        )
        new = base_folder(flags).with_suffix(".new")
        subprocess.run([sys.executable, "-c", code, flags.dtype, str(new)], cwd=Path(__file__).parent, check=True)
        new.rename(base_folder(flags))


def kept_prompts(folder: Path) -> list[tuple[Path, Path]]:
    """Each prompt that a process left, earliest first, and the file whose time is that of the prompt."""
    ours = [(state.parent, state) for state in folder.glob("run/checkpoints/step-*/state.json")]
    ours += [(file.parent, file) for file in folder.glob("run/adapter_model.safetensors")]
    found = ours or [(file, file) for file in folder.glob("epoch-*.pt")]
    return sorted(found, key=lambda pair: pair[1].stat().st_mtime)


def score_runs(flags: argparse.Namespace, name: str) -> None:
    """Every prompt on the test rows; those known already are left out."""
    todo = [run for run in read_runs(flags.out, name) if not is_scored(run)]
    if not todo:
        return
    from quality_cases import make_real_case
    from quality_scoring import score_rows

    case = make_real_case(name, flags.material, flags.test_rows, flags.dtype)
    for run in todo:
        print(f"{time.strftime('%H:%M:%S')} {name}: scores of {run['contender']}, seed {run['seed']}", flush=True)
        for point in run["points"]:
            scores = score_rows(case.base, case.test, load(Path(run["folder"]) / point["prompt"]))
            mean = sum(scores.sums) / sum(scores.counts)
            point["figure"] = 100 * (1 - mean) if case.has_labels else mean
        run["labels"] = case.has_labels
        write(Path(run["folder"]) / "run.json", {key: value for key, value in run.items() if key != "folder"})


def load(prompt: Path) -> Any:  # Any: a SoftPrompt
    import torch

    from softprompt import SoftPrompt, load_prompt

    return SoftPrompt(torch.load(prompt, weights_only=True)) if prompt.suffix == ".pt" else load_prompt(prompt)


def read_runs(out: Path, name: str) -> list[Run]:
    """With the folder of each."""
    return [
        {**json.loads(file.read_text()), "folder": str(file.parent)} for file in sorted(out.glob(f"{name}/*/run.json"))
    ]


def is_scored(run: Run) -> bool:
    return all("figure" in point for point in run["points"])


def table(name: str, runs: Sequence[Run]) -> str:
    """What each ends with and when, and when it first has the figure that PEFT's best ends with."""
    best = [run["points"][-1]["figure"] for run in runs if run["contender"] == WINNER]
    if not best:
        return f"\n{name}: nothing of {WINNER} is measured and scored yet"
    target, has_labels = statistics.mean(best), runs[0]["labels"]
    form, unit = (".1f", "%") if has_labels else (".3f", "nats per token")
    lines = [
        f"\n{name}: the figure to reach is {target:{form}} {unit}, the mean of what {WINNER} ends with\n",
        f"| contender | seeds | ends with ({unit}) | seconds to the end | seconds to the figure | seeds that reach it "
        "| times as soon as PEFT's best |\n|" + " --- |" * 7,
    ]
    times = {each: [time_to(run, target) for run in runs if run["contender"] == each] for each in CONTENDERS}
    peft = statistics.median(times[WINNER])
    return "\n".join([*lines, *(_line(runs, each, own, peft, form) for each, own in times.items() if own)])


def _line(runs: Sequence[Run], contender: str, times: Sequence[float], peft: float, form: str) -> str:
    own, middle = [run for run in runs if run["contender"] == contender], statistics.median(times)
    ends = [run["points"][-1]["figure"] for run in own]
    cells = [
        contender + (f" ({own[0]['settings']})" if own[0]["settings"] else ""), f"{len(own)}",
        f"{statistics.mean(ends):{form}}" + (f" ± {statistics.stdev(ends):{form}}" if len(ends) > 1 else ""),
        f"{statistics.median(run['seconds'] for run in own):.1f}",
        "never" if middle == math.inf else f"{middle:.1f}", f"{sum(each < math.inf for each in times)}",
        f"{peft / middle:.2f}" if max(middle, peft) < math.inf else "",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def time_to(run: Run, target: float) -> float:
    """Seconds until the first prompt that is as good; infinite where none is."""
    sign, end = (-1 if run["labels"] else 1), run["points"][-1]["figure"]
    wanted = sign * (end if run["contender"] == WINNER else target)
    return min((each["seconds"] for each in run["points"] if sign * each["figure"] <= wanted), default=math.inf)


def check_setting(flags: argparse.Namespace) -> None:
    """Raises SystemExit where --out has runs of another dtype, processor or number of threads."""
    import torch

    from softprompt.base.device import resolve_dtype

    if flags.dtype == "auto":
        flags.dtype = str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    own = {
        "dtype": flags.dtype, "processor": processor(), "threads": flags.threads or torch.get_num_threads(),
        "test_rows": flags.test_rows,
    }  # fmt: skip
    file = flags.out / "setting.json"
    kept = json.loads(file.read_text()) if file.exists() else own
    differing = [name for name in IDENTITY if kept[name] != own[name]]
    if differing:
        raise SystemExit(f"{flags.out} has runs of another {' and '.join(differing)}; give another --out, or delete it")
    write(file, own)


@contextmanager
def only_process(out: Path) -> Iterator[None]:
    with (out / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another process measures in {out}; times are only right one at a time") from None
        yield


def write(file: Path, content: Any) -> None:  # Any: JSON
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1))
    new.replace(file)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("material", type=Path, help="folder with english-quotes/ and sst2/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bench", type=Path, help="--out of quality.py, whose grid has PEFT's best settings")
    parser.add_argument("--winner", metavar="SETTINGS", help="PEFT's best for all sets, in place of --bench's")
    parser.add_argument("--cases", default=",".join(CASES), help="default %(default)s; other numbers of rows too")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of ours and of PEFT's"
    )
    parser.add_argument("--threads", type=int, help="of each process; default: OMP_NUM_THREADS, or torch's choice")
    parser.add_argument("--test-rows", type=int, help="at most, for a quick look")
    parser.add_argument("--table", action="store_true", help="print what is known and measure nothing")
    flags = parser.parse_args()
    flags.cases = flags.cases.split(",")
    return flags


if __name__ == "__main__":
    main()
