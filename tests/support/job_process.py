"""A server on the tiny base in a process of its own, to be killed: `python job_process.py STATE`; prints its URL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def job_process(state: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its URL and the process, which is killed at the end if it has not been."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__, str(state)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def _serve(state: str) -> None:
    import time

    import torch

    from softprompt.config import ServerConfig
    from softprompt.server.start import serving_app
    from support.app_server import served
    from support.tiny_bases import build_base

    torch.set_num_threads(1)
    with served(serving_app(build_base("llama"), ServerConfig(state=state))) as url:
        print(url, flush=True)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    _serve(sys.argv[1])
