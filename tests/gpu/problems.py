"""The ops' problems on the GPU and what their results are held against."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gkd_fast import functional
from tests.second_order_cases import second_order

DEVICE = torch.device("cuda")
OPS = ("relation_kl", "node_contrast", "graph_conv symmetric", "graph_conv row")
# Beyond twice plain PyTorch's own error, which may happen to be none, relative to the largest entry. In the short types
# one rounding of the result; in float32 those of two log-sums, up to 16 at τ = 0.1, whose difference a loss is; in
# float64 what no wrong formula comes near.
SLACK = {
    torch.float64: 1e-12, torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2, torch.float16: torch.finfo(torch.float16).eps / 2,
}  # fmt: skip


@dataclass
class Problem:
    """``inputs`` by name, those with gradient first; ``call(backend, inputs)`` is the op.

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
        self.upstream = torch.randn(rows, *shape[1:], generator=generator, dtype=torch.float64)

    def results(
        self, backend: str, dtype: torch.dtype | None = None, device=DEVICE, order: int = 1
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

    def _leaf(self, x: Tensor, k: int, dtype, device) -> Tensor:
        leaf = x.detach().to(device=device, dtype=dtype or x.dtype, copy=False)
        return leaf.requires_grad_(True) if k < self.wanted else leaf


def problem(
    op: str, batch: int, dim: int = 48, dtype: torch.dtype = torch.float32, *, stages: tuple[int, int] = (2, 2),
    teachers_wanted: bool = True, temperature: float = 0.1, kind: str = "normal", bandwidth: float = 0.7,
) -> Problem:  # fmt: skip
    """``kind``: "normal", "near" (teachers nearly equal to students), "zero" (some zero rows), "strided"."""
    generator = torch.Generator().manual_seed(batch * 31 + dim)

    def matrix() -> Tensor:
        x = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
        if kind == "zero":
            x[:: max(1, batch // 3)] = 0
        if kind == "strided":
            wide = torch.zeros(2 * batch, 3 * dim, dtype=dtype, device=DEVICE)
            wide[::2, ::3] = x.to(DEVICE, dtype)
            return wide[::2, ::3]
        return x.to(DEVICE, dtype)

    if op.startswith("graph_conv"):
        normalization = op.split()[1]

        def convolve(backend: str, inputs: list[Tensor]) -> Tensor:
            return functional.graph_conv(*inputs, bandwidth=bandwidth, normalization=normalization, backend=backend)

        return Problem({"nodes": matrix(), "messages": matrix()}, 2, convolve)
    num_students, num_teachers = stages
    students = [matrix() for _ in range(num_students)]
    teachers = [matrix() for _ in range(num_teachers)]
    if kind == "near":
        noise = [torch.randn(batch, dim, generator=generator).to(DEVICE, dtype) for _ in teachers]
        teachers = [students[0] + 1e-3 * x for x in noise]
    inputs = {f"students[{k}]": x for k, x in enumerate(students)} | {
        f"teachers[{k}]": x for k, x in enumerate(teachers)
    }
    options = {"temperature": temperature} | ({"bandwidth": bandwidth} if op == "relation_kl" else {})

    def losses(backend: str, inputs: list[Tensor]) -> Tensor:
        return getattr(functional, op)(inputs[:num_students], inputs[num_students:], **options, backend=backend)

    wanted = len(inputs) if teachers_wanted else num_students
    return Problem(inputs, wanted, losses, gradient_terms=1.0 if op == "node_contrast" else 0.1)


def assert_no_worse_than_plain(problem: Problem, slack: float | None = None, order: int = 1) -> None:
    """|truth − fast| ≤ 2 |truth − plain| + slack · scale, for the output and every gradient; or those of order 2."""
    dtype = next(iter(problem.inputs.values())).dtype
    slack = SLACK[dtype] if slack is None else slack
    truth = problem.results("reference", torch.float64, order=order)
    plain, fast = (problem.results(backend, order=order) for backend in ("reference", "triton"))
    assert fast.keys() == truth.keys()
    for name, expected in truth.items():
        assert fast[name].shape == expected.shape and fast[name].dtype == plain[name].dtype, name
        error, allowed = ((x[name].double() - expected).abs().max() for x in (fast, plain))
        least = 1.0 if name == "output" else problem.gradient_terms
        limit = 2 * allowed + slack * max(float(expected.abs().max()), least)
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"
