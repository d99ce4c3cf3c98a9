"""graph_conv on the CPU kernels against the reference, and its row and column sets against dense formulas."""

import pytest
import torch

from gkd_fast import functional, ops, reference
from gkd_fast.functional import effective_neighbors
from tests.ops_cases import D64, DTYPES, KINDS, TILES, check, graph_conv, requires_cpp, rows

pytestmark = requires_cpp
both_normalizations = pytest.mark.parametrize("normalization", ["symmetric", "row"])
both_forms = pytest.mark.parametrize("self_weight", [None, 0.3], ids=["own node", "others"])


def agree(draws, dtype, normalization, self_weight, bandwidth=0.6):
    check(
        graph_conv(normalization, bandwidth, self_weight=self_weight),
        lambda nodes, messages: reference.graph_conv(nodes, messages, bandwidth, normalization, self_weight),
        draws,
        dtype,
        # What a node that has one neighbour gives is a difference of terms of 1/σ².
        gain=1.0 if self_weight is None else bandwidth**-2,
    )


@both_forms
@both_normalizations
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tile", "batch"), TILES)
def test_batches(tile_rows, tile, batch, dtype, normalization, self_weight):
    tile_rows(tile)
    agree([rows(batch, 5, 3)], dtype, normalization, self_weight)


@both_forms
@both_normalizations
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(1, 3), (33, 1), (3, 257), (257, 33)])
def test_widths(tile_rows, widths, dtype, normalization, self_weight):
    tile_rows(32)
    agree([rows(37, *widths)], dtype, normalization, self_weight)


@both_forms
@both_normalizations
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bandwidth", [1.0, 0.05])
def test_kinds_of_rows_and_bandwidths(tile_rows, kind, bandwidth, dtype, normalization, self_weight):
    tile_rows(32)
    draws = (rows(41, 6, 6, kind=kind, seed=seed) for seed in range(3))
    agree(draws, dtype, normalization, self_weight, bandwidth)


def dense(nodes, messages, columns, column_messages, bandwidth, normalization, offset, column_degrees=None):
    """Output ``[I, K]`` of unit rows with a column set, and the degrees, by its formula."""
    own = torch.arange(len(nodes))[:, None] + offset == torch.arange(len(columns))
    adjacency = torch.exp((nodes @ columns.T - 1) / bandwidth**2).masked_fill(own, 1)
    degrees = adjacency.sum(dim=1)
    if normalization == "row":
        return adjacency @ column_messages / degrees[:, None], degrees
    others = degrees if column_degrees is None else column_degrees
    return adjacency * degrees.rsqrt()[:, None] @ (column_messages * others.rsqrt()[:, None]), degrees


@both_normalizations
def test_shards_of_rows_give_the_whole_batch(tile_rows, normalization):
    tile_rows(32)
    bandwidth, precision = 0.7, "float64"
    inverse_variance = torch.tensor(bandwidth**-2, dtype=D64)
    nodes, messages = rows(101, 5, 3)
    nodes = reference.unit_rows(nodes).requires_grad_()
    messages.requires_grad_()
    whole, true_degrees = dense(nodes, messages, nodes, messages, bandwidth, normalization, 0)
    upstream = torch.randn(101, 3, dtype=D64)
    expected = torch.autograd.grad(whole, [nodes, messages], upstream)
    nodes, messages = nodes.detach(), messages.detach()
    bounds = [slice(0, 3), slice(3, 61), slice(61, 101)]
    calls = torch.ops.gkd_fast
    degrees = torch.cat([calls.graph_degrees(nodes[p], inverse_variance, precision, nodes, p.start) for p in bounds])
    torch.testing.assert_close(degrees, true_degrees.detach(), rtol=1e-12, atol=0)
    forward = [
        calls.graph_conv(
            nodes[p],
            messages[p],
            inverse_variance,
            normalization,
            precision,
            nodes,
            messages,
            p.start,
            degrees[p],
            degrees,
        )
        for p in bounds
    ]
    output = torch.cat([x[0] for x in forward])
    torch.testing.assert_close(output, whole.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat([x[1] for x in forward]), degrees, rtol=1e-12, atol=0)

    def backward(needs, terms=None):
        parts = [
            calls.graph_conv_backward(
                upstream[p], nodes[p], messages[p], output[p], degrees[p], inverse_variance, normalization, precision,
                needs, nodes, messages, p.start, upstream, degrees, None if terms is None else terms[p], terms,
            )
            for p in bounds
        ]  # fmt: skip
        return [torch.cat(x) for x in zip(*parts)]

    (messages_gradient,) = backward([False, True])
    terms = ops.node_terms(upstream, output, messages, messages_gradient, degrees, normalization)
    gradients = [*backward([True, False], terms), messages_gradient]
    torch.testing.assert_close(gradients, [*expected], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(backward([True, True], terms), [*expected], rtol=1e-9, atol=1e-11)


@both_normalizations
@pytest.mark.parametrize(
    ("columns", "offset", "dtype"), [(150, 40, D64), (150, 1000, D64), (1_000_000, 999_990, torch.float32)]
)
def test_few_rows_against_columns_without_upstream(columns, offset, dtype, normalization):
    """The own column is one of the columns or none of them; a million columns overflow no index."""
    nodes, messages = (x.to(dtype) for x in rows(5, 4, 2))
    bank, bank_messages = (x.to(dtype) for x in rows(columns, 4, 2, seed=1))
    nodes, bank = (reference.unit_rows(x) for x in (nodes, bank))
    inverse_variance = torch.tensor(4.0, dtype=dtype)
    given = torch.linspace(1, 9, columns, dtype=dtype)
    truth_nodes = nodes.to(D64, copy=True).requires_grad_()
    truth, _ = dense(
        truth_nodes, None, bank.double(), bank_messages.double(), 0.5, normalization, offset, given.double()
    )
    upstream = torch.randn(5, 2, dtype=D64).to(dtype)
    (expected,) = torch.autograd.grad(truth, truth_nodes, upstream.double())
    options = (inverse_variance, normalization, str(dtype).removeprefix("torch."))
    degrees = torch.ops.gkd_fast.graph_degrees(nodes, inverse_variance, options[2], bank, offset)
    output, degrees = torch.ops.gkd_fast.graph_conv(
        nodes, messages, *options, bank, bank_messages, offset, degrees, given
    )
    nothing = torch.zeros_like(messages)
    terms = ops.node_terms(upstream, output, messages, nothing, degrees, normalization)
    (gradient,) = torch.ops.gkd_fast.graph_conv_backward(
        upstream,
        nodes,
        messages,
        output,
        degrees,
        *options,
        [True, False],
        bank,
        bank_messages,
        offset,
        None,
        given,
        terms,
    )
    # A wrong index would err by about 1; float32 sums of a million addends keep four digits.
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if dtype == D64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(output.double(), truth.detach(), **tolerance)
    torch.testing.assert_close(gradient.double(), expected, **tolerance)


@pytest.mark.parametrize("others", [False, True])
def test_effective_neighbors(tile_rows, others):
    tile_rows(32)
    x = rows(67, 6)[0]
    found, expected = (effective_neighbors(x, 0.6, others=others, backend=name) for name in ("cpp", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


STAGE_WIDTHS = ((5, 9), (12, 9), (7, 3))


def of_stages(dtype=torch.float64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = [
        [torch.randn(11, width, dtype=dtype, generator=generator, requires_grad=True) for width in widths]
        for widths in zip(*STAGE_WIDTHS)
    ]
    return made[0], made[1]


@both_forms
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("bandwidth", ["auto", 0.7, [0.5, "auto", torch.tensor(1.2, dtype=torch.float64)]], ids=str)
def test_stages_are_their_own_convolutions(backend, bandwidth, self_weight):
    nodes, messages = of_stages()
    each = bandwidth if isinstance(bandwidth, list) else [bandwidth] * len(nodes)
    options = {"normalization": "row", "backend": backend, "self_weight": self_weight}
    found = functional.graph_conv(nodes, tuple(messages), bandwidth=bandwidth, **options)
    assert isinstance(found, list)
    for output, x, h, sigma in zip(found, nodes, messages, each, strict=True):
        torch.testing.assert_close(output, functional.graph_conv(x, h, bandwidth=sigma, **options), rtol=0, atol=0)


def test_stages_that_do_not_fit_are_refused():
    nodes, messages = of_stages()
    with pytest.raises(ValueError, match=r"messages must hold as many stages as nodes \(3, at least 1\), got 2"):
        functional.graph_conv(nodes, messages[:2])
    with pytest.raises(ValueError, match=r"nodes\[1\] must have as many rows as nodes\[0\] \(11\), got 4"):
        functional.graph_conv([nodes[0], nodes[1][:4], nodes[2]], messages)
    with pytest.raises(ValueError, match="bandwidth must hold one for each of 3 stages, got 2"):
        functional.graph_conv(nodes, messages, bandwidth=[1.0, 2.0])
    with pytest.raises(ValueError, match="bandwidth must be a positive number or 'auto', got 'wide'"):
        functional.graph_conv(nodes, messages, bandwidth=[1.0, "wide", 2.0])
    with pytest.raises(TypeError, match="messages must be a sequence of tensors where nodes are one, got a Tensor"):
        functional.graph_conv(nodes, messages[0])
    with pytest.raises(TypeError, match=r"messages\[2\] must have the type of nodes\[0\]"):
        functional.graph_conv(nodes, [*messages[:2], messages[2].float()])
