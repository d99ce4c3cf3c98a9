"""What the ops' autograd formulas share: the errors for derivatives that are not offered."""

from collections.abc import Callable, Iterable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad

PT2 = (torch.Tag.pt2_compliant_tag,)


def refuse_derivative(op: str) -> None:
    """Make the derivative of ``op`` an error instead of a silent zero."""

    def backward(ctx, *upstream):
        raise _not_offered(op)

    torch.library.register_autograd(op, backward)


def last_derivative(backward: Callable) -> Callable:
    """A ``backward`` of an autograd Function whose own derivative is an error."""

    @wraps(backward)
    def wrapped(ctx, *upstream):
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(x if x is None else _Last.apply(backward.__qualname__, x, *upstream) for x in gradients)

    return wrapped


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, result, *inputs):
        ctx.name = name
        return result.view_as(result)

    @staticmethod
    def backward(ctx, *upstream):
        raise _not_offered(ctx.name)


def _not_offered(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} has no derivative: the fused backends offer first and second derivatives, third-order gradients are "
        'not offered; use backend="reference", which is differentiable any number of times'
    )


def refuse_forward_mode(tensors: Iterable[Tensor]) -> None:
    """Raise if a tensor carries a forward-mode tangent, which ``register_autograd`` would turn into zero."""
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            'the fused backends have no forward-mode derivative; use reverse mode, or backend="reference"'
        )


def refuse_column_gradient(op: str, derivative: str, has_columns: bool) -> None:
    """A column set belongs to other rows, whose upstream only the caller knows: the op ``derivative`` takes it."""
    if has_columns:
        raise NotImplementedError(
            f"{op} with a column set is not differentiated automatically: call {derivative} with the columns' "
            "statistics and upstream"
        )


def flags(needs) -> list[bool]:
    """``ctx.needs_input_grad`` of a tensor-list argument as a list of bools."""
    return [bool(x) for x in needs]


def needed_like(stages: Iterable[Tensor], needs: list[bool]) -> list[Tensor]:
    """Empty gradients of the stages that need one: what a backward op's fake gives."""
    return [x.new_empty(x.shape) for x, needed in zip(stages, needs, strict=True) if needed]


def scatter(gradients: list[Tensor | None], needs: list[bool]) -> list[Tensor | None]:
    """A compact list of gradients back at the places that asked for one."""
    compact = iter(gradients)
    return [next(compact) if needed else None for needed in needs]


def tangents_of(cotangents: list[Tensor | None], needs: list[bool]) -> tuple[list[Tensor], list[bool]]:
    """The cotangents of a backward op's gradients as directions of its stages: the given ones, and which they are.

    By the symmetry of second derivatives the double backward is the backward's own tangent along them.
    """
    stages = scatter(cotangents, needs)
    return [x.contiguous() for x in stages if x is not None], [x is not None for x in stages]
