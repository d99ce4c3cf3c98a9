"""A compiled criterion and compiled functions of a global batch."""

import copy
from functools import partial

import pytest
import torch

from gkd_fast import GraphKDLoss, functional
from tests.ops_cases import GRAPHS, requires_cpp, rows, same_bits

pytestmark = requires_cpp
COMPILED = (
    functional.graph_conv,
    partial(functional.graph_conv, **GRAPHS["others"]),
    functional.relation_kl,
    functional.node_contrast,
    functional.info_nce,
    functional.pkt,
)


def steps(group, **graph):
    """Whether losses and gradients of compiled calls are those of uncompiled ones, and in how many graphs."""
    torch._dynamo.reset()
    rank = torch.distributed.get_rank(group)
    torch.manual_seed(0)
    criterion = GraphKDLoss([4, 5], [6, 6], num_classes=3, embed_dim=8, process_group=group, **graph)
    plain = copy.deepcopy(criterion)
    compiled = torch.compile(criterion, backend="aot_eager")
    alike = []
    for step in range(2):
        x = [y.float() for y in rows(7 + rank, 4, 5, 6, 6, seed=step)]
        arguments = [y.requires_grad_() for y in x[:2]], x[2:], torch.arange(7 + rank) % 3
        results = []
        for call, owner in ((compiled, criterion), (plain, plain)):
            loss = call(*arguments)
            results.append([loss.detach(), *torch.autograd.grad(loss, [*arguments[0], *owner.parameters()])])
        alike.append(same_bits(*results))
    return alike


def functions(group):
    torch._dynamo.reset()
    x, y = (z.requires_grad_() for z in rows(6 + torch.distributed.get_rank(group), 4, 4))
    alike = []
    for function in COMPILED:

        def call(x, y, function=function):
            return function(x, y, process_group=group).square().sum()

        compiled = torch.compile(call, backend="aot_eager")
        alike.append(same_bits(*(torch.autograd.grad(f(x, y), [x, y]) for f in (compiled, call))))
    return alike


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_a_criterion(pool, graph):
    assert pool.run(partial(steps, **graph), ranks=2) == [[True, True]] * 2


def test_functions(pool):
    assert pool.run(functions, ranks=2) == [[True] * len(COMPILED)] * 2
