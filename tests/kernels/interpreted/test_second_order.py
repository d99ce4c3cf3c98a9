"""The second order's kernels against the reference: finite differences, types, shapes, divisions, column sets."""

import importlib
from functools import partial

import pytest
import torch
from gkd_fast.kernels import table
from torch.autograd import gradgradcheck

from tests.second_order_cases import (
    FUNCTIONS,
    MOVING,
    SHARP,
    assert_agrees,
    assert_errs_no_more_than_plain,
    assert_exact_in_float32,
    check_row_sets_of_node_contrast,
    matrices,
    second_order,
)

from .judge import BATCHES, between_nans, features, judge

D64 = torch.float64
OPS = ("node_contrast",)
FUNCTIONS, SHARP = ({k: f for k, f in table.items() if k.startswith(OPS)} for table in (FUNCTIONS, SHARP))
ROWS = [slice(5, 25)]
DIVISIONS = ["programs", "pieces", "strips"]

each = pytest.mark.parametrize("name", FUNCTIONS)


def judge_second_order(function, inputs, tiles=None):
    judge(function, inputs, tiles, second_order)


@pytest.mark.parametrize("name", [*FUNCTIONS, *SHARP])
def test_finite_differences_across_tiles(name):
    function, widths = (FUNCTIONS | SHARP)[name]
    with table.forced(16, 16):
        assert gradgradcheck(partial(function, backend="triton"), matrices(18, *widths), fast_mode=True)


@pytest.mark.parametrize("name", [*FUNCTIONS, *SHARP])
@pytest.mark.parametrize("divided", ["whole", "strips"])
def test_agrees_with_the_reference(name, division, divided):
    function, widths = (FUNCTIONS | SHARP)[name]
    with table.forced(16, 16, **division(divided)):
        assert_agrees(function, matrices(20, *(5 * w for w in widths)), "triton")


@each
@pytest.mark.parametrize("kind", ["spread", "near-equal"])
def test_float32_errs_no_more_than_twice_plain_pytorch(name, kind):
    function, widths = FUNCTIONS[name]
    inputs = [x.detach() for x in matrices(37, *(16 * w for w in widths))]
    if kind == "near-equal":
        inputs = [1 + 0.1 * x for x in inputs]
    with table.forced(16, 16):
        assert_errs_no_more_than_plain(function, inputs, "triton")


@each
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(name, batch):
    function, widths = FUNCTIONS[name]
    with table.forced(16, 16):
        if batch == 1:
            assert_exact_in_float32(function, matrices(1, *widths), "triton")
    judge_second_order(function, features(batch, *(4 * w + 1 for w in widths)))


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divided", ["whole", "strips"])
def test_short_types(name, dtype, division, divided):
    function, widths = FUNCTIONS[name]
    judge_second_order(function, features(20, *(16 for _ in widths), dtype=dtype), division(divided))


@each
@pytest.mark.parametrize("divided", ["programs", "pieces"])
def test_divisions_of_the_columns(name, division, divided):
    function, widths = FUNCTIONS[name]
    judge_second_order(function, features(37, *(3 * w for w in widths)), division(divided))


@each
def test_frozen_inputs_and_zero_rows(name):
    function, widths = FUNCTIONS[name]
    for frozen in range(len(widths)):
        inputs = [x.detach() for x in features(20, *(3 * w for w in widths))]
        inputs[0][3] = 0
        for k, x in enumerate(inputs):
            x.requires_grad_(k != frozen)
        judge_second_order(function, inputs)


@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("divided", ["whole", "pieces", "strips"])
@pytest.mark.parametrize("keep", [True, False])
def test_column_sets_of_node_contrast(moving, division, divided, keep):
    with table.forced(16, 16, **division(divided)):
        check_row_sets_of_node_contrast(37, ROWS, moving, keep, between_nans)


def test_node_contrast_without_kept_weighted_sums(monkeypatch):
    monkeypatch.setattr(importlib.import_module("gkd_fast.ops.node_contrast"), "KEEP_WEIGHTED_BYTES", 0)
    function, widths = FUNCTIONS["node_contrast"]
    with table.forced(16, 16):
        assert_agrees(function, matrices(20, *widths), "triton")
