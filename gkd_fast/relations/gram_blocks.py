"""The losses of Gram matrices in blocks of rows: values and first derivatives with D×D sums and the temporaries of a
block as their only memory. Higher derivatives come of the same formulas in plain operations.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gkd_fast import ops
from gkd_fast._autocast import autocast_disabled
from gkd_fast.ops.autograd import transformed

# Rows whose temporaries are held at once: a block of the usual widths stays in the core's cache.
BLOCK = 1024


def blocked(batch) -> bool:
    """Whether the batch is one of this process alone that no transform, forward mode or compiler looks into."""
    if batch.shards is not None or batch.counts is not None:
        return False
    return not transformed() and forward_ad._current_level < 0 and not torch.compiler.is_compiling()


class Form(Protocol):
    """A function of both sides' rows."""

    def forward(self, students: Tensor, teachers: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The value and what ``backward`` reads of it."""

    def backward(
        self, upstream: Tensor, students: Tensor, teachers: Tensor, saved: list[Tensor], needs: list[bool]
    ) -> list[Tensor | None]:
        """The gradients that are needed."""


def in_blocks(form: Form, plain: Callable[[Tensor, Tensor], Tensor], students: Tensor, teachers: Tensor) -> Tensor:
    """The form's value; ``plain``: the same in operations that have all derivatives."""
    return _InBlocks.apply(form, plain, students, teachers)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, plain, students, teachers):
        value, saved = form.forward(students, teachers)
        ctx.form, ctx.plain = form, plain
        ctx.save_for_backward(students, teachers, *saved)
        return value

    @staticmethod
    def backward(ctx, upstream):
        students, teachers, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        with autocast_disabled(students):
            if not torch.is_grad_enabled():
                return None, None, *ctx.form.backward(upstream, students, teachers, saved, needs)
            wanted = [x for x, needed in zip((students, teachers), needs) if needed]
            gradients = iter(torch.autograd.grad(ctx.plain(students, teachers), wanted, upstream, create_graph=True))
            return None, None, *(next(gradients) if needed else None for needed in needs)


class Cosines:
    """2 − 2c_i of a row's relations, c_i the cosine between the products s_i·s_j and t_i·t_j over j, from the matrices
    A = SᵀS, B = TᵀT, M = SᵀT: c_i = p_i/√(a_i b_i), p = sᵀMt, a = sᵀAs, b = tᵀBt. A row of zeros adds 0 for its 1."""

    def forward(self, students, teachers):
        scales = [_inverse_size(x) for x in (students, teachers)]
        a, b, m = (students.new_zeros(x.shape[1], y.shape[1]) for x, y in _pairs(students, teachers))
        for _, s, t in self._scaled(students, teachers, scales):
            a.addmm_(s.T, s), b.addmm_(t.T, t), m.addmm_(s.T, t)
        sums = students.new_empty(3, len(students))
        for rows, s, t in self._scaled(students, teachers, scales):
            for place, x, gram, y in ((0, s, a, s), (1, t, b, t), (2, s, m, t)):
                torch.sum((x @ gram).mul_(y), dim=1, out=sums[place, rows])
        inverse = [_inverse_root(x) for x in sums[:2]]
        cosines = inverse[0] * inverse[1] * sums[2]
        ones = sum(x * y.square() for x, y in zip(sums[:2], inverse))
        return ones - 2 * cosines, [*scales, a, b, m, cosines, *inverse]

    def backward(self, upstream, students, teachers, saved, needs):
        *scales, a, b, m, cosines, inverse_s, inverse_t = saved
        products = -2 * upstream * inverse_s * inverse_t
        squares = [2 * upstream * cosines * inverse.square() for inverse in (inverse_s, inverse_t)]
        grams = [torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(m)]
        for rows, s, t in self._scaled(students, teachers, scales):
            for place, x in ((0, s), (1, t)):
                if needs[place]:
                    grams[place].addmm_(x.T, squares[place][rows, None] * x)
            grams[2].addmm_(s.T, products[rows, None] * t)
        results = [torch.empty_like(x) if needed else None for x, needed in zip((students, teachers), needs)]
        for rows, s, t in self._scaled(students, teachers, scales):
            for place, x, gram, y, mixed, moved in ((0, s, a, t, m.T, grams[2].T), (1, t, b, s, m, grams[2])):
                if needs[place]:
                    own = (x @ gram).mul_(squares[place][rows, None]).addmm_(x, grams[place])
                    own += (y @ mixed).mul_(products[rows, None]).addmm_(y, moved)
                    torch.mul(own, scales[place], out=results[place][rows])
        return results

    @staticmethod
    def _scaled(students, teachers, scales) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for rows in _blocks(students):
            yield rows, students[rows] * scales[0], teachers[rows] * scales[1]


class Differences:
    """Σ_ij (e_i·e_j − f_i·f_j)² of unit rows e of the students and f of the teachers, in float64:
    ‖EᵀE‖² + ‖FᵀF‖² − 2‖EᵀF‖²."""

    def forward(self, students, teachers):
        grams = [students.new_zeros(x.shape[1], y.shape[1]) for x, y in _pairs(students, teachers)]
        for rows in _blocks(students):
            e, f = ops.unit_rows([students[rows], teachers[rows]], students.dtype)
            for gram, x, y in zip(grams, (e, f, e), (e, f, f)):
                gram.addmm_(x.T, y)
        squares = [gram.double().square().sum() for gram in grams]
        return squares[0] + squares[1] - 2 * squares[2], grams

    def backward(self, upstream, students, teachers, saved, needs):
        a, b, m = saved
        factor = 4 * upstream.to(students.dtype)
        results = [torch.empty_like(x) if needed else None for x, needed in zip((students, teachers), needs)]
        for rows in _blocks(students):
            with torch.enable_grad():
                x = [y[rows].detach().requires_grad_(n) for y, n in zip((students, teachers), needs)]
                e, f = ops.unit_rows(x, students.dtype)
            with torch.no_grad():
                upstreams = [
                    (factor * (own @ gram).addmm_(other, mixed, alpha=-1)) if needed else None
                    for own, gram, other, mixed, needed in ((e, a, f, m.T, needs[0]), (f, b, e, m, needs[1]))
                ]
            wanted = [k for k in (0, 1) if needs[k]]
            units, leaves, given = ([each[k] for k in wanted] for each in ((e, f), x, upstreams))
            for k, gradient in zip(wanted, torch.autograd.grad(units, leaves, given)):
                results[k][rows] = gradient
        return results


def _blocks(x: Tensor) -> Iterator[slice]:
    for start in range(0, len(x), BLOCK):
        yield slice(start, start + BLOCK)


def _pairs(students: Tensor, teachers: Tensor):
    return (students, students), (teachers, teachers), (students, teachers)


def _inverse_size(x: Tensor) -> Tensor:
    """1 over the largest entry, by which products of four rows neither over- nor underflow."""
    largest = torch.maximum(x.amax(), -x.amin())
    return 1 / torch.where(largest > 0, largest, 1)


def _inverse_root(x: Tensor) -> Tensor:
    """1/√x; 0 of a row of zeros."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).rsqrt(), 0)
