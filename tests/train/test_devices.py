"""The device that a training is asked to run on."""

from dataclasses import replace

import pytest
import torch

from gkd_fast.train import cli
from gkd_fast.train.config import Config, TrainError, relevant_options
from gkd_fast.train.devices import choose_cuda_device
from tests.train.test_driver import options


@pytest.fixture
def two_gpus(monkeypatch) -> list[int]:
    """A machine that says it has two; which of them was made the current one."""
    chosen = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:11"])
def test_devices_that_can_be_asked_for(name):
    assert Config(device=name).device == name


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "cpu:0", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"device must be auto, cpu, cuda or cuda:N, got '{name}'"):
        Config(device=name)


@pytest.mark.parametrize(("name", "current"), [("cpu", []), ("auto", []), ("cuda", []), ("cuda:1", [1])])
def test_the_device_becomes_the_current_one(two_gpus, name, current):
    choose_cuda_device(name)
    assert two_gpus == current


def test_a_device_beyond_the_last_is_refused(two_gpus):
    with pytest.raises(TrainError, match="device cuda:2 cannot be had here: there are 2, from cuda:0 on"):
        choose_cuda_device("cuda:2")


def test_several_processes_do_not_share_one(two_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    choose_cuda_device("cuda")
    with pytest.raises(TrainError, match="device cuda:1 is one for several processes: with cuda each takes its own"):
        choose_cuda_device("cuda:1")
    assert two_gpus == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_without_a_gpu_the_command_says_so(tiny, capsys, name):
    assert cli.main([*options(replace(tiny, device=name), "student"), "--method", "ce"]) == 1
    error = capsys.readouterr().err
    assert f"device {name} cannot be had here: torch.cuda.is_available() is False" in error
    assert len(error.splitlines()) == 1


def test_a_run_goes_on_on_another_gpu(tiny):
    first, second, cpu = (relevant_options(replace(tiny, device=d), "student") for d in ("cuda", "cuda:1", "cpu"))
    assert first == second != cpu
