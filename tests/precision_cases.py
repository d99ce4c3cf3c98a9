"""Rows whose cosines are near 1, and the bound that results in a short product type keep there against float64.

The exponent (c − 1)/σ² magnifies the roundings of rows that are nearly alike, which post-ReLU features are. So the
truth is made of the rows as they were given, not of rows that were rounded, and plain PyTorch in that type is no
measure. Widths are 64 or more for rows: the products of short ones have few roundings that cancel each other.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from gkd_fast import functional
from tests.second_order_cases import second_order

D64 = torch.float64

# Mean cosines of the rows, and what results may err by, as a share of the largest entry.
COSINES = [0.0, 0.9, 0.99, 0.999, 0.9999]
BOUND = 1e-2

# How a short type comes into force: inputs of that type, or float32 inputs under autocast.
MODES = ["inputs", "autocast"]


def near_rows(batch: int, cosine: float, *widths: int, seed: int = 0, zero_rows: bool = False) -> list[Tensor]:
    """Features ``[batch, width]`` in float64 of this mean cosine: 1 + s·noise with 1/(1 + s²) = ``cosine``."""
    generator = torch.Generator().manual_seed(1000 * seed + batch)
    noise = [torch.randn(batch, width, dtype=D64, generator=generator) for width in widths]
    rows = [1 + (1 / cosine - 1) ** 0.5 * x for x in noise] if cosine else noise
    for k, x in enumerate(rows if zero_rows else []):
        x[k::7] = 0
    return rows


def _graph_conv(normalization: str, self_weight: float | None = None):
    """At the adaptive bandwidth, which needs no pairs."""

    def function(nodes, messages, backend):
        return functional.graph_conv(
            nodes, messages, neighbors=None, self_weight=self_weight, normalization=normalization, backend=backend
        )

    return function


def _node_contrast(num_students: int, has_bank: bool = False):
    def function(*stages, backend):
        students, teachers = stages[:num_students], stages[num_students:]
        bank = [x.detach().roll(1, 1) for x in teachers] if has_bank else None
        return functional.node_contrast(students, teachers, backend=backend, bank=bank)

    return function


def _relation_kl(num_students: int, has_bank: bool = False):
    def function(*stages, backend):
        students, teachers = stages[:num_students], stages[num_students:]
        bank = None
        if has_bank:
            bank = tuple([x.detach().roll(1, 1) for x in side] for side in (students, teachers))
        return functional.relation_kl(students, teachers, backend=backend, bank=bank)

    return function


# Name: the function of its inputs and the backend, with the default temperature and bandwidth, and the inputs' widths.
CASES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "graph_conv symmetric": (_graph_conv("symmetric"), (65, 33)),
    "graph_conv row": (_graph_conv("row"), (129, 64)),
    "neighbor_conv symmetric": (_graph_conv("symmetric", self_weight=0.3), (65, 33)),
    "neighbor_conv row": (_graph_conv("row", self_weight=0.3), (129, 64)),
    "node_contrast": (_node_contrast(2), (65, 65, 65)),
    "node_contrast with a bank": (_node_contrast(1, has_bank=True), (64, 64)),
    "relation_kl": (_relation_kl(1), (128, 65)),
    "relation_kl of two students": (_relation_kl(2), (64, 97, 128)),
    "relation_kl with a bank": (_relation_kl(1, has_bank=True), (65, 128)),
}


def first_order_results(function: Callable[..., Tensor], inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    """The output and the gradients of all inputs, under a random upstream."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves, backend=backend)
    return [output.detach(), *torch.autograd.grad(output, leaves, _upstream(output).to(output.dtype))]


def second_order_results(function: Callable[..., Tensor], inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    """The gradients of Σ ⟨gradient, cotangent⟩ at all inputs and at the upstream, under random cotangents."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        output = function(*leaves, backend="reference")
    return second_order(function, leaves, _upstream(output), backend)


def _upstream(output: Tensor) -> Tensor:
    """In numbers of bfloat16, which every type holds."""
    generator = torch.Generator().manual_seed(output.numel())
    return torch.randn(output.shape, dtype=D64, generator=generator).bfloat16()


def assert_keeps_bound(
    name: str,
    cosine: float,
    backend: str,
    dtype: torch.dtype,
    mode: str = "autocast",
    batch: int = 97,
    results: Callable[..., list[Tensor]] = first_order_results,
    zero_rows: bool = False,
) -> None:
    """A case's ``results`` on ``backend`` in a short type err by at most BOUND of the largest entry, against float64.

    Args:
        name: of CASES.
        cosine: the mean cosine of the rows, see COSINES.
        dtype: the short type; ``mode``: how it comes into force, see MODES.
        results: ``first_order_results`` or ``second_order_results``.
        zero_rows: some rows of every input are zero.
    """
    function, widths = CASES[name]
    given = dtype if mode == "inputs" else torch.float32
    inputs = [x.to(given) for x in near_rows(batch, cosine, *widths, zero_rows=zero_rows)]
    truth = results(function, [x.double() for x in inputs], "reference")
    device = inputs[0].device.type
    with torch.autocast(device, dtype) if mode == "autocast" else nullcontext():
        found = results(function, inputs, backend)
    for k, (x, y) in enumerate(zip(found, truth, strict=True)):
        error, size = (x.double() - y).abs().max().item(), y.abs().max().item()
        assert error <= BOUND * size, f"{name}, result {k}: error {error:.3g}, largest entry {size:.3g}"
