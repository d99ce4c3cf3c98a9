"""relation_kl's kernels against the reference: types, shapes, divisions of the columns, column sets."""

import pytest
import torch

from gkd_fast import functional, ops
from gkd_fast.kernels.common import table

from .judge import BATCHES, between_nans, features, judge

D64 = torch.float64


def relation_kl(num_students: int, **options):
    return lambda *x, backend: functional.relation_kl(x[:num_students], x[num_students:], backend=backend, **options)


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch, small_or_large):
    judge(relation_kl(1), features(batch, 13, 7))


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 33])
def test_widths(dim, small_or_large):
    judge(relation_kl(1), features(17, dim, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype, small_or_large):
    judge(relation_kl(1), features(37, 16, 16, dtype=dtype))


@pytest.mark.parametrize("name", ["programs", "pieces", "strips", "divided strips"])
@pytest.mark.parametrize("dtype", [D64, torch.float16])
def test_divisions_of_the_columns(division, name, dtype):
    judge(relation_kl(1), features(37, 16, 16, dtype=dtype), division(name))


@pytest.mark.parametrize(("students", "teachers"), [(2, 3), (3, 1)])
def test_all_stage_pairs(students, teachers, small_or_large):
    """More stages than share a launch."""
    judge(relation_kl(students), features(20, *[9] * (students + teachers)))


@pytest.mark.parametrize("name", ["small", "whole", "programs", "pieces", "strips", "divided strips"])
def test_own_shifts_where_the_shared_one_would_underflow(division, name):
    judge(relation_kl(1, temperature=0.01), features(20, 9, 9), division(name))


@pytest.mark.parametrize("name", ["small", "whole", "programs", "strips", "divided strips"])
@pytest.mark.parametrize(("temperature", "perturbation"), [(0.1, 1e-2), (0.05, 1e-3), (0.01, 1e-4)])
def test_losses_of_a_converged_student_err_no_more_than_twice_plain_pytorch(division, name, temperature, perturbation):
    """ℓ is what two nearly equal terms leave; the mean over seeds, since the largest error of a few rows varies."""
    tiles = division(name)
    errors = {"triton": 0.0, "reference": 0.0}
    for seed in range(3):
        teacher, noise = (x.detach() for x in features(20, 16, 16, dtype=torch.float32, seed=seed))
        student = teacher + perturbation * noise
        loss = relation_kl(1, temperature=temperature)
        truth = loss(student.double(), teacher.double(), backend="reference")
        for backend in errors:
            with table.forced(16, 16, **tiles):
                errors[backend] += (loss(student, teacher, backend=backend) - truth).abs().max().item()
    assert errors["triton"] <= 2 * errors["reference"]


@pytest.mark.parametrize("bandwidth", [0.05, 3.0])
def test_bandwidths(bandwidth, small_or_large):
    judge(relation_kl(1, bandwidth=bandwidth), features(20, 9, 9, dtype=torch.float32))


def test_frozen_inputs_and_teachers_alone(small_or_large):
    for frozen in ([0], [1], [0, 2], [1, 2]):
        inputs = features(20, 9, 9, 9)
        for k in frozen:
            inputs[k].requires_grad_(False)
        judge(relation_kl(2), inputs)


def test_zero_rows_and_equal_networks(small_or_large):
    x, y = (t.detach() for t in features(20, 9, 9))
    x[3] = 0
    y[:10] = x[:10]
    judge(relation_kl(1), [x.requires_grad_(), y.requires_grad_()])


@pytest.mark.parametrize("name", ["whole", "pieces", "strips", "divided strips"])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_column_sets(division, name, temperature):
    """Rows 5 … 25 with all 37 columns give what the whole batch gives there."""
    options = (temperature, 0.9, "float64")
    rows = slice(5, 25)
    with table.forced(16, 16, **division(name)):
        unit = [between_nans(x) for x in ops.unit_rows(features(37, 9, 12), D64)]
        students, teachers = unit[:1], unit[1:]
        whole = torch.ops.gkd_fast.relation_kl(students, teachers, *options)
        upstream = torch.randn(37, 1, 1, dtype=D64)
        gradients = torch.ops.gkd_fast.relation_kl_backward(
            upstream, students, teachers, *whole, *options, [True, True]
        )
        part = [[between_nans(x[rows]) for x in side] for side in (students, teachers)]
        columns = students, teachers, rows.start
        losses, *log_sums = torch.ops.gkd_fast.relation_kl(*part, *options, *columns)
        torch.testing.assert_close(losses, whole[0][rows])
        torch.testing.assert_close(log_sums, [x[:, rows] for x in whole[1:]])
        arguments = (between_nans(upstream[rows]), *part, losses, *log_sums, *options, [True, True], *columns)
        torch.testing.assert_close(
            torch.ops.gkd_fast.relation_kl_backward(*arguments, upstream, *whole), [g[rows] for g in gradients]
        )
        # Columns without upstream: what the rows' own upstream alone gives.
        without = torch.ops.gkd_fast.relation_kl_backward(*arguments)
        alone = torch.zeros_like(upstream)
        alone[rows] = upstream[rows]
        mixed = torch.ops.gkd_fast.relation_kl_backward(alone, students, teachers, *whole, *options, [True, True])
        both = torch.ops.gkd_fast.relation_kl_backward(*arguments, alone, *whole)
        torch.testing.assert_close(both, [g[rows] for g in mixed])
        others = torch.ops.gkd_fast.relation_kl_backward(torch.zeros_like(arguments[0]), *arguments[1:], alone, *whole)
        torch.testing.assert_close([a + b for a, b in zip(without, others)], both)
