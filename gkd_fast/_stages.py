"""Stages of two networks: their widths and which of them are paired."""

from collections.abc import Iterable, Sequence
from typing import Any

from gkd_fast import _arguments
from gkd_fast._arguments import is_whole


def check_dims(name: str, dims: int | Sequence[int]) -> list[int]:
    """The widths as a list; ValueError unless they are positive ints."""
    given: Any = [dims] if is_whole(dims) else dims
    if isinstance(given, str) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        raise TypeError(f"{name} must be a positive int or a list of them, got {type(dims).__name__}")
    widths = list(given)
    if not widths or any(not is_whole(d) or d < 1 for d in widths):
        raise ValueError(f"{name} must be a positive int or a list of them, got {widths}")
    return [int(d) for d in widths]


def check_pairs(pairs: str | Sequence[tuple[int, int]], num_students: int, num_teachers: int) -> list[tuple[int, int]]:
    """The wanted (student stage, teacher stage) pairs as a sorted list; ValueError for others than those that exist."""
    name = pairs if isinstance(pairs, str) else None
    if name == "all":
        return [(s, t) for s in range(num_students) for t in range(num_teachers)]
    if name == "matched":
        if num_students != num_teachers:
            raise ValueError(
                f"pairs='matched' needs as many student as teacher stages, got {num_students}, {num_teachers}"
            )
        return [(k, k) for k in range(num_students)]
    if isinstance(pairs, str) or not (isinstance(pairs, Sequence) and len(pairs)):
        raise ValueError(f"pairs must be 'all', 'matched' or a list of (student stage, teacher stage), got {pairs!r}")
    listed: Any = pairs
    found = _arguments.check_pairs(listed, num_students, num_teachers)
    return check_pairs("all", num_students, num_teachers) if found is None else found


def frozen_widths(teacher_dims: Sequence[int], pairs: Sequence[tuple[int, int]], num_students: int) -> list[int]:
    """The width to which each student stage's graph convolutions lead: that of the teacher stages it is paired with."""
    widths = []
    for stage in range(num_students):
        paired = {teacher_dims[t] for s, t in pairs if s == stage}
        if len(paired) > 1:
            raise ValueError(
                f"teacher_graph='frozen' needs teacher stages of one width for each student stage; student stage "
                f"{stage} is paired with widths {sorted(paired)}: choose pairs='matched' or a list"
            )
        widths.append(paired.pop() if paired else teacher_dims[0])
    return widths
