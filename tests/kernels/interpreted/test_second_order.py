"""The second order's kernels against the reference: finite differences, types, shapes, strips, column sets."""

import importlib
from functools import partial

import pytest
import torch
from torch.autograd import gradgradcheck

from gkd_fast import functional
from gkd_fast.kernels.common import table
from tests.second_order_cases import (
    FUNCTIONS,
    MOVING,
    SHARP,
    assert_agrees,
    assert_errs_no_more_than_plain,
    assert_exact_in_float32,
    check_row_sets_of_graph_conv,
    check_row_sets_of_node_contrast,
    check_row_sets_of_relation_kl,
    matrices,
    second_order,
)

from .judge import BATCHES, between_nans, features, judge

ALL = FUNCTIONS | SHARP
# One function of each pass: "row" differs from "symmetric", and more stages from one pair, outside the kernels.
EACH = ["graph_conv symmetric", "node_contrast", "relation_kl of one pair"]
ROWS = [slice(5, 25)]

whole_or_strips = pytest.mark.parametrize("divided", ["whole", "strips"])


def judge_second_order(name, batch, widths=None, tiles=None, dtype=torch.float64):
    function, narrow = ALL[name]
    widths = widths or [4 * w + 1 for w in narrow]
    judge(function, features(batch, *widths, dtype=dtype), tiles, second_order)


@pytest.mark.parametrize("name", EACH)
def test_finite_differences_across_tiles(name):
    """The others are held against the reference below, whose finite differences tests/test_second_order.py takes."""
    function, widths = ALL[name]
    with table.forced(16, 16):
        assert gradgradcheck(partial(function, backend="triton"), matrices(18, *widths), fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_agrees_with_the_reference(name):
    """Several tiles, also of the widths."""
    function, widths = ALL[name]
    with table.forced(16, 16):
        assert_agrees(function, matrices(20, *(5 * w for w in widths)), "triton")


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("kind", ["spread", "near-equal"])
def test_float32_errs_no_more_than_twice_plain_pytorch(name, kind):
    function, widths = ALL[name]
    inputs = [x.detach() for x in matrices(37, *(8 * w for w in widths))]
    if kind == "near-equal":
        inputs = [1 + 0.1 * x for x in inputs]
    with table.forced(16, 16):
        assert_errs_no_more_than_plain(function, inputs, "triton")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_single_row_in_float32(name):
    function, widths = ALL[name]
    with table.forced(16, 16):
        assert_exact_in_float32(function, matrices(1, *widths), "triton")


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(name, batch):
    judge_second_order(name, batch)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_in_strips(name, dtype, division):
    judge_second_order(name, 37, [16 for _ in ALL[name][1]], division("strips"), dtype)


@pytest.mark.parametrize("normalization", ["symmetric", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_neighbors_of_rounded_rows_at_a_small_bandwidth(normalization, dtype):
    """Where the first order's weights are those of rounded rows and the second order's are not."""

    def function(*inputs, backend):
        options = {"bandwidth": 0.1, "self_weight": 0.3, "normalization": normalization, "backend": backend}
        return functional.graph_conv(*inputs, **options)

    judge(function, features(20, 9, 9, dtype=dtype), results=second_order)


@pytest.mark.parametrize("name", ["graph_conv row", *EACH])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_float16_directions_of_any_size(name, scale):
    """Second derivatives are linear in the cotangents."""
    function, widths = ALL[name]
    inputs = features(20, *(9 for _ in widths), dtype=torch.float16)

    def scaled(*arguments, **options):
        return [x * (1 / scale) for x in second_order(*arguments, **options, length=scale)]

    judge(function, inputs, results=scaled)


@pytest.mark.parametrize("name", EACH)
def test_frozen_inputs_and_zero_rows(name):
    function, widths = ALL[name]
    for frozen in range(len(widths)):
        inputs = [x.detach() for x in features(20, *(3 * w for w in widths))]
        inputs[0][3] = 0
        for k, x in enumerate(inputs):
            x.requires_grad_(k != frozen)
        judge(function, inputs, results=second_order)


@whole_or_strips
def test_column_sets_of_graph_conv(division, divided):
    with table.forced(16, 16, **division(divided)):
        check_row_sets_of_graph_conv(37, ROWS, between_nans)


@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize(("divided", "keep"), [("whole", False), ("strips", True)])
def test_column_sets_of_node_contrast(moving, division, divided, keep):
    with table.forced(16, 16, **division(divided)):
        check_row_sets_of_node_contrast(37, ROWS, moving, keep, between_nans)


@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize(("divided", "temperature"), [("whole", 0.01), ("strips", 0.3)])
def test_column_sets_of_relation_kl(moving, division, divided, temperature):
    with table.forced(16, 16, **division(divided)):
        check_row_sets_of_relation_kl(37, ROWS, moving, temperature, between_nans)


def test_node_contrast_without_kept_weighted_sums(monkeypatch):
    monkeypatch.setattr(importlib.import_module("gkd_fast.ops.node_contrast"), "KEEP_WEIGHTED_BYTES", 0)
    judge_second_order("node_contrast", 20)


def test_third_order_is_refused():
    for name in EACH:
        function, widths = ALL[name]
        inputs = matrices(3, *widths)
        with table.forced(16, 16):
            gradients = torch.autograd.grad(function(*inputs, backend="triton").sum(), inputs, create_graph=True)
            (second, *_) = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs, create_graph=True)
        with pytest.raises(NotImplementedError, match="third-order gradients are not offered"):
            torch.autograd.grad(second.sum(), inputs[0])
