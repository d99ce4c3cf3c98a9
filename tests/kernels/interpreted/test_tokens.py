"""The losses within the tokens of each sample on interpreted kernels: one launch for all samples, padding or not."""

from functools import partial

import pytest
import torch

from gkd_fast.kernels.common import strips, table
from tests.ops_cases import D64
from tests.second_order_cases import second_order
from tests.test_tokens import LOSSES, padding, tokens

from .conftest import between_nans
from .judge import judge

TWICE = ("pkt", "rkd_distance", "similarity_preserving", "correlation_gaussian")
KERNELS = (*TWICE, "rkd_angle")


def inputs_of(samples: int, count: int, name: str, dtype=D64) -> list[torch.Tensor]:
    return [between_nans(x).requires_grad_() for x in tokens(samples, count, name, dtype)]


def within(name: str, mask) -> partial:
    return partial(LOSSES[name], reduction="none", within="tokens", mask=mask)


@pytest.mark.parametrize(
    ("samples", "count", "masked"), [(1, 17, False), (3, 1, False), (3, 1, True), (2, 37, False), (4, 37, True)]
)
@pytest.mark.parametrize("name", KERNELS)
def test_samples_and_tokens(name, samples, count, masked, division):
    division("programs" if count == 37 else "whole")
    judge(within(name, padding(samples, count) if masked else None), inputs_of(samples, count, name))


def test_angles_of_some_nodes_and_rows_of_one_sample_at_a_time(monkeypatch):
    monkeypatch.setattr(strips, "LEAST", 16)
    monkeypatch.setattr(strips, "STRIP_BYTES", 1)
    judge(within("rkd_angle", padding(3, 37)), inputs_of(3, 37, "rkd_angle"))


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives_and_strips(name, division):
    """Weights of some rows of one sample at a time."""
    judge(within(name, padding(3, 37)), inputs_of(3, 37, name), division("strips"), second_order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KERNELS)
def test_types(name, dtype):
    mask, inputs = padding(4, 21), inputs_of(4, 21, name, dtype)
    with table.forced(16, 16):
        found = within(name, mask)(*inputs, backend="triton")
        upstream = torch.linspace(-1, 2, len(found))
        gradients = torch.autograd.grad(found, inputs, upstream)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = within(name, mask)(*wide, backend="reference")
    bound = 1e-3 if dtype == torch.float32 else 3e-2
    for x, y in zip([found, *gradients], [exact, *torch.autograd.grad(exact, wide, upstream.double())], strict=True):
        assert (x - y).abs().max() <= bound * y.abs().max()
