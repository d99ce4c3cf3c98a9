"""neighbor_sums against its formulas in float64."""

import math

import pytest
import torch

from gkd_fast import ops
from gkd_fast.kernels.common import small, table
from gkd_fast.kernels.graph_conv.graphs import Graph
from gkd_fast.kernels.graph_conv.small import Stages
from gkd_fast.kernels.neighbor_conv.sums import neighbor_sums, small_sums, sums

from .judge import BATCHES, between_nans, features

D64, D32 = torch.float64, torch.float32
# Of a row's exponents, rounded in the type of the sums, and of log2's and the sums' roundings.
TOLERANCE = {"float64": 1e-13, "float32": 1e-6, "tf32x3": 1e-6}


def units(batch: int, *dims: int, dtype=D64) -> list[torch.Tensor]:
    return [between_nans(x) for x in ops.unit_rows(features(batch, *dims), dtype)]


def expected(rows: torch.Tensor, columns: torch.Tensor, variance: float, offset: int) -> torch.Tensor:
    """l(v), l(2v), Σ p x and Σ q x, [4, rows]."""
    x = (rows.double() @ columns.double().T - 1) * variance
    own = torch.arange(len(rows))[:, None] + offset == torch.arange(len(columns))
    logits = [torch.where(own, -math.inf, power * x) for power in (1, 2)]
    means = [(logit.softmax(1).nan_to_num(0) * x).sum(1) for logit in logits]
    return torch.stack([*(logit.logsumexp(1) for logit in logits), *means])


def check(nodes: list[torch.Tensor], variances: list[float], precision: str, columns=None, offset: int = 0) -> None:
    sides = columns or [None] * len(nodes)
    graphs = [
        Graph(x, torch.tensor(v, dtype=x.dtype), precision, y, offset, place=place)
        for place, (x, v, y) in enumerate(zip(nodes, variances, sides, strict=True))
    ]
    found = small_sums(stages_of(graphs)) if graphs[0].is_small(1) else sums(graphs)
    for x, y, v, *ours in zip(nodes, sides, variances, *found, strict=True):
        exact = expected(x, x if y is None else y, v, offset)
        assert all(z.dtype == D64 and z.shape == exact[0].shape for z in ours)
        # Where a row has no other column both are −inf.
        torch.testing.assert_close(torch.stack(ours), exact, rtol=0, atol=TOLERANCE[precision] * max(v, 1))


def stages_of(graphs: list[Graph]) -> Stages:
    first = graphs[0].stages()
    return Stages([g.nodes for g in graphs], [g.inverse_variance for g in graphs], first.arch, first.product)


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch, small_or_large):
    with table.forced(16, 16):
        check(units(batch, 13), [2.5], "float64")


@pytest.mark.parametrize("name", ["small", "whole", "programs", "strips"])
@pytest.mark.parametrize("precision", ["float64", "tf32x3"])
def test_divisions_of_the_columns(division, name, precision):
    dtype = D64 if precision == "float64" else D32
    with table.forced(16, 16, **division(name)):
        check(units(70, 13, dtype=dtype), [11.0], precision)


def test_stages_share_a_launch(small_or_large):
    with table.forced(16, 16):
        check(units(37, 9, 12, 16), [0.5, 4.0, 40.0], "float64")


def far_nodes(dtype) -> torch.Tensor:
    """Two tight classes, a node that is far from all others and a zero row, which is as far."""
    rows = torch.zeros(40, 12, dtype=D64)
    rows[:20, 0] = rows[20:, 1] = 1
    rows += 1e-2 * torch.randn(40, 12, dtype=D64, generator=torch.Generator().manual_seed(2))
    rows[7], rows[30] = 0, 0
    rows[7, 5] = 1
    (unit,) = ops.unit_rows([rows], dtype)
    return between_nans(unit)


@pytest.mark.parametrize("name", ["small", "whole", "programs", "strips"])
@pytest.mark.parametrize("precision", ["float64", "tf32x3"])
def test_far_nodes_do_not_underflow(division, name, precision):
    """σ = 0.02: exp((0 − 1)/σ²) is e^-2500."""
    nodes = far_nodes(D64 if precision == "float64" else D32)
    with table.forced(16, 16, **division(name)):
        check([nodes], [2500.0], precision)


@pytest.mark.parametrize("name", ["whole", "programs", "strips"])
def test_column_sets(division, name):
    (nodes,) = units(53, 9)
    with table.forced(16, 16, **division(name)):
        for columns, offset in (
            (nodes, 5),
            (nodes[:21].clone(), 5),
            (nodes[5:6].clone(), 0),
            (nodes[40:].clone(), -35),
        ):
            check([between_nans(nodes[5:25])], [3.0], "float64", [between_nans(columns)], offset)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["small", "programs"])
@pytest.mark.parametrize("mean", [0.0, 0.9, 0.9999])
def test_near_cosines_in_short_types(monkeypatch, division, name, precision, mean):
    """Exponents at the bandwidth of a mean distance err by a few 1e-3, whatever the cosines."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.full((70, 24), mean**0.5, dtype=D64) / 24**0.5
    rows += (1 - mean) ** 0.5 * torch.nn.functional.normalize(torch.randn(70, 24, dtype=D64, generator=generator))
    (unit,) = ops.unit_rows([rows], D32)
    variance = 1 / (1 - unit.double() @ unit.double().T).mean().item()
    exact = expected(unit, unit, variance, 0)
    with table.forced(16, 16):
        division(name)
        if name == "small":
            monkeypatch.setattr(small, "SMALL_BATCH", 128)
        found = neighbor_sums(between_nans(unit), torch.tensor(variance, dtype=D32), precision)
    assert (torch.stack(found) - exact).abs().max() < 1e-2
