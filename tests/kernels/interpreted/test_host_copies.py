"""Nothing is copied from the host, and nothing waits for the device: on a GPU either would stop the stream, and a CUDA
graph could not capture it.
"""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from gkd_fast import functional
from gkd_fast._terms import node_losses
from gkd_fast.kernels import OPS
from gkd_fast.kernels.common import table
from gkd_fast.ops.node_contrast_columns import _merge
from tests.second_order_cases import FUNCTIONS, second_order

from .judge import features

# An index made of a list of numbers, a tensor made of Python's numbers, a number read from a tensor.
COPIES = ("index", "index_put", "index_put_", "_index_put_impl_", "lift_fresh", "_local_scalar_dense", "nonzero")


class Copies(TorchDispatchMode):
    """Collects the operations of PyTorch that copy between host and device."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names: list[str] = []
        interpret = InterpretedFunction.run

        def run(kernel, *arguments, **options):
            with _disable_current_modes():
                return interpret(kernel, *arguments, **options)

        monkeypatch.setattr(InterpretedFunction, "run", run)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name in COPIES:
            self.names.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_up_to_the_second_order(name, division, monkeypatch):
    function, widths = FUNCTIONS[name]
    tiles, inputs = division("whole"), features(5, *widths, dtype=torch.float32)
    with table.forced(16, 16, **tiles):
        upstream = torch.ones_like(function(*inputs, backend="triton"))
        with Copies(monkeypatch) as copies:
            second_order(function, inputs, upstream, "triton")
    assert copies.names == []


@pytest.mark.parametrize("temperature", [0.004, 0.07, 3.0])
@pytest.mark.parametrize("large", [False, True])
def test_a_temperature_on_the_device(temperature, large, division, monkeypatch):
    division("whole" if large else "small")
    students, teachers = features(20, 9, 9, dtype=torch.float32)
    learned = torch.tensor(temperature, requires_grad=True)
    wanted = [students, teachers, learned]
    with table.forced(16, 16), Copies(monkeypatch) as copies:
        losses = functional.info_nce(students, teachers, learned, reduction="none", backend="triton")
        found = [losses, *torch.autograd.grad(losses, wanted, torch.ones_like(losses))]
    assert copies.names == []
    exact = [x.detach().double().requires_grad_() for x in wanted]
    losses = functional.info_nce(*exact, reduction="none", backend="reference")
    truth = [losses, *torch.autograd.grad(losses.sum(), exact)]
    for x, y in zip(found, truth, strict=True):
        assert (x - y).abs().max() <= 1e-5 * max(y.abs().max(), 1 / temperature if x.dim() else 1)


def test_a_temperature_on_the_device_that_is_not_positive():
    x, y = features(3, 5, 5, dtype=torch.float32)
    with table.forced(16, 16):
        assert functional.info_nce(x, y, torch.tensor(-1.0), backend="triton").isnan()


def test_putting_sets_of_columns_together(monkeypatch):
    part = partial(torch.ones, dtype=torch.float32)
    results = part(4, 2, 3), part(2, 4), part(2, 4, 5)
    with Copies(monkeypatch) as copies:
        losses, *_ = _merge(results, results, [0, 4])
    assert copies.names == []
    grown = 1 + torch.tensor(2.0).log()
    expected = torch.ones(4, 6)
    expected[:, [0, 4]] = grown
    torch.testing.assert_close(losses.flatten(1), expected)


@pytest.mark.parametrize("large", [False, True])
def test_stages_of_the_graph_over_the_others(large, division, monkeypatch):
    """Of some of the stages alone, too."""
    nodes = [x.detach() for x in functional.ops.unit_rows(features(20, 9, 9, dtype=torch.float32), torch.float32)]
    messages, upstream = features(20, 9, 9, dtype=torch.float32), features(20, 9, 9, dtype=torch.float32)
    messages, upstream = ([x.detach() for x in stages] for stages in (messages, upstream))
    settings = torch.tensor([1.0, 2.0]), "symmetric", "float32"
    with table.forced(16, 16, **division("whole" if large else "small")), Copies(monkeypatch) as copies:
        for starts in ([], [torch.ones(()), torch.ones(())]):
            OPS["neighbor_bandwidths_stages"](nodes, starts, 4.0, 2, "float32")
        results = OPS["neighbor_conv_stages"](nodes, messages, *settings)
        for needs in ([True] * 4, [False, True, False, True]):
            OPS["neighbor_conv_stages_backward"](upstream, nodes, messages, *results, *settings, needs)
    assert copies.names == []


def test_losses_of_stages_of_mixed_widths(monkeypatch):
    """A frozen teacher's widths are its own."""
    stages = [x.detach() for x in features(5, 7, 6, 6, 6, 7, dtype=torch.float32)]
    students, teachers, pairs = stages[:2], stages[2:], [(0, 2), (1, 0), (1, 1)]
    options = {"pairs": pairs, "bank": None, "temperature": 0.1}
    with table.forced(16, 16), Copies(monkeypatch) as copies:
        losses = node_losses(students, teachers, backend="triton", **options)
    assert copies.names == [] and losses.shape == (5, 2, 3)
    expected = torch.zeros(5, 2, 3)
    for s, t in pairs:
        alone = functional.node_contrast(students[s], teachers[t], temperature=0.1, backend="reference")
        expected[:, s, t] = alone[:, 0, 0]
    torch.testing.assert_close(losses, expected)
