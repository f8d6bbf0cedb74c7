"""A batch that memory does not allow is split, said aloud, and sums to the same; what cannot be split is refused."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.encoders import ENCODERS, build_encoder
from support.family_configs import each_of
from support.ready import ready_run
from support.seq2seq_bases import build_seq2seq
from support.tiny_bases import build_base

from softprompt.base import device, free_bytes
from softprompt.config import TrainConfig
from softprompt.data import rows_from_records
from softprompt.errors import MemoryLimitError
from softprompt.families import TESTED_FAMILIES, Packing, forward_of
from softprompt.splice import column_states, target_states
from softprompt.training import ResumePoint, SliceDone, memory, train

ALLOCATION = 2**20


def config(**changes):
    return TrainConfig(**{"virtual_tokens": 4, "epochs": 1, "batch_rows": 8, **changes})


@pytest.fixture
def one_row_takes(monkeypatch):
    """Pretend that one row takes `peak` bytes of `free` ones."""

    def pretend(peak, free):
        monkeypatch.setattr(memory, "_measured_peak", lambda run, device: run() or peak)
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)

    return pretend


def test_the_batch_is_split_the_run_says_so_and_the_sums_stay(tiny_llama64, texts, one_row_takes):
    whole = train(tiny_llama64, texts, config(micro_batch_rows=8))
    one_row_takes(100, 401)
    slices = []
    split = train(tiny_llama64, texts, config(), sink=lambda e: slices.append(e) if isinstance(e, SliceDone) else None)
    assert split.plan.micro_batch_rows == 3  # four fifths of what is free
    assert any("memory allows 3 of 8 rows at a time" in note for note in split.notes)
    assert len(slices) == 3 + 3 + 2 + 3  # micro-batches, and each step's pass back through the prompt
    assert split.losses == pytest.approx(whole.losses, rel=1e-9)
    torch.testing.assert_close(split.prompt.tensor, whole.prompt.tensor, rtol=1e-5, atol=1e-6)


def test_enough_memory_changes_nothing_and_says_nothing(tiny_llama, texts, one_row_takes):
    one_row_takes(100, 10**9)
    result = train(tiny_llama, texts, config())
    assert result.plan.micro_batch_rows == 8
    assert not any("memory" in note for note in result.notes)


def test_a_row_that_does_not_fit_is_refused_with_its_numbers(tiny_llama, texts, one_row_takes):
    one_row_takes(300 * 2**20, 200 * 2**20)
    with pytest.raises(MemoryLimitError, match="one row takes 300 MiB and 200 MiB are free"):
        train(tiny_llama, texts, config())


@pytest.fixture
def passes(tiny_llama):
    """The forward passes of the base, one item each."""
    seen = []
    forward_of(tiny_llama)
    hook = tiny_llama.model.base_model.register_forward_hook(lambda *_: seen.append(None))
    yield seen
    hook.remove()


def test_nothing_is_run_to_measure_what_surely_fits(tiny_llama, texts, passes, monkeypatch):
    ready_run(tiny_llama, texts, config())
    assert len(passes) == 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**28)  # the control: the bound does not fit, a row does
    ready = ready_run(tiny_llama, texts, config())
    assert len(passes) == 1
    assert ready.loop.micro_batch_rows == 8


@pytest.mark.parametrize("family", sorted(TESTED_FAMILIES))
def test_the_bound_is_above_what_a_step_keeps_for_its_backward_pass(family, texts):
    ready = ready_run(build_base(family), texts, config(batch_rows=21))
    kept = kept_for_backward(ready)
    numbers = 4 * memory.bound_numbers_of_tokens(ready.loop.base, ready.loop.forward, ready.loop.trials)
    assert kept < 0.6 * numbers
    assert kept > 0.1 * numbers  # so loose that it says nothing it should not be either


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_bound_of_an_encoder_decoder_is_above_what_both_sides_keep(family, texts):
    rows = rows_from_records(
        [{"a": text, "b": texts[-i]} for i, text in enumerate(texts)], template="{a}", completion="{b}"
    )
    ready = ready_run(build_seq2seq(family), rows, config(batch_rows=21, decoder_prompt=True))
    numbers = 4 * memory.bound_numbers_of_tokens(ready.loop.base, ready.loop.forward, ready.loop.trials)
    assert 0.05 * numbers < kept_for_backward(ready) < 0.6 * numbers


def kept_for_backward(ready, run=target_states):
    """Bytes that autograd keeps of a forward pass over the first step's rows, the base's own tensors aside."""
    base = ready.loop.base
    own = {tensor.untyped_storage().data_ptr() for tensor in (*base.model.parameters(), *base.model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(base, ready.loop.forward, ready.trial.next_rows()[0], [ready.trial.prompt().requires_grad_(True)])
    return sum(size for size, _ in kept.values())


LABELLED = [{"text": " ".join(f"w{5 + number}" for _ in range(3 + number % 20)), "label": "ab"[number % 2]}
            for number in range(24)]  # fmt: skip


@pytest.mark.parametrize("family", each_of([one for one in ENCODERS if "deberta" not in one], ("albert", "modernbert")))
def test_the_bound_is_above_what_a_step_of_an_encoder_keeps_for_its_backward_pass(family):
    """Its soft prompt runs with each row, and ALBERT's one layer several times."""
    ready = ready_run(build_encoder(family), LABELLED, config(batch_rows=24))
    kept = kept_for_backward(ready, column_states)
    numbers = 4 * memory.bound_numbers_of_tokens(ready.loop.base, ready.loop.forward, ready.loop.trials)
    assert kept < 0.6 * numbers
    assert kept > 0.1 * numbers
    assert memory.bound_of_step(ready.loop.base, ready.loop.forward, ready.loop.trials) < 2**29
    longer = ready_run(build_encoder(family), LABELLED, config(batch_rows=24, virtual_tokens=70))
    as_if_shared = replace(longer.loop.forward, is_causal=True)
    numbers = 4 * memory.bound_numbers_of_tokens(longer.loop.base, as_if_shared, longer.loop.trials)
    assert kept_for_backward(longer, column_states) > numbers  # the control: 24 soft prompts, and not one
    assert math.isinf(memory.bound_of_step(longer.loop.base, padded(longer.loop.forward), longer.loop.trials))


def padded(forward):
    return replace(forward, packing=Packing(None, "padded"))


@pytest.mark.parametrize("family", ["bert", "deberta-v3"])
def test_the_batch_of_an_encoder_is_split_and_the_sums_stay(family, one_row_takes):
    base = build_encoder(family, dtype=torch.float64)
    whole = train(base, LABELLED, config(micro_batch_rows=8))
    one_row_takes(100, 401)
    split = train(base, LABELLED, config())
    assert split.plan.micro_batch_rows == 3
    assert split.plan.layout == ("packed" if family == "bert" else "padded")
    assert split.losses == pytest.approx(whole.losses, rel=1e-9)


def test_rows_whose_losses_depend_on_each_other_are_not_split_but_refused(one_row_takes):
    pairs = [{"anchor": row["text"], "positive": row["text"] + " w9"} for row in LABELLED[:8]]
    one_row_takes(100, 401)
    with pytest.raises(MemoryLimitError, match=r"compares all rows of a step.*batch_rows 3"):
        train(build_encoder("bert"), pairs, config(task="embed"))


def test_a_base_whose_rows_cannot_be_packed_has_no_bound(tiny_llama, texts):
    ready = ready_run(tiny_llama, texts, config())
    padded = replace(ready.loop.forward, packing=Packing(None, "padded"))
    assert memory.bound_of_step(tiny_llama, padded, ready.loop.trials) == math.inf
    alone = replace(ready.loop.forward, max_batchable_length=10)
    assert memory.bound_of_step(tiny_llama, alone, ready.loop.trials) == math.inf
    assert memory.bound_of_step(tiny_llama, ready.loop.forward, ready.loop.trials) < 2**29


def test_a_resumed_run_keeps_its_split_though_memory_measures_a_little_less(tiny_llama, texts, one_row_takes):
    one_row_takes(100, 501)
    points = []
    settings = config(save_every=1)
    straight = train(
        tiny_llama, texts, settings, sink=lambda e: points.append(e) if isinstance(e, ResumePoint) else None
    )
    assert straight.plan.micro_batch_rows == 4
    one_row_takes(100, 450)  # for a new run, 3 rows
    resumed = train(tiny_llama, texts, settings, resume=points[0].state)
    assert resumed.plan.micro_batch_rows == 4
    assert torch.equal(resumed.prompt.tensor, straight.prompt.tensor)
    one_row_takes(100, 10**12)  # and more memory changes nothing
    resumed = train(tiny_llama, texts, settings, resume=points[0].state)
    assert torch.equal(resumed.prompt.tensor, straight.prompt.tensor)


def test_the_least_of_machine_group_and_own_limit_counts(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    real = free_bytes(cpu)
    assert 0 < real < 2**50
    limit, usage = tmp_path / "limit", tmp_path / "usage"
    limit.write_text("5000000\n")
    usage.write_text("3000000\n")
    monkeypatch.setattr(device, "CGROUP_FILES", (("/no/such/file", "/no/such/file"), (str(limit), str(usage))))
    assert free_bytes(cpu) == 2_000_000
    limit.write_text("max\n")
    assert free_bytes(cpu) > 2_000_000


def test_the_measured_peak_sees_an_allocation():
    def run():
        torch.ones(64 * ALLOCATION)

    assert 200 * ALLOCATION < memory._measured_peak(run, torch.device("cpu")) < 600 * ALLOCATION


class FakeDevice:
    """A device whose memory holds so many rows at a time; a bigger micro-batch fails after its step has begun."""

    def __init__(self, real, max_rows):
        self.real, self.max_rows, self.sizes = real, max_rows, []

    def __call__(self, base, forward, prompts, rows, micro_batch_rows, *more):
        self.sizes.append(micro_batch_rows)
        for number, nats in enumerate(self.real(base, forward, prompts, rows, micro_batch_rows, *more)):
            if micro_batch_rows > self.max_rows and number == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield nats


def test_out_of_memory_in_the_middle_of_a_step_halves_and_begins_it_again(tiny_llama64, texts, monkeypatch):
    from softprompt.training import loop

    whole = train(tiny_llama64, texts, config(batch_rows=21, micro_batch_rows=12))
    device = FakeDevice(loop.accumulate_gradient, max_rows=3)
    monkeypatch.setattr(loop, "accumulate_gradient", device)
    split = train(tiny_llama64, texts, config(batch_rows=21, micro_batch_rows=12))
    assert device.sizes == [12, 6, 3]
    assert split.plan.micro_batch_rows == 3
    assert split.prompt.record.run["plan"]["micro_batch_rows"] == 3
    assert split.losses == pytest.approx(whole.losses, rel=1e-12)  # a begun slice was once counted twice
    torch.testing.assert_close(split.prompt.tensor, whole.prompt.tensor, rtol=1e-5, atol=1e-6)


def test_out_of_memory_with_one_row_is_not_hidden(tiny_llama, texts, monkeypatch):
    from softprompt.training import loop

    monkeypatch.setattr(loop, "accumulate_gradient", FakeDevice(loop.accumulate_gradient, max_rows=0))
    with pytest.raises(torch.OutOfMemoryError):
        train(tiny_llama, texts, config(micro_batch_rows=4))


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import psutil, torch
torch.set_num_threads(1)
from support.tiny_bases import build_tokenizer, _COMMON, _LLAMA
from transformers import LlamaConfig, LlamaForCausalLM
from softprompt.base import freeze_base
from softprompt.config import TrainConfig
from softprompt.training import train

torch.manual_seed(0)
settings = {**_COMMON, **_LLAMA, "hidden_size": 256, "intermediate_size": 4096, "max_position_embeddings": 1024}
base = freeze_base(LlamaForCausalLM(LlamaConfig(**settings)), build_tokenizer())
texts = [" ".join(["w5", "w7"] * 250)] * 16

def rows_at_a_time(micro_batch_rows):
    settings = TrainConfig(virtual_tokens=4, max_steps=1, batch_rows=16, micro_batch_rows=micro_batch_rows)
    return train(base, texts, settings).plan.micro_batch_rows

train(base, texts[:1], TrainConfig(virtual_tokens=4, max_steps=1, batch_rows=1))
limit = psutil.Process().memory_info().vms + 500 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(rows_at_a_time(None))
try:
    rows_at_a_time(16)
except RuntimeError as error:
    print("can't allocate" in str(error))
"""


@pytest.mark.medium
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address-space limits are Linux'")
def test_under_an_address_space_limit_the_batch_is_split_rather_than_killed():
    command = [sys.executable, "-c", LIMITED, str(Path(__file__).parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    rows, whole_batch_failed = run.stdout.split()
    assert 1 <= int(rows) < 16
    assert whole_batch_failed == "True"  # the control
