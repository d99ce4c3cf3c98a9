"""Derivatives of a global batch: under checkpointing, of results changed in place, twice over one graph, of rows from
inference mode, and what they leave behind."""

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gkd_fast import distributed
from tests.ops_cases import D64, requires_cpp, same_bits, upstream_like

from .test_functions import FUNCTIONS, tensors

pytestmark = requires_cpp
COUNTS = [9, 4]
ALL = [*FUNCTIONS]


def on_rank(group, name):
    """This rank's function and its inputs."""
    rank = torch.distributed.get_rank(group)
    own = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    inputs = [x.detach()[own].clone().requires_grad_() for x in tensors(name, D64, sum(COUNTS))[0]]
    return lambda *x: FUNCTIONS[name][0](x, backend="cpp", process_group=group), inputs


def every_order(function, inputs, change=None):
    """Gradients, and those of the sum of their squares; ``change``: a factor that results get in place before they are
    used."""
    output = function(*inputs)
    upstream = upstream_like(output)
    factor = 1.0
    if change is not None:
        output.mul_(change)
        factor = 1 / change
    gradients = torch.autograd.grad(output, inputs, factor * upstream, create_graph=True)
    total = sum((g if change is None else g.mul_(change) / change).square().sum() for g in gradients)
    first = [g.detach().clone() / (change or 1) for g in gradients]
    return first, list(torch.autograd.grad(total, inputs))


def checkpointed(group, name):
    function, inputs = on_rank(group, name)
    expected = every_order(function, inputs)
    found = every_order(lambda *x: checkpoint(function, *x, use_reentrant=False), inputs)
    return all(map(same_bits, found, expected))


def changed_in_place(group, name):
    function, inputs = on_rank(group, name)
    expected = every_order(function, inputs)
    return all(map(same_bits, every_order(function, inputs, change=2.0), expected))


def repeated(group, name):
    function, inputs = on_rank(group, name)
    output = function(*inputs)
    first = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    return same_bits(torch.autograd.grad(output.sum(), inputs), first)


def from_inference_mode(group, name):
    """The first input trains, the others are frozen features."""
    function, inputs = on_rank(group, name)
    frozen = [x.detach() for x in inputs[1:]]
    with torch.inference_mode():
        made = [x.clone() for x in frozen]
    results = [torch.autograd.grad(function(inputs[0], *x).square().sum(), inputs[0]) for x in (made, frozen)]
    return same_bits(*results)


def left_behind(group, name):
    """Tensors with as many rows as the global batch that are alive after a backward pass."""
    function, inputs = on_rank(group, name)

    def whole():
        gc.collect()
        return sum(type(x) is torch.Tensor and x.dim() > 1 and len(x) == sum(COUNTS) for x in gc.get_objects())

    before = whole()
    output = function(*inputs)
    during = whole()
    output.sum().backward()
    return during > before or distributed.GATHER_BUDGET == 0, whole() == before, output.grad_fn is not None


def with_budget(group, check, name, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "GATHER_BUDGET", budget)
        return check(group, name)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("check", [checkpointed, changed_in_place, repeated, from_inference_mode])
def test_derivatives_are_the_plain_ones(pool, check, name):
    for budget in (float("inf"), 0):
        assert pool.run(with_budget, check, name, budget, ranks=len(COUNTS)) == [True] * len(COUNTS)


@pytest.mark.parametrize("name", ALL)
def test_nothing_gathered_outlives_the_backward_pass(pool, name):
    for budget in (float("inf"), 0):
        assert pool.run(with_budget, left_behind, name, budget, ranks=len(COUNTS)) == [(True, True, True)] * len(COUNTS)
