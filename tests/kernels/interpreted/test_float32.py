"""float32 rows, which the kernels for large batches multiply as sums of two float16 numbers, against plain float32."""

import pytest
import torch

from gkd_fast import functional
from gkd_fast.kernels.common import small, table
from gkd_fast.kernels.common.launch import PRODUCTS, power_of_two
from gkd_fast.kernels.common.launcher import Launch
from gkd_fast.kernels.graph_conv.values import _powers

from .judge import between_nans, features, values_and_gradients

OPS = {
    "relation_kl": lambda x, y, backend: functional.relation_kl(x, y, backend=backend),
    "node_contrast": lambda x, y, backend: functional.node_contrast(x, y, backend=backend),
    "graph_conv symmetric": lambda x, y, backend: functional.graph_conv(x, y, bandwidth=0.7, backend=backend),
    "graph_conv row": lambda x, y, backend: functional.graph_conv(
        x, y, bandwidth=0.7, normalization="row", backend=backend
    ),
    "neighbor_conv": lambda x, y, backend: functional.graph_conv(
        x, y, bandwidth=0.7, self_weight=0.3, backend=backend
    ),
}  # fmt: skip
WIDTHS = [(16, 16), (8, 40), (256, 130), (300, 16)]
# Errors of a few roundings of the largest entry are luck, as plain PyTorch's are.
LUCK = 8 * torch.finfo(torch.float32).eps
each_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """The kernels of large batches, at few rows."""
    monkeypatch.setattr(small, "SMALL_BATCH", 0)


@pytest.fixture
def setting(request):
    """PyTorch's for float32 products; None: untouched."""
    if request.param == "ieee":
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    elif request.param is not None:
        torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def errors(op: str, inputs: list[torch.Tensor], upstream: torch.Tensor) -> tuple[list[float], list[float]]:
    """The largest, relative to the largest entry, of the kernels and of plain PyTorch in float32."""
    function = OPS[op]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = values_and_gradients(function, exact, upstream, backend="reference")
    with table.forced(16, 32):
        fast = values_and_gradients(function, inputs, upstream, backend="triton")
    plain = values_and_gradients(function, inputs, upstream, backend="reference")
    return tuple(
        [float((x - exact).abs().max() / exact.abs().max()) for x, exact in zip(found, truth, strict=True)]
        for found in (fast, plain)
    )


def problem(op: str, widths: tuple[int, int], cosine: float = 0.0, seed: int = 0):
    if op == "node_contrast":
        widths = (widths[0],) * 2
    inputs = [x.detach() for x in features(37, *widths, dtype=torch.float32, seed=seed)]
    if cosine:
        inputs = [1 + (1 / cosine - 1) ** 0.5 * x for x in inputs]
    upstream = torch.randn(OPS[op](*inputs, backend="reference").shape, generator=torch.Generator().manual_seed(1))
    return [x.requires_grad_() for x in inputs], upstream


@each_op
@pytest.mark.parametrize(
    ("widths", "cosine", "setting"),
    [*((w, 0.0, "highest") for w in WIDTHS), ((40, 16), 0.99, "high")],
    indirect=["setting"],
)
def test_errs_no_more_than_twice_plain_pytorch(op, widths, cosine, setting):
    """Means over draws; at "high" no more than at "highest"."""
    found = [errors(op, *problem(op, widths, cosine, seed)) for seed in range(2)]
    for k in range(3):
        ours, plain = (sum(of_draw[side][k] for of_draw in found) / len(found) for side in range(2))
        assert ours <= 2 * plain + LUCK, (k, ours, plain)


@each_op
@pytest.mark.parametrize("power", [-50, 50])
def test_gradients_of_any_size_have_all_their_digits(op, power):
    """Weights may have any size, float16 numbers may not: an upstream times a power of two gives gradients times it."""
    inputs, upstream = problem(op, (24, 24))
    with table.forced(16, 16):
        _, *once = values_and_gradients(OPS[op], inputs, upstream, backend="triton")
        _, *scaled = values_and_gradients(OPS[op], inputs, upstream * 2.0**power, backend="triton")
    for x, y in zip(once, scaled, strict=True):
        assert torch.equal(x * 2.0**power, y)


def launched(op: str, monkeypatch) -> set[tuple[str, str]]:
    """Kernels and how they multiply; none runs."""
    names = set()

    def record(self, grid, *arguments):
        names.add((self.kernel.__name__, str(self.constants.get("PRECISION"))))

    monkeypatch.setattr(Launch, "__call__", record)
    inputs, upstream = problem(op, (20, 20))
    values_and_gradients(OPS[op], inputs, upstream, backend="triton")
    return names


@each_op
@pytest.mark.parametrize("setting", [None, "highest", "ieee", "high"], indirect=True)
def test_no_setting_chooses_another_kernel(op, setting, monkeypatch):
    """Said or unsaid, "highest" is the same; "high" gets no less."""
    found = launched(op, monkeypatch)
    assert len(found) >= 5 and {precision for _, precision in found} == {"float16x3", "None"}


def test_powers_of_the_longest_rows():
    """Of matrices of several widths; of places with rows, and some also columns, of another number."""
    x, y, z = (between_nans(a.detach()) for a in features(37, 9, 140, 24, dtype=torch.float32))
    rows = [x, 1e-3 * y, z]
    columns = [5 * x[:20], None, 1e-6 * z[:20]]
    product = PRODUCTS["float16x3"]

    def longest(*matrices):
        return torch.stack([a.float().norm(dim=1).amax() for a in matrices if a is not None]).amax()

    for values in ([[a] for a in rows], list(map(list, zip(rows, columns, strict=True)))):
        found = torch.stack(_powers(values, [product] * 3, 3))
        expected = power_of_two(torch.stack([longest(*of_place) for of_place in values]), product.longest)
        assert torch.equal(found, expected)
