"""Killed and resumed equals uninterrupted, bit for bit."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gkd_fast import UnrolledSGD
from gkd_fast.train import checkpoint
from gkd_fast.train.engine import Distiller
from gkd_fast.train.progress import Display
from gkd_fast.train.run import Interrupted, Run, train
from tests.train.conftest import tiny_config

PROCESSES = multiprocessing.get_context("forkserver")
# What takes seconds to import is there once, in the server that the processes are forked from.
PROCESSES.set_forkserver_preload(["tests.train.test_driver_resume", "torch._dynamo"])

# Moments at which a process kills itself: the function that is entered, and at which call of it.
MOMENTS = {
    "first step": (Distiller, "train_step", 1),
    "training step after a checkpoint": (Distiller, "train_step", 5),
    "meta-step": (Distiller, "meta_step", 2),
    "hypergradient": (UnrolledSGD, "hypergradient", 3),
    "save, before the driver's state": (checkpoint.torch, "save", 9),
    "save, before the manifest": (checkpoint, "_describe", 6),
    "save, before the rename": (checkpoint.os, "replace", 4),
    "save, after the rename": (checkpoint, "_checkpoints", 4),
    "end of the epoch, after the metrics": (Run, "_save", 2),
    "writing the weights": (Run, "_pair_weight_change", 1),
}


def _train(config, moment: str | None, notes: str) -> None:
    if moment is not None:
        owner, name, count = MOMENTS[moment]
        function, calls = getattr(owner, name), 0

        def counted(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        setattr(owner, name, counted)
    with open(notes, "a") as file:
        train(config, "student", Display(Console(file=file), brief=True))


def _in_process(config, moment: str | None = None) -> int:
    """Trains in a process of its own; its exit code."""
    process = PROCESSES.Process(target=_train, args=(config, moment, config.output + ".notes"))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture
def student(tiny, tiny_teacher):
    # The permuted weights draw random numbers in every step, on top of all that plain gkd has.
    return replace(tiny, method="gkd-permuted", teacher=tiny_teacher)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    config = replace(tiny_config(folder), method="gkd-permuted", teacher=tiny_teacher)
    assert _in_process(config) == 0
    return Path(config.output)


def _assert_same(run: Path, other: Path) -> None:
    weights, others = (torch.load(folder / "weights.pt", weights_only=True)["model"] for folder in (run, other))
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.equal(weights[name], others[name]), name
    newest = sorted((run / "checkpoints").iterdir())[-1]
    twin = other / "checkpoints" / newest.name
    states = [torch.load(folder / checkpoint.STATE, weights_only=True) for folder in (newest, twin)]
    for part in ("meta_optimizer", "scheduler", "random_state"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
    # The distiller with its pair weights, optimizer and random states; driver.pt also holds the times that steps took.
    for file in newest.iterdir():
        if file.name not in (checkpoint.STATE, checkpoint.MANIFEST):
            assert file.read_bytes() == (twin / file.name).read_bytes(), file.name
    assert (run / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_uninterrupted(student, uninterrupted, moment):
    assert _in_process(student, moment) == -signal.SIGKILL
    assert not (Path(student.output) / "weights.pt").exists()
    unfinished = (Path(student.output) / "checkpoints" / checkpoint.PARTIAL).exists()
    assert unfinished == moment.startswith("save, before")
    assert _in_process(replace(student, resume=True)) == 0
    _assert_same(Path(student.output), uninterrupted)
    resumed = "going on at" in Path(student.output + ".notes").read_text()
    assert resumed == (moment not in ("first step", "meta-step"))


def test_killed_from_outside_again_and_again(student, uninterrupted):
    config = replace(student, save_every=1)
    kills = 0
    for seconds in (0.0, 0.05, 0.15, 0.4):
        process = PROCESSES.Process(target=_train, args=(config, None, config.output + ".notes"))
        process.start()
        while process.is_alive() and not checkpoint.exists(Path(config.output) / "checkpoints"):
            time.sleep(0.002)
        time.sleep(seconds)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        config = replace(config, resume=True)
    assert kills > 0
    assert _in_process(config) == 0
    _assert_same(Path(config.output), uninterrupted)


def test_interrupt_saves_and_says_so(student, uninterrupted, monkeypatch):
    steps = Distiller.train_step
    monkeypatch.setattr(Distiller, "train_step", lambda *a: (os.kill(os.getpid(), signal.SIGINT), steps(*a))[1])
    with pytest.raises(Interrupted, match=student.output):
        train(student, "student", Display(Console(quiet=True)))
    assert json.loads((Path(student.output) / "checkpoints/step-000000001/manifest.json").read_text())["step"] == 1
    monkeypatch.undo()
    assert _in_process(replace(student, resume=True)) == 0
    _assert_same(Path(student.output), uninterrupted)
