"""The driver's steps in CUDA graphs, as far as a machine without a GPU shows them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gkd_fast._snapshot import Snapshot
from gkd_fast.train import build, cli, graphs
from gkd_fast.train.config import TrainError
from gkd_fast.train.engine import Distiller
from gkd_fast.train.run import train
from tests.train.conftest import quiet
from tests.train.test_driver import options


def test_it_says_what_it_cannot_have(tiny, tiny_teacher, capsys):
    student = [*options(tiny, "student"), "--teacher", tiny_teacher, "--cuda-graphs"]
    assert cli.main(student) == 1
    assert "cuda_graphs cannot be had: it needs a CUDA device, and the run is on cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("gkd", {"precision": "fp16"}, "precision fp16"),
        ("gkd", {"micro_batch": 8}, "micro_batch"),
        ("gkd-permuted", {}, "method gkd-permuted"),
        ("gkd", {"column_bank": 4}, "graph.column_bank"),
    ],
)
def test_reasons(tiny, method, changes, reason):
    class OnGPU:
        device, num_processes = torch.device("cuda"), 1

    graphs.check_capture(tiny, "gkd", OnGPU)
    graph = replace(tiny.graph, column_bank=changes.pop("column_bank", 0))
    with pytest.raises(TrainError, match=f"cuda_graphs cannot be had: {reason}"):
        graphs.check_capture(replace(tiny, graph=graph, **changes), method, OnGPU)


@pytest.fixture
def pretended(monkeypatch) -> list[int]:
    """CUDA graphs that are pretended: a capture has no effect, a replay runs the step and writes to its memory; the
    number of samples of each step that runs."""
    steps: list[int] = []
    module = None

    def captured(run):
        parameters = list(module.parameters())
        snapshot = Snapshot([module])
        results = run()
        steps.pop()
        held = [p.grad for p in parameters]
        snapshot.restore()

        def replay():
            for p in parameters:
                p.grad = None
            for name, value in run().items():
                results[name].copy_(value)
            for p, kept in zip(parameters, held, strict=True):
                if kept is not None:
                    kept.copy_(p.grad)
                p.grad = None

        return results, replay

    step = Distiller._forward_and_backward

    def counting(self, images, labels):
        nonlocal module
        module = self.module
        steps.append(len(images))
        return step(self, images, labels)

    monkeypatch.setattr(Distiller, "_forward_and_backward", counting)
    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(build, "check_capture", lambda *_: None)
    return steps


def test_the_training_is_that_without(tiny, tiny_teacher, tmp_path, pretended):
    """Batches of 45 are captured after three, the last of an epoch, of 20, run as ever; meta-steps come between."""
    training = replace(tiny.student_training, batch_size=45, epochs=3, milestones=[2])
    config = replace(tiny, method="gkd", teacher=tiny_teacher, student_training=training)
    records = []
    for name in ("eager", "captured"):
        pretended.clear()
        folder = tmp_path / name
        train(replace(config, output=str(folder), cuda_graphs=name == "captured"), "student", quiet())
        assert pretended == [45, 45, 45, 45, 20] * 3
        records.append([json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()])
    assert records[0] == records[1]
