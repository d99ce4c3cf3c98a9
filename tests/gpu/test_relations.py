"""The losses over pairs and triples against the reference in float64: values and gradients, and the second order."""

from functools import partial

import pytest
import torch

from gkd_fast import functional
from tests.ops_cases import results, rows
from tests.second_order_cases import second_order

from .target import TARGET

LOSSES = {
    "pkt": functional.pkt,
    "rkd_distance": functional.rkd_distance,
    "similarity_preserving": functional.similarity_preserving,
    "correlation_gaussian": partial(functional.correlation_congruence, kernel="gaussian", squared=True),
    "rkd_angle": functional.rkd_angle,
}
LOSSES = {name: partial(loss, reduction="none") for name, loss in LOSSES.items()}
# The definition of rkd_angle holds their cube.
ROWS = min(67, TARGET.other_rows)
# Of the largest entry.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("widths", [(24, 40), (7, 65)], ids=str)
def test_values_and_gradients(name, dtype, widths):
    inputs = [x.to(dtype) for x in rows(ROWS, *widths)]
    found = results(partial(LOSSES[name], backend=TARGET.backend), [x.to(TARGET.device) for x in inputs], dtype)
    truth = results(partial(LOSSES[name], backend="reference"), [x.double() for x in inputs], dtype)
    for x, y in zip(found, truth, strict=True):
        assert (x.double().cpu() - y).abs().max() <= BOUNDS[dtype] * y.abs().max()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "rkd_angle"])
def test_second_order(name):
    inputs = [x.to(TARGET.device).requires_grad_() for x in rows(ROWS, 9, 5)]
    upstream = torch.rand(ROWS, dtype=torch.float64, device=TARGET.device)
    found = second_order(LOSSES[name], inputs, upstream, TARGET.backend)
    truth = second_order(LOSSES[name], inputs, upstream, "reference")
    for x, y in zip(found, truth, strict=True):
        assert (x - y).abs().max() <= 1e-10 * y.abs().max()
