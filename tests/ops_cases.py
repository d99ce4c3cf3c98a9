"""What the tests of the ops share: inputs, results, and the rule by which a fused result is judged."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gkd_fast import functional, ops, reference

D64 = torch.float64
DTYPES = [D64, torch.float32, torch.bfloat16, torch.float16]
MISSING = ops.missing("cpp", torch.device("cpu"))
requires_cpp = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# Rows per tile and batches: 1, 2, a tile less or more one, a prime, several tiles; 0: the kernels' own choice, which
# changes at 256 and at 768 rows.
TILES = [(32, 1), (32, 2), (32, 31), (32, 33), (32, 67), (64, 65), (96, 193), (0, 257), (0, 769)]

KINDS = ["random", "converged", "nearly converged", "zero rows", "clustered", "opposite rows"]


def rows(batch: int, *widths: int, kind: str = "random", seed: int = 0) -> list[Tensor]:
    """Features ``[batch, width]`` in float64.

    ``kind``: the second half of the tensors equals (nearly) the first one ("converged", "nearly converged"), some rows
    are zero, all point nearly one way ("clustered"), or cosines are exactly 1 and −1 ("opposite rows").
    """
    generator = torch.Generator().manual_seed(1000 * seed + batch)
    tensors = [torch.randn(batch, width, dtype=D64, generator=generator) for width in widths]
    half = len(tensors) // 2
    for k, x in enumerate(tensors):
        if "converged" in kind and k >= half:
            x.mul_(1e-3 * (kind != "converged")).add_(tensors[k - half])
        elif kind == "zero rows":
            x[k::5] = 0
        elif kind == "clustered":
            x.mul_(0.02).add_(1)
        elif kind == "opposite rows":
            x[batch // 2 :] = x[: batch - batch // 2] * torch.tensor([2.0, -1.0], dtype=D64)[k % 2]
    return tensors


def upstream_like(output: Tensor, dtype: torch.dtype = D64) -> Tensor:
    """A random upstream gradient, rounded to ``dtype``."""
    upstream = torch.randn(output.shape, dtype=D64, generator=torch.Generator().manual_seed(output.numel()))
    return upstream.to(dtype).to(output.dtype)


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype = D64) -> list[Tensor]:
    """The output and the gradients of all inputs, under a random upstream rounded to ``dtype``."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream_like(output, dtype))]


def same_bits(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Rounded(torch.autograd.Function):
    """The nearest bfloat16 numbers, differentiated as if they were the numbers themselves."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx, upstream):
        return upstream


def with_rounded_rows(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What ``run`` gives where the rows that the definitions multiply are rounded to bfloat16, as products in that type
    do: unit rows, pkt's, and the rows about their mean whose distances are taken."""
    unit_rows, nearly_unit_rows, distances = reference.unit_rows, reference.nearly_unit_rows, reference.distances
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "unit_rows", lambda x: _Rounded.apply(unit_rows(x)))
        patch.setattr(reference, "nearly_unit_rows", lambda x, eps: _Rounded.apply(nearly_unit_rows(x, eps)))
        patch.setattr(reference, "distances", lambda x: distances(_Rounded.apply(x - x.mean(dim=0))))
        return run()


def check(
    fused: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    draws: Iterable[Sequence[Tensor]],
    dtype: torch.dtype,
    gain: float = 1.0,
) -> None:
    """``fused`` against ``definition``, output and all gradients, for inputs rounded to ``dtype``.

    float64 agrees to 1e-10 of the largest entry. In the other types |truth − fused| ≤ 2·|truth − plain|, with the truth
    in float64 and ``definition`` itself in ``dtype`` as plain (in float32 where it leaves ``dtype``'s range), or, where
    that errs more, ``with_rounded_rows``: no product of bfloat16 operands knows more, but where one pair of rows
    decides, plain PyTorch can be right by luck. Plus one rounding of the result and ε·``gain`` of float32, what a
    rounding of what goes into an exponential does to a result of size 1. Errors are largest ones, and of several
    ``draws`` of the inputs their means: single roundings of few entries decide each.
    """
    measured = [_errors(fused, definition, inputs, dtype, gain) for inputs in draws]
    for k, of_draws in enumerate(zip(*measured, strict=True)):
        error, allowed = (sum(x) / len(of_draws) for x in zip(*of_draws, strict=True))
        assert error <= allowed, f"{f'gradient {k - 1}' if k else 'output'}: error {error:.3g}, allowed {allowed:.3g}"


def _errors(fused, definition, inputs, dtype, gain) -> list[tuple[float, float]]:
    """The largest error of every result and what is allowed."""
    inputs = [x.to(dtype) for x in inputs]
    truth = results(definition, [x.double() for x in inputs], dtype)
    fast = results(fused, inputs, dtype)
    assert [x.dtype for x in fast[1:]] == [dtype] * len(inputs)
    if dtype == D64:
        return [((x - y).abs().max().item(), 1e-10 * max(1, y.abs().max().item())) for x, y in zip(fast, truth)]
    plain = [results(definition, inputs, dtype)]
    if not all(x.isfinite().all() for x in plain[0]):
        plain = [results(definition, [x.float() for x in inputs], dtype)]
    if dtype == torch.bfloat16:
        plain.append(with_rounded_rows(lambda: results(definition, [x.double() for x in inputs], dtype)))
    measured = []
    for exact, ours, *theirs in zip(truth, fast, *plain, strict=True):
        error, *plain_errors = ((x.double() - exact).abs().max().item() for x in (ours, *theirs))
        rounding = torch.finfo(ours.dtype).eps / 2 * exact.abs().max().item() + torch.finfo(torch.float32).eps * gain
        measured.append((error, 2 * max(plain_errors) + rounding))
    return measured


def graph_conv(normalization: str = "symmetric", bandwidth: float = 0.6, backend: str = "cpp", **form):
    """``form``: ``self_weight``, for the graph over the others."""
    return lambda nodes, messages: functional.graph_conv(
        nodes, messages, bandwidth=bandwidth, normalization=normalization, backend=backend, **form
    )


def node_contrast(num_students: int = 1, backend: str = "cpp", **options):
    return lambda *x: functional.node_contrast(x[:num_students], x[num_students:], backend=backend, **options)


def relation_kl(num_students: int = 1, backend: str = "cpp", **options):
    return lambda *x: functional.relation_kl(x[:num_students], x[num_students:], backend=backend, **options)


# Every public function: made for a backend, and the widths of its inputs.
FUNCTIONS = {
    "graph_conv symmetric": (lambda backend: graph_conv("symmetric", backend=backend), (4, 3)),
    "graph_conv row": (lambda backend: graph_conv("row", backend=backend), (4, 3)),
    "neighbor_conv symmetric": (lambda backend: graph_conv("symmetric", backend=backend, self_weight=0.3), (4, 3)),
    "neighbor_conv row": (lambda backend: graph_conv("row", backend=backend, self_weight=0.3), (4, 3)),
    "node_contrast": (lambda backend: node_contrast(2, backend, temperature=0.4), (3, 3, 3, 3)),
    "node_contrast of some pairs": (lambda backend: node_contrast(2, backend, pairs=[(0, 1), (1, 0)]), (3, 3, 3, 3)),
    "node_contrast, own shifts": (lambda backend: node_contrast(1, backend, temperature=0.02), (5, 5)),
    "relation_kl": (lambda backend: relation_kl(2, backend, temperature=0.4, bandwidth=0.8), (3, 2, 4, 3)),
    "relation_kl, own shifts": (lambda backend: relation_kl(1, backend, temperature=0.01), (5, 4)),
}

# The forms of a loss's graphs.
GRAPHS: dict[str, dict] = {"own node": {"neighbors": None, "self_weight": None},
                           "others": {"neighbors": 4, "self_weight": 0.8}}  # fmt: skip

# The fused backend that computes on this CPU.
FUSED = next((name for name in ("cpp", "triton") if ops.missing(name, torch.device("cpu")) is None), None)
requires_fused = pytest.mark.skipif(FUSED is None, reason="no fused backend computes on this CPU")


def _with_bank(function: Callable[..., Tensor], num_students: int, **options):
    """``function`` with a bank of seven rows of every stage, without gradient."""

    def call(*x: Tensor) -> Tensor:
        students, teachers = x[:num_students], x[num_students:]
        bank = [y.detach().roll(1, 1)[-7:] + 1 for y in teachers]
        if function is functional.relation_kl:
            bank = [y.detach().roll(1, 1)[-7:] + 1 for y in students], bank
        return function(students, teachers, bank=bank, **options)

    return call


# The same of functions whose rows meet a column set.
BANKED = {
    "node_contrast with a bank": (
        lambda backend: _with_bank(functional.node_contrast, 2, temperature=0.4, backend=backend), (3, 3, 3)
    ),
    "relation_kl with a bank": (
        lambda backend: _with_bank(functional.relation_kl, 1, temperature=0.4, backend=backend), (3, 2, 4)
    ),
}  # fmt: skip


def leaves(widths: Sequence[int], batch: int = 11, dtype: torch.dtype = D64) -> list[Tensor]:
    return [x.to(dtype).requires_grad_() for x in rows(batch, *widths)]


class Calls(TorchDispatchMode):
    """Records the arguments, by name, of every call of ``torch.ops.gkd_fast`` inside."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gkd_fast":
            names = (argument.name for argument in func._schema.arguments)
            self.calls.append((func._opname, dict(zip(names, args)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))

    def arguments(self, op: str) -> list[dict]:
        return [arguments for name, arguments in self.calls if name == op]
