"""Past embeddings of both networks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gkd_fast.distributed import Shards


class ColumnBank(nn.Module):
    """The newest embeddings of every stage, ``size`` of them at most, in buffers that grow until they are so many.

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

    def contents(self) -> tuple[list[Tensor], list[Tensor]]:
        """The students' embeddings and the teachers', ``[N, width]``, oldest first."""
        stages = list(self.buffers())
        return stages[: self.num_students], stages[self.num_students :]

    def add(self, embeddings: Sequence[Tensor], shards: Shards | None) -> None:
        """Puts in a batch's embeddings, students first, with ``shards`` those of all ranks."""
        if shards is not None:
            embeddings = shards.gather_newest(embeddings, self.size)
        for (name, kept), x in zip(list(self.named_buffers()), embeddings, strict=True):
            setattr(self, name, torch.cat([kept, x.detach().to(kept.dtype)])[-self.size :])

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        # There may have been more or fewer at the time of saving.
        for name, kept in list(self.named_buffers()):
            if prefix + name in state_dict:
                setattr(self, name, kept.new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
