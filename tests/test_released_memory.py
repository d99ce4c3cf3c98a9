"""A backward pass releases what it read, column sets too, though the caller still holds the output."""

import gc

import pytest
import torch

from gkd_fast import functional

from .ops_cases import FUSED, requires_fused, rows

pytestmark = requires_fused
BATCH, BANK, WIDTH = 13, 37, 5


def relation_kl(x, y, bank):
    return functional.relation_kl(x, y, bank=([bank], [bank]), backend=FUSED)


def node_contrast(x, y, bank):
    return functional.node_contrast(x, y, bank=[bank], backend=FUSED)


def held() -> int:
    """Rows of nodes and of banks, of any kind, that are alive."""
    gc.collect()
    shapes = [(BATCH, WIDTH), (BANK, WIDTH)]
    return sum(type(x) is torch.Tensor and tuple(x.shape) in shapes for x in gc.get_objects())


@pytest.mark.parametrize("function", [relation_kl, node_contrast])
def test_the_graph_holds_no_columns_after_its_backward_pass(function):
    x, y = (x.requires_grad_() for x in rows(BATCH, WIDTH, WIDTH))
    (bank,) = rows(BANK, WIDTH)
    before = held()
    output = function(x, y, bank)
    assert held() >= before + 4
    gradients = torch.autograd.grad(output.sum(), [x, y], retain_graph=True)
    again = torch.autograd.grad(output.sum(), [x, y])
    assert all(torch.equal(g, h) for g, h in zip(gradients, again))
    del gradients, again
    assert held() == before
    assert output.grad_fn is not None
    with pytest.raises(RuntimeError, match="a second time"):
        output.sum().backward()


@pytest.mark.parametrize("function", [relation_kl, node_contrast])
def test_neither_does_the_graph_of_the_gradients(function):
    x, y = (x.requires_grad_() for x in rows(BATCH, WIDTH, WIDTH))
    (bank,) = rows(BANK, WIDTH)
    before = held()
    output = function(x, y, bank)
    gradients = torch.autograd.grad(output.sum(), [x, y], create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in gradients), [x, y])
    del output
    assert held() == before + len(gradients)
