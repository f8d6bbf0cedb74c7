"""Who stops computing leaves no OpenMP threads, in processes of their own: threads are counted in /proc."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists() or (os.cpu_count() or 1) < 2, reason="needs /proc and two cores"
)

BEGINS = """
import os, threading, time, torch
from softprompt import openmp, turns
from softprompt.openmp import put_threads_away
from softprompt.turns import Turns, breathe

def multiply():
    return torch.ones(1_000_000).sin()

def num_threads():
    return len(os.listdir("/proc/self/task"))

def settled(count):
    ends = time.monotonic() + 20
    while num_threads() != count and time.monotonic() < ends:
        time.sleep(0.01)
    return num_threads()

"""


def told(script):
    """What a process with two OpenMP threads prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    ran = subprocess.run(
        [sys.executable, "-c", BEGINS + script], env=environment, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


def test_a_pool_is_put_away_and_made_anew_with_the_same_results():
    script = """
before, first = num_threads(), multiply()
print(num_threads() - before)
put_threads_away()
put_threads_away()
print(settled(before) - before)
print(torch.equal(multiply(), first), torch.get_num_threads(), num_threads() - before)
"""
    assert told(script) == ["1", "0", "True", "2", "1"]


TURNS = """
def train():
    with turns_.second():
        while not is_over.is_set():
            breathe()
            multiply()
    put_threads_away()

turns_, is_over, counts = Turns(share=0.5), threading.Event(), []
before = num_threads()
thread = threading.Thread(target=train)
thread.start()
for _ in range(100):
    with turns_.first():
        multiply()
        ends = time.monotonic() + 0.01
        while time.monotonic() < ends and num_threads() > before + 2:
            pass
        counts.append(num_threads() - before)
is_over.set()
turns_.idle()
thread.join()
print(sorted(counts)[50], settled(before) - before)
"""


def test_of_two_that_take_turns_one_has_threads():
    """The second core's is the engine's; in the control, of turns that put nothing away, both have one."""
    assert told(TURNS) == ["2", "0"]
    kept, _ = told("turns.put_threads_away = lambda: None\n" + TURNS)
    assert kept == "3"


READS = """
import tempfile
from pathlib import Path
from softprompt import SoftPrompt, load_base, save_prompt
from softprompt.server.prompts import arrivals

def read():
    arrivals.read_folder(place, base)
    has_read.set()
    may_end.wait(60)

base, has_read, may_end = load_base("embedded"), threading.Event(), threading.Event()
place = Path(tempfile.mkdtemp()) / "large"
save_prompt(SoftPrompt(torch.ones(1_000, base.hidden_size)), place)
put_threads_away()
before = settled(2)
thread = threading.Thread(target=read)
thread.start()
has_read.wait(60)
ends = time.monotonic() + 1
while time.monotonic() < ends and num_threads() > before + 1:
    pass
print(num_threads() - before)
may_end.set()
thread.join()
"""


@pytest.mark.medium
def test_a_thread_that_has_read_a_large_soft_prompt_keeps_none():
    assert told(READS) == ["1"]
    assert told(READS.replace("def read", "arrivals.put_threads_away = lambda: None\ndef read")) == ["2"]
