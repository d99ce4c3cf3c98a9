"""From a stage's output to one row per sample: which of its entries, and the mean over which dimensions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

# The layouts that "mean" stands for, by their number of dimensions.
USUAL_LAYOUTS = {2: "nc", 3: "nlc", 4: "nchw", 5: "ncthw"}


@dataclass(frozen=True)
class Pooling:
    """The mean over a stage's positions, or one of its tokens.

    Args:
        layout: a letter per dimension: ``n`` the samples, ``c`` the channels, any other the positions; ``"nhwc"``,
            ``"lnc"`` (sequence first), ``"nthwc"``.
        prefix: so many positions at the start are left out of the mean: class and register tokens.
        token: this position alone, instead of the mean.
        mask: name of the model's keyword argument that says which positions count (not 0), ``[B, L]`` (with several
            dimensions of positions, ``[B, …]`` in their order); as the ``attention_mask`` of tokenizers.

    Raises:
        ValueError: a layout without samples or channels or with a letter twice; a prefix, token or mask that does not
            go with the others.
    """

    layout: str = "nlc"
    prefix: int = 0
    token: int | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        if not _is_layout(self.layout):
            raise ValueError(
                f"layout must hold n (samples), c (channels) and letters for positions, once each, got {self.layout!r}"
            )
        if self.prefix < 0:
            raise ValueError(f"prefix must not be negative, got {self.prefix}")
        if (self.prefix or self.token is not None) and len(self.layout) != 3:
            raise ValueError(f"prefix and token need a layout with one dimension of positions, got {self.layout!r}")
        if self.token is not None and (self.prefix or self.mask):
            raise ValueError("token takes neither prefix nor mask")

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, C]`` of features in this layout."""
        if x.dim() != len(self.layout):
            raise ValueError(
                f"features must be [{', '.join(self.layout.upper())}] or [N, C], got shape {tuple(x.shape)}"
            )
        positions = [letter for letter in self.layout if letter not in "nc"]
        x = x.permute([self.layout.index(letter) for letter in ("n", *positions, "c")])
        if self.token is not None:
            return x[:, self.token]
        dims = tuple(range(1, x.dim() - 1))
        if mask is None:
            return x[:, self.prefix :].mean(dim=dims) if dims else x
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"{self.mask or 'mask'} must have shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
        counts = (mask != 0)[:, self.prefix :, ..., None]
        total = torch.where(counts, x[:, self.prefix :], 0).sum(dim=dims)
        return total / counts.sum(dim=dims).clamp(min=1).to(total.dtype)


# One stage's; then what GraphKDLoss takes: one for all, a list with one for each stage, a dict of these for two sides.
StagePool: TypeAlias = str | Pooling | Callable[[Tensor], Tensor]
Pool: TypeAlias = StagePool | Sequence[StagePool] | Mapping[str, StagePool | Sequence[StagePool]]
Select: TypeAlias = int | str | Callable[[Any], Tensor] | None


def pool_features(x: Tensor, pool: StagePool = "mean", mask: Tensor | None = None) -> Tensor:
    """One row per sample: ``[B, C]`` stays, everything else is pooled.

    Args:
        x: features.
        pool: one of

            - ``"mean"``: over positions, of ``[B, C, H, W]``, video ``[B, C, T, H, W]`` or tokens ``[B, N, C]``;
            - ``"mean_LAYOUT"`` with a letter per dimension, ``n`` the samples, ``c`` the channels, any other positions:
              ``"mean_nhwc"``, ``"mean_ncl"``, ``"mean_lnc"`` (sequence first), ``"mean_nthwc"``;
            - ``"cls"``: the first token of ``[B, N, C]``;
            - ``"mean_patches"``: the mean of the other tokens;
            - a :class:`gkd_fast.features.Pooling`: several class and register tokens, a padding mask;
            - a callable that returns ``[B, C]``.
        mask: the positions that count, for a pooling with a mask.

    Raises:
        ValueError: the shape or the name is not one of these.
    """
    pooling = resolved(pool)
    if isinstance(pooling, Pooling) and x.dim() == 2:
        return x
    pooled = pooling(x, mask) if isinstance(pooling, Pooling) and pooling.mask else pooling(x)
    if not isinstance(pooled, Tensor) or pooled.dim() != 2:
        raise ValueError(f"pool must return a Tensor [batch, width], got {getattr(pooled, 'shape', type(pooled))}")
    return pooled


def usual_mean(x: Tensor) -> Tensor:
    """The mean over positions of features whose number of dimensions tells the layout."""
    if x.dim() not in USUAL_LAYOUTS:
        raise ValueError(
            f"features must be [B, C], [B, N, C] or (pool='mean') [B, C, H, W] or [B, C, T, H, W], got shape "
            f"{tuple(x.shape)}"
        )
    return x if x.dim() == 2 else Pooling(USUAL_LAYOUTS[x.dim()])(x)


def resolved(pool: StagePool) -> Pooling | Callable[[Tensor], Tensor]:
    """What a name stands for; ValueError or TypeError for what :func:`pool_features` does not know."""
    if callable(pool):
        return pool
    known = (
        f"pool must be 'mean', 'cls' or a callable, got {pool!r}; further names are 'mean_patches' and 'mean_' with a "
        "layout, as 'mean_nhwc', 'mean_ncl' or 'mean_lnc'"
    )
    if not isinstance(pool, str):
        raise TypeError(known)
    if pool == "mean":
        return usual_mean
    if pool == "cls":
        return Pooling(token=0)
    if pool == "mean_patches":
        return Pooling(prefix=1)
    layout = pool.removeprefix("mean_")
    if layout == pool or not _is_layout(layout):
        raise ValueError(known)
    return Pooling(layout)


def _is_layout(letters: str) -> bool:
    return {"n", "c"} <= set(letters) and len(set(letters)) == len(letters) and letters.isalpha() and letters.islower()


def per_stage(name: str, value: Any, stages: int) -> list:
    """What is given for all stages, or in a list for each, as a list with one for each."""
    if not isinstance(value, (list, tuple)):
        return [value] * stages
    if len(value) != stages:
        raise ValueError(f"{name} must be one for all stages or a list of {stages}, got a list of {len(value)}")
    return list(value)


def of_side(name: str, value: Any, side: str) -> Any:
    """What is given for both networks, or in a dict for each."""
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"student", "teacher"}:
        raise ValueError(f"{name} must have the keys 'student' and 'teacher' when it is a dict, got {list(value)}")
    return value[side]


def stage_pools(pool: Pool, stages: int, side: str | None = None) -> list[StagePool]:
    """The pooling of each of one network's stages, checked."""
    pools = per_stage("pool", pool if side is None else of_side("pool", pool, side), stages)
    for one in pools:
        resolved(one)
    return pools


def selected(output: Any, select: Select) -> Any:
    """The entry of a tuple, list, dict or object that ``select`` names; a tensor is its own, but for a callable."""
    if callable(select):
        return select(output)
    if select is None or isinstance(output, Tensor):
        return output
    try:
        return getattr(output, select) if isinstance(select, str) and hasattr(output, select) else output[select]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"select={select!r} is not in it ({type(error).__name__}: {error})") from None
