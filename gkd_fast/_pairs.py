"""The stage pairs that a call computes: the wanted ones, in blocks of students that all meet the same teachers.

An op shares the similarities of S + T stages among S·T pairs, so its calls are blocks without a gap, and a pair that is
not wanted is in none of them.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product

import torch
from torch import Tensor

Block = tuple[list[int], list[int]]  # numbers of students and of teachers


def used_of(pairs: Iterable[tuple[int, int]]) -> list[Block]:
    """The block of all stages that have a wanted pair, with the unwanted pairs between them; none without a pair."""
    students, teachers = ({pair[side] for pair in pairs} for side in (0, 1))
    return [(sorted(students), sorted(teachers))] if students else []


def blocks_of(pairs: Iterable[tuple[int, int]]) -> list[Block]:
    """The pairs in blocks without a gap: students that meet the same teachers together, or teachers that meet the same
    students, whichever way leaves fewer stages to multiply."""
    by_students = _together(pairs)
    by_teachers = [(students, teachers) for teachers, students in _together((t, s) for s, t in pairs)]
    return min(by_students, by_teachers, key=lambda blocks: sum(len(s) + len(t) for s, t in blocks))


def _together(pairs: Iterable[tuple[int, int]]) -> list[Block]:
    partners: dict[int, set[int]] = {}
    for one, other in pairs:
        partners.setdefault(one, set()).add(other)
    groups: dict[tuple[int, ...], list[int]] = {}
    for one, others in sorted(partners.items()):
        groups.setdefault(tuple(sorted(others)), []).append(one)
    return [(members, list(others)) for others, members in groups.items()]


def losses_of_blocks(
    compute: Callable[[list[int], list[int]], Tensor],
    blocks: list[Block] | None,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """``compute(students' numbers, teachers' numbers)``, ``[B, s, t]``, of every block as ``[B, S, T]``, else 0.

    Blocks None: the one of all pairs. A stage in no block has no part in anything, whatever it holds, and a gradient of
    zeros.
    """
    every = list(range(len(students))), list(range(len(teachers)))
    if blocks is None or blocks == [every]:
        return compute(*every)
    columns: dict[tuple[int, int], Tensor] = {}
    for block in blocks:
        columns |= zip(product(*block), compute(*block).flatten(1).unbind(1), strict=True)
    used = [{k for block in blocks for k in block[side]} for side in (0, 1)]
    nothing = students[0].new_zeros(len(students[0]), dtype=dtype)

    def unwanted(pair: tuple[int, int]) -> Tensor:
        unused = (side[k] for side, k, known in zip((students, teachers), pair, used, strict=True) if k not in known)
        return sum((_zeros_of(x).to(dtype) for x in unused), nothing)

    places = product(range(len(students)), range(len(teachers)))
    losses = torch.stack([columns[pair] if pair in columns else unwanted(pair) for pair in places], dim=1)
    return losses.unflatten(1, (len(students), len(teachers)))


def _zeros_of(x: Tensor) -> Tensor:
    """A zero per row of x, which is differentiated as if it were made of x: DDP wants a gradient of every stage."""
    return x[:, 0].masked_fill(torch.ones(len(x), dtype=torch.bool, device=x.device), 0)
