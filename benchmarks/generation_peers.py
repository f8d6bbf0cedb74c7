"""Peers of generation.py: plain transformers in a fixed batch, PEFT one request after another, and the judge of both.

The plain batch is what is left of the design when all around it is taken away: soft prompt and text in one tensor of
embeddings, right-aligned, transformers' own `forward` and DynamicCache. Rows that have ended leave the batch; nobody
joins one that runs.

B rows, T tokens, P prompt length, H hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generation_cases import (
    Asked,
    Request,
    Serve,
    Served,
    Watch,
    Workload,
    asked_of,
    prompts_of,
    run_workloads,
    workload_of,
)
from torch import Tensor
from training_cases import load_gguf, make_model

Model = Any  # transformers' model
QUICK_STRENGTH = 3.0
PEFT_REQUESTS = 4  # one after another: few are enough, the speed does not depend on their number


def run_plain(request: Request) -> Request:
    """Child: plain transformers, fixed batches."""
    return _run(request, lambda model: partial(serve_plain, model))


def run_peft(request: Request) -> Request:
    """Child: PEFT's `set_adapter` and `generate`, the first requests of each workload."""
    return _run(request, lambda model: partial(serve_peft, with_adapters(model)))


def _run(request: Request, make: Callable[[Model], Serve]) -> Request:
    model, load_seconds = load(request["folder"], getattr(torch, request["dtype"]))
    return {**run_workloads(request, make(model)), "load_seconds": load_seconds, "setup_seconds": 0.0}


def make_quick_model(request: Request) -> Request:
    """Child: the tiny model with larger numbers in its layers: as drawn, it echoes its text whatever the prompt."""
    from safetensors.torch import load_file, save_file

    path = Path(request["folder"]) / "model.safetensors"
    is_new = not path.exists()
    facts = make_model(request)
    if is_new:
        weights = {name: part * (QUICK_STRENGTH if ".h." in name else 1) for name, part in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    return facts


def load(model: str, dtype: torch.dtype) -> tuple[Model, float]:
    """The model of a folder or a GGUF file, and the seconds that loading took."""
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    if model.endswith(".gguf"):
        loaded = load_gguf(Path(model), dtype)[0]
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return loaded.eval(), time.perf_counter() - began


def serve_plain(model: Model, workload: Workload) -> list[Served]:
    """Batches of waiting requests, each run until its longest answer has ended."""
    asked, watch = asked_of(workload, model.config.vocab_size), Watch()
    prompts = list(prompts_of(workload, model.config.hidden_size))
    served, waiting = [Served() for _ in asked], deque(range(len(asked)))
    while waiting:
        watch.sleep_until(asked[waiting[0]].arrives_s)
        now, batch = watch.now(), []
        while waiting and len(batch) < workload.max_rows and asked[waiting[0]].arrives_s <= now:
            batch.append(waiting.popleft())
        rows = [PlainRow(asked[number], prompts[asked[number].prompt], served[number]) for number in batch]
        run_batch(model, rows, workload.penalty, watch)
    return served


@dataclass(frozen=True)
class PlainRow:
    """One request in a batch."""

    asked: Asked
    prompt_PH: Tensor
    served: Served


@torch.inference_mode()
def run_batch(model: Model, rows: Sequence[PlainRow], penalty: float, watch: Watch) -> None:
    from transformers import DynamicCache

    cache, inputs = DynamicCache(), start(model, rows)
    ids_BT = torch.tensor([row.asked.ids for row in rows])
    while True:
        out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids_BT = torch.cat([ids_BT, choose(out.logits[:, -1], ids_BT, penalty)[:, None]], dim=1)
        now = watch.now()
        for row, token in zip(rows, ids_BT[:, -1].tolist(), strict=True):
            row.served.note([token], now)
        staying = [place for place, row in enumerate(rows) if len(row.served.ids) < row.asked.new_tokens]
        if not staying:
            return
        if len(staying) < len(rows):
            kept = torch.tensor(staying)
            cache.batch_select_indices(kept)
            ids_BT, inputs = ids_BT[kept], {name: tensor[kept] for name, tensor in inputs.items()}
            rows = [rows[place] for place in staying]
        inputs = following(inputs, ids_BT[:, -1:])


def start(model: Model, rows: Sequence[PlainRow]) -> dict[str, Tensor]:
    """Soft prompts and texts, padded on the left; families that read the mask ignore position_ids."""
    embedding = model.get_input_embeddings()
    texts = [embedding(torch.tensor(row.asked.ids)) for row in rows]
    whole = [torch.cat([row.prompt_PH.to(text), text]) for row, text in zip(rows, texts, strict=True)]
    embeds_BTH = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_side="left")
    lengths_B = torch.tensor([len(each) for each in whole])
    mask_BT = (torch.arange(embeds_BTH.shape[1]) >= embeds_BTH.shape[1] - lengths_B[:, None]).long()
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    return {"inputs_embeds": embeds_BTH, "attention_mask": mask_BT, "position_ids": positions_BT}


def following(inputs: dict[str, Tensor], next_B1: Tensor) -> dict[str, Tensor]:
    mask_BT = inputs["attention_mask"]
    return {
        "input_ids": next_B1,
        "attention_mask": torch.cat([mask_BT, torch.ones_like(next_B1)], dim=1),
        "position_ids": inputs["position_ids"][:, -1:] + 1,
    }


def choose(logits_BV: Tensor, ids_BT: Tensor, penalty: float) -> Tensor:
    """Greedy, as transformers' generate has it: over float32 scores, the penalty over the real ids."""
    return penalised(logits_BV.float(), ids_BT, penalty).argmax(dim=-1)


def penalised(scores_BV: Tensor, ids_BT: Tensor, penalty: float) -> Tensor:
    from transformers import RepetitionPenaltyLogitsProcessor

    return scores_BV if penalty == 1 else RepetitionPenaltyLogitsProcessor(penalty)(ids_BT, scores_BV)


def run_generate(request: Request) -> Request:
    """Child: transformers' own `generate` over soft prompts and texts as embeddings, all requests in one batch."""
    return _run(request, lambda model: partial(serve_generate, model))


@torch.inference_mode()
def serve_generate(model: Model, workload: Workload) -> list[Served]:
    """One batch of answers of one length, greedy; an end of text ends nothing."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    asked, prompts = asked_of(workload, model.config.vocab_size), list(prompts_of(workload, model.config.hidden_size))
    served, watch, times = [Served() for _ in asked], Watch(), list[float]()

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            times.append(watch.now())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    inputs = start(model, [PlainRow(each, prompts[each.prompt], own) for each, own in zip(asked, served, strict=True)])
    model.generation_config.eos_token_id = None
    tokens = model.generate(
        inputs_embeds=inputs["inputs_embeds"], attention_mask=inputs["attention_mask"], do_sample=False,
        max_new_tokens=workload.new_tokens[1], stopping_criteria=StoppingCriteriaList([Clock()]),
    )  # fmt: skip
    for each, ids in zip(served, tokens.tolist(), strict=True):
        each.ids, each.times = ids, list(times)
    return served


def serve_peft(model: Model, workload: Workload) -> list[Served]:
    """The workload's first requests, each under its own adapter; the adapters are there before the clock starts."""
    asked = asked_of(workload, model.config.vocab_size)[:PEFT_REQUESTS]
    prompts = list(prompts_of(workload, model.config.hidden_size))
    for number, each in enumerate(asked):
        _keep_adapter(model, _adapter(workload, number), prompts[each.prompt])
    watch = Watch()
    return [_generate(model, _adapter(workload, n), each, workload.penalty, watch) for n, each in enumerate(asked)]


def _adapter(workload: Workload, number: int) -> str:
    return f"{workload.name.replace('.', '-')}, {number}"


def with_adapters(model: Model) -> Model:
    """PEFT's model; it never ends at an end-of-text token."""
    from peft import get_peft_model

    peft_model = get_peft_model(model, _settings(1)).eval()
    peft_model.generation_config.eos_token_id = None
    return peft_model


def _settings(virtual_tokens: int) -> Any:  # Any: PEFT's config
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens)


def _keep_adapter(model: Model, name: str, prompt_PH: Tensor) -> None:
    model.add_adapter(name, _settings(len(prompt_PH)))
    with torch.no_grad():
        model.prompt_encoder[name].embedding.weight.copy_(prompt_PH)


def _generate(model: Model, adapter: str, asked: Asked, penalty: float, watch: Watch) -> Served:
    from transformers.generation.streamers import BaseStreamer

    served = Served(called_s=watch.now())

    class Times(BaseStreamer):
        def put(self, value: Tensor) -> None:
            if value.dim() == 1:  # the text itself comes first, as [1, T]
                served.note(value.tolist(), watch.now())

        def end(self) -> None:
            return

    model.set_adapter(adapter)
    ids_1T = torch.tensor([asked.ids])
    model.generate(
        input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=asked.new_tokens, do_sample=False,
        repetition_penalty=penalty, streamer=Times(),
    )  # fmt: skip
    return served


@torch.inference_mode()
def judge(request: Request) -> Request:
    """Child: how far each token lies below the best one, in float32 over the same rounded weights.

    `answers` holds a name for each list of answers to the workload. Every answer is judged behind its own tokens, so
    one that left another's way at a near-tie is right all the same. The control gives the first answers other prompts.
    """
    model = load(request["folder"], getattr(torch, request["dtype"]))[0].float()
    workload = workload_of(request["workload"])
    found = {name: _gaps(model, workload, answers, request["dtype"]) for name, answers in request["answers"].items()}
    first = next(iter(request["answers"].values()))
    return {"gaps": found, "control": _gaps(model, workload, first, request["dtype"], shift=1)}


def _gaps(model: Model, workload: Workload, answers: list[list[int]], dtype: str, shift: int = 0) -> list[list[float]]:
    """A value for each answer and token; `shift` uses the prompt that many numbers further on, as a control."""
    prompts = list(prompts_of(workload, model.config.hidden_size))
    found = []
    for asked, ids in zip(asked_of(workload, model.config.vocab_size), answers, strict=False):  # PEFT's are the first
        prompt_PH = prompts[(asked.prompt + shift) % len(prompts)].to(getattr(torch, dtype)).float()
        ids_1T = torch.tensor([[*asked.ids, *ids]])
        embeds_1TH = torch.cat([prompt_PH, model.get_input_embeddings()(ids_1T[0, :-1])])[None]
        scores_TV = model(inputs_embeds=embeds_1TH, logits_to_keep=len(ids)).logits[0]
        found.append(list(_below_best(scores_TV, ids_1T, len(asked.ids), workload.penalty)))
    return found


def _below_best(scores_TV: Tensor, ids_1T: Tensor, first: int, penalty: float) -> Iterator[float]:
    for place, scores_V in enumerate(scores_TV, start=first):
        final_V = penalised(scores_V[None], ids_1T[:, :place], penalty)[0]
        yield float(final_V.max() - final_V[ids_1T[0, place]])
