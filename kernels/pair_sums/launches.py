"""pair_sums on GPUs: the launches of ``tiles``. Nothing of the size of the batch squared exists: sums stay in their
programs, weights come in strips of bounded size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import (
    PRODUCTS,
    Product,
    architecture,
    divide,
    matrices,
    multiprocessors,
    on_device,
    product_of,
)  # fmt: skip
from gkd_fast.kernels.common.launcher import launch
from gkd_fast.kernels.common.strips import add_products, new_strip
from gkd_fast.kernels.common.tangents import (
    column_pieces_of,
    converted,
    row_blocks,
    spread,
    tiling,
)  # fmt: skip
from gkd_fast.kernels.pair_sums.kinds import KINDS
from gkd_fast.kernels.pair_sums.tiles import pair_row_sums, pair_weights


@dataclass(frozen=True)
class Rows:
    """Rows of every side, in the product's type, and their terms; with directions, of the sides that move."""

    sides: list[Tensor]
    terms: Tensor
    tangents: list[Tensor | None]
    term_tangents: Tensor

    def __len__(self) -> int:
        return len(self.sides[0])

    def __getitem__(self, here: slice) -> "Rows":
        """Some of the rows."""
        return Rows(
            [x[here] for x in self.sides], self.terms[:, here].contiguous(),
            [x if x is None else x[here] for x in self.tangents], self.term_tangents[:, here].contiguous(),
        )  # fmt: skip

    def pointers(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The sides and their tangents; the sides themselves in the place of tangents that are not read."""
        tangents = (x if d is None else d for x, d in zip(self.sides, self.tangents, strict=True))
        return tuple(self.sides), tuple(tangents)


class Problem:
    """Rows, columns and constants of one call; with ``directions``, of its tangent.

    float16 rows are multiplied as tf32, which has its digits and float32's range: features, unlike unit rows, may have
    any size. Tangents are multiplied in the rows' own type.

    Attributes:
        graphs: how many there are; the rows are theirs one after another, ``length`` of each.
        counts: how many of its rows count, ``[graphs]``; None: there is one graph, and they all do.
    """

    counts: Tensor | None = None

    def __init__(self, kind, sides, terms, constants, product_precision, columns, column_terms, offset,
                 directions=None, column_tangents=None, column_term_tangents=None):  # fmt: skip
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
        self.kind, (self.sides, self.terms, self.sums) = kind, KINDS[kind]
        self.is_tangent = directions is not None
        tangents, moving, term_tangents, constant_tangents = directions or ([], [False] * self.sides, terms, constants)
        self.product = _product(product_precision, sides[0], self.is_tangent)
        self.device, self.arch, self.type = sides[0].device, architecture(sides[0].device), sides[0].dtype
        self.own = self._rows("sides", sides, terms, tangents, moving, term_tangents)
        if (columns is None) != (column_terms is None):
            raise ValueError("columns and column_terms go together")
        self.others = self.own
        if columns is not None:
            if not self.is_tangent:
                column_tangents, column_term_tangents = [], column_terms
            elif column_tangents is None or column_term_tangents is None:
                raise ValueError("columns and their tangents go together")
            self.others = self._rows("columns", columns, column_terms, column_tangents, moving, column_term_tangents)
        self.moving = sum(1 << q for q, x in enumerate(self.own.tangents) if x is not None)
        self.dims = tuple(x.shape[1] for x in self.own.sides)
        self.constants, self.constant_tangents, self.offset = constants, constant_tangents, offset
        self.graphs, self.length, self.column_length = 1, len(self.own), len(self.others)

    def _rows(self, name: str, sides, terms, tangents, moving, term_tangents) -> Rows:
        if len(sides) != self.sides:
            raise ValueError(f"{self.kind} has {self.sides} sides, got {len(sides)}")
        sides = matrices(name, sides)
        for of_rows in (terms, term_tangents):
            if of_rows.shape != (self.terms, len(sides[0])) or of_rows.dtype != self.type:
                raise ValueError(
                    f"terms of {name} must have shape {(self.terms, len(sides[0]))} and type {self.type}, "
                    f"got {tuple(of_rows.shape)} and {of_rows.dtype}"
                )
        along = spread("tangents", tangents, moving, sides)
        return Rows(
            [converted(x, self.product) for x in sides], terms.contiguous(),
            [x if x is None else converted(x, self.product) for x in along], term_tangents.contiguous(),
        )  # fmt: skip

    def constant_arguments(self) -> tuple[Tensor, Tensor]:
        return self.constants, self.constant_tangents

    def options(self) -> dict:
        return {
            "KIND": self.kind, "SIDES": self.sides, "TERMS": self.terms, "COUNT": len(self.constants),
            "MOVING": self.moving, "TANGENT": self.is_tangent, "GRAPHS": self.counts is not None,
        }  # fmt: skip

    def row_sums(self) -> Tensor:
        """The sums or their tangents, [K, I] in float64."""
        kernel = "pair_sum_tangents" if self.is_tangent else "pair_row_sums"
        (blocks, row_count), common = tiling(kernel, self.arch, self.product, self.length, self.column_length)
        parts = divide(row_count * self.graphs, blocks * common["BLOCK_COLUMNS"], common["BLOCK_COLUMNS"],
                       multiprocessors(self.device))  # fmt: skip
        totals = self.own.terms.new_empty(parts, self.sums, len(self.own), dtype=torch.float64)
        counts = self.own.terms
        if self.counts is not None:
            counts, totals = self.counts, totals.zero_()  # Rows that do not count are not written.
        with on_device(totals):
            launch(pair_row_sums, SUMS=self.sums, **self.options(), **common)(
                (row_count, parts, self.graphs), *self.own.pointers(), *self.others.pointers(), self.dims,
                self.own.terms, self.own.term_tangents, self.others.terms, self.others.term_tangents,
                *self.constant_arguments(), totals, counts, counts, self.length, self.column_length, self.offset, parts,
            )  # fmt: skip
        return totals[0] if parts == 1 else totals.sum(dim=0)

    def gradients(self, upstream: Tensor, column_upstream: Tensor | None, needs) -> tuple[list[Tensor], Tensor]:
        """Those of the row set's sides and terms, or their tangents."""
        if len(needs) != self.sides:
            raise ValueError(f"needs must have {self.sides} entries, got {len(needs)}")
        if (self.others is self.own) != (column_upstream is None):
            raise ValueError("columns and column_upstream go together")
        upstream = upstream.contiguous()
        column_upstream = upstream if column_upstream is None else column_upstream.contiguous()
        count = len(self.own)
        gradients = [upstream.new_zeros(count, dim) if n else None for dim, n in zip(self.dims, needs, strict=True)]
        term_gradients = torch.zeros(self.terms, count, dtype=torch.float64, device=self.device)
        wanted = sum(1 << q for q, needed in enumerate(needs) if needed)
        strips = wanted.bit_count() + (wanted & self.moving).bit_count()
        with on_device(upstream):
            for block in row_blocks(count, max(self.dims)):
                rows = self.own[block]
                for here in column_pieces_of(len(self.others), self.product, len(rows), strips):
                    offset = self.offset + block.start - here.start
                    columns = self.others[here]
                    given = rows, columns, upstream[block], column_upstream[here]
                    weights = self._weights(*given, wanted, offset)
                    for q, gradient in enumerate(gradients):
                        if gradient is None:
                            continue
                        moving, still = weights[0][q], weights[1][q]
                        add_products(gradient[block], moving, columns.sides[q])
                        if still is not None:
                            add_products(gradient[block], still, columns.tangents[q])
                    term_gradients[:, block] += weights[2].sum(dim=0, dtype=torch.float64)
        return [x for x in gradients if x is not None], term_gradients.to(self.type)

    def _weights(self, rows: Rows, columns: Rows, upstream: Tensor, column_upstream: Tensor, wanted: int, offset: int,
                 graphs: int = 1, constants=None, row_counts=None, column_counts=None):  # fmt: skip
        """M or M˙ of every side, M of those that move, None where there is none, and the slopes by the terms."""
        kernel = "pair_weight_tangents" if self.is_tangent else "pair_weights"
        lengths = len(rows) // graphs, len(columns) // graphs
        grid, common = tiling(kernel, self.arch, self.product, *lengths)
        constants = constants or self.constant_arguments()
        counts = (rows.terms, rows.terms) if row_counts is None else (row_counts, column_counts)

        def strips(bits: int) -> list[Tensor | None]:
            like = rows.sides
            return [new_strip(x, len(rows), lengths[1]) if bits >> q & 1 else None for q, x in enumerate(like)]

        moving, still = strips(wanted), strips(wanted & self.moving)
        sums = rows.terms.new_zeros(grid[0], self.terms, len(rows))
        given = [tuple(x for x in found if x is not None) or (sums,) for found in (moving, still)]
        launch(pair_weights, WANTED=wanted, **self.options(), **common)(
            (*grid, graphs), *rows.pointers(), *columns.pointers(), self.dims, rows.terms, rows.term_tangents,
            columns.terms, columns.term_tangents, *constants, upstream, column_upstream, *given, sums, *counts,
            *lengths, offset,
        )  # fmt: skip
        return moving, still, sums


def _product(precision: str, x: Tensor, is_tangent: bool) -> Product:
    if x.dtype != torch.float64 and not is_tangent and precision == "float16":
        return PRODUCTS["tf32"]
    return product_of("float32" if is_tangent else precision, x)


def pair_sums(kind, sides, terms, constants, product_precision, columns=None, column_terms=None, offset=0) -> Tensor:
    return Problem(kind, sides, terms, constants, product_precision, columns, column_terms, offset).row_sums()


def pair_sums_backward(
    kind, upstream, sides, terms, constants, product_precision, needs, columns=None, column_terms=None,
    column_upstream=None, offset=0,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    problem = Problem(kind, sides, terms, constants, product_precision, columns, column_terms, offset)
    return problem.gradients(upstream, column_upstream, needs)


def pair_sums_tangent(
    kind, sides, terms, constants, tangents, moving, term_tangents, constant_tangents, product_precision, columns=None,
    column_terms=None, column_tangents=None, column_term_tangents=None, offset=0,
) -> Tensor:  # fmt: skip
    directions = tangents, moving, term_tangents, constant_tangents
    return Problem(
        kind, sides, terms, constants, product_precision, columns, column_terms, offset, directions, column_tangents,
        column_term_tangents,
    ).row_sums()  # fmt: skip


def pair_sums_double_backward(
    kind, upstream, sides, terms, constants, tangents, moving, term_tangents, constant_tangents, product_precision,
    needs, columns=None, column_terms=None, column_tangents=None, column_term_tangents=None, column_upstream=None,
    offset=0,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    directions = tangents, moving, term_tangents, constant_tangents
    problem = Problem(
        kind, sides, terms, constants, product_precision, columns, column_terms, offset, directions, column_tangents,
        column_term_tangents,
    )  # fmt: skip
    return problem.gradients(upstream, column_upstream, needs)
