"""Stages of two networks: their widths and which of them are paired."""

from collections.abc import Sequence


def check_dims(name: str, dims: int | Sequence[int]) -> list[int]:
    """The widths as a list; ValueError unless they are positive ints."""
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims or any(not isinstance(d, int) or d < 1 for d in dims):
        raise ValueError(f"{name} must be a positive int or a list of them, got {dims}")
    return dims


def check_pairs(pairs: str | Sequence[tuple[int, int]], num_students: int, num_teachers: int) -> list[tuple[int, int]]:
    """The wanted (student stage, teacher stage) pairs as a sorted list; ValueError for others than those that exist."""
    if pairs == "all":
        return [(s, t) for s in range(num_students) for t in range(num_teachers)]
    if pairs == "matched":
        if num_students != num_teachers:
            raise ValueError(
                f"pairs='matched' needs as many student as teacher stages, got {num_students}, {num_teachers}"
            )
        return [(k, k) for k in range(num_students)]
    if isinstance(pairs, str) or not pairs:
        raise ValueError(f"pairs must be 'all', 'matched' or a list of (student stage, teacher stage), got {pairs!r}")
    pairs = sorted({(int(s), int(t)) for s, t in pairs})
    for s, t in pairs:
        if not (0 <= s < num_students and 0 <= t < num_teachers):
            raise ValueError(f"pairs must lie below ({num_students}, {num_teachers}), got ({s}, {t})")
    return pairs


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
