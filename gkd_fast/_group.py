"""A module's process group, which is this process's own."""

import copy
from typing import Any

from torch.distributed import ProcessGroup


class GroupHolder:
    """A process group that copies share and pickles leave behind: elsewhere it must be named anew."""

    def __init__(self, group: ProcessGroup | None, left_behind: int = 0):
        if group is not None and not isinstance(group, ProcessGroup):
            raise TypeError(f"process_group must be a ProcessGroup or None, got {type(group).__name__}")
        self._group = group
        self._left_behind = left_behind

    def group(self) -> ProcessGroup | None:
        """The group; RuntimeError where a pickle left it behind."""
        if self._left_behind:
            raise RuntimeError(
                f"process_group, of {self._left_behind} ranks, was left behind when this loss was pickled: set its "
                "attribute process_group, None for this process alone"
            )
        return self._group

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupHolder":
        return copy.copy(self) if self._group is None else GroupHolder(self._group)

    def __reduce__(self):
        return GroupHolder, (None, self._left_behind if self._group is None else self._group.size())
