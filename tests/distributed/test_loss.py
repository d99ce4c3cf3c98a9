"""The loss over several ranks: terms, gradients, diagnostics, training under DDP and FSDP2, the meta-step."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gkd_fast import GraphKDLoss, PairWeightNetwork, UnrolledSGD, distributed
from gkd_fast.distributed import until_all_end
from tests.ops_cases import D64, requires_cpp

pytestmark = requires_cpp
CLASSES = 3
OPTIONS = {"num_classes": CLASSES, "embed_dim": 6}


class Student(nn.Module):
    """A network without batch statistics, its loss in one module so that DDP sees all parameters."""

    def __init__(self, group=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.stage1, self.stage2, self.classifier = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(4, CLASSES)
        self.criterion = GraphKDLoss([8, 4], [5, 7], process_group=group, **(OPTIONS | options))
        self.double()

    def forward(self, x, teacher_features, labels, share):
        """``share``: that of one sample in the mean over the global batch, times the number of ranks."""
        first = self.stage1(x).tanh()
        second = self.stage2(first).tanh()
        cross_entropy = share * F.cross_entropy(self.classifier(second), labels, reduction="sum")
        return cross_entropy + self.criterion([first, second], teacher_features, labels)


def problem(batch: int, step: int = 0):
    generator = torch.Generator().manual_seed(100 + step)
    x, t1, t2 = (torch.randn(batch, width, dtype=D64, generator=generator) for width in (5, 5, 7))
    return x, [t1, t2], torch.randint(CLASSES, (batch,), generator=generator)


def shard(group, counts, x, teacher_features, labels):
    rank = 0 if group is None else dist.get_rank(group)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    return x[own], [t[own] for t in teacher_features], labels[own], len(counts) / sum(counts)


def step_counts(step: int, ranks: int) -> list[int]:
    """Shards that change from step to step; now and then a rank has no sample."""
    return [(7 * rank + 5 * step) % 11 + (rank == 0) for rank in range(ranks)]


def train(group, wrapper="ddp", process_group=True, steps=20, accumulate=1):
    """The parameters after SGD on changing shards; ``group`` None: one process with all samples."""
    ranks = 1 if group is None else dist.get_world_size(group)
    student = Student(group if process_group else None)
    model = student
    if group is not None and wrapper == "ddp":
        model = DistributedDataParallel(student, process_group=group)
    if wrapper == "fsdp":
        fully_shard(model, mesh=dist.device_mesh.DeviceMesh.from_group(group, "cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        counts = step_counts(step, 4)
        data = problem(sum(counts), step)
        if group is not None and ranks != 4:
            counts = [sum(counts[rank::ranks]) for rank in range(ranks)]
        mine = shard(group, counts if group is not None else [sum(counts)], *data)
        last = (step + 1) % accumulate == 0
        with nullcontext() if last or group is None else model.no_sync():
            (model(*mine) / accumulate).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    state = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach() for p in state]


def distance(parameters, others) -> float:
    return max((x - y).abs().max().item() for x, y in zip(parameters, others, strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_twenty_steps_of_ddp_give_the_parameters_of_one_process(pool, ranks):
    expected = train(None)
    for parameters in pool.run(train, ranks=ranks):
        assert distance(parameters, expected) < 1e-9


def test_without_a_process_group_they_differ(pool):
    assert distance(pool.run(train, "ddp", False, 1, ranks=1)[0], train(None, steps=1)) < 1e-12
    with pytest.raises(RuntimeError, match="empty"):
        pool.run(train, "ddp", False)
    assert distance(pool.run(equal_shards_without_a_group, ranks=2)[0], equal_shards_without_a_group(None)) > 1e-3


def equal_shards_without_a_group(group):
    student = Student()
    model = student if group is None else DistributedDataParallel(student, process_group=group)
    counts = [16] if group is None else [8, 8]
    model(*shard(group, counts, *problem(16))).backward()
    return [p.grad for p in student.parameters()]


def test_gradient_accumulation(pool):
    expected = train(None, accumulate=2)
    for parameters in pool.run(train, "ddp", True, 20, 2, ranks=2):
        assert distance(parameters, expected) < 1e-9


def test_fully_sharded_parameters(pool):
    expected = train(None)
    for parameters in pool.run(train, "fsdp", ranks=2):
        assert distance(parameters, expected) < 1e-9
