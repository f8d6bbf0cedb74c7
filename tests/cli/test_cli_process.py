"""What only a process of its own shows: what it imports, its pipes, its exit code after Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from support.command_line import ENVIRONMENT, run, run_apart, start
from support.material import sentence, write_csv

from softprompt.runs import RunFolder
from softprompt.storage import load_prompt

HEAVY = {"torch", "transformers", "datasets", "peft", "scipy", "numpy"}


@pytest.mark.parametrize("flag", ["--help", "--version", "-h"])
def test_help_and_version_import_nothing_heavy(flag):
    script = f"""
import sys
sys.argv = ["softprompt", "{flag}"]
from softprompt.cli.main import main
try:
    main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
print(*{{name.partition(".")[0] for name in sys.modules}}, file=sys.stderr)
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert child.returncode == 0, child.stderr
    assert not HEAVY & set(child.stderr.split())
    assert "softprompt" in child.stdout


@pytest.mark.medium
def test_results_go_to_stdout_and_messages_to_stderr_and_libraries_print_nothing(base_folder, library):
    flags = ("--prompt", library / "coach", "--input", "w5 w6", "--max-new-tokens", 4)
    ran = run_apart("compare", "--base", base_folder, "--dtype", "float32", *flags, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["answered"]
    said = [line for line in ran.err.splitlines() if "cores busy" not in line]  # the tests run beside others
    assert len(said) == 1
    assert said[0].startswith("tiny-llama: llama,")


@pytest.mark.medium
def test_a_refusal_is_one_line_and_exit_code_2(base_folder, tmp_path):
    flags = ("--data", tmp_path / "none.csv", "--out", tmp_path / "out")
    ran = run_apart("train", "--base", base_folder, *flags)
    assert ran.complaint.startswith("there is no data at")
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.medium
def test_a_reader_that_leaves_early_is_no_error(base_folder):
    texts = ["w5 w6"] * 40
    with start("generate", "--base", base_folder, "--max-new-tokens", 40, "--json", *texts) as process:
        process.stdout.close()  # as `| head -0` does
        said = process.stderr.read()
    assert "Broken" not in said
    assert "Traceback" not in said
    assert "Exception" not in said
    assert process.returncode == 1


@pytest.fixture
def endless(base_folder, tmp_path):
    """A training that would take minutes."""
    data = write_csv(tmp_path / "texts.csv", [{"prompt": sentence(i)} for i in range(32)])
    flags = ("--data", data, "--rows", 16, "--virtual-tokens", 3, "--epochs", 5_000, "--schedule", "constant")
    return ("train", "--base", base_folder, "--text-column", "prompt", "--dtype", "float32", *flags)


def interrupt_after_steps(process, folder, num_steps):
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b'"step"') < num_steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)


@pytest.mark.medium
def test_ctrl_c_saves_the_best_prompt_and_prints_its_folder(endless, tmp_path):
    out = tmp_path / "run"
    with start(*endless, "--validation", "6", "--out", out, "--json") as process:
        result, said = interrupt_after_steps(process, out, num_steps=6)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    found = json.loads(result)
    assert found["interrupted"] is True
    assert f"interrupted; the prompt of step {found['kept_step']} is kept" in said
    assert said.rstrip().endswith(f"saved to {out}")
    prompt = load_prompt(out)
    assert prompt.content_hash == found["content_hash"]
    assert RunFolder(out).read_plan()["result"]["interrupted"] is True
    losses = dict(found["validation_losses"])
    assert found["kept_step"] == min(losses, key=losses.__getitem__)
    own_folder = out / "checkpoints" / f"step-{found['kept_step']}"
    if own_folder.exists():  # it may be this one that Ctrl-C kept from being written
        assert torch.equal(prompt.tensor, load_prompt(own_folder).tensor)
    assert not list(out.glob("**/.*"))


def test_ctrl_c_without_validation_saves_the_prompt_of_the_last_step(endless, tmp_path):
    out = tmp_path / "run"
    ended = threading.Event()

    def interrupt() -> None:
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < 5:
            if ended.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        ran = run(*endless, "--out", out, "--json")
    finally:
        ended.set()
        thread.join()
    assert ran.code == 130
    assert ran.json["kept_step"] == ran.json["steps"] == len(ran.json["losses"])
    assert load_prompt(out).content_hash == ran.json["content_hash"]


@pytest.mark.medium
def test_a_terminal_gets_a_progress_line_and_no_output_of_libraries(base_folder, texts, tmp_path):
    leader, follower = pty.openpty()
    flags = ("--data", texts, "--text-column", "prompt", "--epochs", 3, "--validation", "6", "--out", tmp_path / "run")
    process = start(
        "train", "--base", base_folder, *flags, stderr=follower, env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "110"}
    )
    with process:
        os.close(follower)
        said = b""
        while True:
            try:
                said += os.read(leader, 65536)
            except OSError:  # what Linux says at the end of a terminal
                break
    os.close(leader)
    shown = said.decode()
    assert process.returncode == 0
    assert "tokens/s" in shown
    assert "validation " in shown
    assert "15/15" in shown
    assert "Loading" not in shown
    assert "it/s" not in shown
    assert f"saved to {tmp_path / 'run'}" in shown.replace("\r\n", "")


LIGHT = [
    ("train", "--help"),
    ("sweep", "--help"),
    ("generate", "--help"),
    ("compare", "--help"),
    ("serve", "--help"),
    ("demo", "--help"),
    ("prompts", "show", "--help"),
    ("runs", "show", "--help"),
    ("keys", "list", "--help"),
    ("train", "--bogus"),
    ("train",),
    ("compare", "--prompt", "a"),
    ("generate", "--base", "b"),
    ("serve", "--port", "x"),
    ("keys", "list", "--state", "none", "--json"),
]


def test_help_usage_errors_and_keys_import_no_torch(tmp_path):
    """All in one process: torch would stay once it was there."""
    script = f"""
import sys
from softprompt.cli.main import main
for arguments in {LIGHT!r}:
    sys.argv = ["softprompt", *arguments]
    try:
        main()
    except SystemExit as ended:
        print(" ".join(arguments), ended.code, file=sys.stderr)
    for name in ("torch", "transformers", "scipy"):
        assert name not in sys.modules, (arguments, name)
"""
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=60
    )
    assert child.returncode == 0, child.stderr
    for arguments in LIGHT:
        refused = "--help" not in arguments and "keys" not in arguments
        assert f"{' '.join(arguments)} {2 if refused else 0}\n" in child.stderr, child.stderr


def test_the_package_imports_nothing_that_only_some_uses_need():
    """What a base's own code needs is imported as the base is loaded, by transformers."""
    script = """
import sys
from softprompt import (
    AsyncEngine, Candidate, Comparison, Engine, Library, SoftPrompt, compare, freeze_base, generate, load_base,
    load_prompt, read_rows, save_prompt, train, train_together,
)
import softprompt.runs
late = ("peft", "datasets", "scipy.stats", "scipy.optimize", "accelerate", "transformers.modeling_utils",
        "transformers.models.bloom")
print([name for name in late if name in sys.modules])
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert child.stdout == "[]\n", child.stdout + child.stderr


def test_the_demo_names_what_it_lacks_before_it_trains(monkeypatch, tmp_path):
    lacking = {"peft", "sklearn"}
    monkeypatch.setattr("softprompt.cli.demo.find_spec", lambda name: None if name in lacking else name)
    said = run("demo", "--out", tmp_path / "out").complaint
    assert said == "the demo compares with PEFT and scikit-learn; pip install 'softprompt[demo]'"
    assert not (tmp_path / "out").exists()
