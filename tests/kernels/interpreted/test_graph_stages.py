"""graph_conv of several stages at once, and their bandwidths, against the stages' own in float64."""

from importlib import import_module

import pytest
import torch
from torch.library import opcheck

from gkd_fast import GraphKDLoss, functional
from gkd_fast.functional import BANDWIDTH_SHARE, MIN_BANDWIDTH
from gkd_fast.kernels.common import table
from gkd_fast.kernels.common.launcher import Launch

from .judge import features

WIDTHS, VALUES = (9, 24, 40), (12, 12, 33)


def stages(batch: int, dtype=torch.float64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    inputs = features(batch, *WIDTHS, *VALUES, dtype=dtype)
    return inputs[:3], inputs[3:]


def results(nodes, messages, wanted, backend: str, **options) -> list[torch.Tensor]:
    outputs = functional.graph_conv(nodes, messages, backend=backend, **options)
    upstream = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, upstream)]


both_forms = pytest.mark.parametrize("self_weight", [None, 0.3], ids=["own node", "others"])


@both_forms
@pytest.mark.parametrize("normalization", ["symmetric", "row"])
@pytest.mark.parametrize("bandwidth", ["auto", 0.8, "each"])
def test_values_and_gradients(small_or_large, normalization, bandwidth, self_weight):
    nodes, messages = stages(20)
    if bandwidth == "each":
        bandwidth = [0.7, "auto", torch.tensor(1.3, dtype=torch.float64)]
    options = {"bandwidth": bandwidth, "normalization": normalization, "self_weight": self_weight}
    with table.forced(16, 16, width=64):
        fused = results(nodes, messages, [*nodes, *messages], "triton", **options)
    torch.testing.assert_close(fused, results(nodes, messages, [*nodes, *messages], "reference", **options))


@both_forms
def test_stages_of_several_widths_where_their_programs_are_more_than_multiprocessors(division, self_weight):
    """Each width has its own kernels, at fewer rows those of the widest."""
    division("whole")
    nodes, messages = stages(20)
    with table.forced(16, 16, width=64):
        fused = results(nodes, messages, [*nodes, *messages], "triton", self_weight=self_weight)
    plain = results(nodes, messages, [*nodes, *messages], "reference", self_weight=self_weight)
    torch.testing.assert_close(fused, plain)


@both_forms
@pytest.mark.parametrize("normalization", ["symmetric", "row"])
def test_gradients_of_some(small_or_large, normalization, self_weight):
    """Frozen nodes, as the teacher's are, and a stage whose gradient nobody asks for."""
    nodes, messages = stages(20)
    nodes = [nodes[0], nodes[1].detach(), nodes[2]]
    wanted = [nodes[0], messages[0], messages[1]]
    with table.forced(16, 16, width=64):
        options = {"normalization": normalization, "self_weight": self_weight}
        fused = results(nodes, messages, wanted, "triton", **options)
    torch.testing.assert_close(fused, results(nodes, messages, wanted, "reference", **options))


def test_the_search_for_bandwidths_under_autocast_is_that_of_a_graph_alone():
    (x, *_), (h, *_) = stages(18, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        together = functional.graph_conv([x], [h], neighbors=4, backend="triton")
        assert torch.equal(together[0], functional.graph_conv(x, h, neighbors=4, backend="triton"))


def test_nodes_are_normalised_once_for_the_search_and_the_convolution(monkeypatch):
    launched, run = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *a: launched.append(self.kernel.__name__) or run(self, *a))
    (x, *_), (h, *_) = stages(18)
    for given in ((x, h), ([x], [h])):
        functional.graph_conv(*given, neighbors=4, backend="triton")
    assert launched.count("unit_rows_forward") == 2


@both_forms
def test_second_derivatives(small_or_large, self_weight):
    nodes, messages = stages(18)
    options = {"bandwidth": 0.9, "self_weight": self_weight}

    def second(backend: str) -> list[torch.Tensor]:
        outputs = functional.graph_conv(nodes, messages, backend=backend, **options)
        first = torch.autograd.grad(sum(x.square().sum() for x in outputs), [*nodes, *messages], create_graph=True)
        return list(torch.autograd.grad(sum(x.sin().sum() for x in first), [*nodes, *messages]))

    with table.forced(16, 16, width=64):
        fused = second("triton")
    torch.testing.assert_close(fused, second("reference"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "noise"), [(1, 1.0), (70, 1.0), (70, 1e-2), (70, 0.0)])
def test_bandwidths(dtype, batch, noise):
    """Of rows that point anywhere, nearly one way, and one way; with zero rows; where one has no number."""
    generator = torch.Generator().manual_seed(3)
    rows = [1 + noise * torch.randn(batch, width, dtype=torch.float64, generator=generator) for width in WIDTHS]
    rows[1][::7] = 0
    rows[2][batch // 2, 3] = torch.nan
    exact = torch.stack([functional.adaptive_bandwidth(x) for x in rows]).square().reciprocal()
    unit, _ = torch.ops.gkd_fast.unit_rows([x.to(dtype) for x in rows], dtype)
    found = torch.ops.gkd_fast.graph_inverse_variances(unit, BANDWIDTH_SHARE, MIN_BANDWIDTH)
    # A unit row is rounded to float32's ε; what that moves a mean distance d by is a few ε/√d of it.
    torch.testing.assert_close(
        found.double(), exact, rtol=1e-9 if dtype == torch.float64 else 2e-5, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("k", [4, 30])
def test_bandwidths_of_neighbors(small_or_large, k):
    """Of all stages at once those that each finds alone; as many neighbours as there are others or more."""
    nodes, _ = stages(20)
    with table.forced(16, 16, width=64):
        together = functional._neighbor_bandwidths(nodes, k, None, "triton", None)
        started = functional._neighbor_bandwidths(nodes, k, [1.02 * x for x in together], "triton", None)
    alone = [functional.neighbor_bandwidth(x, k, backend="reference") for x in nodes]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=0)
    torch.testing.assert_close(started, alone, rtol=2e-3, atol=0)


def test_a_loss_goes_in_step(monkeypatch):
    """All heads of a loss share a call of each layer, unless one has a hook."""
    calls = []
    for name in ("graph_conv_as_found", "graph_conv"):  # the first layer's, the others'
        plain = getattr(functional, name)
        counted = lambda nodes, *a, plain=plain, **o: calls.append(len(nodes)) or plain(nodes, *a, **o)  # noqa: E731
        monkeypatch.setattr(functional, name, counted)
    generator = torch.Generator().manual_seed(1)
    students, teachers = ([torch.randn(12, w, generator=generator) for w in widths] for widths in ((5, 7), (6,)))
    criterion = GraphKDLoss([5, 7], [6], num_classes=3, embed_dim=8, layers=2, backend="triton").eval()
    expected = criterion.embed(students, teachers)
    assert calls == [3, 3]
    seen = []
    criterion.student_heads[0].register_forward_hook(lambda *_: seen.append(True))
    found = criterion.embed(students, teachers)
    assert calls == [3, 3, 1, 1, 1, 1, 1, 1] and seen == [True]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("normalization", ["symmetric", "row"])
def test_values_of_short_types_are_read_as_they_are(small_or_large, normalization):
    """Messages and upstream in bfloat16 give what they give in float32, to the last bit, in the nodes' type."""
    calls = torch.ops.gkd_fast
    nodes, messages = ([x.detach() for x in side] for side in stages(20, torch.float32))
    unit, _ = calls.unit_rows(nodes, torch.float32)
    settings = torch.tensor([0.7, 1.0, 1.4]), normalization, "float32"
    short = [x.bfloat16() for x in messages]
    found = []
    for values in (short, [x.float() for x in short]):
        outputs, degrees = calls.graph_conv_stages(unit, values, *settings)
        upstream = [x.flip(0).contiguous() for x in values]
        needs = [True] * 6
        gradients = calls.graph_conv_stages_backward(upstream, unit, values, outputs, degrees, *settings, needs)
        found.append([*outputs, *degrees, *gradients])
    assert all(x.dtype == torch.float32 for x in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_autocast_may_mix_types(small_or_large):
    nodes, messages = stages(20, torch.float32)
    mixed = [messages[0], messages[1].bfloat16(), messages[2]]
    with torch.autocast("cpu", torch.bfloat16):
        fused = functional.graph_conv(nodes, mixed, bandwidth=0.9, backend="triton")
        plain = functional.graph_conv(nodes, mixed, bandwidth=0.9, backend="reference")
    assert [x.dtype for x in fused] == [x.dtype for x in mixed]
    torch.testing.assert_close(fused, plain, rtol=2e-2, atol=2e-2)


def test_the_caller_may_change_what_it_gets(monkeypatch):
    monkeypatch.undo()  # poisoning makes views
    nodes, messages = stages(10)

    def gradients(change: bool):
        outputs = functional.graph_conv(nodes, messages, bandwidth=0.9, backend="triton")
        total = sum(x.sin().sum() for x in outputs)
        if change:
            outputs = functional.graph_conv(nodes, messages, bandwidth=0.9, backend="triton")
            total = sum(x.sin_().sum() for x in outputs)
        return torch.autograd.grad(total, [*nodes, *messages])

    torch.testing.assert_close(gradients(True), gradients(False))


def test_opcheck_of_the_ops_of_stages(monkeypatch):
    monkeypatch.undo()  # opcheck compares what was allocated
    calls = torch.ops.gkd_fast
    nodes, messages = ([x.detach() for x in side] for side in stages(9))
    unit, _ = calls.unit_rows(nodes, torch.float64)
    variances = calls.graph_inverse_variances(unit, BANDWIDTH_SHARE, MIN_BANDWIDTH)
    settings = variances, "symmetric", "float64"
    outputs, degrees = calls.graph_conv_stages(unit, messages, *settings)
    of_others, log_sums = calls.neighbor_conv_stages(unit, messages, *settings)
    needs = [True, False, True, True, True, False]
    arguments = {
        "graph_inverse_variances": (unit, BANDWIDTH_SHARE, MIN_BANDWIDTH),
        "graph_conv_stages": (unit, messages, *settings),
        "graph_conv_stages_backward": (messages, unit, messages, outputs, degrees, *settings, needs),
        "neighbor_bandwidths_stages": (unit, list(variances.clone().rsqrt().unbind()), 3.0, 2, "float64"),
        "neighbor_conv_stages": (unit, messages, *settings),
        "neighbor_conv_stages_backward": (messages, unit, messages, of_others, log_sums, *settings, needs),
    }
    assert set(arguments) == set(import_module("gkd_fast.ops.graph_conv_stages").OPS)
    for name, given in arguments.items():
        opcheck(getattr(calls, name).default, given)
