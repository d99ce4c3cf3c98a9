"""What the ops' autograd formulas share: the errors for derivatives that are not offered."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

PT2 = (torch.Tag.pt2_compliant_tag,)


def refuse_second_order(op: str) -> None:
    """Make the derivative of the backward op ``op`` an error instead of a silent zero."""

    def backward(ctx, *upstream):
        raise NotImplementedError(
            f"{op} has no derivative: fused second-order gradients are not offered by this backend; "
            'use backend="reference", which is differentiable any number of times'
        )

    torch.library.register_autograd(op, backward)


def refuse_forward_mode(name: str, tensors: Iterable[Tensor]) -> None:
    """Raise if a tensor carries a forward-mode tangent, which ``register_autograd`` would turn into zero."""
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative on the fused backends; "
            'use reverse mode, or backend="reference"'
        )


def refuse_column_gradient(op: str, has_columns: bool) -> None:
    """A column set belongs to other rows, whose upstream only the caller knows: the backward op takes it."""
    if has_columns:
        raise NotImplementedError(
            f"{op} with a column set is not differentiated automatically: call {op}_backward with the columns' "
            "statistics and upstream"
        )


def flags(needs) -> list[bool]:
    """``ctx.needs_input_grad`` of a tensor-list argument as a list of bools."""
    return [bool(x) for x in needs]


def scatter(gradients: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """A compact list of gradients back at the places that asked for one."""
    compact = iter(gradients)
    return [next(compact) if needed else None for needed in needs]
