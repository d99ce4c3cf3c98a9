"""unit_rows on the CPU kernels against the reference: types, scales, zero rows, frozen stages, second derivatives."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gkd_fast import ops, reference
from tests.ops_cases import D64, DTYPES, check, requires_cpp, rows

pytestmark = requires_cpp


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return D64 if dtype == D64 else torch.float32


def fused(x: torch.Tensor) -> torch.Tensor:
    return ops.unit_rows([x], compute_dtype(x.dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "zero rows", "clustered"])
@pytest.mark.parametrize(("batch", "dim"), [(1, 1), (2, 3), (63, 33), (65, 257), (131, 16)])
def test_rows_and_gradients(batch, dim, kind, dtype):
    """Tasks of 64 rows."""
    check(fused, reference.unit_rows, [rows(batch, dim, kind=kind)], dtype)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (D64, 1e-150),
        (D64, 1e300),
        (torch.float32, 1e-18),
        (torch.float32, 1e38),
        (torch.float16, 6e4),
        (torch.bfloat16, 1e38),
    ],
)
def test_no_square_over_or_underflows(dtype, scale):
    x = rows(6, 17)[0]
    x = (x / x.abs().amax() * scale).to(dtype)
    torch.testing.assert_close(fused(x), reference.unit_rows(x.to(D64)).to(compute_dtype(dtype)), rtol=1e-6, atol=1e-6)


def test_a_row_below_the_threshold_of_the_reference_is_zero():
    x = torch.tensor([[1e-20, 0], [0, 0.9 * 2.0**-63], [0, 1.1 * 2.0**-63]], requires_grad=True)
    e = fused(x)
    assert torch.equal(e, reference.unit_rows(x)) and torch.equal(e, torch.tensor([[0.0, 0], [0, 0], [0, 1]]))
    (gradient,) = torch.autograd.grad(e.sum(), x)
    assert torch.equal(gradient[:2], torch.zeros(2, 2)) and gradient.isfinite().all()


@pytest.mark.parametrize("place", [0, 3, 16])
def test_nan_and_infinity_make_their_row_nan(place):
    x = torch.ones(3, 17)
    x[0, place], x[2, place] = math.nan, math.inf
    e = fused(x)
    assert e[0].isnan().all() and e[2].isnan().any() and e[1].isfinite().all()


def test_stages_of_mixed_types_and_strides_in_one_call():
    stages = [rows(7, 9)[0].float()[:, ::2], rows(5, 7)[0].bfloat16().T, rows(7, 1)[0].half().expand(7, 4)]
    before = [x.clone() for x in stages]
    for e, x in zip(ops.unit_rows(stages, torch.float32), stages, strict=True):
        assert e.is_contiguous() and e.dtype == torch.float32
        torch.testing.assert_close(e, reference.unit_rows(x.float()))
    assert all(torch.equal(x, y) for x, y in zip(stages, before))


def test_a_frozen_stage_stays_without_gradient():
    x, y = (t.requires_grad_(k == 0) for k, t in enumerate(rows(5, 3, 3)))
    assert [e.requires_grad for e in ops.unit_rows([x, y], D64)] == [True, False]


def test_unit_rows_and_inverse_norms_are_twice_differentiable():
    x, y = (t.requires_grad_() for t in rows(5, 4, 3))

    def function(*stages):
        unit, inverse_norms = torch.ops.gkd_fast.unit_rows(stages, D64)
        return *unit, *inverse_norms

    assert gradcheck(function, (x, y)) and gradgradcheck(function, (x, y))
