"""Memory of a launch that makes a tensor of every stage: an allocation for all of one shape, not for each."""

from collections.abc import Sequence

import torch
from torch import Tensor


def several(like: Tensor, count: int, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    """``count`` tensors in one piece. Each of them must take a multiple of 16 bytes: how its memory is aligned tells
    Triton which kernel to compile.
    """
    if count == 1:
        return [like.new_empty(*shape, dtype=dtype)]
    return list(like.new_empty(count, *shape, dtype=dtype).unbind())


def of_widths(like: Tensor, widths: Sequence[int], *length: int, dtype: torch.dtype) -> list[Tensor]:
    """A tensor [length, width], or [width], of every width; those of one width in one piece."""
    if widths.count(widths[0]) == len(widths):
        return several(like, len(widths), *length, widths[0], dtype=dtype)
    places = {width: iter(several(like, widths.count(width), *length, width, dtype=dtype)) for width in set(widths)}
    return [next(places[width]) for width in widths]
