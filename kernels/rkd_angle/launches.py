"""rkd_angle on GPUs: the launches of ``tiles``, of many graphs at once, of strips of G that stay within
``strips.STRIP_BYTES``. One graph is a batch of one."""

import torch
import triton
from torch import Tensor

from gkd_fast.kernels.common import strips
from gkd_fast.kernels.common.launch import architecture, matrices, on_device, product_of
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.strips import column_strips, graph_strips, multiply
from gkd_fast.kernels.common.table import block_width, tiles
from gkd_fast.kernels.rkd_angle.tiles import angle_products, angle_sums, angle_weights


class Graphs:
    """Both sides' rows ``[G, N, D]``, their squared norms, how many of each graph count, and the strips of the nodes.

    Attributes:
        step: the nodes of a strip.
    """

    def __init__(self, students: Tensor, teachers: Tensor, counts: Tensor, step: int):
        self.sides, self.counts, self.step = (students, teachers), counts, step
        self.graphs, self.count = students.shape[:2]
        self.dims = students.shape[2], teachers.shape[2]
        self.norms = tuple(x.square().sum(dim=2) for x in self.sides)
        self.product, self.arch = product_of("float32", students), architecture(students.device)

    def launched(self, kernel, rows: int, **constants):
        """The kernel and its grid, columns first, of tiles of ``rows`` rows and all columns of every graph."""
        config = tiles(kernel.__name__, self.arch, self.product.name, 0)
        bound = launch(
            kernel, BLOCK_ROWS=config.rows, BLOCK_COLUMNS=config.columns, BLOCK_WIDTH=block_width(self.product.name),
            num_warps=config.warps, num_stages=config.stages, **self.product.constants(), **constants,
        )  # fmt: skip
        return bound, (triton.cdiv(self.count, config.columns), triton.cdiv(rows, config.rows), self.graphs)

    def strips_of_nodes(self):
        """Some nodes after others, with their rows of both sides' G."""
        for nodes in column_strips(self.count, self.step):
            made, length = [], nodes.stop - nodes.start
            for x, dim in zip(self.sides, self.dims, strict=True):
                strip = x.new_empty(self.graphs, length, self.count)
                bound, grid = self.launched(angle_products, length)
                bound(grid, x, strip, dim, nodes.start, length, self.count)
                made.append(strip)
            yield nodes, length, made

    def sums(self) -> Tensor:
        sums = torch.zeros(self.graphs, self.count, dtype=torch.float64, device=self.counts.device)
        for nodes, length, products in self.strips_of_nodes():
            bound, grid = self.launched(angle_sums, self.count)
            totals = products[0].new_empty(grid[0], self.graphs, self.count)
            bound(
                grid, *self.sides, *self.norms, *products, totals, self.counts, *self.dims, nodes.start, length,
                self.count,
            )  # fmt: skip
            sums += totals.sum(dim=0, dtype=torch.float64)
        return sums

    def add_gradients(self, upstream: Tensor, needs, gradients: list[Tensor | None]) -> None:
        wanted = sum(1 << q for q, needed in enumerate(needs) if needed)
        for nodes, length, products in self.strips_of_nodes():
            for block in column_strips(self.count, self.step):
                rows = block.stop - block.start
                weights = [
                    x.new_empty(self.graphs, rows if needed else 0, self.count)
                    for x, needed in zip(self.sides, needs, strict=True)
                ]
                bound, grid = self.launched(angle_weights, rows, WANTED=wanted)
                bound(
                    grid, *self.sides, *self.norms, *products, upstream, *weights, self.counts, *self.dims,
                    nodes.start, length, block.start, rows, self.count,
                )  # fmt: skip
                for x, w, gradient in zip(self.sides, weights, gradients, strict=True):
                    if gradient is not None:
                        own = w.sum(dim=2, keepdim=True) * x[:, block]
                        gradient[:, block] += 2 * (multiply(w, x) - own)


def _some_graphs(students: Tensor, teachers: Tensor, counts: Tensor):
    """Some graphs after others, as many as have their strips within bounds."""
    if students.dim() != 3 or teachers.dim() != 3 or students.shape[:2] != teachers.shape[:2]:
        shapes = tuple(students.shape), tuple(teachers.shape)
        raise ValueError(f"students and teachers must have shape [graphs, rows, width], got {shapes}")
    if counts.shape != (len(students),):
        raise ValueError(f"counts must have shape ({len(students)},), got {tuple(counts.shape)}")
    rows = students.shape[0] * students.shape[1]
    for name, x in (("students", students), ("teachers", teachers)):
        matrices(name, [x.flatten(0, 1)], rows)
    students, teachers, counts = students.contiguous(), teachers.contiguous(), counts.contiguous()
    # Of both sides rows of G and of weights.
    row_bytes = 4 * students.shape[1] * students.element_size()
    graphs, step = graph_strips(row_bytes, students.shape[1], strips.STRIP_BYTES)
    for here in column_strips(len(students), graphs):
        yield here, Graphs(students[here], teachers[here], counts[here], step)


def batched_rkd_angle(students: Tensor, teachers: Tensor, counts: Tensor) -> Tensor:
    with on_device(students):
        found = [part.sums() for _, part in _some_graphs(students, teachers, counts)]
    return torch.cat(found) if found else students.new_zeros(students.shape[:2], dtype=torch.float64)


def batched_rkd_angle_backward(
    upstream: Tensor, students: Tensor, teachers: Tensor, needs, counts: Tensor
) -> list[Tensor]:
    if len(needs) != 2:
        raise ValueError(f"needs must have 2 entries, got {len(needs)}")
    if not any(needs):
        return []
    sides, upstream = (students, teachers), upstream.contiguous()
    gradients = [
        torch.zeros_like(x, memory_format=torch.contiguous_format) if n else None
        for x, n in zip(sides, needs, strict=True)
    ]
    with on_device(upstream):
        for here, part in _some_graphs(students, teachers, counts):
            part.add_gradients(upstream[here], needs, [x if x is None else x[here] for x in gradients])
    return [x for x in gradients if x is not None]


def rkd_angle(students: Tensor, teachers: Tensor) -> Tensor:
    return batched_rkd_angle(students[None], teachers[None], _whole(students))[0]


def rkd_angle_backward(upstream: Tensor, students: Tensor, teachers: Tensor, needs) -> list[Tensor]:
    given = upstream[None], students[None], teachers[None]
    return [x[0] for x in batched_rkd_angle_backward(*given, needs, _whole(students))]


def _whole(rows: Tensor) -> Tensor:
    """The count of a graph all of whose rows are its own."""
    return torch.full((1,), len(rows), dtype=torch.int64, device=rows.device)
