"""The ops' problems and what results on the target are held against."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from gkd_fast import functional, reference
from tests.precision_cases import BOUND
from tests.second_order_cases import second_order

from .target import COMPILED, TARGET

DEVICE = TARGET.device
OPS = (
    "relation_kl", "node_contrast", "graph_conv symmetric", "graph_conv row", "neighbor_conv symmetric",
    "neighbor_conv row",
)  # fmt: skip
SELF_WEIGHT = 0.3
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
D64 = torch.float64
# How products are made: the inputs' type and PyTorch's setting for float32 products.
PRODUCTS = {
    "float64": (torch.float64, "highest"),
    "float32": (torch.float32, "highest"),
    "float32 high": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
}
# Bits of a number beyond its leading one, in the types that rows are rounded to before they are multiplied.
MANTISSA = {"float32 high": 10, "bfloat16": 7, "float16": 10}
# Beyond twice the error of plain PyTorch or of rounded rows, which may happen to be none, relative to the largest
# entry: one rounding of the result in the short types, two of the weights in tf32; in float32 those of two log-sums, up
# to 16 at τ = 0.1, whose difference a loss is; in float64 what no wrong formula comes near.
SLACK = {
    "float64": 1e-12,
    "float32": 16 * torch.finfo(torch.float32).eps,
    "float32 high": 2.0**-10,
    "bfloat16": torch.finfo(torch.bfloat16).eps / 2,
    "float16": torch.finfo(torch.float16).eps / 2,
}
PRODUCT_OF = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def representable(x: Tensor) -> Tensor:
    """Rounded to numbers that every type holds, so that one float64 truth is that of all types."""
    return x.bfloat16().half().double()


@dataclass
class Problem:
    """``inputs`` by name, those with gradient first, of numbers that every type holds; ``call(backend, inputs)`` is
    the op.

    Losses and gradients that vanish (one row, a student equal to its teacher) are differences of terms of size 1 and
    ``gradient_terms``: errors are relative to these where nothing larger comes out.
    """

    inputs: dict[str, Tensor]
    wanted: int
    call: Callable[..., Tensor]
    gradient_terms: float = 0.1
    upstream: Tensor = field(init=False)

    def __post_init__(self):
        with torch.no_grad():
            shape = self.call("reference", [x[:1] for x in self.inputs.values()]).shape
        rows = len(next(iter(self.inputs.values())))
        generator = torch.Generator().manual_seed(rows)
        self.upstream = representable(torch.randn(rows, *shape[1:], generator=generator, dtype=D64))

    def results(
        self, backend: str, dtype: torch.dtype | None = None, device: torch.device = DEVICE, order: int = 1
    ) -> dict[str, Tensor]:
        """Output and gradients, or of order 2 the gradients of Σ ⟨gradient, cotangent⟩ at inputs and upstream.

        They are computed from the inputs as they are or cast to ``dtype``.
        """
        leaves = [self._leaf(x, k, dtype, device) for k, x in enumerate(self.inputs.values())]
        output = self.call(backend, leaves)
        upstream = self.upstream.to(output.device, output.dtype)
        if order == 2:
            leaves = leaves[: self.wanted]
            found = second_order(lambda *_, **__: output, leaves, upstream, backend)
            return {
                f"dd {name}": g for name, g in zip([*self.inputs][: self.wanted] + ["upstream"], found, strict=True)
            }
        gradients = torch.autograd.grad(output, leaves[: self.wanted], upstream)
        return {"output": output.detach()} | {f"d {name}": g for name, g in zip(self.inputs, gradients)}

    def errors(self, found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
        """Largest errors, relative to the largest entry."""
        assert found.keys() == truth.keys()
        return {name: float((found[name].double() - x).abs().max()) / self._scale(name, x) for name, x in truth.items()}

    def _scale(self, name: str, exact: Tensor) -> float:
        return max(float(exact.abs().max()), 1.0 if name == "output" else self.gradient_terms)

    def _leaf(self, x: Tensor, k: int, dtype, device) -> Tensor:
        leaf = x.detach().to(device=device, dtype=dtype or x.dtype, copy=False)
        return leaf.requires_grad_(True) if k < self.wanted else leaf


def problem(
    op: str, batch: int, widths: int | Sequence[int] = 48, dtype: torch.dtype = torch.float32, *,
    stages: tuple[int, int] = (2, 2), teachers_wanted: bool = True, temperature: float = 0.1, kind: str = "normal",
    bandwidth: float | None = None, cosine: float = 0.0,
) -> Problem:  # fmt: skip
    """``widths``: one for all inputs; or of nodes and messages, or those of the stages, which students and teachers
    take in turn. ``kind``: "normal", "near" (teachers nearly equal to students), "zero" (some zero rows), "strided".
    ``cosine``: the mean one of rows.
    """
    bandwidth = bandwidth or (1.0 if cosine else 0.7)
    first = widths if isinstance(widths, int) else widths[0]
    generator = torch.Generator().manual_seed(batch * 31 + first)

    def width(k: int) -> int:
        return widths if isinstance(widths, int) else widths[k % len(widths)]

    def matrix(k: int, cosine: float = cosine) -> Tensor:
        x = torch.randn(batch, width(k), generator=generator, dtype=D64)
        if cosine:
            x = 1 + (1 / cosine - 1) ** 0.5 * x
        x = representable(x)
        if kind == "zero":
            x[:: max(1, batch // 3)] = 0
        if kind == "strided":
            wide = torch.zeros(2 * batch, 3 * width(k), dtype=dtype, device=DEVICE)
            wide[::2, ::3] = x.to(DEVICE, dtype)
            return wide[::2, ::3]
        return x.to(DEVICE, dtype)

    if "conv" in op:
        self_weight = SELF_WEIGHT if op.startswith("neighbor_conv") else None
        form = {"normalization": op.split()[1], "self_weight": self_weight}
        sigma = "auto" if cosine else bandwidth  # of rows that are nearly alike the one that suits them

        def convolve(backend: str, inputs: list[Tensor]) -> Tensor:
            return functional.graph_conv(*inputs, bandwidth=sigma, backend=backend, **form)

        # What a node that has one neighbour gives is a difference of terms of 1/σ².
        terms = 0.1 if self_weight is None else bandwidth**-2
        return Problem({"nodes": matrix(0), "messages": matrix(1, 0.0)}, 2, convolve, terms)
    num_students, num_teachers = stages
    students = [matrix(k) for k in range(num_students)]
    teachers = [matrix(k + num_students) for k in range(num_teachers)]
    if kind == "near":
        noise = [torch.randn(x.shape, generator=generator).to(DEVICE, dtype) for x in teachers]
        teachers = [students[0] + 1e-3 * x for x in noise]
    inputs = {f"students[{k}]": x for k, x in enumerate(students)} | {
        f"teachers[{k}]": x for k, x in enumerate(teachers)
    }
    options = {"temperature": temperature} | ({"bandwidth": bandwidth} if op == "relation_kl" else {})

    def losses(backend: str, inputs: list[Tensor]) -> Tensor:
        return getattr(functional, op)(inputs[:num_students], inputs[num_students:], **options, backend=backend)

    wanted = len(inputs) if teachers_wanted else num_students
    return Problem(inputs, wanted, losses, gradient_terms=1.0 if op == "node_contrast" else 0.1)


@contextmanager
def rows_rounded_to(bits: int) -> Iterator[None]:
    """The definitions with unit rows of so many bits beyond the leading one: what products of such operands know."""
    unit_rows = reference.unit_rows
    with mock.patch.object(reference, "unit_rows", lambda x: _Rounded.apply(unit_rows(x), bits)):
        yield


class _Rounded(torch.autograd.Function):
    """To so many bits, to even; its gradient is its upstream."""

    @staticmethod
    def forward(ctx, x: Tensor, bits: int) -> Tensor:
        mantissa, exponent = torch.frexp(x)  # in [½, 1)
        return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream, None


def complaints(
    problem: Problem, product: str, truth: dict[str, Tensor], order: int = 1, slack: float | None = None
) -> list[str]:
    """What errs by more than twice as much as is due, and ``slack``; in bfloat16 also by more than the ``BOUND`` that
    is promised there, below which a draw's luck decides: what is due knows nothing of the rounding of weights.

    What is due, |truth − plain|: in float32 plain PyTorch's error in that type; of products in a short type or in tf32
    that of the definition, in float64, of rows rounded to it. The functions' reference backend would be no measure of
    these: it multiplies in float32 whatever the inputs are.
    """
    dtype, precision = PRODUCTS[product]
    torch.set_float32_matmul_precision("highest")
    if product in MANTISSA:
        with rows_rounded_to(MANTISSA[product]):
            plain = problem.results("reference", D64, order=order)
    else:
        plain = truth if dtype == D64 else problem.results("reference", dtype, order=order)
    torch.set_float32_matmul_precision(precision)
    fast = problem.results(TARGET.backend, dtype, order=order)
    torch.set_float32_matmul_precision("highest")
    loss_type = torch.float64 if dtype == D64 else torch.float32
    found = []
    for name, exact in truth.items():
        of_losses = name in ("output", "dd upstream") and "nodes" not in problem.inputs
        if fast[name].shape != exact.shape or fast[name].dtype != (loss_type if of_losses else dtype):
            found.append(f"{product} {name}: {fast[name].dtype} {tuple(fast[name].shape)}")
    slack = SLACK[product] if slack is None else slack
    due, errors = problem.errors(plain, truth), problem.errors(fast, truth)
    for name, error in errors.items():
        limit = max(2 * due[name] + slack, BOUND if product == "bfloat16" else 0.0)
        if not error <= limit:
            found.append(f"{product} {name}: error {error:.2e}, allowed {limit:.2e} of the largest entry")
    return found


def compile_for(problem: Problem, products: Sequence[str], orders: Sequence[int]) -> None:
    """Makes all that the results take, and judges nothing."""
    for product in products:
        dtype, precision = PRODUCTS[product]
        torch.set_float32_matmul_precision(precision)
        for order in orders:
            problem.results(TARGET.backend, dtype, order=order)


def assert_all_products(problem: Problem, products: Sequence[str] = tuple(PRODUCTS), orders=(1, 2)) -> None:
    """Every product's results against one truth."""
    if TARGET is COMPILED:
        return compile_for(problem, products, orders)
    found = []
    for order in orders:
        truth = problem.results("reference", D64, order=order)
        for product in products:
            found += complaints(problem, product, truth, order)
    assert not found, "\n".join(found)


def assert_no_worse_than_due(problem: Problem, slack: float | None = None, order: int = 1) -> None:
    """In the type of the problem's inputs."""
    product = PRODUCT_OF[next(iter(problem.inputs.values())).dtype]
    if TARGET is COMPILED:
        return compile_for(problem, [product], [order])
    truth = problem.results("reference", D64, order=order)
    found = complaints(problem, product, truth, order, slack)
    assert not found, "\n".join(found)


def assert_within(problem: Problem, dtype: torch.dtype, bound: float, autocast: bool, order: int) -> None:
    """In a short type, as the inputs' own or autocast's, all errors are below ``bound`` of the largest entry, and what
    float32 makes of terms of size 1: a loss of rows that are all alike is smaller than that."""
    if TARGET is COMPILED:
        return compile_for(problem, [PRODUCT_OF[dtype]], [order])
    truth = problem.results("reference", D64, order=order)
    with torch.autocast(DEVICE.type, dtype) if autocast else nullcontext():
        fast = problem.results(TARGET.backend, torch.float32 if autocast else dtype, order=order)
    for name, exact in truth.items():
        error, size = float((fast[name].double() - exact).abs().max()), float(exact.abs().max())
        assert error <= bound * size + SLACK["float32"], f"{name}: error {error:.2e}, largest entry {size:.2e}"
