"""What the rows of an op meet: themselves, or a global batch and a bank, block by block.

The results of an op over several blocks of columns are put together in ``<op>_columns.py``; most of them just add up.
Autograd of the ops with a column set lives there too: its derivatives need the columns' own statistics and upstream,
which other ranks have.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# An offset at which no row has its own column.
OUTSIDE = -(2**40)

Prepare = Callable[[Tensor, int], Tensor]


class Exchange(Protocol):
    """How ranks pass rows to each other: :class:`gkd_fast.distributed.Shards`."""

    counts: list[int]
    rank: int
    start: int
    total: int

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]: ...

    def ring(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]: ...


@dataclass(frozen=True)
class Block:
    """Some columns.

    Attributes:
        columns: the prepared tensors ``[J, …]``.
        extra: what was passed with them; None for a bank.
        offset: row i's own column is i + offset; OUTSIDE or another rank's columns have none.
        trained: whether the columns are some rank's rows, with gradients of their own, or a bank's.
    """

    columns: list[Tensor]
    extra: list[Tensor]
    offset: int
    trained: bool = True


@dataclass
class Columns:
    """All rows of a global batch as columns, and a bank of others.

    They are gathered once and kept where they fit ``gather_budget``, else passed around in a ring on every use.

    Args:
        shards: passes rows between ranks.
        rows: this rank's tensors ``[count, width]``, in the types in which they travel.
        prepare: turns a tensor that has arrived, and its place among ``rows``, into columns.
        bank: prepared columns without gradient.
        gather_budget: bytes that the gathered rows may take.
        gathered: the prepared columns of tensors by their id, shared by the ops that have tensors in common.
    """

    shards: Exchange
    rows: list[Tensor]
    prepare: Prepare
    bank: list[Tensor] | None = None
    gather_budget: float = float("inf")
    gathered: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        row_bytes = sum(x.shape[1] * x.element_size() for x in self.rows)
        self.is_gathered = self.shards.total * row_bytes <= self.gather_budget

    @property
    def whole(self) -> bool:
        """Whether there is one block alone."""
        return self.is_gathered and self.bank is None

    def beside(self, *rows: Tensor) -> "Columns":
        """The same columns with more tensors, gathered or passed around as these are."""
        more = replace(self, rows=[*self.rows, *rows], gathered=dict(self.gathered))
        more.is_gathered = self.is_gathered
        return more

    def blocks(self, *extra: Tensor, only: int | None = None) -> Iterator[Block]:
        """The blocks, each with what belongs to its columns of ``extra``, tensors ``[count, …]`` of the ranks' own.

        Args:
            *extra: passed along.
            only: how many of the tensors are needed, all by default.
        """
        shards = self.shards
        if self.is_gathered:
            rows = self.rows[:only]
            missing = [k for k, x in enumerate(rows) if id(x) not in self.gathered]
            for k, x in zip(missing, shards.gather([rows[k] for k in missing]), strict=True):
                self.gathered[id(rows[k])] = rows[k], self.prepare(x, k)
            yield Block([self.gathered[id(x)][1] for x in rows], shards.gather(extra), shards.start)
        else:
            rows = self.rows[:only]
            for rank, tensors in shards.ring([*rows, *extra]):
                if shards.counts[rank]:
                    offset = shards.start - sum(shards.counts[:rank])
                    columns = [self.prepare(x, k) for k, x in enumerate(tensors[: len(rows)])]
                    yield Block(columns, tensors[len(rows) :], offset)
        if self.bank is not None:
            yield Block(self.bank[:only], [], OUTSIDE, trained=False)


def run(op, *arguments, **named):
    """``op(...)``; where the rows are none, its empty or zero results without running it."""
    rows = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
    if len(rows):
        return op(*arguments, **named)
    fakes = tree_map_only(Tensor, lambda x: x.to("meta"), (arguments, named))
    results = op(*fakes[0], **fakes[1])
    return tree_map_only(Tensor, lambda x: torch.zeros_like(x, device=rows.device), results)


def add(total: list[Tensor] | None, part: Sequence[Tensor]) -> list[Tensor]:
    """Sums of two lists, the first None at the start."""
    return list(part) if total is None else [x.add_(y) for x, y in zip(total, part, strict=True)]
