"""GraphKDLoss in CUDA graphs. Not yet seen on a GPU."""

import json
from dataclasses import replace

import pytest
import torch

from gkd_fast import GraphKDLoss
from tests.ops_cases import GRAPHS
from tests.train.conftest import quiet, tiny_config

from .target import TARGET, needs_gpu

pytestmark = needs_gpu

BATCH, WIDTHS = 96, (32, 48)
both_forms = pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)


def inputs(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    students, teachers = (
        [torch.randn(BATCH, width, generator=generator).to(TARGET.device) for width in WIDTHS] for _ in range(2)
    )
    return students, teachers, torch.randint(0, 5, (BATCH,), generator=generator).to(TARGET.device)


def loss_of(**options) -> GraphKDLoss:
    torch.manual_seed(0)
    return GraphKDLoss(WIDTHS, WIDTHS, num_classes=5, embed_dim=32, **options).to(TARGET.device)


class Flat(torch.nn.Module):
    """The loss with all tensors as its own arguments, as graphed callables take them."""

    def __init__(self, criterion: GraphKDLoss):
        super().__init__()
        self.criterion = criterion

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.criterion(tensors[:2], tensors[2:4], tensors[4])


def gradients(loss: torch.Tensor, students, criterion) -> list[torch.Tensor]:
    return [loss, *torch.autograd.grad(loss, [*students, *criterion.parameters()])]


@both_forms
def test_a_graphed_callable(graph):
    eager, captured = loss_of(**graph), loss_of(**graph)
    students, teachers, target = inputs(0)
    sample = [x.clone().requires_grad_() for x in students] + teachers + [target]
    graphed = torch.cuda.make_graphed_callables(Flat(captured), tuple(sample))
    for seed in (1, 2):
        students, teachers, target = inputs(seed)
        students = [x.requires_grad_() for x in students]
        found = gradients(graphed(*students, *teachers, target), students, captured)
        expected = gradients(eager(students, teachers, target), students, eager)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@both_forms
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("column_bank", [0, 2 * BATCH])
def test_a_whole_step(column_bank, autocast, graph):
    """Forward, backward and the bank's additions; the first calls, with their diagnostics, are not captured."""
    eager, captured = (loss_of(column_bank=column_bank, **graph) for _ in range(2))
    students, teachers, target = inputs(0)
    students = [x.requires_grad_() for x in students]

    def step(criterion: GraphKDLoss) -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = criterion(students, teachers, target)
        return gradients(loss, students, criterion)

    def feed(seed: int) -> None:
        with torch.no_grad():
            for side, new in zip((students, teachers, [target]), inputs(seed)):
                for x, value in zip(side, new if isinstance(new, list) else [new]):
                    x.copy_(value)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for seed in range(3):
            feed(seed)
            step(captured)
            step(eager)
        graph = torch.cuda.CUDAGraph()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = step(captured)
    for seed in (3, 4):
        feed(seed)
        graph.replay()
        torch.testing.assert_close(found, step(eager), rtol=1e-4, atol=1e-5)


def test_the_driver(tmp_path):
    """Epochs with a batch of another size, and meta-steps between the replays."""
    from accelerate.state import AcceleratorState

    from gkd_fast.train.run import train

    teacher = tiny_config(tmp_path / "teacher")
    train(teacher, "teacher", quiet())
    training = replace(teacher.student_training, batch_size=45, epochs=3, milestones=[2])
    records = []
    for name in ("eager", "captured"):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = replace(
            teacher, output=str(tmp_path / name), device="cuda", teacher=teacher.output, student_training=training,
            cuda_graphs=name == "captured",
        )  # fmt: skip
        train(config, "student", quiet())
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records.append([{k: v for k, v in json.loads(x).items() if isinstance(v, float)} for x in lines])
    AcceleratorState._reset_state(reset_partial_state=True)
    for eager, captured in zip(*records, strict=True):
        assert captured == pytest.approx(eager, rel=2e-2)
