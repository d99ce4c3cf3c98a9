"""pair_sums of many graphs: the launches of ``tiles`` with a graph per index of the grid's third dimension."""

import torch
from torch import Tensor

from gkd_fast.kernels.common import strips
from gkd_fast.kernels.common.launch import on_device
from gkd_fast.kernels.common.strips import MOST_GRAPHS, add_products, column_strips, graph_strips
from gkd_fast.kernels.pair_sums.launches import Problem, Rows


class Graphs(Problem):
    """Graphs ``[G, N, …]`` as rows one after another; terms and constants, ``[P, G, N]`` and ``[Q, G]``, lie so too."""

    def __init__(self, kind, sides, terms, constants, product_precision, counts, directions=None):
        if sides[0].dim() != 3 or any(x.shape[:2] != sides[0].shape[:2] for x in sides):
            raise ValueError(f"sides must have shape [graphs, rows, width], got {[tuple(x.shape) for x in sides]}")
        graphs, length = sides[0].shape[:2]
        if counts.shape != (graphs,):
            raise ValueError(f"counts must have shape ({graphs},), got {tuple(counts.shape)}")
        if constants.dim() != 2 or constants.shape[1] != graphs:
            raise ValueError(f"constants must have shape [constants, {graphs}], got {tuple(constants.shape)}")
        if directions is not None:
            along, moving, term_tangents, constant_tangents = directions
            along = [x.flatten(0, 1) for x in along]
            directions = along, moving, term_tangents.flatten(1), constant_tangents.contiguous()
        flat = [x.flatten(0, 1) for x in sides]
        super().__init__(
            kind, flat, terms.flatten(1), constants.contiguous(), product_precision, None, None, 0, directions
        )
        self.counts, self.graphs = counts.contiguous(), graphs
        self.length = self.column_length = length

    def some(self, first: int, most: int) -> "Graphs":
        """Up to ``most`` of the graphs, from the first on."""
        here = slice(first, min(first + most, self.graphs))
        part = object.__new__(Graphs)
        part.__dict__ |= self.__dict__
        part.own = part.others = self.own[here.start * self.length : here.stop * self.length]
        part.constants, part.constant_tangents = (x[:, here].contiguous() for x in self.constant_arguments())
        part.counts, part.graphs = self.counts[here], here.stop - here.start
        return part

    def rows_of(self, block: slice) -> Rows:
        """Some rows of every graph."""

        def matrix(x: Tensor) -> Tensor:
            return self.spread(x)[:, block].flatten(0, 1).contiguous()

        def vectors(x: Tensor) -> Tensor:
            return x.unflatten(1, (self.graphs, self.length))[:, :, block].flatten(1).contiguous()

        own = self.own
        along = [x if x is None else matrix(x) for x in own.tangents]
        return Rows([matrix(x) for x in own.sides], vectors(own.terms), along, vectors(own.term_tangents))

    def spread(self, x: Tensor) -> Tensor:
        """Rows one after another as those of the graphs."""
        return x.unflatten(0, (self.graphs, -1))

    def gradients(self, upstream: Tensor, column_upstream: None, needs) -> tuple[list[Tensor], Tensor]:
        if len(needs) != self.sides:
            raise ValueError(f"needs must have {self.sides} entries, got {len(needs)}")
        if upstream.shape != (self.graphs, self.length):
            raise ValueError(f"upstream must have shape {(self.graphs, self.length)}, got {tuple(upstream.shape)}")
        upstream = upstream.contiguous()
        like = self.own.terms
        found = [
            like.new_zeros(self.graphs, self.length, d) if n else None for d, n in zip(self.dims, needs, strict=True)
        ]
        term_gradients = torch.zeros(self.terms, self.graphs, self.length, dtype=torch.float64, device=self.device)
        wanted = sum(1 << q for q, needed in enumerate(needs) if needed)
        weights = wanted.bit_count() + (wanted & self.moving).bit_count()
        row_bytes = self.length * weights * self.product.torch_type.itemsize
        graphs, rows = graph_strips(row_bytes, self.length, strips.STRIP_BYTES)
        with on_device(upstream):
            for first in range(0, self.graphs, graphs):
                here = slice(first, first + graphs)
                part = self.some(first, graphs)
                for block in column_strips(self.length, rows):
                    given = [x if x is None else x[here, block] for x in found]
                    part.add_gradients(given, term_gradients[:, here, block], upstream[here], wanted, block)
        return [x for x in found if x is not None], term_gradients.to(self.type)

    def add_gradients(self, gradients, term_gradients: Tensor, upstream: Tensor, wanted: int, block: slice) -> None:
        """Adds those of some rows of every graph, which have all their columns."""
        whole = block.stop - block.start == self.length
        rows = self.own if whole else self.rows_of(block)
        counts = self.counts if whole else (self.counts - block.start).clamp(0, block.stop - block.start)
        moving, still, sums = self._weights(
            rows, self.own, upstream[:, block].contiguous(), upstream, wanted, block.start, self.graphs,
            self.constant_arguments(), counts, self.counts,
        )  # fmt: skip
        for q, gradient in enumerate(gradients):
            if gradient is None:
                continue
            add_products(gradient, self.spread(moving[q]), self.spread(self.own.sides[q]))
            if still[q] is not None:
                add_products(gradient, self.spread(still[q]), self.spread(self.own.tangents[q]))
        term_gradients += sums.sum(dim=0, dtype=torch.float64).unflatten(1, (self.graphs, -1))


def batched_pair_sums(kind, sides, terms, constants, product_precision, counts) -> Tensor:
    return _sums(Graphs(kind, sides, terms, constants, product_precision, counts))


def batched_pair_sums_backward(
    kind, upstream, sides, terms, constants, product_precision, needs, counts
) -> tuple[list[Tensor], Tensor]:
    return Graphs(kind, sides, terms, constants, product_precision, counts).gradients(upstream, None, needs)


def batched_pair_sums_tangent(
    kind, sides, terms, constants, tangents, moving, term_tangents, constant_tangents, product_precision, counts
) -> Tensor:
    directions = tangents, moving, term_tangents, constant_tangents
    return _sums(Graphs(kind, sides, terms, constants, product_precision, counts, directions))


def batched_pair_sums_double_backward(
    kind, upstream, sides, terms, constants, tangents, moving, term_tangents, constant_tangents, product_precision,
    needs, counts,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    directions = tangents, moving, term_tangents, constant_tangents
    return Graphs(kind, sides, terms, constants, product_precision, counts, directions).gradients(upstream, None, needs)


def _sums(graphs: Graphs) -> Tensor:
    if graphs.graphs <= MOST_GRAPHS:
        return graphs.row_sums().unflatten(1, (graphs.graphs, graphs.length))
    parts = [_sums(graphs.some(first, MOST_GRAPHS)) for first in range(0, graphs.graphs, MOST_GRAPHS)]
    return torch.cat(parts, dim=1)
