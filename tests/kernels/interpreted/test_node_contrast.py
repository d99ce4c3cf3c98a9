"""node_contrast's kernels against the reference: types, shapes, divisions of the columns, column sets."""

import importlib

import pytest
import torch

from gkd_fast import functional, ops
from gkd_fast.kernels.common import table

from .judge import BATCHES, between_nans, features, judge

D64 = torch.float64


def node_contrast(num_students: int, **options):
    return lambda *x, backend: functional.node_contrast(x[:num_students], x[num_students:], backend=backend, **options)


@pytest.fixture(params=["weighted sums kept", "recomputed"])
def keep(request, monkeypatch):
    if request.param == "recomputed":
        monkeypatch.setattr(importlib.import_module("gkd_fast.ops.node_contrast"), "KEEP_WEIGHTED_BYTES", 0)


def test_students_opposite_to_all_teachers(keep, small_or_large):
    """Against log-sums near −1/τ a column that does not exist would weigh more than float32 holds."""
    student = (-torch.ones(5, 8)).requires_grad_()
    losses = functional.node_contrast(student, torch.ones(5, 8), temperature=0.01, backend="triton")
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch, keep, small_or_large):
    judge(node_contrast(1), features(batch, 13, 13))


@pytest.mark.parametrize("dim", [1, 16, 33])
def test_widths(dim, keep, small_or_large):
    judge(node_contrast(1), features(17, dim, dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 0.05])
def test_types(dtype, temperature, keep, small_or_large):
    judge(node_contrast(1, temperature=temperature), features(37, 16, 16, dtype=dtype))


@pytest.mark.parametrize("name", ["programs", "pieces", "strips", "divided strips"])
@pytest.mark.parametrize("dtype", [D64, torch.float16])
def test_divisions_of_the_columns(division, name, dtype, keep):
    judge(node_contrast(1), features(37, 16, 16, dtype=dtype), division(name))


@pytest.mark.parametrize("name", ["small", "whole", "programs", "strips", "divided strips"])
def test_wanted_stage_pairs(division, name, keep):
    judge(node_contrast(2, pairs=[(0, 1), (1, 0), (1, 2)]), features(20, *[9] * 5), division(name))
    judge(node_contrast(2, pairs=[(1, 0)]), features(20, *[9] * 3), division(name))


@pytest.mark.parametrize("name", ["small", "whole", "programs", "pieces", "strips", "divided strips"])
def test_own_shifts_where_the_shared_one_would_underflow(division, name, keep):
    judge(node_contrast(1, temperature=0.01), features(20, 9, 9), division(name))


def test_frozen_inputs(small_or_large):
    for frozen in ([0], [1], [0, 2], [1, 2]):
        inputs = features(20, 9, 9, 9)
        for k in frozen:
            inputs[k].requires_grad_(False)
        judge(node_contrast(2), inputs)


def test_zero_rows(small_or_large):
    x, y = (t.detach() for t in features(20, 9, 9))
    x[3] = 0
    y[7] = 0
    judge(node_contrast(1), [x.requires_grad_(), y.requires_grad_()])


@pytest.mark.parametrize("name", ["whole", "pieces", "strips", "divided strips"])
@pytest.mark.parametrize("kept", [True, False])
def test_column_sets(division, name, kept):
    """Rows 5 … 25 with all 37 columns give what the whole batch gives there."""
    rows, options = slice(5, 25), ([True, False, True, True], 0.2, "float64")
    with table.forced(16, 16, **division(name)):
        unit = [between_nans(x) for x in ops.unit_rows(features(37, *[9] * 4), D64)]
        students, teachers = unit[:2], unit[2:]
        losses, log_sums, weighted = torch.ops.gkd_fast.node_contrast(students, teachers, *options, kept)
        upstream = torch.randn(37, 2, 2, dtype=D64)
        needs = [True] * 4
        gradients = torch.ops.gkd_fast.node_contrast_backward(
            upstream, students, teachers, log_sums, weighted, *options, needs
        )
        part = [[between_nans(x[rows]) for x in side] for side in (students, teachers)]
        results = torch.ops.gkd_fast.node_contrast(*part, *options, kept, teachers, rows.start)
        torch.testing.assert_close(results[0], losses[rows])
        torch.testing.assert_close(results[1], log_sums[:, rows])
        if kept:
            torch.testing.assert_close(results[2], weighted[:, rows])
        found = torch.ops.gkd_fast.node_contrast_backward(
            between_nans(upstream[rows]), *part, *results[1:], *options, needs, teachers, students, rows.start,
            upstream, log_sums,
        )  # fmt: skip
        torch.testing.assert_close(found, [g[rows] for g in gradients])
