"""The search for bandwidths against ``gkd_fast._neighbors``, of the same sums."""

import math

import pytest
import torch
from torch import Tensor

from gkd_fast import _neighbors, functional, ops
from gkd_fast.kernels import OPS
from gkd_fast.kernels.common import table

from .judge import features

D64 = torch.float64


def stages(batch: int) -> list[Tensor]:
    """Unit rows of stages of several widths: anywhere, in two tight classes, and five alike each."""
    anywhere, noise = (x.detach() for x in features(batch, 9, 12))
    classes = torch.eye(2, 12, dtype=D64)[torch.arange(batch) % 2] + 1e-2 * noise
    alike = torch.eye(16, dtype=D64)[torch.arange(batch) // 5]
    return [x.detach() for x in ops.unit_rows([anywhere, classes, alike], D64)]


def expected(nodes: list[Tensor], starts: Tensor, neighbors: float, passes: int) -> Tensor:
    def sums(variances: Tensor):
        return list(zip(*[ops.neighbor_sums(e, v, "float64") for e, v in zip(nodes, variances)], strict=True))

    return _neighbors.search(sums, starts, neighbors, len(nodes[0]), passes, D64, lambda x: x)


@pytest.mark.parametrize("name", ["small", "whole", "programs", "strips"])
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_steps(division, name, passes):
    """From near and from far; a start that is no bandwidth is one."""
    nodes = stages(37)
    for start in (0.3, 0.011, 40.0):
        for neighbors in (4.0, 11.5):
            starts = torch.tensor([start, 1.5 * start, start], dtype=D64)
            with table.forced(16, 16, **division(name)):
                given = nodes, list(starts.clone().unbind()), neighbors, passes, "float64"
                found, inverse_variances = OPS["neighbor_bandwidths_stages"](*given)
                truth = expected(nodes, starts, neighbors, passes)
            # Where n hardly changes with σ, roundings of log n are divided by slopes down to 1e-6.
            torch.testing.assert_close(found[:2], truth[:2], rtol=1e-9, atol=0)
            torch.testing.assert_close(found[2], truth[2], rtol=1e-6, atol=0)
            torch.testing.assert_close(inverse_variances, found.square().reciprocal(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("start", [math.nan, math.inf, 0.0, -1.0, 1e-9, 1e9])
def test_starts_that_no_search_gives(start, small_or_large):
    nodes, starts = stages(20)[:1], torch.tensor([start], dtype=D64)
    with table.forced(16, 16):
        found, _ = OPS["neighbor_bandwidths_stages"](nodes, [starts[0].clone()], 4.0, 3, "float64")
        torch.testing.assert_close(found, expected(nodes, starts, 4.0, 3), rtol=1e-9, atol=0)


def test_without_starts_they_are_the_adaptive_bandwidths(small_or_large):
    nodes = stages(37)
    adaptive = torch.stack([functional.adaptive_bandwidth(x) for x in nodes])
    with table.forced(16, 16):
        found, _ = OPS["neighbor_bandwidths_stages"](nodes, [], 4.0, 2, "float64")
        # At σ = 1,000 weights differ by 1e-6.
        torch.testing.assert_close(found, expected(nodes, adaptive, 4.0, 2), rtol=1e-4, atol=0)


def test_what_is_no_number_stays_none(small_or_large):
    nodes = stages(20)[:2]
    nodes[1][3, 2] = math.nan
    with table.forced(16, 16):
        for starts in ([], [torch.ones((), dtype=D64)] * 2):
            found, _ = OPS["neighbor_bandwidths_stages"](nodes, starts, 4.0, 2, "float64")
            assert found.isnan().tolist() == [False, True]
