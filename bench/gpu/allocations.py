"""Memory of the GPU ops without a GPU: their launchers run on CPU tensors with the kernels left out, and every
allocation is counted.

Beyond the unit rows (and messages) that go in, the losses (or the output) and the gradients that come out. The unit
rows themselves are the caller's: float32 copies of the features, counted apart by :func:`unit_row_bytes`.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gkd_fast import kernels
from gkd_fast.kernels.common import row_maxima
from gkd_fast.kernels.common.launcher import Launch
from gkd_fast.kernels.graph_conv import strips as graph_conv_strips
from gkd_fast.kernels.node_contrast import strips as node_contrast_strips
from gkd_fast.kernels.relation_kl import launches as relation_kl


class Counter(TorchDispatchMode):
    """Follows the storages that PyTorch's operations make; ``peak`` is the most bytes alive at a time."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        given = {_storage(x) for x in tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)}
        result = function(*arguments, **(keywords or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and _storage(x) not in given:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def extra_peak(run: Callable[[], list[torch.Tensor]]) -> int:
    """Bytes at the peak of ``run()`` beyond the tensors that it returns."""
    with kernels_left_out([]), Counter() as counter:
        kept = run()
    return counter.peak - sum({_storage(x): x.untyped_storage().nbytes() for x in kept}.values())


def op_peak(*arguments, **options) -> int:
    """Extra bytes of :func:`op_run`; node_contrast's weighted sums, where it keeps them, count as extra."""
    return extra_peak(op_run(*arguments, **options))


def op_run(
    op: str, batch: int, dim: int, stages: int, precision: str, *, normalization: str = "symmetric",
    keep_weighted: bool = True, teachers_wanted: bool = False,
) -> Callable[[], list[torch.Tensor]]:  # fmt: skip
    """Forward and backward of one op on unit rows of no values, gradients to students (nodes and messages) or all."""
    rows = torch.float64 if precision == "float64" else torch.float32

    def matrices(count: int) -> list[torch.Tensor]:
        return [torch.empty(batch, dim, dtype=rows) for _ in range(count)]

    if op == "graph_conv":
        (nodes, messages, upstream), variance = matrices(3), torch.ones((), dtype=rows)
        launch = kernels.OPS

        def run() -> list[torch.Tensor]:
            output, degrees = launch["graph_conv"](nodes, messages, variance, normalization, precision)
            found = launch["graph_conv_backward"](
                upstream, nodes, messages, output, degrees, variance, normalization, precision, [True, True]
            )
            return [output, *found]

        return run
    students, teachers, upstream = matrices(stages), matrices(stages), torch.empty(batch, stages, stages, dtype=rows)
    needs = [True] * stages + [teachers_wanted] * stages
    forward, backward = kernels.OPS[op], kernels.OPS[f"{op}_backward"]

    def relation() -> list[torch.Tensor]:
        losses, *sums = forward(students, teachers, 0.1, 1.0, precision)
        return [losses, *backward(upstream, students, teachers, losses, *sums, 0.1, 1.0, precision, needs)]

    def contrast() -> list[torch.Tensor]:
        wanted = [True] * stages**2
        losses, *sums = forward(students, teachers, wanted, 0.1, precision, keep_weighted)
        return [losses, *backward(upstream, students, teachers, *sums, wanted, 0.1, precision, needs)]

    return relation if op == "relation_kl" else contrast


def unit_row_bytes(op: str, batch: int, dim: int, stages: int) -> int:
    """Float32 unit rows and their norms, which the backward pass keeps."""
    matrices = 1 if op == "graph_conv" else 2 * stages
    return matrices * batch * (dim + 1) * 4


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What ``strips.multiply`` gives on a GPU, uncomputed."""
    wide = a.dtype if a.dtype == torch.float64 else torch.float32
    return a.new_empty(a.shape[0], b.shape[1], dtype=wide)


@contextmanager
def kernels_left_out(launched: list):
    """Grids of the kernels, and shapes of what cuBLAS, which adds in place, multiplies, are put into ``launched``."""

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        launched.append((a.shape, b.shape))
        return _product(a, b)

    def add(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        launched.append((a.shape, b.shape))

    with ExitStack() as replaced:
        call = lambda self, grid, *arguments: launched.append(grid)  # noqa: E731
        replaced.enter_context(mock.patch.object(Launch, "__call__", call))
        for module in (graph_conv_strips, node_contrast_strips, relation_kl, row_maxima):
            replaced.enter_context(mock.patch.object(module, "multiply", product))
        for module in (graph_conv_strips, node_contrast_strips, relation_kl):
            replaced.enter_context(mock.patch.object(module, "add_products", add))
        yield
