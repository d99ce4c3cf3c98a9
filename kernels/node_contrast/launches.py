"""node_contrast on GPUs: the launches of ``tiles``, all wanted pairs or stages in one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import (
    PRODUCTS,
    Product,
    architecture,
    bits_of,
    cdiv,
    divide,
    matrices,
    multiprocessors,
    on_device,
    padded_width,
    power_of_two,
    product_of,
    rows_of,
    walk_product_of,
)  # fmt: skip
from gkd_fast.kernels.common.launcher import Launch, launch
from gkd_fast.kernels.common.log_sums import shifts_and_ratios
from gkd_fast.kernels.common.operands import BLOCK_ROWS, BLOCK_WIDTH, Prepared, centred, stored_width
from gkd_fast.kernels.common.plan import planned
from gkd_fast.kernels.common.row_maxima import row_maxima
from gkd_fast.kernels.common.small import is_small
from gkd_fast.kernels.common.table import tiles
from gkd_fast.kernels.node_contrast import small, strips
from gkd_fast.kernels.node_contrast.tiles import (
    contrast_differences,
    contrast_gradients,
    contrast_losses,
    contrast_sums,
    cross_numbers,
)  # fmt: skip

LOG2E = 1.4426950408889634
# Up to this 2/τ the sums of exp((c − 1)/τ) cannot underflow in float32, nor the weights in float16, scaled by 2^14.
LARGEST_SHARED_SHIFT = 80
LARGEST_SHARED_SHIFT_FLOAT16 = 20
FLOAT16_EXPONENT = 14
MOST_PAIRS = 62
EPILOGUE_ROWS = 16
# Tiles that dividing the columns must save the forward pass, 0.9 µs each on an H200 (bfloat16, 128 wide), for the
# launch that then adds sums and weighted sums: predicted, some 2.5 µs.
LEAST_SAVED = 3


class Shape:
    """What follows from a call's numbers."""

    def __init__(
        self, S: int, T: int, rows: int, dim: int, wanted: Sequence[bool], temperature: float, product: str,
        device: torch.device,
    ):  # fmt: skip
        if len(wanted) != S * T:
            raise ValueError(f"wanted must have {S * T} entries, got {len(wanted)}")
        if len(wanted) > MOST_PAIRS:
            raise ValueError(f"node_contrast takes at most {MOST_PAIRS} stage pairs, got {len(wanted)}")
        self.S, self.T, self.row_count, self.dim = S, T, rows, dim
        self.wanted = bits_of(wanted)
        self.pairs = [divmod(p, T) for p, is_wanted in enumerate(wanted) if is_wanted]
        self.product, self.device = PRODUCTS[product], device
        self.arch = arch = architecture(device)
        self.temperature, self.scale = temperature, LOG2E / temperature
        self.width = padded_width(dim)
        walk_product = walk_product_of(self.product, arch, dim)
        self.is_wide = walk_product is None
        self.walk_product = walk_product or self.product

    def constants(self, config) -> dict:
        return {
            "WIDTH": self.width, "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns,
            "num_warps": config.warps, "num_stages": config.stages, **self.walk_product.constants(),
        }  # fmt: skip

    def epilogue_constants(self) -> dict:
        return {"WIDTH": self.width, "BLOCK_ROWS": EPILOGUE_ROWS, "SUM": self.product.SUM}


_shape = planned(Shape)


class Problem(Shape):
    """Rows and constants of one call.

    Attributes:
        shape: the one object of all calls with such numbers, that plans are kept by.
    """

    def __init__(self, students, teachers, wanted, temperature, product_precision, prepared=None):
        self.prepared: Prepared = prepared or Prepared()
        self.students = rows_of("students", students, prepared)
        x = self.students[0]
        rows, dim = x.shape
        self.teachers = rows_of("teachers", teachers, prepared, rows)
        if {y.size(1) for y in (*self.students, *self.teachers)} != {dim}:
            raise ValueError(f"all stages must have width {dim}")
        product = product_of(product_precision, x).name
        self.shape = _shape(len(students), len(teachers), rows, dim, tuple(wanted), temperature, product, x.device)
        self.__dict__.update(self.shape.__dict__)

    def column_set(self, name: str, columns, rows: list[Tensor]) -> list[Tensor]:
        if columns is None:
            return rows
        columns = matrices(name, columns)
        if len(columns) != len(rows) or columns[0].shape[1] != self.dim:
            raise ValueError(f"{name} must have {len(rows)} stages of width {self.dim}")
        return columns

    def owns(self, columns, offset: int) -> bool:
        """Whether the rows' own columns, which are rows of the stages themselves, are among the columns."""
        if columns is None or 0 <= offset <= len(columns[0]) - self.row_count:
            return True
        if -self.row_count < offset < len(columns[0]):
            raise ValueError(
                f"the rows' own columns i + offset must all be columns or none of them: {self.row_count} rows, "
                f"{len(columns[0])} columns, offset {offset}"
            )
        return False

    def sides(self, students: list[Tensor], teachers: list[Tensor], owned: bool) -> "Sides":
        width = stored_width(self.dim, self.is_wide)
        own = [*self.students, *self.teachers]
        is_whole = students is self.students and teachers is self.teachers
        prepared = self.prepared if is_whole else None
        return Sides(self.walk_product, width, students, teachers, own, owned, self.wanted, prepared)


class Sides:
    """The operands of both sides, every stage about its mean, the numbers p and q of every wanted pair, and the
    similarities of the problem's rows (``own``, of both sides) and their own columns, 0 unless ``owned``.

    prepared: where operands are looked for whose rows are all stages of the call, in order; None: they are others.
    """

    def __init__(
        self, product: Product, width: int, students: list[Tensor], teachers: list[Tensor], own: list[Tensor],
        owned: bool, wanted: int, prepared: Prepared | None = None,
    ):  # fmt: skip
        rows, S, T = [*students, *teachers], len(students), len(teachers)
        counts, widths = (students[0].shape[0], teachers[0].shape[0]), [width] * len(rows)
        if prepared is not None:
            made = prepared.centred(range(S + T), rows, product, widths)
        elif counts[0] == counts[1]:
            made = centred(rows, product, widths)
        else:
            made = [*centred(students, product, widths[:S]), *centred(teachers, product, widths[S:])]
        self.students, self.teachers = made[:S], made[S:]
        self.numbers = tuple(
            [x[0].numbers.new_empty(S * T, x[0].rows.shape[0]) for x in (self.students, self.teachers)]
        )
        own_count = own[0].shape[0]
        self.own_similarities = own[0].new_empty(S * T, own_count)
        _cross_numbers(S, T, product.name)(
            (cdiv(max(counts), BLOCK_ROWS), 3 * S * T), tuple(rows), tuple([x.centre for x in made]), *self.numbers,
            tuple(own), self.own_similarities, rows[0].shape[1], *counts, own_count, int(owned), wanted,
        )  # fmt: skip


@planned
def _cross_numbers(S: int, T: int, product: str) -> Launch:
    return launch(cross_numbers, S=S, T=T, WIDTH=BLOCK_WIDTH, BLOCK_ROWS=BLOCK_ROWS, SUM=PRODUCTS[product].SUM)


@planned
def _sums(shape: Shape, column_count: int, keeps: bool, own_shift: bool) -> tuple[tuple[int, int], int, Launch, Launch]:
    """Of the forward pass over so many columns: the first launch's grid, among how many programs these are divided, and
    both launches.
    """
    config = tiles("contrast_sums", shape.arch, shape.walk_product.name, shape.width)
    row_blocks, num_pairs = cdiv(shape.row_count, config.rows), len(shape.pairs)
    parts = divide(
        row_blocks * num_pairs, column_count, config.columns, multiprocessors(shape.device), LEAST_SAVED
    )  # fmt: skip
    keep = {"S": shape.S, "T": shape.T, "KEEP": keeps, "OWN_SHIFT": own_shift}
    return (
        (row_blocks, num_pairs * parts), parts, launch(contrast_sums, **keep, **shape.constants(config)),
        launch(contrast_losses, **keep, **shape.epilogue_constants()),
    )  # fmt: skip


def node_contrast(
    students, teachers, wanted, temperature, product_precision, keep_weighted, teacher_columns=None, offset=0,
    *, prepared=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = Problem(students, teachers, wanted, temperature, product_precision, prepared)
    columns = problem.column_set("teacher_columns", teacher_columns, problem.teachers)
    owned = problem.owns(teacher_columns, offset)
    offset = 0 if teacher_columns is None else offset
    in_one_launch = is_small(problem.row_count, teacher_columns is not None, problem.dim)
    if problem.is_wide and not in_one_launch:
        return strips.node_contrast(problem, columns, owned, offset, keep_weighted)
    x, rows, num_pairs = problem.students[0], problem.row_count, len(problem.pairs)
    writes_all = in_one_launch or num_pairs == problem.S * problem.T
    losses = (x.new_empty if writes_all else x.new_zeros)(rows, problem.S, problem.T)
    log_sums = x.new_empty(num_pairs, rows, dtype=torch.float64)
    weighted = x.new_empty(num_pairs, rows, problem.dim) if keep_weighted else x.new_empty(0)
    if in_one_launch:
        small.node_contrast(problem, losses, log_sums, weighted)
        return losses, log_sums, weighted
    if num_pairs == 0:
        return losses, log_sums, weighted
    column_count = columns[0].shape[0]
    with on_device(x):
        own_shift, shift, shifts = row_shifts(problem, columns)
        grid, parts, sum_weights, finish = _sums(problem.shape, column_count, keep_weighted, own_shift)
        sums = x.new_empty(parts, num_pairs, rows)
        partial = x.new_empty(parts, num_pairs, rows, problem.dim) if keep_weighted and parts > 1 else weighted
        shifts = losses if shifts is None else shifts
        sides = problem.sides(problem.students, columns, owned)
        centres, own_similarities = tuple([y.centre for y in sides.teachers]), sides.own_similarities
        sum_weights(
            grid, tuple([x.rows for x in sides.students]), tuple([y.rows for y in sides.teachers]), centres,
            tuple(problem.teachers), *sides.numbers, own_similarities, sums, partial, shifts, losses, log_sums,
            problem.dim, rows, column_count, offset, int(owned), problem.wanted, parts, problem.scale, shift,
        )  # fmt: skip
        if parts > 1:
            finish(
                (cdiv(rows, EPILOGUE_ROWS), num_pairs), centres, own_similarities, sums, partial, weighted,
                shifts, losses, log_sums, problem.dim, rows, int(owned), problem.wanted, parts, problem.scale, shift,
            )  # fmt: skip
    return losses, log_sums, weighted


def row_shifts(problem: Problem, columns: list[Tensor]) -> tuple[bool, float, Tensor | None]:
    """Whether every pair's rows have shifts of their own, the shift otherwise, and those shifts [pairs, I].

    Sums are relative to them, so that it does not matter how the maxima's products are rounded.
    """
    is_float16 = problem.product.name == "float16"
    largest = LARGEST_SHARED_SHIFT_FLOAT16 if is_float16 else LARGEST_SHARED_SHIFT
    below = FLOAT16_EXPONENT if is_float16 else 0
    if 2 / problem.temperature <= largest:
        return False, problem.scale - below, None
    maxima = columns[0].new_empty(len(problem.pairs), problem.row_count)
    for place, (s, t) in enumerate(problem.pairs):
        row_maxima(maxima[place], problem.students[s], columns[t], 0, False, problem.product)
    return True, 0.0, maxima * problem.scale - below


def node_contrast_backward(
    upstream, students, teachers, log_sums, weighted, wanted, temperature, product_precision, needs,
    teacher_columns=None, student_columns=None, offset=0, column_upstream=None, column_log_sums=None,
    *, prepared=None,
) -> list[Tensor]:  # fmt: skip
    problem = Problem(students, teachers, wanted, temperature, product_precision, prepared)
    S, T = problem.S, problem.T
    if len(needs) != S + T:
        raise ValueError(f"needs must have {S + T} entries, got {len(needs)}")
    all_teachers = problem.column_set("teacher_columns", teacher_columns, problem.teachers)
    all_students = problem.column_set("student_columns", student_columns, problem.students)
    owned = problem.owns(teacher_columns, offset), problem.owns(student_columns, offset)
    upstream, log_sums = upstream.contiguous(), log_sums.contiguous()
    column_side = (upstream, log_sums)
    has_columns = teacher_columns is not None or student_columns is not None
    if is_small(problem.row_count, has_columns, problem.dim):
        return small.node_contrast_backward(problem, upstream, log_sums, weighted.contiguous(), needs)
    if has_columns:
        if column_upstream is not None and (column_log_sums is None or student_columns is None):
            raise ValueError("column_upstream needs student_columns and column_log_sums")
        column_side = None if column_upstream is None else (column_upstream.contiguous(), column_log_sums.contiguous())
    offset = offset if has_columns else 0
    if problem.is_wide:
        return strips.node_contrast_backward(
            problem, all_teachers, all_students, owned, offset, (upstream, log_sums), column_side, weighted, needs
        )
    gradients = [
        torch.empty_like(x) for x, needed in zip((*problem.students, *problem.teachers), needs, strict=True) if needed
    ]
    num_students = sum(needs[:S])
    of_students, of_teachers = gradients[:num_students], gradients[num_students:]
    with on_device(upstream):
        if of_students and weighted.numel():
            _differences(problem, owned[0], weighted.contiguous(), upstream, of_students, needs[:S])
            of_students = []
        if not of_students and not of_teachers:
            return gradients
        own_side = of_columns = upstream, *shifts_and_ratios(log_sums, upstream, problem.product.SUM)
        if has_columns and of_teachers:
            of_columns = None
            if column_side is not None:
                of_columns = column_side[0], *shifts_and_ratios(column_side[1], upstream, problem.product.SUM)
        sides = None
        if of_students:
            sides = problem.sides(problem.students, all_teachers, owned[0])
            _gradients(problem, sides, len(all_teachers[0]), owned[0], offset, own_side, own_side, of_students,
                       needs[:S], False)  # fmt: skip
        if of_teachers:
            if has_columns or sides is None:
                sides = problem.sides(all_students, problem.teachers, owned[1])
            _gradients(problem, sides, len(all_students[0]), owned[1], offset, own_side, of_columns, of_teachers,
                       needs[S:], True)  # fmt: skip
    return gradients


@planned
def _differences_launch(shape: Shape) -> Launch:
    return launch(contrast_differences, S=shape.S, T=shape.T, **shape.epilogue_constants())


def _differences(problem, owned, weighted, upstream, gradients, needs):
    """The students' gradients from the weighted sums that the forward pass kept."""
    _differences_launch(problem.shape)(
        (cdiv(problem.row_count, EPILOGUE_ROWS), len(gradients)), tuple(problem.teachers), weighted, upstream,
        tuple(gradients), problem.dim, problem.row_count, int(owned), problem.wanted, bits_of(needs),
        1 / problem.temperature,
    )  # fmt: skip


@planned
def _walk(
    shape: Shape, stages: int, partners: int, gradients: int, column_count: int, by_column: bool
) -> tuple[tuple[int, int], int, Launch]:
    """Of one side's gradients, so many of so many stages: grid, among how many programs the columns are divided, and
    the launch.
    """
    config = tiles("contrast_gradients", shape.arch, shape.walk_product.name, shape.width)
    row_blocks = cdiv(shape.row_count, config.rows)
    parts = divide(row_blocks * gradients, column_count, config.columns, multiprocessors(shape.device))
    return (row_blocks, parts * gradients), parts, launch(
        contrast_gradients, STAGES=stages, PARTNERS=partners, BY_COLUMN=by_column, SCALED=shape.product.scaled,
        **shape.constants(config),
    )  # fmt: skip


def _gradients(problem, sides, column_count, owned, offset, own_side, side, gradients, needs, by_column):
    """One side's gradients; own_side: upstream, shifts and ratios of the rows' losses; ``side``: those that weigh the
    columns, by column those of the columns' losses (None: zero).
    """
    partners, rows, columns, numbers = problem.teachers, sides.students, sides.teachers, sides.numbers
    if by_column:
        partners, rows, columns, numbers = problem.students, columns, rows, numbers[::-1]
    count = 0 if side is None else column_count
    side = own_side if side is None else side
    grid, parts, sum_gradients = _walk(problem.shape, len(rows), len(columns), len(gradients), count, by_column)
    partial = gradients if parts == 1 else [x.new_empty(parts, *x.shape) for x in gradients]
    power = side[0]
    if problem.product.scaled:
        power = power_of_two(power.abs().amax() / problem.temperature)
    sum_gradients(
        grid, tuple([x.rows for x in rows]), tuple([y.rows for y in columns]), tuple([y.centre for y in columns]),
        tuple(partners), *numbers, sides.own_similarities, *side, *own_side, tuple(partial), power, problem.dim,
        problem.row_count, count, offset, int(owned), problem.wanted, bits_of(needs), parts,
        1 if by_column else problem.T, problem.T if by_column else 1, problem.scale, 1 / problem.temperature,
    )  # fmt: skip
    if parts > 1:
        for x, pieces in zip(gradients, partial, strict=True):
            torch.sum(pieces, dim=0, out=x)
