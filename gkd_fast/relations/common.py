"""What the losses over a batch's relations share: checks, the backend, reductions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_fast import distributed, ops
from gkd_fast._arguments import (
    autocast_disabled,
    check_features,
    compute_dtype,
    product_precision,
    select_backend,
    warn_once,
)
from gkd_fast.distributed import Group, Shards, checking, of_union, shards_of
from gkd_fast.ops.columns import Columns

REDUCTIONS = ("mean", "none")


@dataclass(frozen=True)
class Batch:
    """What a loss is computed of on a fused backend.

    Attributes:
        students, teachers: features in float32 or float64, this process's.
        precision: of tile products.
        shards: where the batch is that of several ranks, how it lies there.
    """

    students: Tensor
    teachers: Tensor
    precision: str
    shards: Shards | None

    @property
    def size(self) -> int:
        """The number of samples on all ranks."""
        return len(self.students) if self.shards is None else self.shards.total

    @property
    def ranks(self) -> int:
        return 1 if self.shards is None else self.shards.size

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        return self.students, self.teachers

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return distributed.total(self.shards, x)

    def columns(self, rows: Sequence[Tensor]) -> Columns | None:
        """All ranks' rows, where there are several."""
        return distributed.row_columns(self.shards, rows)


def relation_losses(
    told: tuple,
    definition: Callable[[Tensor, Tensor], Tensor],
    fused: Callable[[Batch], Tensor],
    students: Tensor,
    teachers: Tensor,
    reduction: str,
    backend: str,
    process_group: Group,
    op: str | None = None,
    finish: Callable[[Tensor, Batch], Tensor] | None = None,
) -> Tensor:
    """The losses per sample, or their mean, by ``definition`` or on a fused backend.

    Args:
        told: the function's name and its options, which must be the same on all ranks.
        definition: of ``gkd_fast.reference``, on features in float32 or float64.
        fused: the same; its results may be wider than the features.
        op: the op that it needs, None where PyTorch's own do.
        finish: makes the loss of the losses per sample where it is not their mean.
    """
    with checking(process_group, told[0]):
        check_reduction(reduction)
        check_pair(students, teachers, process_group is not None)
        dtype = compute_dtype({"students": students, "teachers": teachers})
        is_fused = relation_backend(backend, students, op) != "reference"
    shards = shards_of(process_group, [students, teachers], (*told, reduction, is_fused))
    if is_fused and op is not None:
        ops.refuse_forward_mode((students, teachers))
    with autocast_disabled(students):
        batch = Batch(students.to(dtype), teachers.to(dtype), product_precision(students), shards)
        losses = fused(batch) if is_fused else of_union(definition, batch.sides, shards)
        if reduction == "none":
            return losses.to(dtype)
        return (mean(losses, shards) if finish is None else finish(losses, batch)).to(dtype)


def mean(losses: Tensor, shards: Shards | None) -> Tensor:
    """The mean loss of a batch; of several ranks' samples, what has the global mean as its mean over ranks."""
    return losses.mean() if shards is None else losses.sum() * (shards.size / shards.total)


def check_pair(students: Tensor, teachers: Tensor, may_be_empty: bool = False) -> None:
    """Raises TypeError or ValueError unless both are features of one batch."""
    check_features("students", students, may_be_empty)
    check_features("teachers", teachers, may_be_empty)
    if len(students) != len(teachers):
        raise ValueError(f"teachers must have the batch size of students ({len(students)}), got {len(teachers)}")


def check_reduction(reduction: str) -> None:
    """Raises ValueError for a name that is no reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def relation_backend(backend: str, tensor: Tensor, op: str | None) -> str:
    """The backend that runs; the reference where "auto" finds no kernels of ``op`` for the tensor's device."""
    chosen = select_backend(backend, tensor)
    if chosen == "reference" or op is None or ops.has_kernels(op, tensor.device):
        return chosen
    reason = f"there are no {chosen} kernels of {op}"
    if backend == "auto":
        warn_once(f"gkd_fast computes on {tensor.device.type} with the slow reference: {reason}")
        return "reference"
    raise RuntimeError(f"backend={backend!r} is not available: {reason}")


def as_multiplied(rows: Tensor, precision: str) -> Tensor:
    """The rows as tiles multiply them, so that what is computed of rows elsewhere fits the tiles' products."""
    if precision == "bfloat16":
        rounded = rows.detach().bfloat16().to(rows.dtype)
    elif (
        precision in ("tf32", "float16") and rows.dtype == torch.float32 and ops.missing("triton", rows.device) is None
    ):
        # To the eleven bits of tf32, in which Triton's tiles multiply both types.
        bits = rows.detach().view(torch.int32)
        rounded = ((bits + 2**12) & -(2**13)).view(torch.float32)
    else:
        return rows
    return rows + (rounded - rows.detach())


def constants(values: list[float], like: Tensor) -> Tensor:
    """Numbers as an op takes them, without a copy from host to device."""
    return torch.stack([torch.full((), x, dtype=torch.float64, device=like.device) for x in values])
