"""Which dimension of a stage's output is which: found by running the model on samples of other sizes.

The samples lie along the dimension that changes with their number, positions along those that change with the size of
the images (the length of the sequences); what changes with neither is the channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gkd_fast._pooling import USUAL_LAYOUTS, Pool, Pooling, StagePool, of_side, pool_features, resolved, stage_pools
from gkd_fast._snapshot import Snapshot
from gkd_fast.features import StageFeatures

Sample = Tensor | Sequence[Any] | Mapping[str, Any]


def pools_and_widths(
    side: str, model: nn.Module, stages: Sequence[str], sample: Sample, pool: Pool | None, select: Any
) -> tuple[list[StagePool], list[int]]:
    """The pooling and the width of each of a model's stages, by forward passes that leave no trace in the model.

    Args:
        side: "student" or "teacher", for messages.
        model: in any mode.
        stages: module names.
        sample: what the model takes: a tensor, a sequence of arguments or a mapping of keyword arguments.
        pool: of one or both sides, to be checked; None: to be found out.
        select: as in :class:`StageFeatures`, of one or both sides.

    Raises:
        ValueError: a stage whose layout cannot be told, or for which a pooling does not give rows of one width.
    """
    pools = None if pool is None else stage_pools(pool, len(stages), side)
    snapshot = Snapshot([model], _tensors(sample))
    recorder = _Recorder(model, stages, select=of_side("select", select, side))
    try:
        model.eval()
        with torch.no_grad():
            base = recorder.record(sample)
            batch = _batch_size(sample)
            other_batch = 1 if batch > 1 else 2
            fewer = recorder.record(_map(sample, lambda x: _resize_batch(x, batch, other_batch)))
            sized, all_ran = _other_size(recorder, sample)
    finally:
        recorder.remove()
        snapshot.restore()
    chosen, widths = [], []
    for k, name in enumerate(stages):
        stage = _Stage(
            f"{side} stage {name!r}", base[k], fewer[k], sized.get(k), batch, other_batch, _is_square(sample)
        )
        chosen_pool = stage.inferred() if pools is None else pools[k]
        widths.append(stage.width(chosen_pool, sample, explicit=pools is not None, size_counts=all_ran))
        chosen.append(chosen_pool)
    return chosen, widths


class _Stage:
    """What a stage gave for a sample, for another number of samples, and for samples of another size."""

    def __init__(
        self, name: str, base: Tensor, fewer: Tensor, sized: Tensor | None, batch: int, other_batch: int, square: bool
    ):
        self.name, self.base, self.fewer, self.sized = name, base, fewer, sized
        self.batch, self.other_batch, self.square = batch, other_batch, square

    def inferred(self) -> StagePool:
        """The name of the layout; ValueError where the runs do not tell it."""
        shape = tuple(self.base.shape)
        samples = _changed(shape, tuple(self.fewer.shape))
        if len(samples) != 1 or (shape[samples[0]], self.fewer.shape[samples[0]]) != (self.batch, self.other_batch):
            raise ValueError(
                f"{self.name} must have one dimension for the samples, got shapes {shape} for {self.batch} and "
                f"{tuple(self.fewer.shape)} for {self.other_batch}; pass a pool= that returns [batch, width]"
            )
        positions = [] if self.sized is None else _changed(shape, tuple(self.sized.shape))
        layout = self._layout(samples[0], positions)
        if layout is None:
            raise ValueError(
                f"{self.name} does not tell which of its dimensions are the channels, with shapes {shape}"
                + (f" and {tuple(self.sized.shape)} for samples of another size" if self.sized is not None else "")
                + "; pass pool=, as 'mean' for [B, C, H, W] or [B, N, C], 'mean_nhwc', 'mean_ncl' or 'mean_lnc'"
            )
        return "mean" if layout == USUAL_LAYOUTS[len(shape)] else f"mean_{layout}"

    def _layout(self, samples: int, positions: list[int]) -> str | None:
        """A letter for each dimension; known are that of the samples and, some of them, those of the positions."""
        shape = self.base.shape
        if len(shape) == 2:
            return "nc" if samples == 0 else None
        if len(shape) == 3:
            channels = [d for d in range(3) if d != samples and d not in positions]
            if not channels:
                return None
            # Nothing changed with the size: the usual tokens, whose channels come last.
            return _letters(3, samples, channels[-1], "l")
        if len(shape) not in (4, 5) or samples != 0:
            return None
        # Channels come first or last, the two dimensions of an image side by side.
        first, last = [len(shape) - 2, len(shape) - 1], [len(shape) - 3, len(shape) - 2]
        if not positions and self.square:
            # Positions of a square image are square.
            square = [pair for pair in (first, last) if shape[pair[0]] == shape[pair[1]]]
            positions = square[0] if len(square) == 1 else []
        names = "hw" if len(shape) == 4 else "thw"
        if set(first) <= set(positions) and 1 not in positions:
            return _letters(len(shape), 0, 1, names)
        if set(last) <= set(positions) and len(shape) - 1 not in positions:
            return _letters(len(shape), 0, len(shape) - 1, names)
        return None

    def width(self, pool: StagePool, sample: Sample, explicit: bool, size_counts: bool) -> int:
        """The width of the pooled rows; ValueError unless they are one per sample, of one width."""
        pooling = resolved(pool)
        if isinstance(pooling, Pooling) and pooling.mask is not None:
            mask = sample.get(pooling.mask) if isinstance(sample, Mapping) else None
            if not isinstance(mask, Tensor):
                raise ValueError(f"sample must be a dict with the mask {pooling.mask!r} that pool= names, a Tensor")
            return pool_features(self.base, pool, mask).shape[1]
        pooled = pool_features(self.base, pool)
        others = [(self.fewer, self.other_batch)]
        # A callable may well give a width that goes with the size of the images: it is the caller's own.
        if self.sized is not None and size_counts and (pool == "mean" or isinstance(pooling, Pooling)):
            others.append((self.sized, self.batch))
        starts_with_samples = not isinstance(pooling, Pooling) or pooling.layout[0] == "n"
        for x, rows in others:
            other = pool_features(x, pool)
            if other.shape[1] != pooled.shape[1] or (starts_with_samples and len(other) != rows):
                raise ValueError(
                    f"{self.name} must give [batch, width] with one width: pool={pool!r} makes {tuple(pooled.shape)} "
                    f"of {tuple(self.base.shape)} and {tuple(other.shape)} of {tuple(x.shape)}{self._advice(explicit)}"
                )
        return pooled.shape[1]

    def _advice(self, explicit: bool) -> str:
        try:
            return f"; pass pool={self.inferred()!r}" if explicit else ""
        except ValueError:
            return "; pass the pool= that this layout needs"


class _Recorder(StageFeatures):
    """Keeps the whole outputs, those before an error of the model too."""

    def __init__(self, model: nn.Module, stages: Sequence[str], select: Any):
        super().__init__(model, stages, pool=None, select=select)
        self.seen: dict[int, Tensor] = {}

    def record(self, sample: Sample, may_fail: bool = False) -> dict[int, Tensor]:
        self.seen, self.failed = {}, False
        args, kwargs = arguments_of(sample)
        try:
            self(*args, **kwargs)
        except Exception:
            # What a model raises for a size that it does not take is its own affair.
            if not may_fail:
                raise
            self.failed = True
        return self.seen

    def _features(self, k: int, output: object) -> Tensor:
        self.seen[k] = super()._features(k, output)
        return self.seen[k]


def _other_size(recorder: _Recorder, sample: Sample) -> tuple[dict[int, Tensor], bool]:
    """The outputs for the first smaller sample that the model takes, else for the one that reached most stages; whether
    it took it."""
    best: dict[int, Tensor] = {}
    for smaller in _smaller_samples(sample):
        seen = recorder.record(smaller, may_fail=True)
        if not recorder.failed:
            return seen, True
        best = max(best, seen, key=len)
    return best, False


def _smaller_samples(sample: Sample) -> Iterator[Sample]:
    """The sample with smaller images, or shorter sequences, in several ways."""
    first = _first(sample)
    if first.dim() >= 4:
        choices = [tuple(range(2, first.dim())), (first.dim() - 2, first.dim() - 1)][first.dim() == 4 :]
    elif first.dim() == 3:
        choices = [(2,), (1,)]
    else:
        choices = [] if first.is_floating_point() or first.dim() < 2 else [(1,)]
    for dims in choices:
        for size_of in (lambda n: n // 2, lambda n: n - 32, lambda n: n * 3 // 4):
            sizes = {d: size_of(first.shape[d]) for d in dims}
            if all(0 < size < first.shape[d] for d, size in sizes.items()):
                yield _map(sample, partial(_cut, like=first, sizes=sizes))


def _cut(x: Tensor, like: Tensor, sizes: dict[int, int]) -> Tensor:
    for d, size in sizes.items():
        if d < x.dim() and x.shape[d] == like.shape[d]:
            x = x.narrow(d, 0, size)
    return x


def _resize_batch(x: Tensor, batch: int, other: int) -> Tensor:
    if x.dim() == 0 or x.shape[0] != batch:
        return x
    return x[:other] if other < batch else torch.cat([x] * other)


def _changed(a: tuple[int, ...], b: tuple[int, ...]) -> list[int]:
    return [d for d in range(len(a)) if len(a) != len(b) or a[d] != b[d]]


def _letters(rank: int, samples: int, channels: int, positions: str) -> str:
    names = iter(positions)
    return "".join("n" if d == samples else "c" if d == channels else next(names) for d in range(rank))


def arguments_of(sample: Sample) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments of a model."""
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (sample,) if isinstance(sample, Tensor) else tuple(sample), {}


def _tensors(sample: Sample) -> list[Tensor]:
    args, kwargs = arguments_of(sample)
    return [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def _first(sample: Sample) -> Tensor:
    tensors = [x for x in _tensors(sample) if x.dim()]
    if not tensors:
        raise ValueError("sample must be a Tensor, or hold one: a sequence of arguments or a dict of keyword arguments")
    return tensors[0]


def _batch_size(sample: Sample) -> int:
    return len(_first(sample))


def _is_square(sample: Sample) -> bool:
    first = _first(sample)
    return first.dim() >= 4 and first.shape[-1] == first.shape[-2]


def _map(sample: Sample, change: Any) -> Sample:
    def changed(x: Any) -> Any:
        return change(x) if isinstance(x, Tensor) else x

    if isinstance(sample, Mapping):
        return {name: changed(x) for name, x in sample.items()}
    return changed(sample) if isinstance(sample, Tensor) else [changed(x) for x in sample]
