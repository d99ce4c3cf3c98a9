"""The driver with micro-batches: the same training where there is no batch norm, in less memory."""

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from gkd_fast.meta import SECOND_DERIVATIVES
from gkd_fast.train import build, cli
from gkd_fast.train.build import build_distiller, build_network_for
from gkd_fast.train.config import Config, TrainError
from gkd_fast.train.cost import peak_bytes
from gkd_fast.train.data import load_splits
from gkd_fast.train.engine import Distiller
from gkd_fast.train.run import Interrupted, train
from tests.train import group_norm
from tests.train.conftest import quiet
from tests.train.test_driver import options


@pytest.fixture
def without_batch_norm(monkeypatch):
    monkeypatch.setattr(build, "build_network", group_norm.without_batch_norm(build.build_network))


def double_distiller(config: Config) -> Distiller:
    splits = load_splits(config.data, config.seed)
    teacher = build_network_for(config.teacher_network, splits, seed=99).double()
    settings = config, splits, "gkd", config.student_network, config.student_training, teacher
    distiller = build_distiller(*settings)
    for module in (distiller.student, distiller.criterion, distiller.pair_weights):
        module.double()
    return distiller


@pytest.mark.parametrize("second_derivatives", SECOND_DERIVATIVES)
def test_iterations_are_those_of_the_whole_batch(tiny, without_batch_norm, second_derivatives):
    """Meta-steps too, whose second derivatives are taken part by part."""
    config = replace(tiny, meta=replace(tiny.meta, second_derivatives=second_derivatives))
    distillers = [double_distiller(replace(config, micro_batch=m)) for m in (None, 7)]
    sizes = set()
    distillers[1].student.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0])))
    start = [p.clone() for p in distillers[0].pair_weights.parameters()]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(20, 1, 8, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (20,), generator=generator)
        terms = [distiller.train_step(images, labels) for distiller in distillers]
        torch.testing.assert_close(*terms, atol=1e-12, rtol=1e-12)
        for distiller in distillers:
            assert distiller.meta_step(images, labels)["meta_gradient_norm"] > 0
    assert sizes == {7, 6}
    for part in ("student", "criterion", "pair_weights"):
        pairs = zip(*(getattr(distiller, part).parameters() for distiller in distillers), strict=True)
        assert max((p - q).abs().max() for p, q in pairs) <= 1e-9
    assert any(not torch.equal(p, q) for p, q in zip(distillers[1].pair_weights.parameters(), start))


def weights(folder: Path) -> torch.Tensor:
    state = torch.load(folder / "weights.pt", weights_only=True)["model"]
    return torch.cat([t.flatten() for t in state.values() if t.is_floating_point()])


def run_cli(config: Config, command: str, *arguments: str) -> torch.Tensor:
    """The weights that a training from the command line ends with."""
    config = replace(config, output=f"{config.output}-{len(arguments)}")
    assert cli.main([*options(config, command), *arguments]) == 0
    return weights(Path(config.output))


def test_a_training_is_that_of_the_whole_batch(tiny, without_batch_norm):
    found, expected = run_cli(tiny, "teacher", "--micro-batch", "16"), run_cli(tiny, "teacher")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_batch_norm_sees_micro_batches(tiny, tiny_teacher):
    student = ["--method", "gkd", "--teacher", tiny_teacher]
    found, expected = run_cli(tiny, "student", *student, "--micro-batch=16"), run_cli(tiny, "student", *student)
    assert found.isfinite().all() and (found - expected).abs().max() > 1e-3


def test_interrupted_and_resumed(tiny, tiny_teacher, tmp_path, monkeypatch):
    config = replace(tiny, method="gkd", teacher=tiny_teacher, micro_batch=16)
    train(replace(config, output=str(tmp_path / "uninterrupted")), "student", quiet())
    steps = Distiller.train_step
    monkeypatch.setattr(Distiller, "train_step", lambda *a: (os.kill(os.getpid(), signal.SIGINT), steps(*a))[1])
    with pytest.raises(Interrupted):
        train(config, "student", quiet())
    monkeypatch.undo()
    with pytest.raises(TrainError, match="micro_batch"):
        train(replace(config, resume=True, micro_batch=17), "student", quiet())
    train(replace(config, resume=True), "student", quiet())
    assert torch.equal(weights(Path(config.output)), weights(tmp_path / "uninterrupted"))


def test_memory_is_that_of_a_micro_batch(tiny):
    """Of a training step and a meta-step, by PyTorch's allocator; features and losses are those of the whole batch."""
    images, labels = torch.randn(96, 1, 14, 14, dtype=torch.float64), torch.randint(10, (96,))
    peaks = []
    for micro_batch in (None, 6):
        distiller = double_distiller(replace(tiny, micro_batch=micro_batch))
        steps = (partial(step, images, labels) for step in (distiller.train_step, distiller.meta_step))
        peaks.append([peak_bytes(step, torch.device("cpu")) for step in steps])
    assert all(small < whole / 3 for whole, small in zip(*peaks)), peaks
