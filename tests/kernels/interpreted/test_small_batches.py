"""Small batches: how much is launched for them, and tiles of the default size."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from gkd_fast.kernels import OPS
from gkd_fast.kernels.common import small, table

from .judge import features, values_and_gradients
from .test_graph_conv import graph_conv
from .test_node_contrast import node_contrast
from .test_relation_kl import relation_kl

# Operations of PyTorch that launch nothing: allocations and views.
FREE = (
    "alias", "empty", "new_empty", "empty_like", "detach", "expand", "select", "slice", "unsqueeze", "unbind", "t",
    "view",
)  # fmt: skip
PRECISIONS = ("float32", "float16")


class Launches(TorchDispatchMode):
    """Collects the kernels, and the operations of PyTorch that would launch one on a GPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names: list[str] = []
        interpret = InterpretedFunction.run

        def run(kernel, *arguments, **options):
            self.names.append(kernel.__name__)
            with _disable_current_modes():
                return interpret(kernel, *arguments, **options)

        monkeypatch.setattr(InterpretedFunction, "run", run)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return function(*arguments, **(options or {}))

    def __call__(self, op: str, *arguments) -> tuple[list[str], object]:
        self.names = []
        with self:
            result = OPS[op](*arguments)
        return self.names, result


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.undo()  # poisoning fills tensors
    return Launches(monkeypatch)


def unit_rows(launches, count: int, dim: int, precision: str) -> list[torch.Tensor]:
    """Of stages of three widths."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    rows = [x.detach() for x in features(8, *(dim + 2 * (k % 3) for k in range(count)), dtype=dtype)]
    names, (units, norms) = launches("unit_rows", rows, dtype)
    assert names == ["unit_rows_forward"]
    names, _ = launches("unit_rows_backward", rows, units, norms, dtype)
    assert names == ["unit_rows_gradient"]
    return units


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("dim", "S", "T", "temperature"), [(9, 3, 3, 0.1), (300, 1, 1, 0.01)])
def test_relation_kl_is_one_launch_and_its_gradients_too(launches, precision, dim, S, T, temperature):
    units, options = unit_rows(launches, S + T, dim, precision), (temperature, 1.0, precision)
    students, teachers = units[:S], units[S:]
    names, results = launches("relation_kl", students, teachers, *options)
    assert names == ["relation_small_losses"]
    for needs in ([True] * (S + T), [True] * S + [False] * T):
        upstream = torch.rand_like(results[0])
        names, gradients = launches("relation_kl_backward", upstream, students, teachers, *results, *options, needs)
        assert names == ["relation_small_gradients"] and len(gradients) == sum(needs)


@pytest.mark.parametrize(("S", "T"), [(1, 1), (2, 3)])
def test_relation_kl_of_larger_batches_takes_as_many_launches_whatever_the_stages(launches, monkeypatch, S, T):
    monkeypatch.setattr(small, "SMALL_BATCH", 0)
    units, options = unit_rows(launches, S + T, 9, "bfloat16"), (0.1, 1.0, "bfloat16")
    students, teachers = units[:S], units[S:]
    with table.forced(16, 16):
        names, results = launches("relation_kl", students, teachers, *options)
        assert names == ["row_sums", "round_rows", "relation_sums"]
        arguments = torch.rand_like(results[0]), students, teachers, *results, *options
        names, _ = launches("relation_kl_backward", *arguments, [True] * (S + T))
    added = ["add_slots"] if S * T > 1 else []
    assert names == ["relation_factors", "row_sums", "round_rows", "relation_gradients", *added]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("S", "T", "temperature", "keep"), [(2, 3, 0.1, False), (1, 1, 0.01, True)])
def test_node_contrast_is_one_launch_and_its_gradients_too(launches, precision, S, T, temperature, keep):
    units = [x[:, :9].contiguous() for x in unit_rows(launches, S + T, 9, precision)]
    wanted = [p != 1 for p in range(S * T)]
    options = (wanted, temperature, precision)
    names, (losses, *sums) = launches("node_contrast", units[:S], units[S:], *options, keep)
    assert names == ["contrast_small_losses"]
    arguments = (torch.rand_like(losses), units[:S], units[S:], *sums, *options, [True] * (S + T))
    names, gradients = launches("node_contrast_backward", *arguments)
    assert names == ["contrast_small_gradients"] and len(gradients) == S + T


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("normalization", ["symmetric", "row"])
def test_graph_conv_is_one_launch_and_its_gradients_two(launches, precision, normalization):
    nodes, messages = unit_rows(launches, 2, 9, precision)
    variance = torch.ones((), dtype=nodes.dtype)
    names, (output, degrees) = launches("graph_conv", nodes, messages, variance, normalization, precision)
    assert names == ["graph_small_sums"]
    arguments = (torch.rand_like(output), nodes, messages, output, degrees, variance, normalization, precision)
    names, gradients = launches("graph_conv_backward", *arguments, [True, True])
    assert names == ["graph_small_sums", "graph_small_gradients"] and len(gradients) == 2


@pytest.mark.parametrize(("large", "launched"), [
    (False, (["neighbor_small_sums"], ["neighbor_small_weighted"], ["neighbor_small_gradients"])),
    (True, (
        ["row_sums", "round_rows", "neighbor_sums"],
        ["row_sums", "round_rows", "row_sums", "round_rows", "graph_sums"],
        ["row_sums", "round_rows", "row_sums", "round_rows", "neighbor_gradients"],
    )),
])  # fmt: skip
@pytest.mark.parametrize("normalization", ["symmetric", "row"])
def test_the_launches_of_neighbor_conv(launches, monkeypatch, normalization, large, launched):
    """Of larger batches also those that make operands; sums of 20 numbers around them are PyTorch's."""
    nodes, messages = unit_rows(launches, 2, 9, "bfloat16")
    settings = torch.ones((), dtype=nodes.dtype), normalization, "bfloat16"
    if large:
        monkeypatch.setattr(small, "SMALL_BATCH", 0)
    with table.forced(16, 16):
        sums, (log_sums, *_) = launches("neighbor_sums", nodes, settings[0], "bfloat16")
        forward, output = launches("neighbor_conv", nodes, messages, log_sums, *settings)
        terms = -(output * output).sum(1)
        backward, _ = launches("neighbor_conv_backward", output, nodes, messages, log_sums, terms, *settings)
    of_pytorch = ("add", "to_copy", "_to_copy")
    assert (sums, forward, [name for name in backward if name not in of_pytorch]) == launched


@pytest.mark.parametrize("function", [relation_kl(1), node_contrast(1), graph_conv("symmetric")])
def test_several_tiles_of_weights_of_the_default_size(function):
    inputs = features(130, 9, 9, dtype=torch.float32)
    upstream = torch.rand_like(function(*inputs, backend="reference"))
    fast, plain = (
        values_and_gradients(function, inputs, upstream, backend=backend) for backend in ("triton", "reference")
    )
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
