"""The graph over the others: its definition, distant nodes, blocks of columns. What it has in common with the graph of
the own node too is tested in ``test_graph_conv``."""

import math

import pytest
import torch

from gkd_fast import reference
from gkd_fast.functional import graph_conv, neighbor_bandwidth
from gkd_fast.ops import neighbor_conv_strips as strips
from gkd_fast.ops.neighbor_conv import composed_gradients
from tests.ops_cases import D64, FUSED, requires_cpp, requires_fused, rows

both_normalizations = pytest.mark.parametrize("normalization", ["symmetric", "row"])


@both_normalizations
def test_definition_is_the_normalised_kernel_without_a_diagonal(normalization):
    nodes, messages = rows(7, 3, 2)
    kernel = reference.similarities(nodes, 0.8, diagonal=0.0)
    degrees = kernel.sum(dim=1)
    weights = kernel / degrees[:, None] if normalization == "row" else kernel / (degrees[:, None] * degrees).sqrt()
    expected = 0.25 * messages + 0.75 * weights @ messages
    torch.testing.assert_close(reference.graph_conv(nodes, messages, 0.8, normalization, 0.25), expected)


@both_normalizations
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_node_far_from_all_others_does_not_underflow(backend, normalization):
    """At σ = 0.01 its kernel is exp(−10,000) of the nearest; its weights are still those of its neighbours."""
    nodes = torch.eye(5).repeat_interleave(torch.tensor([3, 3, 1, 3, 3]), dim=0).requires_grad_()
    messages = torch.arange(13.0)[:, None].requires_grad_()
    output = graph_conv(nodes, messages, bandwidth=0.01, self_weight=0.0, normalization=normalization, backend=backend)
    gradients = torch.autograd.grad(output.sum(), [nodes, messages])
    assert all(x.isfinite().all() for x in (output, *gradients))
    alone = reference.neighbor_conv(nodes.double(), messages.double(), 0.01, normalization)[6]
    torch.testing.assert_close(output[6].double(), alone, rtol=1e-3, atol=1e-3)
    if normalization == "row":
        assert output[6].item() == pytest.approx(6.0, rel=1e-3)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_node_without_others_keeps_its_message(backend):
    messages = torch.randn(1, 4, requires_grad=True)
    output = graph_conv(torch.randn(1, 3), messages, neighbors=8, self_weight=0.5, backend=backend)
    assert torch.equal(output, messages)
    assert torch.equal(torch.autograd.grad(output.sum(), messages)[0], torch.ones(1, 4))


@requires_fused
def test_the_old_form_takes_the_bandwidth_of_the_neighbors():
    nodes, messages = rows(30, 4, 3)
    expected = graph_conv(nodes, messages, bandwidth=neighbor_bandwidth(nodes, 6, backend=FUSED), backend=FUSED)
    options = {"neighbors": 6, "self_weight": None, "backend": FUSED}
    assert torch.equal(graph_conv(nodes, messages, **options), expected)
    several = graph_conv([nodes, nodes], [messages, messages], **options)
    assert all(torch.equal(x, expected) for x in several)


def test_arguments_that_say_nothing_are_refused():
    nodes, messages = rows(6, 3, 2)
    with pytest.raises(ValueError, match="neighbors=4 finds the bandwidth, which must then be 'auto', got 0.5"):
        graph_conv(nodes, messages, bandwidth=0.5, neighbors=4)
    with pytest.raises(ValueError, match=r"neighbors must be at least 1, got 0\.5"):
        graph_conv(nodes, messages, neighbors=0.5)
    with pytest.raises(ValueError, match="neighbors must be a number, None or 'auto', got 'many'"):
        graph_conv(nodes, messages, neighbors="many")
    with pytest.raises(ValueError, match=r"self_weight must be from 0 to 1, got 1\.5"):
        graph_conv(nodes, messages, self_weight=1.5)
    with pytest.raises(TypeError, match="neighbors must be a number, got None"):
        neighbor_bandwidth(nodes, None)
    with pytest.raises(ValueError, match="start must be a positive number or None, got 'auto'"):
        neighbor_bandwidth(nodes, 2, start="auto")
    with pytest.raises(ValueError, match="start must be positive and finite, got 0"):
        neighbor_bandwidth(nodes, 2, start=0)


@requires_cpp
@pytest.mark.parametrize("normalization", ["row", "symmetric", "column"])
@pytest.mark.parametrize("variance", [2.0, 1e4])
def test_blocks_of_columns_give_what_strips_give(tile_rows, variance, normalization):
    """Tiles that hold own columns, all, some or none, and rows far from all columns."""
    tile_rows(32)
    calls, (nodes, messages, upstream, terms) = torch.ops.gkd_fast, rows(101, 65, 33, 33, 1)
    nodes, terms, v = reference.unit_rows(nodes), terms[:, 0].contiguous(), torch.tensor(variance, dtype=D64)
    log_sums = strips.neighbor_sums(nodes, v, "float64")[0]
    settings = v, normalization, "float64"
    for part in (slice(0, 3), slice(3, 61), slice(40, 101)):
        own, block = slice(7, 77), (nodes[part], 7 - part.start)
        found = calls.neighbor_sums(nodes[own], v, "float64", *block)
        for x, y in zip(found, strips.neighbor_sums(nodes[own], v, "float64", *block), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
        given = nodes[own], messages[own], log_sums[own], *settings, nodes[part], messages[part], block[1]
        found = calls.neighbor_conv(*given, log_sums[part])
        torch.testing.assert_close(found, strips.neighbor_conv(*given, log_sums[part]), rtol=1e-9, atol=1e-10)
        for others in (upstream[part], log_sums[part], terms[part]), (None, log_sums[part], None):
            if normalization != "column":
                rest = (upstream[own], *given[:3], terms[own], *given[3:], *others)
                expected = strips.neighbor_conv_backward(*rest)
                torch.testing.assert_close(calls.neighbor_conv_backward(*rest), expected, rtol=1e-9, atol=1e-7)


@requires_cpp
@both_normalizations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nodes_of_one_neighbor_have_no_gradient_where_products_are_rounded(dtype, normalization):
    """Where a weight is 1 all of a gradient cancels, but for 1/σ² times what differs in the numbers that should."""
    generator = torch.Generator().manual_seed(0)
    x, messages, upstream = (torch.randn(96, 24, generator=generator).to(dtype) for _ in range(3))
    nodes = (x[:48].repeat(2, 1) + x / 10).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        output = graph_conv(
            nodes, messages, bandwidth=0.01, self_weight=0.5, normalization=normalization, backend="cpp"
        )
    (gradient,) = torch.autograd.grad(output, nodes, upstream.to(output.dtype))
    assert gradient.abs().max() <= 8 * torch.finfo(torch.float32).eps / 0.01**2


@requires_cpp
@pytest.mark.parametrize("normalization", ["row", "symmetric", "column"])
def test_rounded_weights_add_up_to_the_unrounded_ones(normalization):
    """Weights of 0.999, which bfloat16 rounds to 1, and messages that it does not round: node terms that were made of 1
    would be off by as much as all other neighbours of such a node weigh."""
    nodes, signs = torch.eye(48).repeat(2, 1), torch.ones(48, 24).bernoulli(0.5).mul(2).sub(1)
    messages, log_sums = torch.cat([signs, -signs]), torch.full((96,), 1e-3, dtype=D64)
    settings = torch.tensor(100.0), normalization, "bfloat16"
    whole = torch.ops.gkd_fast.neighbor_conv(nodes, messages, log_sums, *settings)
    own = nodes[40:], messages[40:], log_sums[40:]
    part = torch.ops.gkd_fast.neighbor_conv(*own, *settings, nodes, messages, 40, log_sums)
    expected = messages.roll(48, 0) * math.exp(-1e-3)
    for found, of_rows in ((whole, expected), (part, expected[40:])):
        torch.testing.assert_close(found, of_rows, rtol=2e-4, atol=0)  # similarities in float32, times 100


@requires_fused
@both_normalizations
@pytest.mark.parametrize("composed", [False, True])
def test_nodes_of_one_neighbor_have_no_gradient_in_float64(composed, normalization):
    """At 1/σ² = 10,000 log-sums are rounded by 1e-12, which is a factor of weights of 1 and must not be one of what
    cancels."""
    generator = torch.Generator().manual_seed(0)
    x, messages, upstream = (torch.randn(96, 24, dtype=D64, generator=generator) for _ in range(3))
    nodes, v = reference.unit_rows(x[:48].repeat(2, 1) + x / 2), torch.tensor(1e4, dtype=D64)
    calls, settings = torch.ops.gkd_fast, (v, normalization, "float64")
    log_sums = calls.neighbor_sums(nodes, v, "float64")[0]
    output = calls.neighbor_conv(nodes, messages, log_sums, *settings)
    gradients_of = composed_gradients if composed else calls.neighbor_conv_gradients
    gradient, _ = gradients_of(upstream, nodes, messages, output, log_sums, *settings, [True, True])
    assert gradient.abs().max() <= torch.finfo(D64).eps * 24 * 1e4


@requires_fused
@both_normalizations
@pytest.mark.parametrize("composed", [False, True])
def test_two_nodes_have_no_gradient(composed, normalization):
    nodes, messages, upstream = (x.float() for x in rows(2, 24, 129, 129))
    nodes, calls, settings = reference.unit_rows(nodes), torch.ops.gkd_fast, (torch.tensor(20.0), normalization)
    log_sums = calls.neighbor_sums(nodes, settings[0], "float32")[0]
    output = calls.neighbor_conv(nodes, messages, log_sums, *settings, "float32")
    gradients_of = composed_gradients if composed else calls.neighbor_conv_gradients
    needs = [True, True]
    of_nodes, of_messages = gradients_of(upstream, nodes, messages, output, log_sums, *settings, "float32", needs)
    assert torch.equal(of_nodes, torch.zeros_like(nodes))
    torch.testing.assert_close(of_messages, upstream.flip(0))


@requires_cpp
@both_normalizations
def test_no_upstream_of_columns_is_one_of_zeros_where_products_are_rounded(normalization):
    nodes, messages, upstream = (x.float() for x in rows(96, 24, 24, 24))
    nodes, upstream, v = reference.unit_rows(nodes), upstream + 4, torch.tensor(2.0)
    log_sums = strips.neighbor_sums(nodes, v, "float32")[0]
    own, others, terms = slice(0, 40), slice(40, 96), upstream[:, 0].contiguous()
    given = upstream[own], nodes[own], messages[own], log_sums[own], terms[own], v, normalization, "bfloat16"
    columns = nodes[others], messages[others], -40
    found = torch.ops.gkd_fast.neighbor_conv_backward(*given, *columns, None, log_sums[others], None)
    zeros = torch.zeros(56, 24), log_sums[others], torch.zeros(56)
    expected = strips.neighbor_conv_backward(*given, *columns, *zeros)
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()


@requires_cpp
@both_normalizations
def test_the_second_order_of_rounded_products_is_of_one_set_of_weights(normalization):
    # Narrow weights: the node terms cancel only where output and log-sums are of the weights that are differentiated.
    generator = torch.Generator().manual_seed(1)
    x, m, u = (torch.randn(96, d, generator=generator, dtype=D64) for d in (32, 24, 24))
    cotangents = [torch.randn(96, d, generator=generator, dtype=D64) for d in (32, 24)]

    def second(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        nodes, messages, upstream = (y.to(dtype).requires_grad_() for y in (x, m, u))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            output = graph_conv(
                nodes, messages, bandwidth=0.1, normalization=normalization, self_weight=0.5, backend=backend
            )
        gradients = torch.autograd.grad(output, (nodes, messages), upstream.to(output.dtype), create_graph=True)
        along = [y.to(dtype) for y in cotangents]
        return list(torch.autograd.grad(gradients, (nodes, messages, upstream), along))

    for found, truth in zip(second("cpp", torch.float32), second("reference", D64)):
        assert (found.double() - truth).abs().max() <= 1e-2 * truth.abs().max()
