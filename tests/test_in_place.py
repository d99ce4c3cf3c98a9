"""Results belong to the caller, who may change them in place: no backward pass reads them."""

import pytest
import torch

from .ops_cases import BANKED, FUNCTIONS, FUSED, leaves, requires_fused, upstream_like

pytestmark = requires_fused
CASES = FUNCTIONS | BANKED


@pytest.mark.parametrize("name", CASES)
def test_a_changed_output_has_its_own_gradient(name):
    make, widths = CASES[name]
    results = []
    for backend in (FUSED, "reference"):
        inputs = leaves(widths)
        output = make(backend)(*inputs)
        output[0] = 0
        torch.relu_(output)
        results.append(torch.autograd.grad(output.square().sum(), inputs))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_changed_gradients_have_their_own_derivative(name):
    make, widths = CASES[name]
    results = []
    for backend in (FUSED, "reference"):
        inputs = leaves(widths)
        output = make(backend)(*inputs)
        gradients = torch.autograd.grad(output, inputs, upstream_like(output), create_graph=True)
        output.detach().zero_()
        for g in gradients:
            g.mul_(2)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
