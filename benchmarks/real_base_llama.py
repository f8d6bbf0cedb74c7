"""llama.cpp's side of real_base.py: a child process under a Python of its own, which has `llama-cpp-python`.

It imports neither torch nor softprompt. The texts are the workload's ids without a soft prompt, which llama.cpp's
Python package does not read; greedy, and an end of text ends nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

Request = dict[str, Any]  # JSON values, as they pass between the processes


def answer(request: Request) -> Request:
    """Child: the file at `gguf`, made into Q8_0 beside the cache first if asked; tokens and their times."""
    from llama_cpp import Llama, __version__

    began = time.perf_counter()
    file = quantized(request["gguf"], Path(request["cache"])) if request["requantize"] else request["gguf"]
    llm = Llama(str(file), n_ctx=request["positions"], n_threads=request["threads"], verbose=False)
    loaded = time.perf_counter() - began
    decode(llm, request["ids"], request["warm_up_tokens"])
    ids, times = decode(llm, request["ids"], request["new_tokens"])
    return {"ids": ids, "times": times, "load_seconds": loaded, "version": __version__, "file_bytes": size_of(file)}


def decode(llm: Any, ids: list[int], new_tokens: int) -> tuple[list[int], list[float]]:  # Any: Llama
    """The tokens after `ids`, and the seconds since the call at which each was there."""
    llm.reset()
    began, found, times = time.perf_counter(), list[int](), list[float]()
    for token in llm.generate(ids, temp=0.0, repeat_penalty=1.0):
        found.append(token)
        times.append(time.perf_counter() - began)
        if len(found) == new_tokens:
            return found, times
    raise SystemExit(f"llama.cpp ended after {len(found)} tokens")


def quantized(gguf: str, cache: Path) -> Path:
    """The file as Q8_0, in the folder `cache`, where it is made once."""
    import llama_cpp

    made = cache / f"{Path(gguf).stem}.Q8_0.gguf"
    if not made.exists():
        part = made.with_suffix(".part")
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
        if llama_cpp.llama_model_quantize(gguf.encode(), str(part).encode(), settings):
            raise SystemExit(f"llama.cpp could not make {made} of {gguf}")
        part.rename(made)
    return made


def size_of(file: str | Path) -> int:
    return Path(file).stat().st_size


def main() -> None:
    print(f"\n{json.dumps(answer(json.loads(sys.argv[1])))}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
