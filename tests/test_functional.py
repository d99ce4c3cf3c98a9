"""Arguments, types, the adaptive bandwidth and the effective neighbours of the public functions."""

import math
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gkd_fast import _arguments, functional, reference
from gkd_fast.distributed import Shards
from gkd_fast.functional import (
    adaptive_bandwidth,
    effective_neighbors,
    graph_conv,
    neighbor_bandwidth,
    node_contrast,
    relation_kl,
)
from gkd_fast.ops import backends

X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: graph_conv([1.0], X), TypeError, "nodes must be a Tensor, got list"),
        (lambda: graph_conv(X.long(), X), TypeError, "nodes must be floating point, got torch.int64"),
        (lambda: graph_conv(X[0], X), ValueError, r"nodes must have 2 dimensions .* got shape \(3,\)"),
        (lambda: graph_conv(X[:0], X[:0]), ValueError, r"nodes must not be empty, got shape \(0, 3\)"),
        (lambda: graph_conv(X, X[:2]), ValueError, r"messages must have as many rows as nodes \(4\), got 2"),
        (lambda: graph_conv(X, X.double()), TypeError, "messages must have the type of nodes .* got torch.float64"),
        (lambda: graph_conv(X, X.to("meta")), ValueError, r"messages must be on the device of nodes \(cpu\), got meta"),
        (lambda: graph_conv(X, X, bandwidth=0), ValueError, "bandwidth must be positive and finite, got 0"),
        (lambda: graph_conv(X, X, bandwidth=math.nan), ValueError, "bandwidth must be positive and finite, got nan"),
        (lambda: graph_conv(X, X, bandwidth="wide"), ValueError, "bandwidth must be a positive number or 'auto'"),
        (lambda: graph_conv(X, X, bandwidth=torch.ones(2)), ValueError, r"bandwidth must have no dimensions .* \(2,\)"),
        (lambda: graph_conv(X, X, bandwidth=None), TypeError, "bandwidth must be a number, got NoneType"),
        (lambda: graph_conv(X, X, normalization="column"), ValueError, "normalization must be one of .* got 'column'"),
        (lambda: graph_conv(X, X, backend="cuda"), ValueError, "backend must be one of .* got 'cuda'"),
        (lambda: node_contrast([], X), ValueError, "students must hold at least one stage, got none"),
        (lambda: node_contrast(X, [X, X[:2]]), ValueError, r"teachers\[1\] must have the batch size .* \(4\), got 2"),
        (lambda: node_contrast(X, X[:, :2]), ValueError, r"must share one width in node_contrast, got \[2, 3\]"),
        (lambda: node_contrast(X, X, temperature=-1), ValueError, "temperature must be positive and finite, got -1"),
        (lambda: node_contrast(X, X, temperature="hot"), TypeError, "temperature must be a number, got str"),
        (lambda: node_contrast(X, X, pairs=[(0, 1)]), ValueError, r"pairs must lie below \(1, 1\), got \(0, 1\)"),
        (lambda: relation_kl(X, [X, "x"]), TypeError, r"teachers\[1\] must be a Tensor, got str"),
        (lambda: relation_kl(X, X.half()), TypeError, r"teachers\[0\] must have the type of students\[0\]"),
        (lambda: relation_kl(X, X, bandwidth=math.inf), ValueError, "bandwidth must be positive and finite, got inf"),
        (lambda: relation_kl(X, X, temperature=0.0), ValueError, "temperature must be positive and finite, got 0.0"),
        (lambda: relation_kl(X, X, backend="nope"), ValueError, "backend must be one of .* got 'nope'"),
        (lambda: effective_neighbors(X, bandwidth=-1.0), ValueError, "bandwidth must be positive and finite, got -1.0"),
        (lambda: adaptive_bandwidth(X[0]), ValueError, "nodes must have 2 dimensions"),
    ],
)
def test_bad_input_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_tensor_is_one_stage():
    s, t = torch.randn(2, 6, 4)
    assert torch.equal(node_contrast(s, t), node_contrast([s], [t]))
    assert torch.equal(relation_kl(s, t), relation_kl([s], [t]))
    assert node_contrast(s, [t, s]).shape == (6, 1, 2)


def test_stages_of_relation_kl_may_differ_in_width():
    s, t = torch.randn(6, 4), torch.randn(6, 9)
    expected = reference.relation_kl([s, t], [t])
    torch.testing.assert_close(relation_kl([s, t], t), expected)


def test_only_wanted_pairs_have_a_node_loss():
    s, t = [*torch.randn(2, 6, 4)], [*torch.randn(3, 6, 4)]
    everything = node_contrast(s, t)
    some = node_contrast(s, t, pairs=[(0, 2), (1, 0)])
    mask = torch.zeros(2, 3)
    mask[0, 2] = mask[1, 0] = 1
    torch.testing.assert_close(some, everything * mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_out(dtype):
    s, t = (torch.randn(6, 4).to(dtype).requires_grad_() for _ in range(2))
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for loss in (node_contrast(s, t), relation_kl(s, t)):
        assert loss.dtype == loss_dtype
        assert all(g.dtype == dtype for g in torch.autograd.grad(loss.sum(), [s, t]))
    assert graph_conv(s, t).dtype == dtype
    assert adaptive_bandwidth(s).dtype == effective_neighbors(s).dtype == loss_dtype


def test_large_half_precision_norms_do_not_overflow():
    x = torch.randn(6, 4).mul(2e4).half().requires_grad_()
    loss = relation_kl(x, x.detach().flip(1)).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and gradient.isfinite().all()


def test_autocast_mixes_types_and_gives_float32_losses():
    s, t = torch.randn(6, 4), torch.randn(6, 4).bfloat16()
    sigma = adaptive_bandwidth(s)
    with torch.autocast("cpu", torch.bfloat16):
        assert relation_kl(s, t).dtype == node_contrast(s, t).dtype == torch.float32
        assert graph_conv(s, t).dtype == torch.bfloat16
        assert torch.equal(adaptive_bandwidth(s), sigma)


def _mean_distance(x: torch.Tensor) -> torch.Tensor:
    e = reference.unit_rows(x)
    distances = 1 - e @ e.T
    return distances[~torch.eye(len(x), dtype=torch.bool)].mean()


@pytest.mark.parametrize("kind", ["normal", "positive", "near-equal", "zero row", "two rows"])
def test_adaptive_bandwidth_is_half_the_mean_distance(kind):
    x = torch.randn(2 if kind == "two rows" else 40, 8, dtype=torch.float64)
    if kind == "positive":
        x = x.abs() + 3
    if kind == "near-equal":
        x = 1 + 0.02 * x
    if kind == "zero row":
        x[5] = 0
        x[7] = 0
    torch.testing.assert_close(adaptive_bandwidth(x) ** 2, 0.5 * _mean_distance(x), rtol=1e-10, atol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_never_below_zero(dtype, backend):
    """Where they are nothing but roundings: of a student that is its teacher nearly, and of one sample."""
    found = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(33, 17, generator=generator)
        student = teacher + 1e-4 * torch.randn(33, 17, generator=generator)
        student, teacher = student.to(dtype), teacher.to(dtype)
        one = student[:1], teacher[:1]
        found += [relation_kl(student, teacher, backend=backend), relation_kl(*one, backend=backend)]
        banked = relation_kl(student, teacher, bank=([student[:5]], [teacher[:5]]), backend=backend)
        found += [banked, *(node_contrast(*one, temperature=t, backend=backend) for t in (0.05, 0.1, 0.3, 1.0))]
    assert all((x >= 0).all() for x in found)


class _TwoRanks(Shards):
    """Two ranks that have the same rows."""

    def stack(self, x):
        return torch.stack([x, x])


class _HostCopies(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function.overloadpacket.__name__ not in ("lift_fresh", "_local_scalar_dense")
        return function(*arguments, **(options or {}))


def test_adaptive_bandwidth_of_ranks_copies_nothing_from_the_host():
    x = torch.randn(5, 4, dtype=torch.float64)
    x[2] = 0
    with _HostCopies():
        found = adaptive_bandwidth(x, process_group=_TwoRanks(None, [5, 5], x.device))
    torch.testing.assert_close(found, adaptive_bandwidth(torch.cat([x, x])), rtol=1e-12, atol=0)


def test_adaptive_bandwidth_at_the_edges():
    assert adaptive_bandwidth(torch.randn(1, 4)) == 1
    assert adaptive_bandwidth(torch.ones(5, 4)) == pytest.approx(functional.MIN_BANDWIDTH)
    assert not adaptive_bandwidth(torch.randn(5, 4, requires_grad=True)).requires_grad


def test_the_default_graph_is_over_eight_others_with_the_own_message_apart():
    nodes, messages = torch.randn(2, 30, 4)
    sigma = neighbor_bandwidth(nodes, 8)
    expected = graph_conv(nodes, messages, bandwidth=sigma, self_weight=0.8)
    assert torch.equal(graph_conv(nodes, messages), expected)
    torch.testing.assert_close(reference.graph_conv(nodes, messages, sigma, "symmetric", 0.8), expected)
    with_own_node = graph_conv(nodes, messages, bandwidth=0.5)
    assert torch.equal(with_own_node, graph_conv(nodes, messages, bandwidth=0.5, self_weight=None))


def test_without_neighbors_the_bandwidth_is_the_adaptive_one():
    nodes, messages = torch.randn(2, 9, 4)
    sigma = adaptive_bandwidth(nodes)
    expected = graph_conv(nodes, messages, bandwidth=sigma)
    assert torch.equal(graph_conv(nodes, messages, neighbors=None, self_weight=None), expected)
    torch.testing.assert_close(graph_conv(nodes, messages, bandwidth=sigma.item()), expected)


def test_effective_neighbors_count():
    groups = torch.eye(3, dtype=torch.float64).repeat_interleave(4, dim=0)
    torch.testing.assert_close(effective_neighbors(groups, 0.05), torch.full((12,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(effective_neighbors(groups, 1e3), torch.full((12,), 12.0, dtype=torch.float64))


def test_effective_neighbors_match_the_adjacency():
    x = torch.randn(15, 6, dtype=torch.float64)
    adjacency = reference.similarities(x, 0.6, diagonal=1.0)
    expected = adjacency.sum(dim=1) ** 2 / adjacency.square().sum(dim=1)
    torch.testing.assert_close(effective_neighbors(x, 0.6), expected)


def test_nan_in_gives_nan_out():
    x = torch.randn(5, 3)
    x[1, 2] = math.nan
    y = torch.randn(5, 3)
    assert node_contrast(x, y)[1].isnan().all()
    assert relation_kl(x, y).isnan().all()
    assert graph_conv(x, y, bandwidth=0.5)[1].isnan().all()


def test_a_backend_that_is_missing_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "CPP_MISSING", "the C++ extension is not built: run this")
    monkeypatch.setattr(_arguments, "_warned", set())
    x, y = torch.randn(2, 6, 4)
    for call in (relation_kl, node_contrast, graph_conv):
        with pytest.raises(
            RuntimeError, match="backend='cpp' is not available: the C\\+\\+ extension is not built: run"
        ):
            call(x, y, backend="cpp")
    # "auto" takes the reference instead, and says so once.
    with pytest.warns(RuntimeWarning, match="the slow reference: the C.. extension is not built: run this"):
        found = relation_kl(x, y)
    assert torch.equal(found, relation_kl(x, y, backend="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph_conv(x, y)


@pytest.mark.skipif(backends.INTERPRETED, reason="the interpreted kernels compute on CPUs")
def test_a_backend_for_another_device_says_so():
    x, y = torch.randn(2, 6, 4)
    with pytest.raises(RuntimeError, match="backend='triton' is not available: it computes on CUDA devices here"):
        effective_neighbors(x, backend="triton")
