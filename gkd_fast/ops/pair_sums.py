"""pair_sums: losses over all pairs of rows of one or two graphs with the same nodes, summed over each row's partners.

    pair_sums(kind, sides, terms, constants, product_precision, columns=None, column_terms=None, offset=0) -> sums
        sides: the students' rows and the teachers', [I, D_s] and [I, D_t] (some kinds: one of them), float32 or
        float64, contiguous; they need not be unit rows.  terms: what each row brings along, [P, I].  constants: [Q], in
        float64.  columns, column_terms: the column set, [J, D] and [P, J]; None: columns = rows.
        offset: row i's own column is i + offset.
        sums: [K, I] in float64. With x_ij = s_i·s_j, y_ij = t_i·t_j:
            "absolute_sums"  of one side: Σ_j |x_ij|
            "distances"      of one side, terms n: Σ_j≠i d_ij,  d_ij = √max(n_i + n_j − 2x_ij, 1e-12)
            "rkd_distance"   terms n^s, n^t, constants κ^s, κ^t, γ^s, γ^t: Σ_j≠i ρ(z_ij), z = κ^s d^s − κ^t d^t, ρ
                             Huber's function, and its derivatives by κ^s and κ^t
            "polynomial"     constants c: Σ_j (K(x_ij) − K(y_ij))²,  K(x) = Σ_p c_p x^p
            "pkt"            terms α, β, constant ε: Σ_j q log((q + ε)/(p + ε)),  p = α_i (1 + x_ij), q = β_i (1 + y_ij)
    pair_sums_backward(kind, upstream, sides, terms, constants, product_precision, needs, columns=None,
                  column_terms=None, column_upstream=None, offset=0) -> (gradients, term_gradients)
        upstream: g, the gradient of the first of the sums, [I].  needs: a bool per side; only those come back.
        The gradients of Σ_i g_i sums_0i, of the ROW set, complete: [I, D] and [P, I] (rows of a side without need are
        undefined). For "rkd_distance" of Σ_i g_i sums_0i + Σ_ij (γ^s d^s_ij + γ^t d^t_ij), κ and γ held fixed.

Second order: along directions of rows, terms and constants, the tangents of the sums and of the gradients, the latter
at a fixed upstream.

    pair_sums_tangent(kind, sides, terms, constants, tangents, moving, term_tangents, constant_tangents,
                  product_precision, columns=None, column_terms=None, column_tangents=None, column_term_tangents=None,
                  offset=0) -> sum tangents [K, I]
        moving: a bool per side.  tangents: the directions of the moving ones.
    pair_sums_double_backward(kind, upstream, sides, terms, constants, tangents, moving, term_tangents,
                  constant_tangents, product_precision, needs, columns=None, column_terms=None, column_tangents=None,
                  column_term_tangents=None, column_upstream=None, offset=0) -> (gradients, term_gradients)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gkd_fast.ops.autograd import (
    PT2,
    flags,
    last_derivative,
    needed_like,
    refuse_derivative,
    refuse_forward_mode,
    scatter,
    tangents_of,
)
from gkd_fast.ops.columns import Columns, add, run

SUMS = {"absolute_sums": 1, "distances": 1, "rkd_distance": 3, "polynomial": 1, "pkt": 1}

_ROWS = "Tensor[] sides, Tensor terms, Tensor constants"
_DIRECTIONS = "Tensor[] tangents, bool[] moving, Tensor term_tangents, Tensor constant_tangents"
_COLUMNS = "Tensor[]? columns=None, Tensor? column_terms=None"
_COLUMN_DIRECTIONS = "Tensor[]? column_tangents=None, Tensor? column_term_tangents=None"
for _name, _arguments in {
    "pair_sums": f"str kind, {_ROWS}, str product_precision, {_COLUMNS}, int offset=0) -> Tensor",
    "pair_sums_backward": f"str kind, Tensor upstream, {_ROWS}, str product_precision, bool[] needs, {_COLUMNS}, "
    "Tensor? column_upstream=None, int offset=0) -> (Tensor[], Tensor)",
    "pair_sums_tangent": f"str kind, {_ROWS}, {_DIRECTIONS}, str product_precision, {_COLUMNS}, {_COLUMN_DIRECTIONS}, "
    "int offset=0) -> Tensor",
    "pair_sums_double_backward": f"str kind, Tensor upstream, {_ROWS}, {_DIRECTIONS}, str product_precision, "
    f"bool[] needs, {_COLUMNS}, {_COLUMN_DIRECTIONS}, Tensor? column_upstream=None, int offset=0) -> "
    "(Tensor[], Tensor)",
    "batched_pair_sums": f"str kind, {_ROWS}, str product_precision, Tensor counts) -> Tensor",
    "batched_pair_sums_backward": f"str kind, Tensor upstream, {_ROWS}, str product_precision, bool[] needs, "
    "Tensor counts) -> (Tensor[], Tensor)",
    "batched_pair_sums_tangent": f"str kind, {_ROWS}, {_DIRECTIONS}, str product_precision, Tensor counts) -> Tensor",
    "batched_pair_sums_double_backward": f"str kind, Tensor upstream, {_ROWS}, {_DIRECTIONS}, str product_precision, "
    "bool[] needs, Tensor counts) -> (Tensor[], Tensor)",
}.items():
    torch.library.define(f"gkd_fast::{_name}", f"({_arguments}", tags=PT2)
    refuse_derivative(f"gkd_fast::{_name}")


@torch.library.register_fake("gkd_fast::pair_sums")
@torch.library.register_fake("gkd_fast::pair_sums_tangent")
@torch.library.register_fake("gkd_fast::batched_pair_sums")
@torch.library.register_fake("gkd_fast::batched_pair_sums_tangent")
def _(kind, sides, *arguments, **named):
    return sides[0].new_empty(SUMS[kind], *sides[0].shape[:-1], dtype=torch.float64)


@torch.library.register_fake("gkd_fast::pair_sums_backward")
@torch.library.register_fake("gkd_fast::batched_pair_sums_backward")
def _(kind, upstream, sides, terms, constants, product_precision, needs, *columns, **named):
    return needed_like(sides, needs), torch.empty_like(terms)


@torch.library.register_fake("gkd_fast::pair_sums_double_backward")
@torch.library.register_fake("gkd_fast::batched_pair_sums_double_backward")
def _(kind, upstream, sides, terms, constants, tangents, moving, term_tangents, constant_tangents, product_precision,
      needs, *columns, **named):  # fmt: skip
    return needed_like(sides, needs), torch.empty_like(terms)


@dataclass(frozen=True)
class Pairs:
    """A kind's rows and what they meet: each method is the op of that name over all blocks of columns, or with
    ``counts`` of many graphs."""

    kind: str
    columns: Columns | None
    precision: str
    sides: tuple[Tensor, ...]
    terms: Tensor
    counts: Tensor | None = None

    def sums(self, constants: Tensor) -> Tensor:
        def part(constants, **block):
            return [run(self._op(), self.sides, *self._own(constants), **block)]

        return self._over(part, constants)[0]

    def gradients(self, constants: Tensor, upstream: Tensor, needs: list[bool]) -> tuple[list[Tensor], Tensor]:
        def part(constants, **block):
            arguments = upstream, self.sides, *self._own(constants), needs
            gradients, terms = run(self._op("_backward"), *arguments, **block)
            return [*gradients, terms]

        *gradients, terms = self._over(part, constants, column_upstream=upstream)
        return gradients, terms

    def sum_tangents(self, constants: Tensor, directions: "Directions") -> Tensor:
        def part(constants, along, **block):
            arguments = self.sides, self.terms, constants, *along, self.precision
            return [run(self._op("_tangent"), *arguments, **block)]

        return self._over(part, constants, directions)[0]

    def gradient_tangents(self, constants: Tensor, directions: "Directions", upstream: Tensor, needs: list[bool]):
        def part(constants, along, **block):
            arguments = upstream, self.sides, self.terms, constants, *along, self.precision, needs
            gradients, terms = run(self._op("_double_backward"), *arguments, **block)
            return [*gradients, terms]

        *gradients, terms = self._over(part, constants, directions, column_upstream=upstream)
        return gradients, terms

    def side(self, q: int) -> "Pairs":
        """The distances of one side."""
        columns = self.columns and self.columns.only(q, len(self.sides) + q)
        terms = self.terms[q : q + 1]
        return replace(self, kind="distances", columns=columns, sides=self.sides[q : q + 1], terms=terms)

    def _op(self, derivative: str = "") -> Callable:
        if self.counts is None:
            return partial(getattr(torch.ops.gkd_fast, "pair_sums" + derivative), self.kind)
        return partial(getattr(torch.ops.gkd_fast, "batched_pair_sums" + derivative), self.kind, counts=self.counts)

    def _own(self, constants: Tensor):
        return self.terms, constants, self.precision

    def _over(
        self,
        part,
        constants: Tensor,
        directions: "Directions | None" = None,
        column_upstream: Tensor | None = None,
    ) -> list[Tensor]:
        def arguments(of):
            return of(constants), *([] if directions is None else [directions.arguments(of)])

        if self.columns is None:
            return part(*arguments(lambda x: x))
        count, has_terms = len(self.sides), len(self.terms) > 0
        sent = [] if column_upstream is None else [column_upstream]
        if directions is not None:
            sent += [*directions.sides, *([directions.terms.T] if has_terms else [])]
        total = None
        for block in self.columns.blocks(*sent):
            columns, terms = block.columns[:count], block.columns[count:]
            # A bank's rows stand still and have no losses.
            extra = list(block.extra) if block.trained else [x.new_zeros(len(columns[0]), *x.shape[1:]) for x in sent]
            none = self.terms.new_empty(0, len(columns[0]))
            named: dict = {"columns": columns, "column_terms": torch.stack([x[:, 0] for x in terms]) if terms else none}
            if column_upstream is not None:
                named["column_upstream"] = extra.pop(0)
            if directions is not None:
                named["column_term_tangents"] = extra.pop().T.contiguous() if has_terms else none
                named["column_tangents"] = extra
            at = arguments((lambda x: x) if block.trained else self._of_bank)
            total = add(total, part(*at, **named, offset=block.offset))
        return total

    def _of_bank(self, constants: Tensor) -> Tensor:
        """A pair of two rows is in the sums of either, one with a bank's row in one alone: it has half of γ."""
        if self.kind != "rkd_distance":
            return constants
        scales, slopes = constants.chunk(2)
        return torch.cat([scales, slopes / 2])


@dataclass(frozen=True)
class Directions:
    """Of the sides that move, the terms and the constants."""

    sides: list[Tensor]
    moving: list[bool]
    terms: Tensor
    constants: Tensor

    def arguments(self, of: Callable[[Tensor], Tensor]):
        """As the ops take them; ``of``: makes a block's constants of the constants."""
        return self.sides, self.moving, self.terms, of(self.constants)


class Fixed:
    """Constants that depend on nothing."""

    def __init__(self, constants: Tensor):
        self.constants = constants

    def forward(self, pairs: Pairs) -> tuple[Tensor, list[Tensor]]:
        """The losses and what the other methods read of them."""
        return pairs.sums(self.constants)[0], []

    def backward(self, pairs: Pairs, saved: Sequence[Tensor], upstream: Tensor) -> Tensor:
        """The constants with which the gradients are computed."""
        return self.constants

    def tangent(self, pairs: Pairs, saved, upstream, sides, moving, terms) -> tuple[Tensor, Directions]:
        """The losses' tangent along directions of sides and terms, and what is along them with the constants."""
        directions = Directions(sides, moving, terms, torch.zeros_like(self.constants))
        return pairs.sum_tangents(self.constants, directions)[0], directions


class MeanDistances:
    """κ^q = N/Σ_ij d^q_ij over the N pairs of a row and another, N a number or of many graphs each one's, ``[G]``.
    dκ/dd = −κ²/N, so γ = −(κ²/N) Σ_i g_i ∂ℓ_i/∂κ."""

    def __init__(self, pairs: int | Tensor):
        self.count = pairs.double().clamp(min=1) if isinstance(pairs, Tensor) else max(pairs, 1)

    def forward(self, pairs: Pairs) -> tuple[Tensor, list[Tensor]]:
        none = _no_constants(pairs)
        totals = self._all(pairs, [side.sums(none)[0] for side in _sides(pairs)])
        scales = torch.where(totals > 0, self.count / totals, 0)
        losses, *slopes = pairs.sums(torch.cat([scales, torch.zeros_like(scales)]))
        return losses, [scales, torch.stack(slopes)]

    def backward(self, pairs: Pairs, saved: Sequence[Tensor], upstream: Tensor) -> Tensor:
        scales, slopes = saved
        return torch.cat([scales, -scales.square() / self.count * self._all(pairs, slopes * upstream)])

    def tangent(self, pairs: Pairs, saved, upstream, sides, moving, terms) -> tuple[Tensor, Directions]:
        scales, slopes = saved
        none = _no_constants(pairs)
        along = iter(sides)
        totals = []
        for q, (side, moves) in enumerate(zip(_sides(pairs), moving, strict=True)):
            own = Directions([next(along)] if moves else [], [moves], terms[q : q + 1].contiguous(), none)
            totals.append(side.sum_tangents(none, own)[0])
        growth = -scales / self.count * self._all(pairs, totals)  # κ˙/κ
        moved_scales = scales * growth
        constants = self.backward(pairs, saved, upstream)
        still = torch.cat([moved_scales, torch.zeros_like(scales)])
        losses, *moved_slopes = pairs.sum_tangents(constants, Directions(sides, moving, terms, still))
        moved = -scales.square() / self.count * self._all(pairs, torch.stack(moved_slopes) * upstream)
        moved = 2 * growth * constants[2:] + moved
        return losses, Directions(sides, moving, terms, torch.cat([moved_scales, moved]))

    @staticmethod
    def _all(pairs: Pairs, sums) -> Tensor:
        """Each side's total over all rows of all ranks, or over each graph's."""
        total = torch.stack([x.sum(dim=-1) for x in sums])
        return total if pairs.columns is None else pairs.columns.shards.sum(total)


def _sides(pairs: Pairs) -> list[Pairs]:
    return [pairs.side(q) for q in range(len(pairs.sides))]


def _no_constants(pairs: Pairs) -> Tensor:
    return pairs.terms.new_zeros(0, *pairs.terms.shape[1:-1], dtype=torch.float64)


class PairLosses(torch.autograd.Function):
    """The losses ``[I]`` or, of graphs, ``[G, I]`` in float64, differentiable by sides and terms; with ``columns`` the
    other ranks run it at the same time."""

    @staticmethod
    def forward(ctx, kind, constants, columns, precision, *tensors):
        # Not two tensors in the variable part: of such a call torch.compile takes the context for left out.
        counts, terms, *sides = tensors
        pairs = Pairs(kind, columns, precision, tuple(sides), terms, counts)
        losses, saved = constants.forward(pairs)
        ctx.kind, ctx.constants, ctx.precision, ctx.count = kind, constants, precision, len(sides)
        ctx.counts = counts  # Whole numbers, of which nothing is derived.
        _save(ctx, columns, terms, *sides, *saved)
        return losses

    @staticmethod
    def backward(ctx, upstream):
        columns, (terms, *saved) = _saved(ctx)
        sides, saved = saved[: ctx.count], saved[ctx.count :]
        needs = flags(ctx.needs_input_grad[6:])
        options = ctx.kind, ctx.constants, columns, ctx.counts, ctx.precision, needs
        moved, *gradients = PairLossesBackward.apply(*options, len(saved), *saved, upstream, terms, *sides)
        return *[None] * 5, moved, *scatter(gradients, needs)


class PairLossesBackward(torch.autograd.Function):
    """The gradients of terms and sides."""

    @staticmethod
    def forward(ctx, kind, constants, columns, counts, precision, needs, extra, *tensors):
        saved, (upstream, terms, *sides) = tensors[:extra], tensors[extra:]
        pairs = Pairs(kind, columns, precision, tuple(sides), terms, counts)
        upstream_rows = upstream.to(terms.dtype).contiguous()
        at = constants.backward(pairs, saved, upstream)
        gradients, moved = pairs.gradients(at, upstream_rows, needs)
        ctx.options = kind, constants, counts, precision, needs, extra
        ctx.set_materialize_grads(False)
        _save(ctx, columns, *tensors)
        return moved, *gradients

    @staticmethod
    @last_derivative
    def backward(ctx, terms_cotangent, *cotangents):
        kind, constants, counts, precision, needed, extra = ctx.options
        columns, tensors = _saved(ctx)
        saved, (upstream, terms, *sides) = tensors[:extra], tensors[extra:]
        pairs = Pairs(kind, columns, precision, tuple(sides), terms, counts)
        tangents, moving = tangents_of(list(cotangents), needed)
        along = torch.zeros_like(terms) if terms_cotangent is None else terms_cotangent.contiguous()
        losses, directions = constants.tangent(pairs, saved, upstream, tangents, moving, along)
        needs_upstream, needs_terms, *needs = flags(ctx.needs_input_grad[7 + extra :])
        gradients, moved = [None] * len(needs), None
        if needs_terms or any(needs):
            at = constants.backward(pairs, saved, upstream)
            rows = upstream.to(terms.dtype).contiguous()
            gradients, moved = pairs.gradient_tangents(at, directions, rows, needs)
            gradients = scatter(gradients, needs)
        return *[None] * (7 + extra), losses if needs_upstream else None, moved if needs_terms else None, *gradients


def _save(ctx, columns: Columns | None, *tensors: Tensor) -> None:
    ctx.has_columns = columns is not None
    if columns is None:
        ctx.save_for_backward(*tensors)
    else:
        columns.save(ctx, *tensors)


def _saved(ctx) -> tuple[Columns | None, list[Tensor]]:
    return Columns.saved(ctx) if ctx.has_columns else (None, list(ctx.saved_tensors))


def pair_losses(
    kind: str,
    sides: Sequence[Tensor],
    terms: Tensor,
    constants: Fixed | MeanDistances,
    product_precision: str,
    columns: Columns | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The first of the kind's sums, ``[I]`` in float64, of rows in float32 or float64; with ``counts`` those of graphs
    of so many rows each, ``[G, I]``. ``columns``: of the sides, and of each of the terms as ``[·, 1]``."""
    refuse_forward_mode((terms, *sides))
    return PairLosses.apply(
        kind, constants, columns, product_precision, counts, terms.contiguous(), *(x.contiguous() for x in sides)
    )
