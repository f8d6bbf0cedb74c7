"""Several real processes train what one trains: the same prompt and best checkpoint, the same bits on all ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CASES = [
    "uneven", "micro-batches", "single rows", "residual-mlp", "bloom", "padded", "together a", "together b",
    "together classify", "together tag",
    "split llama", "split llama, single rows", "split llama, checkpointed",
    "split bloom", "split bloom, single rows", "split bloom, checkpointed",
]  # fmt: skip
THREE = pytest.param(3, marks=pytest.mark.medium)


class Groups:
    """Groups of processes by their number, each started when it is first asked for."""

    def __init__(self, folder):
        self._folder, self._found = folder, {}

    def __getitem__(self, count):
        if count not in self._found:
            folder = self._folder / f"of{count}"
            folder.mkdir()
            process = ended(start(by_our_launcher(folder) if count == 2 else by_accelerate(folder, count)))
            self._found[count] = (process, found(folder, count))
        return self._found[count]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return Groups(tmp_path_factory.mktemp("groups"))


@pytest.fixture(scope="module", params=[2, THREE])
def ranks(request, groups):
    """What each rank found."""
    return groups[request.param][1]


def by_our_launcher(folder):
    """Two processes, the second of which fails once all is done."""
    program = (
        "import sys; from softprompt.launch.processes import run_group; "
        "sys.exit(run_group([sys.executable, *sys.argv[1:]], 2))"
    )
    return ["-c", program, HERE / "driver.py", folder, "rank-1-fails"]


def by_accelerate(folder, count):
    number = ["--multi_gpu", "--num_processes", f"{count}", "--num_machines", "1", "--main_process_port", "0"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [HERE / "accelerate_on_loopback.py", *number, *plain, HERE / "driver.py", folder]


def start(command):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=variables, **pipes)


def ended(process):
    out, said = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, said)


def found(folder, count):
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(count)]


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_train_the_prompt_that_one_process_trains(case, ranks, truth):
    for rank in ranks:
        torch.testing.assert_close(rank[case]["prompt"], truth[case]["prompt"], rtol=0, atol=1e-6)
        torch.testing.assert_close(rank[case]["head"], truth[case]["head"], rtol=0, atol=1e-6)
        assert rank[case]["losses"] == pytest.approx(truth[case]["losses"], rel=1e-6)
        assert rank[case]["kept_step"] == truth[case]["kept_step"]
        assert [step for step, _ in rank[case]["validation"]] == [step for step, _ in truth[case]["validation"]]
        losses = [loss for _, loss in truth[case]["validation"]]
        assert [loss for _, loss in rank[case]["validation"]] == pytest.approx(losses, rel=1e-6)


def test_the_best_checkpoint_is_one_on_the_way(truth):
    """So that a rank which judged by its own rows only would keep another."""
    steps = [step for step, _ in truth["uneven"]["validation"]]
    assert steps[0] < truth["uneven"]["kept_step"] < steps[-1]


@pytest.mark.parametrize("case", [*CASES, "float32"])
def test_all_ranks_end_with_the_same_bits(case, ranks):
    first = ranks[0][case]
    for rank in ranks[1:]:
        assert torch.equal(rank[case]["prompt"], first["prompt"])
        assert all(map(torch.equal, rank[case]["head"], first["head"]))
        assert (rank[case]["losses"], rank[case]["validation"]) == (first["losses"], first["validation"])
        assert rank[case]["micro_batch_rows"] == first["micro_batch_rows"]


def test_every_rank_reports_the_whole_step(ranks, truth):
    for rank in ranks:
        assert [step[:2] for step in rank["steps"]] == [step[:2] for step in truth["steps"]]
        assert [step[2] for step in rank["steps"]] == pytest.approx([step[2] for step in truth["steps"]], rel=1e-6)


def test_the_control_gradients_that_are_not_summed_give_other_prompts(ranks, truth):
    expected = truth["unsummed"]["prompt"]
    prompts = [rank["unsummed"]["prompt"] for rank in ranks]
    assert all((prompt - expected).abs().max() > 1e-2 for prompt in prompts)
    assert not torch.equal(prompts[0], prompts[1])


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_each_rank_holds_a_part_of_a_split_base_with_the_same_fingerprint(family, ranks, truth):
    held = [rank[f"share held {family}"] for rank in ranks]
    assert sum(held) == pytest.approx(1.0)
    assert max(held) < 0.6
    assert {rank[f"fingerprint {family}"] for rank in ranks} == {truth[f"fingerprint {family}"]}


@pytest.mark.medium
def test_only_the_first_rank_prints(groups):
    process, _ = groups[3]
    assert process.returncode == 0, process.stderr
    assert process.stdout == "rank 0 speaks\n"
    assert "rank 0 complains" in process.stderr
    assert "rank 1" not in process.stderr


def test_the_error_of_a_failed_rank_is_shown_once(groups):
    process, _ = groups[2]
    assert process.stdout == "rank 0 speaks\n"
    assert process.returncode == 1
    first, *rest = process.stderr.splitlines()
    assert first == "rank 0 complains"
    assert rest[-1].endswith("DataError: rank 1 cannot go on")
    assert sum("Traceback" in line for line in rest) == 1  # the driver has no command line that makes it one sentence
