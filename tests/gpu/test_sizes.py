"""Every op and type at the sizes and widths that have kernels of their own: forward, gradients and second order."""

import pytest
import torch

from .problems import OPS, assert_all_products, assert_within, problem
from .target import TARGET

each_op = pytest.mark.parametrize("op", OPS)
SHORT = [torch.bfloat16, torch.float16]
BOUND = 1e-2  # of the largest entry, at any mean cosine


@each_op
@pytest.mark.parametrize("width", TARGET.widths)
@pytest.mark.parametrize("rows", TARGET.rows)
def test_every_width(op, rows, width):
    assert_all_products(problem(op, rows, width, torch.float64, stages=(1, 1)))


@pytest.mark.parametrize("op", OPS[2:])
@pytest.mark.parametrize("widths", TARGET.unequal, ids=str)
@pytest.mark.parametrize("rows", TARGET.rows[:2])
def test_nodes_and_messages_of_unequal_widths(op, rows, widths):
    assert_all_products(problem(op, rows, widths, torch.float64))


@pytest.mark.parametrize("rows", [TARGET.few_rows[-1], *TARGET.rows])
def test_stages_of_unequal_widths_in_one_call(rows):
    stages = (len(TARGET.stage_widths),) * 2
    assert_all_products(problem("relation_kl", rows, TARGET.stage_widths, torch.float64, stages=stages))


@each_op
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("autocast", [False, True], ids=["inputs", "autocast"])
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("cosine", TARGET.cosines)
@pytest.mark.parametrize("rows", [TARGET.few_rows[-1], TARGET.rows[-1]])
def test_rows_that_are_nearly_alike(op, rows, cosine, dtype, autocast, order):
    """The truth is that of the rows as they were given: roundings of similar rows must not be magnified by 1/σ²."""
    width = min(128, TARGET.widths[-1])
    stages = {"stages": (1, 1)} if "conv" not in op else {}
    assert_within(problem(op, rows, width, torch.float64, cosine=cosine, **stages), dtype, BOUND, autocast, order)
