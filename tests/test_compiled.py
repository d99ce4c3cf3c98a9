"""Compiled criteria and functions give the uncompiled values: in one graph, or out of it on purpose."""

import copy

import pytest
import torch

from gkd_fast import GraphKDLoss

from .ops_cases import BANKED, FUSED, GRAPHS, leaves, requires_fused, same_bits, upstream_like

pytestmark = requires_fused


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def steps(criterion, call, count=3):
    """Losses and gradients of training steps of two stages."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(count):
        students = [torch.randn(8, d, generator=generator).requires_grad_() for d in (4, 5)]
        teachers = [torch.randn(8, 6, generator=generator) for _ in range(2)]
        loss = call(students, teachers, torch.arange(8) % 3)
        results += [loss.detach(), *torch.autograd.grad(loss, [*students, *criterion.parameters()])]
    return results


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("column_bank", [0, 12])
def test_a_criterion_of_two_stages(column_bank, graph):
    torch.manual_seed(0)
    options = {"num_classes": 3, "embed_dim": 8, "column_bank": column_bank, "backend": FUSED}
    criterion = GraphKDLoss([4, 5], [6, 6], **options, **graph)
    plain = copy.deepcopy(criterion)
    expected = steps(plain, plain)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=not column_bank)
    for found, right in zip(steps(criterion, compiled), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    assert same_bits(criterion.buffers(), plain.buffers())
    if column_bank:
        (reason,) = torch._dynamo.utils.counters["graph_break"]
        assert "process groups and column banks are not compiled" in reason


@pytest.mark.parametrize("name", BANKED)
def test_functions_with_a_bank(name):
    make, widths = BANKED[name]
    function, inputs = make(FUSED), leaves(widths)
    expected = function(*inputs)
    gradients = torch.autograd.grad(expected, inputs, upstream_like(expected))
    for _ in range(2):
        found = torch.compile(lambda *x: 2 * function(*x), backend="aot_eager")(*inputs)
        torch.testing.assert_close(found, 2 * expected)
        for x, y in zip(torch.autograd.grad(found, inputs, upstream_like(expected)), gradients, strict=True):
            torch.testing.assert_close(x, 2 * y)
