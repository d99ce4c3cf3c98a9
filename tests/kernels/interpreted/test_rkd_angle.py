"""rkd_angle on interpreted kernels: published values, the reference, types, strips."""

from functools import partial

import pytest
import torch

from gkd_fast import functional, reference
from gkd_fast.kernels.common import strips, table
from tests.ops_cases import DTYPES, check, rows
from tests.test_relations import published

from .judge import features, judge

loss = partial(functional.rkd_angle, reduction="none")


@pytest.mark.parametrize("case", ["relational_a", "relational_b"])
def test_the_published_values(case):
    with table.forced(16, 16):
        published(case, "rkd_angle", "triton")


@pytest.mark.parametrize("batch", [1, 2, 15, 17, 33])
def test_batches_and_unequal_widths(batch):
    judge(loss, features(batch, 5, 19))


def test_strips_of_nodes(monkeypatch):
    monkeypatch.setattr(strips, "LEAST", 16)
    monkeypatch.setattr(strips, "STRIP_BYTES", 1)
    judge(loss, features(20, 18, 5))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side(frozen):
    inputs = features(20, 3, 9)
    inputs[frozen].requires_grad_(False)
    judge(loss, inputs)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", ["random", "converged", "clustered", "zero rows"])
def test_types_and_kinds_of_rows(kind, dtype):
    with table.forced(16, 16):
        check(partial(loss, backend="triton"), reference.rkd_angle, [rows(20, 17, 17, kind=kind)], dtype, gain=10)


def test_a_second_derivative_is_an_error():
    x, y = (x.requires_grad_() for x in rows(5, 3, 4))
    with table.forced(16, 16):
        (gradient,) = torch.autograd.grad(loss(x, y, backend="triton").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="rkd_angle has first derivatives alone"):
        torch.autograd.grad(gradient.sum(), x)
