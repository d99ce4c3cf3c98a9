"""Past embeddings of both networks."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from gkd_fast._training import being_captured, recomputing
from gkd_fast.distributed import Shards

# How far, of their largest entry, column sums of embeddings that are computed again may be from those before.
SAME_SUMS = 1e-2


class ColumnBank(nn.Module):
    """The newest embeddings of every stage, ``size`` of them at most, in buffers that grow until they are so many.

    A step's embeddings come in once, and the step does not meet itself: where the newest call is made again, by
    activation checkpointing or for a look at its terms, it meets what was there before its embeddings came in.

    Args:
        size: most embeddings per stage.
        student_widths: of the student's stages.
        teacher_widths: of the teacher's.
    """

    def __init__(self, size: int, student_widths: Sequence[int], teacher_widths: Sequence[int]):
        super().__init__()
        self.size = size
        self.num_students = len(student_widths)
        for side, widths in (("student", student_widths), ("teacher", teacher_widths)):
            for k, width in enumerate(widths):
                self.register_buffer(f"{side}_{k}", torch.empty(0, width))
        # Before the newest came in, in the memory that the buffers have anyway; and the column sums of these.
        self._before: list[Tensor] = []
        self._newest_sums: Tensor | None = None
        self._newest_call = CallMark()

    def contents(self, before_newest: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """The students' embeddings and the teachers', ``[N, width]``, oldest first."""
        stages = self._before if before_newest and self._before else list(self.buffers())
        return stages[: self.num_students], stages[self.num_students :]

    @torch.no_grad()
    def add(self, embeddings: Sequence[Tensor], shards: Shards | None) -> None:
        """Puts in a batch's embeddings, students first, with ``shards`` those of all ranks."""
        self._newest_sums = _column_sums(embeddings[0])
        if shards is not None:
            embeddings = shards.gather_newest(embeddings, self.size)
        # Replays of a CUDA graph read and write the memory that the bank had at the capture.
        captured = being_captured(embeddings[0])
        if captured and len(next(self.buffers())) < self.size:
            raise RuntimeError(
                f"column_bank: a CUDA graph cannot hold a bank that still grows: it has {len(next(self.buffers()))} of "
                f"{self.size} embeddings; call the loss, or remember, until it is full, then capture"
            )
        self._before = []
        for (name, kept), x in zip(list(self.named_buffers()), embeddings, strict=True):
            whole = torch.cat([kept, x.detach().to(kept.dtype)])
            self._before.append(whole[: len(kept)])
            if captured:
                kept.copy_(whole[-self.size :])
            else:
                setattr(self, name, whole[-self.size :])

    @torch.no_grad()
    def is_newest(self, embeddings: Sequence[Tensor]) -> bool:
        """Whether these are, but for rounding, the embeddings that came in last; waits for the device."""
        if self._newest_sums is None:
            return False
        difference = (_column_sums(embeddings[0]) - self._newest_sums).abs().max()
        return bool(difference <= SAME_SUMS * self._newest_sums.abs().max())

    def has_met(self, embeddings: Sequence[Tensor], features: Sequence[Tensor], parameters: Iterable[Tensor]) -> bool:
        """Whether the embeddings of this call are those that came in last: it is made, or computed, again.

        Raises:
            RuntimeError: a recomputation of an earlier call, whose bank is no more.
        """
        if recomputing():
            if not self.is_newest(embeddings):
                raise RuntimeError(
                    "column_bank: this recomputes a call that is not the last one. Under activation checkpointing a "
                    "call's backward pass must come before the next call in training mode"
                )
            return True
        return not torch.compiler.is_compiling() and self._newest_call.is_of(features, parameters)

    def mark_call(self, features: Sequence[Tensor], parameters: Iterable[Tensor]) -> None:
        """The embeddings that came in last were those of these features at these parameters."""
        self._newest_call = CallMark() if torch.compiler.is_compiling() else CallMark(features, parameters)

    def _forget_newest(self) -> None:
        self._before, self._newest_sums, self._newest_call = [], None, CallMark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ColumnBank":
        self._forget_newest()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        self._forget_newest()
        # There may have been more or fewer at the time of saving.
        for name, kept in list(self.named_buffers()):
            if prefix + name in state_dict:
                setattr(self, name, kept.new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class CallMark:
    """Tells the same call made again: with the very same tensors, unchanged, at unchanged parameters. Keeps none."""

    def __init__(self, tensors: Iterable[Tensor] = (), parameters: Iterable[Tensor] = ()):
        self._tensors = [(TensorWeakRef(x), _version(x)) for x in tensors]
        self._parameters = [p._version for p in parameters]

    def is_of(self, tensors: Sequence[Tensor], parameters: Iterable[Tensor]) -> bool:
        return (
            0 < len(tensors) == len(self._tensors)
            and all(ref() is x and version == _version(x) for (ref, version), x in zip(self._tensors, tensors))
            and self._parameters == [p._version for p in parameters]
        )

    def __reduce__(self):
        return CallMark, ()


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _column_sums(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).sum(dim=0)
