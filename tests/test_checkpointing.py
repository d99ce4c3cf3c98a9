"""Gradients under activation checkpointing, which computes what a backward pass reads once, when it first reads it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from .ops_cases import BANKED, FUNCTIONS, FUSED, leaves, requires_fused, upstream_like

pytestmark = requires_fused
CASES = FUNCTIONS | BANKED


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_plain_ones(name, use_reentrant):
    make, widths = CASES[name]
    function, inputs = make(FUSED), leaves(widths)
    plain = function(*inputs)
    upstream = upstream_like(plain)
    expected = torch.autograd.grad(plain, inputs, upstream)
    checkpointed = checkpoint(function, *inputs, use_reentrant=use_reentrant)
    checkpointed.backward(upstream)
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(x.grad, y)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_the_plain_ones(name):
    make, widths = CASES[name]
    function, inputs = make(FUSED), leaves(widths)

    def second_order(output):
        upstream = upstream_like(output).requires_grad_()
        gradients = torch.autograd.grad(output, inputs, upstream, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), [*inputs, upstream])

    expected = second_order(function(*inputs))
    for x, y in zip(second_order(checkpoint(function, *inputs, use_reentrant=False)), expected, strict=True):
        assert torch.equal(x, y)
