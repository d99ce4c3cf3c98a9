"""What the losses over a batch's relations share: checks, the backend, reductions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from gkd_fast import distributed, ops, reference
from gkd_fast._arguments import (
    bank_size,
    check_banks,
    check_choice,
    check_features,
    compute_dtype,
    product_precision,
    select_backend,
    warn_once,
)
from gkd_fast._autocast import autocast_disabled
from gkd_fast.distributed import Group, Shards, checking, of_union, shards_of
from gkd_fast.ops.autograd import refuse_transforms

# Further rows of students and of teachers to have relations with.
Bank: TypeAlias = tuple[Tensor, Tensor] | None

REDUCTIONS = ("mean", "none")
WITHIN = ("batch", "tokens")


@dataclass(frozen=True)
class Side:
    """One network's rows, ``[B, D]`` or of graphs ``[G, N, D]``, and its bank's ``[M, D]``, which have no gradient."""

    rows: Tensor
    bank: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What a loss is computed of on a fused backend: one graph, or one per sample.

    Attributes:
        students, teachers: features ``[B, D]`` in float32 or float64, this process's; of graphs ``[G, N, D]``, each
            with its own rows first and then rows of zeros.
        precision: of tile products.
        shards: where the batch is that of several ranks, how it lies there.
        counts: the graphs' numbers of rows, ``[G]``; None: there is one graph.
        bank: further rows of both sides, which rows meet and which have no losses; the same on all ranks.
    """

    students: Tensor
    teachers: Tensor
    precision: str
    shards: Shards | None
    counts: Tensor | None = None
    bank: list[Tensor] | None = None

    @property
    def size(self) -> int | Tensor:
        """The number of a graph's rows, on all ranks; of graphs, which may have none, ``[G, 1]`` and at least 1."""
        if self.counts is not None:
            return self.counts.clamp(min=1).to(self.students.dtype)[:, None]
        return len(self.students) if self.shards is None else self.shards.total

    @property
    def partners(self) -> int | Tensor:
        """How many rows a row meets: those of its graph and of the bank."""
        return self.size if self.bank is None else self.size + len(self.bank[0])

    @property
    def ranks(self) -> int:
        return 1 if self.shards is None else self.shards.size

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        return self.students, self.teachers

    def mapped(self, function: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> list[Side]:
        """``function`` of both sides' rows, and of their bank's."""
        rows = function(self.sides)
        if self.bank is None:
            return [Side(x) for x in rows]
        with torch.no_grad():
            return [Side(*both) for both in zip(rows, function(self.bank), strict=True)]

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        return distributed.total(self.shards, x)

    def partner_sum(self, side: Side) -> Tensor:
        """The sum over the rows that a row meets, ``[1, D]`` or of graphs ``[G, 1, D]``."""
        own = self.total(side.rows.sum(dim=-2, keepdim=True))
        return own if side.bank is None else own + side.bank.sum(dim=0)

    def centres(self) -> list[Tensor]:
        """Both sides' mean rows, without gradient, ``[1, D]`` or of graphs ``[G, 1, D]``."""
        size = self.size if self.counts is None else self.size[..., None]
        return [self.total(x.detach().sum(dim=-2, keepdim=True)) / size for x in self.sides]

    def pair_losses(
        self,
        kind: str,
        sides: list[Side],
        terms: Tensor,
        constants,
        precision: str | None = None,
        bank_terms: Tensor | None = None,
    ) -> Tensor:
        """:func:`gkd_fast.ops.pair_losses` of the graph or graphs; ``bank_terms``: those of the bank's rows, 0 unless
        given."""
        rows, columns = [x.rows for x in sides], None
        if self.shards is not None:
            more = None
            if self.bank is not None:
                if bank_terms is None:
                    bank_terms = terms.new_zeros(len(terms), len(self.bank[0]))
                more = [*(x.bank for x in sides), *bank_terms[..., None]]
            columns = distributed.row_columns(self.shards, [*rows, *terms[..., None]], more)
        return ops.pair_losses(kind, rows, terms, constants, precision or self.precision, columns, self.counts)

    def constants(self, values: list[float]) -> Tensor:
        """Numbers as an op takes them, without a copy from host to device."""
        like = self.students if self.counts is None else self.counts
        shape = () if self.counts is None else self.counts.shape
        found = [torch.full((1, *shape), x, dtype=torch.float64, device=like.device) for x in values]
        return torch.cat([torch.empty(0, *shape, dtype=torch.float64, device=like.device), *found])


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
    finish: Callable[[Tensor, float | Tensor], Tensor] | None = None,
    within: str = "batch",
    mask: Tensor | None = None,
    bank: Bank = None,
) -> Tensor:
    """The losses per sample, or their mean, by ``definition`` or on a fused backend.

    Within the tokens of each sample the loss of a sample is that of its graph: the mean over its tokens.

    Args:
        told: the function's name and its options, which must be the same on all ranks.
        definition: of ``gkd_fast.reference``, on features in float32 or float64, the bank's after the samples'.
        fused: the same; its results may be wider than the features.
        op: the op that it needs, None where PyTorch's own do.
        finish: makes the loss of the mean of a graph's losses and of its number of pairs where it is not the mean.
        within: "batch" or "tokens".
        mask: the tokens that count.
        bank: further rows to have relations with.
    """
    of_tokens = within == "tokens"
    with checking(process_group, told[0]):
        check_choice("reduction", reduction, REDUCTIONS)
        check_within(students, teachers, within, mask, process_group is not None)
        dtype = compute_dtype({"students": students, "teachers": teachers})
        if of_tokens and op is not None:
            op = f"batched_{op}"
        more = check_pair_bank(bank, students, teachers, within)
        is_fused = relation_backend(backend, students, op) != "reference"
    told = *told, reduction, is_fused, within, bank_size(more)
    shards = shards_of(process_group, [students, teachers], told, more)
    if is_fused and op is not None:
        ops.refuse_forward_mode((students, teachers))
        if "pair_sums" in op:
            refuse_transforms(told[0])
    with autocast_disabled(students):
        s, t = students.to(dtype), teachers.to(dtype)
        if of_tokens:
            if is_fused:
                batch = Batch(*graphs_of(s, t, mask, product_precision(students)))
                losses, sizes = fused(batch).sum(dim=-1) / batch.size[:, 0], batch.size[:, 0]
            else:
                losses = reference.within_tokens(definition, s, t, mask)
                sizes = token_counts(s, mask).clamp(min=1)
            losses = losses if finish is None else finish(losses, sizes**2)
            return (losses if reduction == "none" else mean(losses, shards)).to(dtype)
        more = more and [x.detach().to(dtype) for x in more]
        batch = Batch(s, t, product_precision(students), shards, bank=more)
        losses = fused(batch) if is_fused else of_union(definition, batch.sides, shards, more)
        if reduction == "none":
            return losses.to(dtype)
        if finish is None:
            return mean(losses, shards).to(dtype)
        return finish(batch.total(losses.sum()) / batch.size, batch.size * batch.partners).to(dtype)


def mean(losses: Tensor, shards: Shards | None) -> Tensor:
    """The mean loss of a batch; of several ranks' samples, what has the global mean as its mean over ranks."""
    return losses.mean() if shards is None else losses.sum() * (shards.size / shards.total)


def check_pair(students: Tensor, teachers: Tensor, may_be_empty: bool = False) -> None:
    """Raises TypeError or ValueError unless both are features of one batch."""
    check_features("students", students, may_be_empty)
    check_features("teachers", teachers, may_be_empty)
    if len(students) != len(teachers):
        raise ValueError(f"teachers must have the batch size of students ({len(students)}), got {len(teachers)}")


def check_within(
    students: Tensor, teachers: Tensor, within: str, mask: Tensor | None, may_be_empty: bool = False
) -> None:
    """Raises TypeError or ValueError unless both are features of one batch, or of the tokens of one batch's samples."""
    check_choice("within", within, WITHIN)
    if within == "batch":
        if mask is not None:
            raise ValueError('mask needs within="tokens", got within="batch"')
        check_pair(students, teachers, may_be_empty)
        return
    for name, x in (("students", students), ("teachers", teachers)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout != torch.strided:
            got = f"{x.dtype}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a dense floating point Tensor, got {got}")
        if x.dim() != 3 or 0 in x.shape[1:] or not (may_be_empty or len(x)):
            raise ValueError(f"{name} must be [samples, tokens, width], none of them 0, got shape {tuple(x.shape)}")
    if students.shape[:2] != teachers.shape[:2]:
        raise ValueError(
            f"teachers must have the samples and tokens of students {tuple(students.shape[:2])}, got "
            f"{tuple(teachers.shape[:2])}"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.layout != torch.strided:
        got = mask.layout if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a dense Tensor, got {got}")
    if mask.shape != students.shape[:2] or mask.device != students.device:
        raise ValueError(
            f"mask must have shape {tuple(students.shape[:2])} on {students.device}, got {tuple(mask.shape)} on "
            f"{mask.device}"
        )


def check_pair_bank(bank: Bank, students: Tensor, teachers: Tensor, within: str) -> list[Tensor] | None:
    """The bank's students and teachers, None where it is empty; TypeError or ValueError for anything else."""
    if bank is not None and within == "tokens":
        raise ValueError(f'bank must be None within="tokens", got a {type(bank).__name__}')
    return check_banks(bank, [students], [teachers])


def token_counts(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens of each sample count, ``[B]``."""
    if mask is None:
        return torch.full((len(x),), x.shape[1], dtype=torch.int64, device=x.device)
    return (mask != 0).sum(dim=1)


def graphs_of(students: Tensor, teachers: Tensor, mask: Tensor | None, precision: str):
    """The fields of a :class:`Batch` of graphs; the tokens that do not count come last, as zeros."""
    counts = token_counts(students, mask)
    if mask is None:
        return students, teachers, precision, None, counts
    counting = mask != 0
    order = (~counting).to(torch.uint8).argsort(dim=1, stable=True)[:, :, None]

    def moved(x: Tensor) -> Tensor:
        return torch.where(counting[:, :, None], x, 0).take_along_dim(order, dim=1)

    return moved(students), moved(teachers), precision, None, counts


def unit_rows(sides: Sequence[Tensor]) -> list[Tensor]:
    """The L2-normalised rows of tensors ``[…, D]``."""
    unit = ops.unit_rows([x.flatten(0, -2) for x in sides], sides[0].dtype)
    return [e.view(x.shape) for e, x in zip(unit, sides, strict=True)]


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
