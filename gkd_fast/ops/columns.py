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

from gkd_fast.ops.autograd import saveable

# An offset at which no row has its own column.
OUTSIDE = -(2**40)

Prepare = Callable[[Tensor, int], Tensor]


class Exchange(Protocol):
    """How ranks pass rows to each other: :class:`gkd_fast.distributed.Shards`."""

    counts: list[int]
    rank: int
    start: int
    total: int

    def fresh(self) -> "Exchange": ...

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
        own: of each of ``rows`` its prepared columns once they are gathered, else None.
        is_gathered: whether rows are gathered; by their size where it is not given.
    """

    shards: Exchange
    rows: list[Tensor]
    prepare: Prepare
    bank: list[Tensor] | None = None
    gather_budget: float = float("inf")
    gathered: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    own: list[Tensor | None] = field(default_factory=list)
    is_gathered: bool | None = None

    def __post_init__(self) -> None:
        self.own += [None] * (len(self.rows) - len(self.own))
        if self.is_gathered is None:
            row_bytes = sum(x.shape[1] * x.element_size() for x in self.rows)
            self.is_gathered = self.shards.total * row_bytes <= self.gather_budget

    @property
    def whole(self) -> bool:
        """Whether there is one block alone."""
        return self.is_gathered and self.bank is None

    def beside(self, *rows: Tensor) -> "Columns":
        """The same columns with more tensors, gathered or passed around as these are."""
        return replace(self, rows=[*self.rows, *rows], own=[*self.own])

    def save(self, ctx, *tensors: Tensor | None) -> None:
        """``ctx.save_for_backward(*tensors)`` together with the columns, which are so released as these are."""
        held = [saveable(x.detach()) if columns is None else columns for x, columns in zip(self.rows, self.own)]
        here = [columns is not None for columns in self.own]
        ctx.save_for_backward(*held, *(self.bank or []), *tensors)
        bare = replace(self, shards=self.shards.fresh(), rows=[], own=[], bank=None, gathered={})
        ctx.columns = bare, here, None if self.bank is None else len(self.bank)

    @staticmethod
    def saved(ctx) -> "tuple[Columns, list[Tensor]]":
        """The columns and the tensors of ``save``."""
        columns, here, banked = ctx.columns
        # Read once: checkpointing computes them once.
        saved = list(ctx.saved_tensors)
        rows, rest = saved[: len(here)], saved[len(here) :]
        own = [x if is_here else None for x, is_here in zip(rows, here)]
        bank = None if banked is None else rest[:banked]
        return replace(columns, rows=rows, own=own, bank=bank, gathered={}), rest[banked or 0 :]

    def only(self, *places: int) -> "Columns":
        """Some of the tensors alone, gathered or passed around as all are."""
        rows, own = [self.rows[k] for k in places], [self.own[k] for k in places]
        return replace(self, rows=rows, own=own, bank=self.bank and [self.bank[k] for k in places])

    def blocks(self, *extra: Tensor, only: int | None = None) -> Iterator[Block]:
        """The blocks, each with what belongs to its columns of ``extra``, tensors ``[count, …]`` of the ranks' own.

        Args:
            *extra: passed along.
            only: how many of the tensors are needed, all by default.
        """
        shards = self.shards
        if self.is_gathered:
            rows = self.rows[:only]
            for k, x in enumerate(rows):
                if self.own[k] is None and id(x) in self.gathered:
                    self.own[k] = self.gathered[id(x)][1]
            missing = [k for k in range(len(rows)) if self.own[k] is None]
            for k, x in zip(missing, shards.gather([rows[k] for k in missing]), strict=True):
                self.own[k] = self.prepare(x, k)
                self.gathered[id(rows[k])] = rows[k], self.own[k]
            yield Block(self.own[: len(rows)], shards.gather(extra), shards.start)
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
