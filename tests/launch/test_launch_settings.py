"""What a process makes of its launcher's environment, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from softprompt.config import BaseConfig
from softprompt.errors import ConfigError, MissingDependencyError
from softprompt.launch import accelerated
from softprompt.launch.accelerated import AcceleratedRanks, config_of_rank, one_voice, ranks_of_environment, shard_base
from softprompt.launch.processes import RENDEZVOUS, may_report_errors
from softprompt.training import Alone


@pytest.fixture
def two_processes(monkeypatch):
    """The environment of the second of two."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def second_rank(device="cpu:0"):
    return AcceleratedRanks(SimpleNamespace(process_index=1, num_processes=2, device=device, state=SimpleNamespace()))


@pytest.mark.parametrize("world_size", [None, "1"])
def test_without_a_launcher_there_is_one_process_and_no_need_of_accelerate(monkeypatch, world_size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr(accelerated, "find_spec", lambda name: None)
    ranks = ranks_of_environment()
    assert isinstance(ranks, Alone)
    config = BaseConfig(base="x", device_map="auto")
    assert config_of_rank(config, ranks) is config
    with one_voice(ranks):
        print("heard")


def test_several_processes_need_accelerate(two_processes, monkeypatch):
    monkeypatch.setattr(accelerated, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'softprompt\[distributed\]'"):
        ranks_of_environment()


def test_of_many_that_complain_the_first_does_or_the_one_that_the_launcher_picks(two_processes, monkeypatch):
    monkeypatch.delenv(RENDEZVOUS, raising=False)
    assert not may_report_errors()
    monkeypatch.setenv(RENDEZVOUS, "file")
    assert may_report_errors()
    monkeypatch.delenv(RENDEZVOUS)
    monkeypatch.setenv("RANK", "0")
    assert may_report_errors()


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_processes_cannot_share_one_device_other_than_the_cpu(two_processes, device):
    with pytest.raises(ConfigError, match=f"device is '{device}', but 2 processes take a device each"):
        ranks_of_environment(device)


def test_more_processes_than_gpus_are_refused(two_processes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 processes were started, but this machine has 1 CUDA"):
        ranks_of_environment()


def test_a_number_of_processes_that_nobody_started_is_refused(two_processes, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", RENDEZVOUS):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but this was not started by a launcher"):
        ranks_of_environment("cpu")


def test_each_rank_loads_onto_its_own_device(two_processes):
    config = BaseConfig(base="x")
    assert config_of_rank(config, second_rank()).device == "cpu"
    assert config_of_rank(config, second_rank("cuda:1")).device == "cuda:1"
    assert second_rank().num_on_this_machine == 2
    with pytest.raises(ConfigError, match="device_map 'auto' spreads one process over all devices, but 2 processes"):
        config_of_rank(BaseConfig(base="x", device_map="auto"), second_rank())


def test_a_base_to_be_split_is_loaded_whole_on_the_cpu_by_every_rank(two_processes, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    ranks = second_rank()
    assert ranks.in_step
    config = config_of_rank(BaseConfig(base="x", dtype="bfloat16"), ranks)
    assert (config.device, config.dtype) == ("cpu", "bfloat16")
    assert accelerated.os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_fsdp_of_version_1_is_refused(two_processes, monkeypatch, tiny_llama):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    ranks = second_rank()
    ranks.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    with pytest.raises(ConfigError, match="FSDP of version 1; set fsdp_version 2"):
        shard_base(tiny_llama, ranks)


def test_nothing_is_split_where_nobody_asked(tiny_llama):
    before = [type(module) for module in tiny_llama.model.modules()]
    shard_base(tiny_llama, Alone())
    shard_base(tiny_llama, second_rank())
    assert [type(module) for module in tiny_llama.model.modules()] == before
