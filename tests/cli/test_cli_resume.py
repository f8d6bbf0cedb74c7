"""A run that is stopped, in whatever way, and goes on is the run that was never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from support.command_line import ENVIRONMENT, run, succeed
from support.killable import Forks
from support.material import save_base, sentence, write_csv

from softprompt.errors import StorageError
from softprompt.runs import RunFolder
from softprompt.runs.run_folder import STATE_NAME, STATE_TENSORS_NAME
from softprompt.storage import load_prompt

TIMED = ("seconds",)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Some seconds of training on a base that is quickly loaded, with a checkpoint after every fifth step."""
    place = tmp_path_factory.mktemp("resume")
    base = save_base(place / "tiny-llama")
    data = write_csv(place / "texts.csv", [{"prompt": sentence(i)} for i in range(40)])
    return (
        "train", "--base", base, "--data", data, "--text-column", "prompt", "--virtual-tokens", 3, "--dtype", "float32",
        "--rows", 24, "--validation", "6", "--epochs", 40, "--batch-rows", 4, "--save-every", 5, "--schedule", "cosine",
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    succeed(*flags, "--out", out)
    return out


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def untimed(folder):
    """The metrics but for how long a step took."""
    return [
        {key: value for key, value in line.items() if key not in TIMED} for line in RunFolder(folder).read_metrics()
    ]


def assert_same_run(found, wanted, seed=None):
    """`seed` of the moments that led here is in the message."""
    assert adapter_bytes(found) == adapter_bytes(wanted), seed
    assert untimed(found) == untimed(wanted), seed
    mine, theirs = RunFolder(found).read_plan(), RunFolder(wanted).read_plan()
    assert mine["result"] == theirs["result"], seed
    steps = [[each.step for each in RunFolder(folder).checkpoints()] for folder in (found, wanted)]
    assert steps[0] == steps[1], seed


def progress(folder):
    """How many lines of metrics a run has written."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_for_progress(child, folder, before):
    """Until the run has written more lines than before, its process has ended, or it has had its time."""
    deadline = time.monotonic() + 30
    while progress(folder) <= before and time.monotonic() < deadline:
        if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.002)


def kill_at_a_random_moment(child, folder, before, moments, *, on_the_way):
    """Whether the run has got further by then; `on_the_way` waits until it has, however slow the machine."""
    if on_the_way:
        wait_for_progress(child, folder, before)
    time.sleep(moments.uniform(0.0, 0.3) if on_the_way else moments.uniform(0.05, 0.8))
    os.kill(child, signal.SIGKILL)
    return progress(folder) > before


@pytest.mark.parametrize(
    "num_kills", [1, pytest.param(5, marks=pytest.mark.medium), pytest.param(20, marks=pytest.mark.slow)]
)
def test_a_run_killed_at_random_moments_and_resumed_is_the_unbroken_one_to_the_bit(
    flags, straight, tmp_path, num_kills
):
    """In rounds: each run is killed and resumed until it ends. The seed of the moments is in the message."""
    seed = random.SystemRandom().randrange(2**32)
    moments = random.Random(seed)
    num_killed = num_on_the_way = 0
    with Forks() as forks:
        while num_killed < num_kills:
            out, log = tmp_path / f"run-{num_killed}", tmp_path / f"log-{num_killed}"
            for _ in range(num_kills):
                before = progress(out)
                child = forks.start([*flags, "--out", out, "--resume"], str(log))
                got_further = kill_at_a_random_moment(child, out, before, moments, on_the_way=num_killed % 2 == 0)
                if forks.wait() != -signal.SIGKILL:
                    break
                num_killed += 1
                num_on_the_way += got_further
            if not (out / "adapter_config.json").exists():
                forks.start([*flags, "--out", out, "--resume"], str(log))
                assert forks.wait() == 0, (seed, log.read_text())
            assert "Traceback" not in log.read_text(), (seed, log.read_text())
            assert_same_run(out, straight, seed)
    assert num_on_the_way >= num_kills // 4, (seed, num_on_the_way)  # else the moments miss what they are for


@pytest.mark.medium
def test_an_interrupted_run_is_resumed_from_its_folder_alone(flags, straight, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    with Forks() as forks:
        child = forks.start([*flags, "--out", out], str(log))
        while not (out / "checkpoints" / "step-10").exists():
            time.sleep(0.01)
        os.kill(child, signal.SIGINT)
        assert forks.wait() == 130, log.read_text()
    assert f"go on with: softprompt train --resume --out {out}" in log.read_text()
    said = succeed("train", "--resume", "--out", out).err
    assert "resumed after step" in said
    assert_same_run(out, straight)
    assert "is finished; there is nothing to resume" in succeed("train", "--resume", "--out", out).err


@pytest.mark.medium
def test_a_run_on_a_full_disk_ends_in_one_line_and_resumes_from_its_last_checkpoint(flags, straight, tmp_path):
    disk, result = tmp_path / "disk", tmp_path / "result"
    disk.mkdir()
    command = " ".join(map(str, flags))
    script = f"""
set -e
mount -t tmpfs -o size=72k none {disk}
code=0; python -m softprompt {command} --out {disk}/run 2> {tmp_path}/first || code=$?
test $code = 2
ls {disk}/run/checkpoints > {tmp_path}/kept
mount -o remount,size=10m {disk}
python -m softprompt {command} --out {disk}/run --resume 2> {tmp_path}/second
cp -r {disk}/run {result}
"""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("a small disk needs a mount namespace (unshare -Urm)")
    environment = {**ENVIRONMENT, "PATH": f"{os.path.dirname(os.sys.executable)}:{os.environ['PATH']}"}
    ran = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, env=environment)
    first = (tmp_path / "first").read_text()
    assert ran.returncode == 0, (ran.stderr, first, (tmp_path / "second").exists())
    assert "no space left on the disk" in first.splitlines()[-1]
    assert "Traceback" not in first
    assert "step-" in (tmp_path / "kept").read_text()
    assert "resumed after step" in (tmp_path / "second").read_text()
    assert_same_run(result, straight)


@pytest.fixture(scope="module")
def killed(flags, tmp_path_factory):
    """A run as a kill leaves it in its middle: a finished run without its result and its later checkpoints."""
    out = tmp_path_factory.mktemp("killed") / "half"
    succeed(*flags, "--out", out, "--keep-checkpoints", 100)
    folder = RunFolder(out)
    for step, path in folder.checkpoints():
        if step > 20:
            shutil.rmtree(path)
    plan = folder.read_plan()
    del plan["result"]
    folder.write_plan(plan)
    for name in ("adapter_model.safetensors", "adapter_config.json", "softprompt.json"):
        (out / name).unlink()
    return out


@pytest.fixture
def half_way(killed, tmp_path):
    return Path(shutil.copytree(killed, tmp_path / "half"))


class TestSettings:
    def test_the_whole_command_with_resume_continues_the_run(self, flags, half_way, straight):
        said = succeed(*flags, "--out", half_way, "--resume").err
        assert "resumed after step 20" in said
        assert adapter_bytes(half_way) == adapter_bytes(straight)

    def test_a_resumed_run_with_another_seed_is_refused(self, flags, half_way):
        said = run(*flags, "--out", half_way, "--resume", "--seed", 1).complaint
        assert said.startswith("--seed is 1, but the run in")
        assert "was begun with 0" in said

    def test_a_resumed_run_with_other_rows_is_refused(self, half_way, tmp_path):
        others = write_csv(tmp_path / "others.csv", [{"prompt": sentence(i + 1)} for i in range(40)])
        assert "of another run" in run("train", "--out", half_way, "--resume", "--data", others).complaint

    def test_a_run_resumes_with_its_rows_moved_and_its_steps_split_otherwise(self, flags, half_way, straight, tmp_path):
        moved = shutil.copy(flags[flags.index("--data") + 1], tmp_path / "moved.csv")
        succeed("train", "--out", half_way, "--resume", "--data", moved, "--micro-batch-rows", 3)
        assert torch.allclose(load_prompt(half_way).tensor, load_prompt(straight).tensor, rtol=1e-2, atol=1e-3)

    def test_resume_and_overwrite_exclude_each_other(self, flags, half_way):
        assert "exclude each other" in run(*flags, "--out", half_way, "--resume", "--overwrite").complaint

    def test_resume_without_a_run_begins_one_and_needs_its_flags(self, flags, tmp_path):
        assert "Missing option '--base'" in run("train", "--out", tmp_path / "new", "--resume").complaint
        succeed(*flags, "--epochs", 1, "--out", tmp_path / "new", "--resume")
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "thesis.txt").write_text("mine")
        assert "exists" in run(*flags, "--out", tmp_path / "thesis", "--resume").complaint

    def test_a_run_of_an_older_release_is_refused(self, half_way):
        plan = json.loads((half_way / "run.json").read_text())
        del plan["settings"]
        (half_way / "run.json").write_text(json.dumps(plan))
        assert "does not record how it was begun" in run("train", "--out", half_way, "--resume").complaint


class TestUnlikelyMoments:
    def test_a_run_that_failed_before_its_first_step_can_be_resumed(self, flags, tmp_path, monkeypatch):
        out = tmp_path / "stuck"
        monkeypatch.setattr(RunFolder, "go_back_to", lambda *_: (_ for _ in ()).throw(StorageError("no space left")))
        assert "no space left" in run(*flags, "--epochs", 1, "--out", out).complaint
        monkeypatch.undo()
        succeed(*flags, "--epochs", 1, "--out", out, "--resume")
        assert (out / "adapter_config.json").exists()

    def test_a_kill_while_an_earlier_run_is_cleared_leaves_a_run(self, flags, straight, tmp_path, monkeypatch):
        out = Path(shutil.copytree(straight, tmp_path / "earlier"))
        remove = shutil.rmtree

        def end_there(path, *arguments, **settings):
            remove(path, *arguments, **settings)
            raise StorageError("killed here")

        monkeypatch.setattr(shutil, "rmtree", end_there)
        assert "killed here" in run(*flags, "--epochs", 1, "--out", out, "--overwrite").complaint
        monkeypatch.undo()
        assert not (out / "checkpoints").exists()
        assert RunFolder(out).has_begun()
        succeed(*flags, "--epochs", 1, "--out", out, "--overwrite")

    def test_repeated_flags_count_as_the_recorded_ones(self, flags, tmp_path):
        several = [
            *flags,
            "--epochs",
            2,
            "--candidates",
            2,
            "--vary",
            "seed",
            "--vary",
            "rate",
            "--out",
            tmp_path / "o",
        ]
        succeed(*several)
        folder = RunFolder(tmp_path / "o")
        plan = folder.read_plan()
        del plan["result"]
        folder.write_plan(plan)
        assert "resumed after step" in succeed(*several, "--resume").err

    @pytest.mark.parametrize("more", [(), ("--candidates", 3)])
    def test_a_finished_run_prints_again_what_it_printed(self, more, flags, tmp_path):
        """Once the candidates were left out."""
        finished = (*flags, "--epochs", 4, *more, "--out", tmp_path / "o", "--json")
        assert succeed(*finished, "--resume").json == succeed(*finished, "--resume").json

    def test_a_run_does_not_write_over_what_it_starts_from(self, flags, straight):
        said = run(*flags, "--init-from", f"{straight}/", "--out", straight, "--overwrite").complaint
        assert "choose another --out" in said

    def test_candidates_of_one_adapter_do_not_vary_what_it_fixes(self, flags, straight, tmp_path):
        some = ("--init-from", f"{straight}/", "--candidates", 2, "--vary", "start", "--out", tmp_path / "o")
        assert "leave --vary start out" in run(*flags, *some).complaint


class TestBrokenCheckpoints:
    @pytest.mark.parametrize(
        "spoil", ["cut", *(pytest.param(way, marks=pytest.mark.medium) for way in ("missing", "json"))]
    )
    def test_a_broken_checkpoint_is_skipped_for_the_one_before(self, spoil, half_way, straight):
        latest = RunFolder(half_way).checkpoints()[-1].path
        tensors = latest / STATE_TENSORS_NAME
        if spoil == "cut":
            tensors.write_bytes(tensors.read_bytes()[:-1])
        elif spoil == "missing":
            tensors.unlink()
        else:
            (latest / STATE_NAME).write_text("{")
        said = succeed("train", "--out", half_way, "--resume").err
        assert "the checkpoint before it is taken" in said
        assert "resumed after step 15" in said
        assert adapter_bytes(half_way) == adapter_bytes(straight)

    def test_a_run_without_checkpoints_begins_again(self, half_way, straight):
        shutil.rmtree(half_way / "checkpoints")
        assert "resumed after" not in succeed("train", "--out", half_way, "--resume", "--keep-checkpoints", 3).err
        assert_same_run(half_way, straight)


@pytest.mark.slow
def test_candidates_are_killed_and_resumed_together(flags, tmp_path):
    several = [*flags, "--candidates", 4, "--epochs", 12]
    succeed(*several, "--out", tmp_path / "straight")
    out, log = tmp_path / "killed", tmp_path / "log"
    with Forks() as forks:
        child = forks.start([*several, "--out", out], str(log))
        while not (out / "checkpoints" / "step-15").exists():
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert forks.wait() == -signal.SIGKILL
    succeed(*several, "--out", out, "--resume")
    assert_same_run(out, tmp_path / "straight")
    for name in ("c0", "c1", "c2", "c3"):
        assert adapter_bytes(out / "candidates" / name) == adapter_bytes(tmp_path / "straight" / "candidates" / name)
