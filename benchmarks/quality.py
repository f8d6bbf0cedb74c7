"""What prompts reach by which recipe: the table of docs/quality.md.

    python benchmarks/quality.py ../shared/data --out build/quality
    python benchmarks/quality.py ../shared/data --out build/quality --base smollm2     # a real base, other contenders

Every recipe trains on the same rows for the same epochs. The grid is tried with two seeds first; the six of each length
that validate best are tried with five, and of those the best by validation is the one to reach. All scores are of the
test rows: nats per text token (or per token of the label), and accuracy by label likelihood where there are labels.
`--recipe '{"relative_learning_rate": 1}'` measures another recipe too; `--skip-grid` leaves the grid out.
What was measured is kept in --out, one JSON file per case, and not measured again.

On SmolLM2 the contenders are those of quality_contenders.py, and each is kept with its seed as soon as it is measured:

    python benchmarks/quality.py ../shared/data --out build/quality --base smollm2 --threads 1 &
    python benchmarks/quality.py ../shared/data --out build/quality --base smollm2 --threads 1 &
    python benchmarks/quality.py ../shared/data --out build/quality --base smollm2 --table

Processes that work on one folder never measure the same twice. What matters most comes first: the bare base, ours, the
notebook's settings, random vectors and the probe on every set, seed by seed; then the rest, PEFT's grid, its winner.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import quality_real
import quality_report
import torch
from quality_cases import LENGTHS, Case, Settings, grid, make_case, make_real_case, peers

from softprompt import SoftPrompt, TrainConfig
from softprompt.data import build_examples
from softprompt.evaluation import accuracy_by_likelihood, mean_loss
from softprompt.families import forward_of
from softprompt.loss import score_examples
from softprompt.training import Candidate, train_together

CASES = (
    "quotes-25", "quotes-200", "roles-50", "sst2-200", "embedded-quotes-25", "embedded-coach-50", "embedded-reviews-50",
    "embedded-reviews-200",
)  # fmt: skip
REAL_CASES = (
    "quotes-25", "quotes-200", "roles-50", "sst2-50", "sst2-200", "sst2-1000", "topics-200", "records-200", "chat-100",
)  # fmt: skip
EPOCHS = 6
SEEDS = (0, 1, 2, 3, 4)
FIRST_SEEDS, FINALISTS = SEEDS[:2], 12
AT_ONCE = 8

Score = dict[str, float | None]
Scores = dict[str, Score]  # by seed


class Measured:
    """Scores of a case by recipe and seed, kept in a file."""

    def __init__(self, case: Case, file: Path) -> None:
        self.case, self._file = case, file
        self.scores: dict[str, Scores] = json.loads(file.read_text()) if file.exists() else {}

    def measure(self, recipes: dict[str, Settings], seeds: tuple[int, ...], with_accuracy: bool = False) -> None:
        """Train what is not known yet, several prompts in one pass, and score it."""
        wanted = [(name, seed) for name in recipes for seed in seeds if str(seed) not in self.scores.get(name, {})]
        for first in range(0, len(wanted), AT_ONCE):
            some = wanted[first : first + AT_ONCE]
            configs = [TrainConfig(**{"epochs": EPOCHS, **recipes[name], "seed": seed}) for name, seed in some]
            candidates = [
                Candidate(data=self.case.train, config=config, name=str(index)) for index, config in enumerate(configs)
            ]
            results = train_together(self.case.base, candidates)
            for (name, seed), result in zip(some, results, strict=True):
                self.scores.setdefault(name, {})[str(seed)] = score(self.case, result.prompt, with_accuracy)
            self._file.write_text(json.dumps(self.scores, indent=1))
            print(f"{self.case.name}: {first + len(some)} of {len(wanted)}", flush=True)

    def bare(self) -> Score:
        if "no prompt" not in self.scores:
            self.scores["no prompt"] = {"0": score(self.case, None, with_accuracy=True)}
        return self.scores["no prompt"]["0"]

    def mean(self, name: str, figure: str) -> float:
        return statistics.mean(self.values(name, figure))

    def values(self, name: str, figure: str) -> list[float]:
        return [value for item in self.scores[name].values() if (value := item[figure]) is not None]


def score(case: Case, prompt: SoftPrompt | None, with_accuracy: bool) -> Score:
    forward = forward_of(case.base)
    tensor = None if prompt is None else prompt.tensor
    losses = {}
    for part, rows in (("validation", case.validation), ("test", case.test)):
        examples = build_examples(case.base, rows, eos=False, max_length=case.base.max_length - 20).examples
        losses[part] = mean_loss(score_examples(case.base, forward, examples, tensor))
    hits = accuracy_by_likelihood(case.base, forward, case.test, prompt) if with_accuracy and case.has_labels else None
    return {**losses, "accuracy": hits}


def run_grid(measured: Measured) -> dict[int, str]:
    """The grid's best recipe of each length by validation, the best of all first."""
    recipes = dict(grid(measured.case.instruction))
    measured.measure(recipes, FIRST_SEEDS)
    best = [_best_of_length(measured, recipes, length) for length in LENGTHS]
    return dict(sorted(zip(LENGTHS, best, strict=True), key=lambda item: measured.mean(item[1], "validation")))


def _best_of_length(measured: Measured, recipes: dict[str, Settings], length: int) -> str:
    same = [name for name, settings in recipes.items() if settings["virtual_tokens"] == length]
    ranked = sorted(same, key=lambda name: measured.mean(name, "validation"))[: FINALISTS // len(LENGTHS)]
    measured.measure({name: recipes[name] for name in ranked}, SEEDS)
    return min(ranked, key=lambda name: measured.mean(name, "validation"))


def show(measured: Measured, named: dict[str, Settings], best: dict[int, str]) -> None:
    print(f"\n{measured.case.name} ({len(measured.case.train)} rows; no prompt: {line(measured, 'no prompt')})\n")
    print("| recipe | test loss | accuracy | way to the grid's best | of its own length |\n|" + " --- |" * 5)
    for name in [*named, *best.values()]:
        length = named[name]["virtual_tokens"] if name in named else None
        ways = [way(measured, name, other) for other in (next(iter(best.values()), None), best.get(length or 0))]
        loss, accuracy = (spread(measured.values(name, figure)) for figure in ("test", "accuracy"))
        print(f"| {name} | {loss} | {accuracy} | {ways[0]} | {ways[1]} |")


def way(measured: Measured, name: str, best: str | None) -> str:
    """How far a recipe comes from no prompt to the best one."""
    if best is None:
        return ""
    bare = measured.bare()["test"]
    return f"{(bare - measured.mean(name, 'test')) / (bare - measured.mean(best, 'test')):.2f}"


def line(measured: Measured, name: str) -> str:
    accuracy = measured.values(name, "accuracy")
    return f"{measured.mean(name, 'test'):.3f}" + (f", accuracy {accuracy[0]:.3f}" if accuracy else "")


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    flags = parse()
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.base == "smollm2":
        run_real(flags)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in (flags.cases or ",".join(CASES)).split(","):
            case = make_case(name, flags.material, Path(scratch))
            measured = Measured(case, flags.out / f"{name}.json")
            measured.bare()
            others = {text: json.loads(text) for text in flags.recipe}
            named = {
                **({} if flags.skip_peers else peers(case.instruction)),
                "ours, P=4": {"virtual_tokens": 4}, "ours, P=20": {"virtual_tokens": 20}, **others,
            }  # fmt: skip
            measured.measure(named, SEEDS[: flags.seeds], with_accuracy=True)
            show(measured, named, {} if flags.skip_grid else run_grid(measured))


def run_real(flags: argparse.Namespace) -> None:
    names = (flags.cases or ",".join(REAL_CASES)).split(",")
    if flags.table:
        quality_report.print_tables(flags.out, names if flags.cases else ())
        return
    if flags.threads:
        torch.set_num_threads(flags.threads)
    others = {text: json.loads(text) for text in flags.recipe}
    grid_sets = () if flags.skip_grid else tuple(f"smollm2-{name}" for name in flags.grid_cases.split(","))
    benches = [
        quality_real.Bench(
            make_real_case(name, flags.material, flags.test_rows, flags.dtype), flags.out, flags.seeds, others,
            grid_sets, flags.only,
        )
        for name in names
    ]  # fmt: skip
    quality_real.run(benches, by_sets=flags.order == "sets")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "material", type=Path, help="folder with models/, english-quotes/, awesome-chatgpt-prompts/, sst2/"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", choices=("small", "smollm2"), default="small", help="small: the two of the tables")
    parser.add_argument("--cases", help=f"of {', '.join(CASES)}; of SmolLM2: {', '.join(REAL_CASES)}, or other counts")
    parser.add_argument("--test-rows", type=int, help="of SmolLM2's sets at most, for a quick look")
    parser.add_argument("--recipe", action="append", default=[], help="settings as JSON, to measure beside the default")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--skip-grid", action="store_true")
    parser.add_argument("--skip-peers", action="store_true")
    real = parser.add_argument_group("of SmolLM2")
    real.add_argument("--only", action="append", default=[], metavar="TEXT", help="contenders whose name has it")
    real.add_argument("--order", choices=("stages", "sets"), default="stages", help="what matters most, or set by set")
    real.add_argument("--grid-cases", default="sst2-200,quotes-25,roles-50", help="sets with PEFT's grid of twelve")
    real.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: the machine's")
    real.add_argument("--threads", type=int, help="default: OMP_NUM_THREADS, or torch's choice")
    real.add_argument("--table", action="store_true", help="print what is known and measure nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
