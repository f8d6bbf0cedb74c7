"""A group of processes behaves as one command: one voice, one exit code, one Ctrl-C, nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from softprompt.errors import ConfigError, MissingDependencyError
from softprompt.launch import processes
from softprompt.launch.processes import run_group, run_processes, without_option

HEAD = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
SAY = "print('softprompt:', 'rank', rank, 'cannot', file=sys.stderr)\n"


def run(body, capfd, count=3):
    """Exit code, stdout and stderr of so many processes."""
    code = run_group([sys.executable, "-S", "-c", HEAD + body], count)
    return (code, *capfd.readouterr())


def test_all_go_well_and_the_first_one_speaks(capfd):
    assert run("print('rank', rank, 'of', os.environ['WORLD_SIZE'])", capfd) == (0, "rank 0 of 3\n", "")


def test_each_is_told_who_it_is(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]
    body = f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(' '.join(os.environ[name] for name in {names}))"
    assert run(body, capfd, 2)[0] == 0
    threads = max(psutil.cpu_count(logical=False) // 2, 1)
    assert [(tmp_path / f"{rank}").read_text() for rank in (0, 1)] == [f"0 0 2 2 {threads}", f"1 1 2 2 {threads}"]


@pytest.mark.parametrize("late", [0, 1])
def test_what_all_of_them_find_wrong_is_said_once(late, capfd):
    body = f"time.sleep(0.3 * (rank == {late}))\n{SAY}sys.exit(2)"
    assert run(body, capfd) == (2, "", "softprompt: rank 0 cannot\n")


def test_what_one_of_the_others_finds_wrong_is_said_too(capfd):
    body = f"if rank == 1:\n  {SAY}  sys.exit(2)\ntime.sleep(0.3); sys.exit(3)"
    assert run(body, capfd) == (2, "", "softprompt: rank 1 cannot\n")


@pytest.mark.parametrize("first", ["time.sleep(60)", "sys.exit(3)", "os.abort()"])
def test_one_that_is_killed_is_named_whatever_becomes_of_the_first(first, capfd, monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE_S", 0.3)
    body = f"if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.3); {first}"
    code, _, said = run(body, capfd)
    assert code == 128 + signal.SIGKILL
    assert said.startswith("softprompt: process 1 of 3 was ended by SIGKILL; if memory ran out")
    assert said.count("\n") == 1


def test_a_first_one_that_is_killed_is_named(capfd):
    code, _, said = run("if rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", capfd)
    assert (code, said.split(";")[0]) == (137, "softprompt: process 0 of 3 was ended by SIGKILL")


def test_a_crash_of_another_shows_its_traceback(capfd):
    code, _, said = run("if rank == 2: 1 / 0\ntime.sleep(0.3); sys.exit(3)", capfd)
    assert code == 1
    assert said.count("Traceback") == 1
    assert said.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("first", ["os.abort()", "time.sleep(0.2); os.abort()"])
def test_an_error_of_another_is_shown_where_the_first_aborted_for_want_of_it(first, capfd):
    """Threads of torch's collectives may abort when another process leaves."""
    code, _, said = run(f"if rank == 0: {first}\nif rank == 2: time.sleep(0.1); 1 / 0\nsys.exit(3)", capfd)
    assert code == 1
    assert said.endswith("ZeroDivisionError: division by zero\n")


def test_an_abort_that_no_other_explains_is_named(capfd):
    code, _, said = run("if rank == 0: os.abort()\nsys.exit(3)", capfd)
    assert (code, said.split(";")[0]) == (134, "softprompt: process 0 of 3 was ended by SIGABRT")


def test_the_others_may_end_a_little_later(capfd, tmp_path):
    body = f"time.sleep(0.3 * rank); open({str(tmp_path)!r} + f'/{{rank}}', 'w')"
    assert run(body, capfd)[0] == 0
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 143)]
)
def test_signals_reach_the_group_and_none_is_left(sent, code, tmp_path):
    body = (
        "if rank == 0:\n  signal.signal(signal.SIGINT, lambda *_: (print('kept', flush=True), sys.exit(130)))\n"
        "else:\n  signal.signal(signal.SIGINT, lambda *_: os._exit(9))\n"
        f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    program = "import sys; from softprompt.launch.processes import run_group; sys.exit(run_group(sys.argv[1:], 2))"
    command = [sys.executable, "-c", program, sys.executable, "-S", "-c", HEAD + body]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        pids = [wait_for_pid(tmp_path / f"{rank}") for rank in (0, 1)]
        parent.send_signal(sent)
        out, said = parent.communicate(timeout=20)
    assert (parent.returncode, out, said) == (code, "kept\n" if sent == signal.SIGINT else "", "")
    assert not any(psutil.pid_exists(pid) for pid in pids)


def wait_for_pid(file):
    give_up = time.monotonic() + 20
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    return int(file.read_text())


def test_the_command_is_ours_without_the_number(monkeypatch):
    seen = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(processes, "run_group", lambda command, count: seen.append((command, count)) or 7)
    assert run_processes(2, ["train", "--processes", "2", "--out", "x"]) == 7
    assert seen == [([sys.executable, "-m", "softprompt", "train", "--out", "x"], 2)]


def test_an_option_is_left_out_with_its_value():
    assert without_option(["a", "--n", "2", "b", "--n=3", "--nn", "4"], "--n") == ["a", "b", "--nn", "4"]
    assert without_option(["--n", "--n", "--n"], "--n") == []


def test_what_cannot_be_started_is_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="processes is 0"):
        run_processes(0, [])
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'softprompt\[distributed\]'"):
        run_processes(2, [])
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="already one of 4 processes"):
        run_processes(2, [])


def test_the_module_starts_without_torch():
    program = "import sys, softprompt.launch.processes; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
