"""neighbor_conv's kernels against their formulas in float64: types, shapes, divisions of the columns, column sets."""

import math

import pytest
import torch

from gkd_fast import ops
from gkd_fast.kernels.common import small, table
from gkd_fast.kernels.neighbor_conv.launches import neighbor_conv, neighbor_conv_backward
from gkd_fast.kernels.neighbor_conv.stages import neighbor_conv_stages, neighbor_conv_stages_backward

from .judge import BATCHES, between_nans, features
from .test_neighbor_sums import far_nodes

D64, D32 = torch.float64, torch.float32
# Of the largest entry: sums are rounded in their type, operands of short products in theirs.
TOLERANCE = {"float64": 1e-12, "tf32x3": 1e-5, "tf32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}

pytestmark = pytest.mark.parametrize("normalization", ["symmetric", "row"])


class Problem:
    """Unit rows, messages, upstream and what the ops take of them, exact; ``given`` is what the kernels get."""

    def __init__(self, nodes, messages, upstream, variance: float, normalization: str, precision: str):
        self.variance, self.normalization, self.precision = variance, normalization, precision
        self.rows = [x.double() for x in (nodes, messages, upstream)]
        e = self.rows[0].clone().requires_grad_()
        h = self.rows[1].clone().requires_grad_()
        x = ((e @ e.T - 1) * variance).masked_fill(torch.eye(len(e), dtype=torch.bool), -torch.inf)
        log_sums = x.logsumexp(1) if len(e) > 1 else torch.full((1,), -torch.inf, dtype=D64)
        both = log_sums[:, None] if normalization == "row" else (log_sums[:, None] + log_sums) / 2
        self.output = (x - both).exp() @ h if len(e) > 1 else h * 0 + e.sum() * 0
        self.gradients = torch.autograd.grad(self.output, (e, h), self.rows[2])
        self.log_sums = log_sums.detach()
        terms = -(self.rows[2] * self.output).sum(1)
        if normalization == "symmetric":
            terms = (terms - (self.rows[1] * self.gradients[1]).sum(1)) / 2
        self.terms = terms.detach()
        dtype = D64 if precision == "float64" else D32
        self.given = [between_nans(x.to(dtype)) for x in (*self.rows, self.terms)]
        self.given_variance = torch.tensor(variance, dtype=dtype)

    def check(self, found: list[torch.Tensor], rows: slice = slice(None), rounding: float = 0.0) -> None:
        exact = self.output, self.gradients[1], self.gradients[0]
        allowed = TOLERANCE[self.precision] + rounding
        for k, (ours, truth) in enumerate(zip(found, exact, strict=True)):
            # Of two nodes all of the gradient cancels, but for some roundings of numbers of the size 1.
            error, scale = (ours - truth[rows]).abs().max().item(), max(truth.abs().max().item(), 1e-2)
            assert error <= allowed * scale, (k, error, scale)

    def judge(self, rounding: float = 0.0) -> None:
        nodes, messages, upstream, terms = self.given
        transposed = "column" if self.normalization == "row" else self.normalization
        v, logs, precision = self.given_variance, between_nans(self.log_sums), self.precision
        self.check([
            neighbor_conv(nodes, messages, logs, v, self.normalization, precision),
            neighbor_conv(nodes, upstream, logs, v, transposed, precision),
            neighbor_conv_backward(upstream, nodes, messages, logs, terms, v, self.normalization, precision),
        ], rounding=rounding)  # fmt: skip


def problem(normalization: str, batch: int, dims=(13, 7), precision="float64", variance=2.5, nodes=None) -> Problem:
    nodes, messages, upstream = (x.detach() for x in features(batch, dims[0], dims[1], dims[1]))
    (unit,) = ops.unit_rows([nodes], D64)
    return Problem(unit, messages, upstream, variance, normalization, precision)


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(normalization, batch, small_or_large):
    with table.forced(16, 16):
        problem(normalization, batch).judge()


@pytest.mark.parametrize("name", ["small", "whole"])
@pytest.mark.parametrize(
    "dims", [(16, 64), (8, 64), (4, 64), (16, 32), (64, 16), (128, 64), (200, 40), (1, 300)], ids=str
)
def test_unequal_widths(normalization, dims, division, name):
    with table.forced(16, 16, **division(name)):
        problem(normalization, 17, dims, variance=1.5).judge()


@pytest.mark.parametrize("dims", [(80, 5), (5, 80)], ids=str)
def test_rows_that_are_wide_by_default(normalization, dims, division):
    """Of which no tile size is in the table."""
    division("whole")
    problem(normalization, 18, dims, "tf32x3").judge()


@pytest.mark.parametrize("precision", ["float64", "tf32x3", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["small", "programs", "strips", "divided strips"])
def test_types(normalization, precision, division, name):
    with table.forced(16, 16, **division(name)):
        problem(normalization, 37, (16, 16), precision).judge()


@pytest.mark.parametrize("name", ["small", "programs", "strips", "divided strips"])
def test_far_nodes(normalization, division, name):
    """σ = 0.02, where a node and a zero row are far from all others: rounding exponents of up to v = 2,500 errs by v·ε,
    here and in the truth."""
    nodes = far_nodes(D64)
    messages, upstream = (x.detach() for x in features(len(nodes), 6, 6))
    with table.forced(16, 16, **division(name)):
        Problem(nodes, messages, upstream, 2500.0, normalization, "float64").judge(4 * 2500.0 * torch.finfo(D64).eps)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["small", "programs"])
@pytest.mark.parametrize("mean", [0.0, 0.9, 0.9999])
def test_near_cosines_in_short_types(monkeypatch, normalization, division, name, precision, mean):
    generator = torch.Generator().manual_seed(4)
    rows = torch.full((70, 24), mean**0.5, dtype=D64) / 24**0.5
    rows += (1 - mean) ** 0.5 * torch.nn.functional.normalize(torch.randn(70, 24, dtype=D64, generator=generator))
    (unit,) = ops.unit_rows([rows], D32)
    messages, upstream = (x.detach() for x in features(70, 8, 8))
    distance = (1 - unit.double() @ unit.double().T).mean().item()
    with table.forced(16, 16):
        division(name)
        if name == "small":
            monkeypatch.setattr(small, "SMALL_BATCH", 128)
        Problem(unit, messages, upstream, 1 / distance, normalization, precision).judge()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["small", "programs", "divided strips"])
def test_nodes_of_one_neighbor_have_no_gradient(normalization, division, name, precision):
    """Where a weight is 1 all of a gradient cancels, but for 1/σ² times what differs in the numbers that should."""
    generator = torch.Generator().manual_seed(0)
    x, messages, upstream = (torch.randn(36, 24, generator=generator) for _ in range(3))
    (nodes,) = ops.unit_rows([x[:18].repeat(2, 1) + x / 10], D32)
    settings = torch.tensor([1e4]), normalization, precision
    with table.forced(16, 16, **division(name)):
        results = [x for (x,) in neighbor_conv_stages([nodes], [messages], *settings)]
        given = [[x] for x in (upstream, nodes, messages, *results)]
        gradient, _ = neighbor_conv_stages_backward(*given, *settings, [True, True])
    gradient -= nodes * (nodes * gradient).sum(1, keepdim=True)  # as unit rows have it
    assert gradient.abs().max() <= 8 * torch.finfo(D32).eps * 1e4


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["small", "programs", "divided strips"])
def test_rounded_weights_add_up_to_the_unrounded_ones(normalization, division, name, precision):
    """Weights of 0.9998, which both types round to 1, and messages that they do not round: node terms that were made of
    1 would be off by as much as all other neighbours of such a node weigh."""
    nodes, signs = torch.eye(12).repeat(2, 1), torch.ones(12, 8).bernoulli(0.5).mul(2).sub(1)
    messages, log_sums = torch.cat([signs, -signs]), torch.full((24,), 2e-4, dtype=D64)
    settings = torch.tensor(100.0), "column" if normalization == "row" else normalization, precision
    own = nodes[10:], messages[10:], log_sums[10:]
    with table.forced(16, 16, **division(name)):
        whole = neighbor_conv(nodes, messages, log_sums, *settings)
        part = neighbor_conv(*own, *settings, nodes, messages, 10, log_sums)
    expected = messages.roll(12, 0) * math.exp(-2e-4)
    for found, of_rows in ((whole, expected), (part, expected[10:])):
        torch.testing.assert_close(found, of_rows, rtol=5e-5, atol=0)  # similarities in float32, times 100


def test_two_nodes_have_no_gradient(normalization):
    nodes, messages, upstream = ([x.detach()] for x in features(2, 9, 6, 6))
    settings = torch.tensor([20.0], dtype=D64), normalization, "float64"
    nodes = list(ops.unit_rows(nodes, D64))
    results = neighbor_conv_stages(nodes, messages, *settings)
    given = upstream, nodes, messages, *results, *settings
    of_nodes, of_messages = neighbor_conv_stages_backward(*given, [True, True])
    assert torch.equal(of_nodes, torch.zeros_like(nodes[0]))
    torch.testing.assert_close(of_messages, upstream[0].flip(0))


@pytest.mark.parametrize("name", ["whole", "programs", "strips", "divided strips"])
def test_column_sets(normalization, division, name):
    """Rows 5 … 25 with all 37 columns give what the whole batch gives there, as do the columns in two blocks."""
    rows, whole = slice(5, 25), problem(normalization, 37, (9, 6))
    transposed = "column" if normalization == "row" else normalization
    nodes, messages, upstream, terms = whole.given
    part = [between_nans(x[rows]) for x in whole.given]
    logs, v = whole.log_sums, whole.given_variance
    with table.forced(16, 16, **division(name)):
        for blocks in ((slice(0, 37),), (slice(0, 21), slice(21, 37))):
            total = [0, 0, 0]
            for block in blocks:
                columns, offset = [between_nans(x[block]) for x in whole.given], rows.start - block.start
                settings = v, normalization, "float64"
                found = (
                    neighbor_conv(part[0], part[1], logs[rows], *settings, columns[0], columns[1], offset, logs[block]),
                    neighbor_conv(part[0], part[2], logs[rows], v, transposed, "float64", columns[0], columns[2],
                                  offset, logs[block]),
                    neighbor_conv_backward(part[2], part[0], part[1], logs[rows], part[3], *settings, columns[0],
                                           columns[1], offset, columns[2], logs[block], columns[3]),
                )  # fmt: skip
                total = [a + b for a, b in zip(total, found, strict=True)]
            whole.check(total, rows)


@pytest.mark.parametrize("name", ["whole", "strips", "divided strips"])
def test_columns_without_upstream(normalization, division, name):
    """A bank's columns: what their own outputs would give is left out."""
    whole = problem(normalization, 37, (9, 6))
    rows, (nodes, messages, upstream, terms) = slice(5, 25), whole.given
    x = (nodes @ nodes.T - 1) * whole.variance
    logs = whole.log_sums
    own, w = (x - logs[:, None]).exp(), (x - (logs[:, None] + logs) / 2).exp()
    weights = (own if normalization == "row" else w) * (upstream @ messages.T) + own * terms[:, None]
    exact = whole.variance * (weights.fill_diagonal_(0) @ nodes)[rows]
    part = [between_nans(y[rows]) for y in whole.given]
    with table.forced(16, 16, **division(name)):
        found = neighbor_conv_backward(
            part[2], part[0], part[1], logs[rows], part[3], whole.given_variance, normalization, "float64", nodes,
            messages, 5, None, None if normalization == "row" else logs,
        )  # fmt: skip
    torch.testing.assert_close(found, exact)
