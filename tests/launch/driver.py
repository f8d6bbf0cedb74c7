"""What each process of a distributed test runs: `driver.py FOLDER` trains every case and writes what its rank found.

`run(Alone())` is the truth that the ranks are compared with. With `rank-1-fails` the second process ends in an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from support.encoders import build_encoder
from support.tiny_bases import build_base, random_ids
from torch import Tensor
from torch.distributed.tensor import DTensor

from softprompt.base import Base
from softprompt.config import TrainConfig
from softprompt.errors import DataError
from softprompt.families import decoder_layers
from softprompt.launch.accelerated import AcceleratedRanks, one_voice, ranks_of_environment, shard_base
from softprompt.training import Alone, Candidate, Ranks, StepDone, TrainResult, train, train_together

SHORT = {"virtual_tokens": 4, "epochs": 2, "batch_rows": 8}


def texts(count: int, first: int = 0) -> list[str]:
    """Ragged rows of 1 to 18 words."""
    return [
        " ".join(f"w{token}" for token in random_ids(1 + (7 * seed) % 18, seed)) for seed in range(first, first + count)
    ]


ROWS, HELD_OUT = texts(21), texts(5, 100)  # steps of 8, 8 and 5 rows


@dataclass
class Unsummed:
    """The control: ranks that share the rows out and keep the gradients that they find to themselves."""

    ranks: Ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ranks, name)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        self.ranks.sum([tensor for tensor in tensors if tensor.shape != (SHORT["virtual_tokens"], 16)])


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**SHORT, **changes})


def found(result: TrainResult) -> dict[str, Any]:
    return {
        "prompt": result.prompt.tensor, "head": list(result.prompt.head.values()), "losses": result.losses,
        "kept_step": result.kept_step,
        "validation": result.validation_losses, "micro_batch_rows": result.plan.micro_batch_rows,
    }  # fmt: skip


def whole_cases(ranks: Ranks) -> dict[str, Any]:
    """Every rank holds the whole base."""
    llama = build_base("llama", dtype=torch.float64)
    some: dict[str, Any] = {"ranks": ranks}
    every = {**some, "validation": HELD_OUT}
    seen: list[StepDone] = []
    cases = {
        "uneven": train(
            llama, ROWS, config(epochs=4, validate_every=2, schedule="constant", relative_learning_rate=0.2), **every,
            sink=lambda event: seen.append(event) if isinstance(event, StepDone) else None,
        ),
        "micro-batches": train(llama, ROWS, config(micro_batch_rows=2), **every),
        "single rows": train(llama, ROWS[:4], config(batch_rows=1), **some),
        "residual-mlp": train(llama, ROWS, config(reparameterisation="residual-mlp", max_grad_norm=0.01), **every),
        "bloom": train(build_base("bloom", dtype=torch.float64), ROWS, config(), **every),
        "padded": train(build_base("mpt", dtype=torch.float64), ROWS, config(epochs=1), **every),
        "float32": train(build_base("llama"), ROWS, config(max_steps=3), **some),
        "unsummed": train(llama, ROWS, config(), ranks=ranks if ranks.count == 1 else Unsummed(ranks)),
    }  # fmt: skip
    together = [
        Candidate(name="a", data=ROWS, config=config(), validation=HELD_OUT),
        Candidate(name="b", data=ROWS[:3], config=config(seed=3, virtual_tokens=2, batch_rows=2)),
    ]
    results = {name: found(result) for name, result in cases.items()}
    results |= {f"together {result.name}": found(result) for result in train_together(llama, together, **some)}
    results |= {f"together {result.name}": found(result) for result in train_together(encoder(), headed(), **some)}
    return {**results, "steps": [(step.num_rows, step.num_targets, step.grad_norm) for step in seen]}


def encoder() -> Base:
    return build_encoder("bert", dtype=torch.float64)


def headed() -> list[Candidate]:
    """Two prompts with heads of their own."""
    labelled = [{"text": text, "label": f"w{i % 2}"} for i, text in enumerate(ROWS)]
    tagged = [{"tokens": text.split(), "tags": ["O", "X", *"O" * 18][: len(text.split())]} for text in ROWS]
    data = {"classify": labelled, "tag": tagged}
    return [
        Candidate(name=task, data=rows, config=config(task=task), validation=rows[:7]) for task, rows in data.items()
    ]


def split_cases(ranks: Ranks) -> dict[str, Any]:
    """Every rank holds a part of the base's layers, where there are ranks."""
    results = {}
    for family in ("llama", "bloom"):
        base = build_base(family, dtype=torch.float64)
        shard_base(base, ranks)
        few = config(micro_batch_rows=2, validate_every=2)
        results |= {
            f"split {family}": found(train(base, ROWS, few, validation=HELD_OUT, ranks=ranks)),
            f"split {family}, single rows": found(train(base, ROWS[:4], config(batch_rows=1), ranks=ranks)),
            f"split {family}, checkpointed": found(
                train(base, ROWS, config(max_steps=2, micro_batch_rows=3, checkpoint_layers=True), ranks=ranks)
            ),
            f"fingerprint {family}": base.fingerprint,
            f"share held {family}": share_held(base),
        }
    return results


def share_held(base: Base) -> float:
    """How much of the decoder layers lies in this process."""
    parameters = [parameter for layer in decoder_layers(base.model) for parameter in layer.parameters()]
    here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    return here / sum(parameter.numel() for parameter in parameters)


def as_if_fsdp_were_asked_for(ranks: Ranks) -> Ranks:
    """As `accelerate launch --use_fsdp --fsdp_version 2` sets it."""
    if not isinstance(ranks, AcceleratedRanks):
        return ranks
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return AcceleratedRanks(ranks.accelerator)


def run(ranks: Ranks) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {**whole_cases(ranks), **split_cases(as_if_fsdp_were_asked_for(ranks))}


if __name__ == "__main__":
    own = ranks_of_environment("cpu")
    assert not isinstance(own, Alone), "no launcher started this"
    code = 0
    try:
        with one_voice(own):
            print(f"rank {own.rank} speaks")
            print(f"rank {own.rank} complains", file=sys.stderr)
            torch.save(run(own), Path(sys.argv[1]) / f"rank-{own.rank}.pt")
            if "rank-1-fails" in sys.argv and own.rank == 1:
                raise DataError("rank 1 cannot go on")  # and rank 0 waits for it
    except SystemExit as ended:
        code = int(str(ended.code))
    sys.stdout.flush()
    os._exit(code)  # as the command line does: in the interpreter's shutdown torch's threads have aborted
