"""Graphs of a global batch: the samples of all ranks of a process group are the nodes.

Each rank computes its own rows against all columns, so N ranks compute what one would. What a function of
:mod:`gkd_fast.functional` returns on a rank are its own samples' results, and its gradient is that of the sum over all
ranks of whatever each of them makes of its own: with W ranks and a global batch of B, a loss of (W/B) times the sum of
a rank's own samples' losses (:class:`gkd_fast.GraphKDLoss` returns that) makes the mean over ranks the global loss and
the average that DDP takes of the parameters' gradients exactly that of one process.

Between ranks pass embeddings, statistics per row and upstream gradients per row, never anything of size B². Every rank
must call the same functions, forward and backward, in the same order; one without samples calls them with zero rows.
``docs/guides/several_gpus.md`` has the traffic and memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gkd_fast import ops
from gkd_fast.ops.autograd import transformed
from gkd_fast.ops.columns import Columns

# Embeddings of the whole global batch are gathered on each rank while they take no more bytes than this, per call;
# beyond it the ranks pass them around in a ring, at a ring pass for every pass over tiles.
GATHER_BUDGET = 2**30

# The gathering of one tensor per rank into one, whose older name PyTorch 2.11 has alone.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

# Tensors of several types travel as bytes, each starting at a multiple of this.
ALIGNMENT = 16
# How long a rank that saw a collective fail waits for the others to say that they saw it too.
REPORT_SECONDS = 5.0

# Whose samples are the nodes: this process's alone (None), or those of all ranks.
Group: TypeAlias = "dist.ProcessGroup | Shards | None"

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class Shards:
    """The rows of a global batch as they lie on the ranks of a process group.

    Args:
        group: the process group; None: this process alone.
        counts: rows per rank.
        device: where the rows are.

    Attributes:
        size, rank: of the group.
        start: place of this rank's first row in the global batch, rank after rank.
        total: size of the global batch.
        gathered: see :class:`gkd_fast.ops.columns.Columns`.
    """

    def __init__(self, group: dist.ProcessGroup | None, counts: list[int], device: torch.device):
        self.group = group
        self.counts = counts
        self.device = device
        self.size, self.rank = len(counts), 0 if group is None else dist.get_rank(group)
        self.start, self.total = sum(counts[: self.rank]), sum(counts)
        self.gathered: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def agree(cls, group: dist.ProcessGroup, rows: Sequence[Tensor], what: str, error: Exception | None = None):
        """The shards of ``rows``, after a check that all ranks have come here with the same kind of rows.

        Args:
            group: the process group; all of its ranks call this.
            rows: this rank's tensors ``[count, …]``.
            what: the work that follows, with its options.
            error: what went wrong on this rank before; then all ranks raise.

        Raises:
            ValueError: ranks disagree, or one has an error, or no rank has a row; the message names rank and reason.
            RuntimeError: a rank does not answer.
        """
        device = rows[0].device if rows else _device_of(group)
        kinds = ", ".join(
            f"{str(x.dtype).removeprefix('torch.')}[*, {', '.join(map(str, x.shape[1:]))}]"
            + (" with gradient" if x.requires_grad and torch.is_grad_enabled() else "")
            for x in rows
        )
        description = f"{what} of {kinds}" if error is None else f"{type(error).__name__}: {error}"
        digest = int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "little")
        count = len(rows[0]) if rows and error is None else -1
        size = dist.get_world_size(group)
        mine = torch.tensor([count, digest], dtype=torch.int64, device=device)
        counts, digests = _all_gather(group, what, mine).T.tolist()
        if min(counts) < 0 or len(set(digests)) > 1:
            told: list[Any] = [None] * size
            _collective(group, what, lambda: dist.all_gather_object(told, description, group=group))
            if error is not None:
                raise error
            failed = [rank for rank, c in enumerate(counts) if c < 0]
            odd = failed or [rank for rank in range(size) if told[rank] != told[0]]
            raise ValueError(
                f"rank {odd[0]} has an error: {told[odd[0]]}"
                if failed
                else f"ranks disagree: rank {odd[0]} is at {told[odd[0]]!r}, rank 0 at {told[0]!r}"
            )
        if sum(counts) == 0:
            raise ValueError(f"no rank has a sample in {what}")
        return cls(group, counts, device)

    def fresh(self) -> Shards:
        """The same without what was gathered."""
        return Shards(self.group, self.counts, self.device)

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All ranks' rows of each tensor ``[count, …]``, ``[total, …]``, in one collective."""
        if not tensors:
            return []
        if self.size == 1:
            return [x.detach().contiguous() for x in tensors]
        layouts = [_layout(tensors, count) for count in self.counts]
        longest = max(layout[-1] for layout in layouts)
        mine = _pack(tensors, longest)
        everything = _all_gather(self.group, "gather", mine)
        gathered = []
        for k, x in enumerate(tensors):
            row_bytes = _row_bytes(x)
            pieces = [
                everything[rank, layout[k] : layout[k] + count * row_bytes]
                for rank, (layout, count) in enumerate(zip(layouts, self.counts))
            ]
            gathered.append(torch.cat(pieces).view(x.dtype).view(self.total, *x.shape[1:]))
        return gathered

    def gather_newest(self, tensors: Sequence[Tensor], most: int) -> list[Tensor]:
        """Of each rank's rows the last ones, an equal share of ``most`` for every rank."""
        share = -(-most // self.size)
        newest = Shards(self.group, [min(count, share) for count in self.counts], self.device)
        return newest.gather([x[max(len(x) - share, 0) :] for x in tensors])

    def ring(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """(rank, its rows of each tensor) for every rank, this one first; two ranks' rows are held here at a time.

        The rows of the next rank are on their way while the caller works on those at hand.
        """
        layouts = [_layout(tensors, count) for count in self.counts]
        held = _pack(tensors, layouts[self.rank][-1])
        following, preceding = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        for step in range(self.size):
            rank = (self.rank - step) % self.size
            arriving, works = None, []
            if step + 1 < self.size:
                arriving = torch.empty(layouts[(rank - 1) % self.size][-1], dtype=torch.uint8, device=self.device)
                works = self._start(held, following, arriving, preceding)
            count = self.counts[rank]
            yield (
                rank,
                [
                    held[at : at + count * _row_bytes(x)].view(x.dtype).view(count, *x.shape[1:])
                    for x, at in zip(tensors, layouts[rank])
                ],
            )
            for work in works:
                _collective(self.group, "ring", work.wait)
            if arriving is not None:
                held = arriving

    def _start(self, outgoing: Tensor, to: int, arriving: Tensor, source: int) -> list[dist.Work]:
        """Sends to one rank and receives from another; empty messages are left out."""
        peers = [(dist.isend, outgoing, to), (dist.irecv, arriving, source)]
        operations = [dist.P2POp(op, x, group=self.group, group_peer=peer) for op, x, peer in peers if x.numel()]
        if not operations:
            return []
        return _collective(self.group, "ring", lambda: dist.batch_isend_irecv(operations))

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, on all of them."""
        total = x.detach().clone()
        if self.size > 1:
            _all_reduce(self.group, "sum", total)
        return total

    def stack(self, x: Tensor) -> Tensor:
        """A tensor of every rank, of one shape on all of them: ``[size, …]``."""
        return Shards(self.group, [1] * self.size, self.device).gather([x[None]])[0]

    def own(self, x: Tensor) -> Tensor:
        """This rank's rows of a tensor ``[total, …]``."""
        return x[self.start : self.start + self.counts[self.rank]]


def union(shards: Shards, tensors: Sequence[Tensor]) -> list[Tensor]:
    """All ranks' rows of each tensor, differentiable any number of times: what the reference computes on."""
    return list(tensors) if shards.size == 1 else [_Gather.apply(shards, x) for x in tensors]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shards, x):
        ctx.shards = shards
        return shards.gather([x])[0]

    @staticmethod
    def backward(ctx, upstream):
        return None, _Own.apply(ctx.shards, upstream)


class _Own(torch.autograd.Function):
    """This rank's rows of the sum over ranks: the adjoint of gathering."""

    @staticmethod
    def forward(ctx, shards, x):
        ctx.shards = shards
        return shards.own(shards.sum(x)).clone()  # A view could not be changed in place.

    @staticmethod
    def backward(ctx, upstream):
        return None, _Gather.apply(ctx.shards, upstream)


def total(shards: Shards | None, x: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, on all of them, differentiable any number of times."""
    return x if shards is None or shards.size == 1 else _Sum.apply(shards, x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shards, x):
        ctx.shards = shards
        return shards.sum(x)

    @staticmethod
    def backward(ctx, upstream):
        return None, _Sum.apply(ctx.shards, upstream)


def average(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """The mean over ranks of each tensor; all of one type travel together."""
    result = [x.detach() for x in tensors]
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        places = [k for k, x in enumerate(tensors) if x.dtype == dtype]
        flat = torch.cat([result[k].reshape(-1) for k in places])
        _all_reduce(group, "average", flat)
        flat /= dist.get_world_size(group)
        for k, piece in zip(places, flat.split([result[k].numel() for k in places])):
            result[k] = piece.view_as(result[k])
    return result


def until_all_end(batches: Iterable[Batch], empty: Batch, group: dist.ProcessGroup | None = None) -> Iterator[Batch]:
    """The batches, and then ``empty`` for as long as some other rank still has one.

    So ranks with fewer batches take as many steps: with zero samples they add nothing to losses and gradients, and the
    others do not wait for them in vain. ::

        for images, labels in until_all_end(loader, (images_like[:0], labels_like[:0])):
            ...

    Args:
        batches: this rank's.
        empty: a batch of zero samples.
        group: the process group, all ranks by default.
    """
    if not hasattr(batches, "__iter__"):
        raise TypeError(f"batches must be iterable, got {type(batches).__name__}")
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        running = torch.tensor([0.0 if batch is None else 1.0], device=_device_of(group))
        _all_reduce(group, "until_all_end", running)
        if running.item() == 0:
            return
        yield empty if batch is None else batch


def checking(group: Group, what: str) -> AbstractContextManager[None]:
    """Lets all ranks raise where the checks of one find fault with its arguments."""
    if group is None or isinstance(group, Shards):
        return nullcontext()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {type(group).__name__}")
    return _telling(group, what)


@contextmanager
def _telling(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        Shards.agree(group, (), what, error)
        raise


def shards_of(group: Group, rows: list[Tensor], what: tuple, bank: list[Tensor] | None = None) -> Shards | None:
    """How the rows lie on the ranks; None where they are this process's alone and there is no bank.

    ``what``: the work that follows and its options, which must be the same on all ranks.
    """
    if group is None and bank is None:
        return None
    if group is not None and transformed():
        raise NotImplementedError(f"{what[0]} with a process group is not transformed by torch.func")
    told = f"{what[0]}({', '.join(map(str, what[1:]))})"
    shards = Shards.agree(group, rows, told) if isinstance(group, dist.ProcessGroup) else group
    if bank is None:
        return None if shards is None or shards.size == 1 else shards
    return shards or Shards(None, [len(rows[0])], rows[0].device)


def unit_columns(shards: Shards, stages: Sequence[Tensor], dtype: torch.dtype, bank: list[Tensor] | None = None):
    """The unit rows of the stages on all ranks, and of a bank."""

    def prepare(rows: Tensor, place: int = 0) -> Tensor:
        return ops.unit_rows([rows.detach()], dtype)[0]

    more = None if bank is None else [prepare(x) for x in bank]
    return Columns(shards, list(stages), prepare, more, GATHER_BUDGET, shards.gathered)


def row_columns(shards: Shards, rows: Sequence[Tensor], bank: list[Tensor] | None) -> Columns:
    """Rows as they are, on all ranks, and a bank's."""
    return Columns(shards, list(rows), lambda x, place: x, bank, GATHER_BUDGET)


def graph_columns(shards: Shards, rows: list[Tensor], dtype: torch.dtype) -> Columns:
    """The unit nodes on all ranks, the messages, and what goes with them."""

    def prepare(rows: Tensor, place: int) -> Tensor:
        return ops.unit_rows([rows], dtype)[0] if place == 0 else rows.to(dtype)

    # Nodes that a search for their bandwidth has gathered do not travel again.
    _, nodes = shards.gathered.get(id(rows[0]), (None, None))
    return Columns(shards, rows, prepare, None, GATHER_BUDGET, own=[nodes])


def of_union(
    function: Callable[..., Tensor],
    rows: Sequence[Tensor],
    shards: Shards | None,
    bank: Sequence[Tensor] | None = None,
) -> Tensor:
    """This rank's rows of ``function`` of all ranks' rows and the bank's."""
    if shards is None:
        return function(*rows)
    whole = union(shards, rows)
    if bank is not None:
        whole = [torch.cat([x, more.to(x.dtype)]) for x, more in zip(whole, bank)]
    return shards.own(function(*whole))


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """A device whose tensors the group's backend takes."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _row_bytes(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _layout(tensors: Sequence[Tensor], count: int) -> list[int]:
    """Where each tensor of ``count`` rows starts in a message, and the message's length, in bytes."""
    sizes = (-(-count * _row_bytes(x) // ALIGNMENT) * ALIGNMENT for x in tensors)
    return list(accumulate(sizes, initial=0))


def _pack(tensors: Sequence[Tensor], length: int) -> Tensor:
    """The tensors as one message of ``length`` bytes."""
    message = torch.empty(length, dtype=torch.uint8, device=tensors[0].device)
    for x, at in zip(tensors, _layout(tensors, len(tensors[0]))):
        content = x.detach().contiguous().view(-1).view(torch.uint8)
        message[at : at + len(content)] = content
    return message


def _all_reduce(group: dist.ProcessGroup | None, what: str, x: Tensor) -> None:
    """Puts the sum over ranks into ``x``."""
    _collective(group, what, lambda: dist.all_reduce(x, group=group))


def _all_gather(group: dist.ProcessGroup | None, what: str, x: Tensor) -> Tensor:
    """Every rank's ``x``, of one length on all of them: ``[ranks, length]``."""
    everything = x.new_empty(dist.get_world_size(group) * len(x))
    _collective(group, what, lambda: getattr(dist, GATHER)(everything, x, group=group))
    return everything.view(-1, len(x))


def _collective(group: dist.ProcessGroup | None, what: str, call: Callable[[], Result]) -> Result:
    """``call()``; where it fails, an error that names the ranks that no longer answer."""
    try:
        return call()
    except RuntimeError as error:
        silent = _silent_ranks(group)
        blamed = f"ranks {silent} do not answer: dead, or stuck elsewhere" if silent else "all ranks report it"
        raise RuntimeError(f"{what}: a collective failed on rank {dist.get_rank(group)}; {blamed} ({error})") from error


_reports = 0


def _silent_ranks(group: dist.ProcessGroup | None) -> list[int]:
    """The ranks that do not report the failure too, by the store through which the group was set up."""
    global _reports
    _reports += 1
    me, size = dist.get_rank(group), dist.get_world_size(group)
    store = dist.distributed_c10d._get_default_store()
    prefix = f"gkd_fast/failure {_reports}/{dist.get_process_group_ranks(group or dist.group.WORLD)}"
    try:
        store.set(f"{prefix}/{me}", "1")
    except RuntimeError:
        return [0]  # The store is rank 0's.
    if dist.get_backend(group) == "gloo":
        # Closes the connections, so that ranks which wait for each other and not for the lost one fail and report.
        for rank in range(size):
            if rank != me:
                try:
                    work = dist.isend(torch.zeros(1), group=group, group_dst=rank, tag=1)
                    if work is not None:
                        work.wait(timedelta(milliseconds=1))
                except RuntimeError:
                    continue
    silent = []
    left = timedelta(seconds=REPORT_SECONDS)
    for rank in range(size):
        try:
            store.wait([f"{prefix}/{rank}"], left)
        except RuntimeError:
            silent.append(rank)
            left = timedelta(milliseconds=200)
    return silent
