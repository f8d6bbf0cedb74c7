"""Who stops computing leaves no OpenMP threads, in processes of their own: threads are counted in /proc."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt import openmp

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists() or (os.cpu_count() or 1) < 2, reason="needs /proc and two cores"
)

BEGINS = """
import os, threading, time, torch
from softprompt import compute_share, openmp
from softprompt.openmp import release_omp_threads
from softprompt.compute_share import ComputeShare, yield_point

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


def told(script, **settings):
    """What a process with two OpenMP threads prints."""
    environment = {name: value for name, value in os.environ.items() if name not in openmp._USERS_OWN}
    environment |= {"OMP_NUM_THREADS": "2", **settings}
    ran = subprocess.run(
        [sys.executable, "-c", BEGINS + script], env=environment, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


def test_a_released_pool_is_made_anew_with_the_same_results():
    script = """
before, first = num_threads(), multiply()
print(num_threads() - before)
release_omp_threads()
release_omp_threads()
print(settled(before) - before)
print(torch.equal(multiply(), first), torch.get_num_threads(), num_threads() - before)
"""
    assert told(script) == ["1", "0", "True", "2", "1"]


SHARING = """
def train():
    with share.training():
        while not is_over.is_set():
            yield_point()
            multiply()
    release_omp_threads()

share, is_over, counts = ComputeShare(share=0.5), threading.Event(), []
before = num_threads()
thread = threading.Thread(target=train)
thread.start()
for _ in range(15):
    with share.inference_step():
        multiply()
        ends = time.monotonic() + 0.01
        while time.monotonic() < ends and num_threads() > before + 2:
            pass
        counts.append(num_threads() - before)
is_over.set()
share.idle()
thread.join()
print(sorted(counts)[7], AFTER - before)
"""


def test_of_two_threads_that_share_the_machine_only_one_keeps_a_pool():
    """The second core's is the engine's; the control releases nothing, and both have one."""
    assert told(SHARING.replace("AFTER", "settled(before)")) == ["2", "0"]
    control = SHARING.replace("AFTER", "num_threads()")
    kept, _ = told("compute_share.release_omp_threads = lambda: None\n" + control)
    assert kept == "3"


READS = """
import tempfile
from pathlib import Path
from softprompt import SoftPrompt, load_base, save_prompt
from softprompt.server.prompts import adapter_import

def read():
    adapter_import.read_folder(place, base)
    has_read.set()
    may_end.wait(60)

base, has_read, may_end = load_base("embedded"), threading.Event(), threading.Event()
place = Path(tempfile.mkdtemp()) / "large"
save_prompt(SoftPrompt(torch.ones(1_000, base.hidden_size)), place)
release_omp_threads()
time.sleep(0.2)
before = num_threads()
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
    chosen = {"GOMP_SPINCOUNT": "300000"}  # libgomp's own: no load monitor adds threads
    assert told(READS, **chosen) == ["1"]
    assert told(READS.replace("def read", "adapter_import.release_omp_threads = lambda: None\ndef read"), **chosen) == [
        "2"
    ]


MONITORED = """
from concurrent.futures import ThreadPoolExecutor

times_s = (0.0, 0.0, 0.0)
monitor, thread = openmp.LoadMonitor(lambda: openmp.Times(*times_s, sum(times_s[:2]))), ThreadPoolExecutor(1)
thread.submit(print).result()
first, before = multiply(), num_threads()
for times_s in TIMES:
    thread.submit(monitor.look).result()
    print(monitor.is_busy, settled(before + os.cpu_count() * monitor.is_busy) - before)
print(torch.equal(multiply(), first))
"""


def test_a_process_that_waits_for_its_cores_keeps_a_spare_pool_until_it_no_longer_waits():
    """Seconds waited, computed, and computed by others so far; a share of 0.2, 0.4, 0.3, 0.2 and 0.1 was waited."""
    times = [(0.2, 0.8, 1), (0.6, 1.4, 2), (0.9, 2.1, 3), (1.1, 2.9, 4), (1.2, 3.8, 5)]
    *states, is_equal = told(f"TIMES = {times}" + MONITORED)
    spare = str(os.cpu_count())
    assert states == ["False", "0", "True", spare, "True", spare, "True", spare, "False", "0"]
    assert is_equal == "True"


@pytest.mark.medium
def test_an_idle_process_does_not_change_how_its_threads_wait():
    """A hundredth of a second of waiting is no sign of load, nor is a thread that has ended with its waiting."""
    assert told("TIMES = [(0.01, 0.01, 1), (0.02, 0.02, 2), (0.0, 1.0, 3)]" + MONITORED)[:-1] == ["False", "0"] * 3


@pytest.mark.medium
def test_a_process_that_waits_for_its_own_threads_is_not_busy():
    """A server's event loop and its engine, say; and when the others stop, what is left to wait is its own."""
    spare = str(os.cpu_count())
    assert told("TIMES = [(0.5, 0.5, 0.1), (1, 1, 1), (1.5, 1.5, 1.1)]" + MONITORED)[:-1] == [
        "False", "0", "True", spare, "False", "0",
    ]  # fmt: skip


LOADED = """
from softprompt import load_base

load_base("embedded")
print([thread.name for thread in threading.enumerate()].count("openmp-load-monitor"))
"""


@pytest.mark.medium
def test_loading_bases_starts_one_load_monitor_unless_the_user_has_chosen_how_threads_wait():
    assert told(LOADED + LOADED) == ["1", "1"]
    assert told(LOADED, OMP_WAIT_POLICY="passive") == ["0"]
    assert told(LOADED, GOMP_SPINCOUNT="1000") == ["0"]
    assert told(LOADED, OMP_NUM_THREADS="1") == ["0"]


BESIDE = """
import subprocess, sys

count = os.cpu_count()
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
monitor, ends = openmp.LoadMonitor(), time.monotonic() + 60
while not monitor.is_busy and time.monotonic() < ends:
    multiply()
    monitor.look()
for other in others:
    other.kill()
    other.wait()
print(monitor.is_busy)
"""


@pytest.mark.medium
def test_busy_processes_beside_this_one_are_noticed():
    assert told(BESIDE) == ["True"]


def test_a_load_above_the_number_of_cores_is_a_warning(monkeypatch):
    cores = os.cpu_count()
    monkeypatch.setattr(os, "getloadavg", lambda: (cores + 1.2, 0.0, 0.0))
    assert openmp.load_warning() == (
        f"other processes keep this machine's {cores} cores busy (load {cores + 1.2:.1f}); this will take longer"
    )
    monkeypatch.setattr(os, "getloadavg", lambda: (float(cores), 99.0, 99.0))
    assert openmp.load_warning() is None
