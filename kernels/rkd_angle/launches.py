"""rkd_angle on GPUs: the launches of ``tiles``, of strips of G that stay within ``STRIP_BYTES``."""

import torch
import triton
from torch import Tensor

from gkd_fast.kernels.common import strips
from gkd_fast.kernels.common.launch import architecture, matrices, on_device, product_of
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.strips import column_strips, multiply
from gkd_fast.kernels.common.table import block_width, tiles
from gkd_fast.kernels.rkd_angle.tiles import angle_products, angle_sums, angle_weights

# The strips of one launch: rows of G of both sides, or weights.
STRIP_BYTES = 16 * 2**20


class Problem:
    """Both sides' rows, their squared norms, and the strips of the nodes."""

    def __init__(self, students: Tensor, teachers: Tensor):
        (self.students,) = matrices("students", [students])
        (self.teachers,) = matrices("teachers", [teachers], len(students))
        self.sides = self.students, self.teachers
        self.count, self.dims = len(students), (students.shape[1], teachers.shape[1])
        self.norms = tuple(x.square().sum(dim=1) for x in self.sides)
        self.product, self.arch = product_of("float32", students), architecture(students.device)
        row_bytes = 2 * max(self.count, 1) * students.element_size()
        self.step = max(strips.LEAST, STRIP_BYTES // row_bytes // strips.LEAST * strips.LEAST)

    def launched(self, kernel, rows: int, **constants):
        """The kernel and its grid, columns first, of tiles of ``rows`` rows and all columns."""
        config = tiles(kernel.__name__, self.arch, self.product.name, 0)
        bound = launch(
            kernel, BLOCK_ROWS=config.rows, BLOCK_COLUMNS=config.columns, BLOCK_WIDTH=block_width(self.product.name),
            num_warps=config.warps, num_stages=config.stages, **self.product.constants(), **constants,
        )  # fmt: skip
        return bound, (triton.cdiv(self.count, config.columns), triton.cdiv(rows, config.rows))

    def strips_of_nodes(self):
        """Some nodes after others, with their rows of both sides' G."""
        for nodes in column_strips(self.count, self.step):
            made = []
            for x, dim in zip(self.sides, self.dims, strict=True):
                rows = x[nodes]
                strip = x.new_empty(len(rows), self.count)
                bound, grid = self.launched(angle_products, len(rows))
                bound(grid, rows, x, strip, dim, len(rows), self.count)
                made.append(strip)
            yield nodes, made


def rkd_angle(students: Tensor, teachers: Tensor) -> Tensor:
    problem = Problem(students, teachers)
    sums = torch.zeros(problem.count, dtype=torch.float64, device=students.device)
    with on_device(sums):
        for nodes, products in problem.strips_of_nodes():
            bound, grid = problem.launched(angle_sums, problem.count)
            totals = students.new_empty(grid[0], problem.count)
            bound(
                grid, *problem.sides, *problem.norms, *products, totals, *problem.dims, nodes.start, len(products[0]),
                problem.count,
            )  # fmt: skip
            sums += totals.sum(dim=0, dtype=torch.float64)
    return sums


def rkd_angle_backward(upstream: Tensor, students: Tensor, teachers: Tensor, needs) -> list[Tensor]:
    if len(needs) != 2:
        raise ValueError(f"needs must have 2 entries, got {len(needs)}")
    problem, upstream = Problem(students, teachers), upstream.contiguous()
    gradients = [torch.zeros_like(x) if needed else None for x, needed in zip(problem.sides, needs, strict=True)]
    wanted = sum(1 << q for q, needed in enumerate(needs) if needed)
    if not wanted:
        return []
    with on_device(upstream):
        for nodes, products in problem.strips_of_nodes():
            for block in column_strips(problem.count, problem.step):
                length = block.stop - block.start
                weights = [
                    x.new_empty(length if needed else 0, problem.count)
                    for x, needed in zip(problem.sides, needs, strict=True)
                ]
                bound, grid = problem.launched(angle_weights, length, WANTED=wanted)
                bound(
                    grid, *problem.sides, *problem.norms, *products, upstream, *weights, *problem.dims, nodes.start,
                    len(products[0]), block.start, length, problem.count,
                )  # fmt: skip
                for x, w, gradient in zip(problem.sides, weights, gradients, strict=True):
                    if gradient is not None:
                        gradient[block] += 2 * (multiply(w, x) - w.sum(dim=1, keepdim=True) * x[block])
    return [x for x in gradients if x is not None]
