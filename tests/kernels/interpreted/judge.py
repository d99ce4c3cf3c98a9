"""Judges a kernel's results against the reference in float64."""

from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch
from torch import Tensor

from gkd_fast import functional
from gkd_fast.kernels.common import table

from .conftest import between_nans

# Largest error relative to the largest true entry: float64 and float32 by rounding alone; the two short types by what
# the reference itself loses in them, plus a rounding of the result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}

SHORT_TYPES = (torch.bfloat16, torch.float16)

# Rows, in tiles of 16 × 16: one, two, a tile less and more one, several tiles.
BATCHES = (1, 2, 15, 17, 37)


def features(batch: int, *dims: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(batch, dim, dtype=torch.float64, generator=generator).to(dtype) for dim in dims]
    return [between_nans(x).requires_grad_() for x in rows]


def values_and_gradients(function: Callable, inputs: list[Tensor], upstream: Tensor, **options) -> list[Tensor]:
    value = function(*inputs, **options)
    wanted = [x for x in inputs if x.requires_grad]
    return [value, *torch.autograd.grad(value, wanted, upstream.to(value.dtype))] if wanted else [value]


def judge(
    function: Callable,
    inputs: list[Tensor],
    tiles: dict | None = None,
    results: Callable = values_and_gradients,
) -> None:
    """``judge_as_launched`` in tiles of 16 × 16, with further options of ``table.forced``."""
    with table.forced(16, 16, **(tiles or {})):
        judge_as_launched(function, inputs, results)


def judge_as_launched(
    function: Callable, inputs: list[Tensor], results: Callable = values_and_gradients, tolerance: float | None = None
) -> None:
    """``function(*inputs, backend=…)`` with "triton" against "reference": values and gradients, or other ``results``.

    In the short types the error may be that of the reference in the same type, plus the tolerance.
    """
    truth_inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    shape = function(*truth_inputs, backend="reference").shape
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = results(function, truth_inputs, upstream, backend="reference")
    fast = results(function, inputs, upstream, backend="triton")
    dtype = inputs[0].dtype
    plain = plain_in(dtype, function, inputs, upstream, results) if dtype in SHORT_TYPES else truth
    for k, (exact, ours, theirs) in enumerate(zip(truth, fast, plain, strict=True)):
        scale = max(exact.abs().max().item(), 1e-3)
        error = (ours - exact).abs().max().item()
        # Where the reference itself leaves float16's range nothing is conceded.
        allowed = (theirs - exact).abs().max().nan_to_num(0, 0).item()
        assert error <= allowed + (tolerance or TOLERANCE[dtype]) * scale, (f"result {k}", error, allowed, scale)


def plain_in(
    dtype: torch.dtype, function: Callable, inputs: list[Tensor], upstream: Tensor, results: Callable
) -> list[Tensor]:
    """The reference with its products in a short type, as autocast makes them."""
    copies = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs]
    with torch.autocast("cpu", dtype), mock.patch.object(functional, "autocast_disabled", lambda x: nullcontext()):
        return results(function, copies, upstream, backend="reference")
