"""The distiller in several processes: one batch over all ranks under DDP, and sharded parameters."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.test_distiller import batch, distiller_of

RANKS = 2


def train(distiller, wrapped, images, labels) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        loss, _, _ = wrapped(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not hasattr(next(distiller.student.parameters()), "to_local"):
            distiller.meta_step(images, labels)
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in distiller.parameters()]
    return [p.detach() for p in whole]


def doubled(**options):
    distiller = distiller_of(**options).double()
    distiller.student[1].eval()  # batch norm's statistics would be those of a rank
    return distiller


def part(group, x):
    return x.tensor_split(dist.get_world_size(group))[dist.get_rank(group)]


def under_ddp(group, pooled: bool):
    images, labels = batch(24)
    distiller = doubled(process_group=group if pooled else None)
    wrapped = DistributedDataParallel(distiller, process_group=group)
    return train(distiller, wrapped, part(group, images.double()), part(group, labels))


def under_fsdp(group):
    from torch.distributed.fsdp import fully_shard

    images, labels = batch(24)
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    distiller = doubled(process_group=group)
    fully_shard(distiller, mesh=mesh)
    found = train(distiller, distiller, part(group, images.double()), part(group, labels))
    with pytest.raises(NotImplementedError, match="sharded"):
        distiller.meta_step(images.double(), labels)
    return found


def test_ranks_under_ddp_train_as_one_process(pool):
    images, labels = batch(24)
    alone = doubled()
    expected = train(alone, alone, images.double(), labels)
    for found in pool.run(under_ddp, True, ranks=RANKS):
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)


def test_ranks_whose_graphs_are_their_own_stay_alike(pool):
    first, *others = pool.run(under_ddp, False)  # of all ranks, over which the meta-step goes
    for found in others:
        torch.testing.assert_close(found, first, atol=0, rtol=0)


def test_sharded_parameters_train_as_whole_ones(pool):
    images, labels = batch(24)
    alone = doubled()
    alone.meta = None
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        alone(images.double(), labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in pool.run(under_fsdp, ranks=RANKS):
        torch.testing.assert_close(found, [p.detach() for p in alone.parameters()], atol=1e-8, rtol=1e-6)
