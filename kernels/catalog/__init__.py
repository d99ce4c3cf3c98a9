"""The kernels as they are compiled for an architecture by default, to be compiled and read without a GPU."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import triton
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gkd_fast.kernels.catalog.neighbors import neighbors
from gkd_fast.kernels.catalog.pairs import angles, pair_losses
from gkd_fast.kernels.catalog.small import small_batches
from gkd_fast.kernels.catalog.tangent import second_order
from gkd_fast.kernels.common.launch import PRODUCTS, Product, divide, padded_width, walk_product_of
from gkd_fast.kernels.common.log_sums import BLOCK as LOG_SUMS_BLOCK
from gkd_fast.kernels.common.log_sums import log_sum_shifts
from gkd_fast.kernels.common.offline import target
from gkd_fast.kernels.common.operands import BLOCK_ROWS as OPERAND_ROWS
from gkd_fast.kernels.common.operands import BLOCK_WIDTH as OPERAND_WIDTH
from gkd_fast.kernels.common.operands import (
    MOST_PARTS,
    block_width,
    length_powers,
    round_rows,
    row_lengths,
    row_sums,
)  # fmt: skip
from gkd_fast.kernels.common.row_maxima import row_maxima_kernel
from gkd_fast.kernels.common.strips import MOST_ROWS
from gkd_fast.kernels.common.table import MULTIPROCESSORS, polynomials, sharing, teachers_at_once, tiles
from gkd_fast.kernels.common.tile import COUNTS
from gkd_fast.kernels.graph_conv.bandwidths import BLOCK_ROWS as MOMENT_ROWS
from gkd_fast.kernels.graph_conv.bandwidths import BLOCK_WIDTH as MOMENT_WIDTH
from gkd_fast.kernels.graph_conv.bandwidths import graph_bandwidths, graph_moments
from gkd_fast.kernels.graph_conv.graphs import share_constants
from gkd_fast.kernels.graph_conv.launches import PARTS_ROWS, PARTS_WIDTH, TERMS_ROWS, TERMS_WIDTH
from gkd_fast.kernels.graph_conv.tiles import (
    graph_degree_sums,
    graph_gradients,
    graph_parts,
    graph_strip,
    graph_sums,
    graph_terms,
)  # fmt: skip
from gkd_fast.kernels.graph_conv.values import INVERSE, INVERSE_ROOT
from gkd_fast.kernels.node_contrast.launches import EPILOGUE_ROWS
from gkd_fast.kernels.node_contrast.strips import COLUMNS, NONE, ROWS
from gkd_fast.kernels.node_contrast.tiles import (
    contrast_differences,
    contrast_gradients,
    contrast_losses,
    contrast_strip,
    contrast_sums,
    cross_numbers,
)  # fmt: skip
from gkd_fast.kernels.relation_kl.gradient_tiles import add_slots, relation_factors, relation_gradients
from gkd_fast.kernels.relation_kl.launches import SLOT_BLOCK, STATISTICS_BLOCK
from gkd_fast.kernels.relation_kl.tiles import relation_losses, relation_sums
from gkd_fast.kernels.unit_rows.launches import BLOCK_ROWS as UNIT_ROWS
from gkd_fast.kernels.unit_rows.launches import BLOCK_WIDTH as UNIT_WIDTH
from gkd_fast.kernels.unit_rows.tiles import unit_rows_forward, unit_rows_gradient

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")

# Arguments that are numbers: multiples of 16 at the widths that matter, and floats.
SIZES = ("dim", "student_dim", "teacher_dim", "dims", "places", "width", "widths", "strides", "row_strides", "sizes")
DOUBLES = ("constants", "constant_tangents", "moments", "squares", "states", "totals")
FLOATS = ("inner", "outer", "slope", "scale", "shift", "inverse_temperature", "zero", "share", "least", "neighbors")


@dataclass(frozen=True)
class Specialization:
    """One kernel with the types, constants and tile sizes of a default launch.

    Attributes:
        op: the op it belongs to ("relation_kl", …).
        kernel: its name, unique within an architecture, product type, width and number of stages.
        direction: "forward", "backward" or "double backward".
        arch, dtype, dim: as asked for; ``dtype`` is the product precision, ``dim`` the width of every matrix.
        signature: argument → Triton type (a tuple of types for a list of stages); constexprs: argument → value.
        block_rows, block_columns: the rows that a program owns and the columns of one step of its walk.
        products: matrix products per step, each block_rows × block_columns × dim.
        exponentials: exponentials per entry of the tile and step that the hardware's unit computes;
        polynomials: those that the float units compute.
        exemption: why no matrix instruction is expected, or None.
        max_registers: what the compiler is told instead of a limit of its own, or None.
        small: whether it serves batches of at most ``small.SMALL_BATCH`` rows alone.
        strip: the most rows and columns of one launch, or None: all.
    """

    op: str
    kernel: str
    direction: str
    arch: str
    dtype: str
    dim: int
    fn: JITFunction
    signature: dict
    constexprs: dict
    num_warps: int
    num_stages: int
    block_rows: int
    block_columns: int
    products: int
    exponentials: float
    polynomials: float
    exemption: str | None
    grid: Callable[[int], tuple[int, int]] = field(compare=False)
    max_registers: int | None = None
    small: bool = False
    strip: tuple[int, int] | None = None

    def launches(self, batch: int) -> int:
        """How many launches, of strips of rows and columns, make one pass at this batch size."""
        return math.prod(triton.cdiv(batch, most) for most in self.strip or ())

    def programs(self, batch: int) -> int:
        """Programs of one launch at this batch size."""
        return self.grid(batch)[0]

    def trips(self, batch: int) -> int:
        """Steps of the walk over the columns per program."""
        return self.grid(batch)[1]


def compile(spec: Specialization, arch: str | None = None) -> triton.compiler.CompiledKernel:
    """Compile for ``arch`` (default: the specialization's); needs no GPU. ``.asm`` holds "cubin" or "amdgcn"."""
    source = ASTSource(spec.fn, spec.signature, spec.constexprs, _alignments(spec))
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if spec.max_registers is not None:
        options["maxnreg"] = spec.max_registers
    return triton.compile(source, target=target(arch or spec.arch), options=options)


def _alignments(spec: Specialization) -> dict:
    """Pointers are aligned to 16 bytes and widths are multiples of 16, which a launch finds out for itself."""
    aligned = {}
    for place, name in enumerate(spec.fn.arg_names):
        kind = spec.signature[name]
        if isinstance(kind, tuple):
            if name == "strides":
                continue
            aligned.update({(place, k): [["tt.divisibility", 16]] for k in range(len(kind))})
        elif kind.startswith("*") or name in SIZES:
            aligned[(place,)] = [["tt.divisibility", 16]]
    return aligned


def specializations(arch: str, dtype: str, dim: int, stages: tuple[int, int] = (1, 1)) -> list[Specialization]:
    """Every kernel that forward, backward and double backward passes launch, in the default configuration.

    Args:
        arch: one of ``ARCHITECTURES``.
        dtype: product precision: "float64", "tf32x3" (on AMD "float32"), "tf32", "bfloat16" or "float16".
        dim: width of the unit rows and of the messages; above ``table.largest_width`` the kernels that work on strips.
        stages: number of student and of teacher stages; more than share a launch count as one launch's group.
    """
    target(arch)
    if dtype not in PRODUCTS:
        raise ValueError(f"dtype must be one of {tuple(PRODUCTS)}, got {dtype!r}")
    of_float32, of_others = ("float32", "tf32x3") if arch.startswith("gfx") else ("tf32x3", "float32")
    if dtype == of_others:
        raise ValueError(f"dtype must be {of_float32!r} on {arch}, as which it multiplies float32, got {dtype!r}")
    build = _Builder(arch, PRODUCTS[dtype], dim)
    walk_product = walk_product_of(build.product, arch, dim)
    walk = None if walk_product is None else _Builder(arch, walk_product, dim, dtype)
    # A call of one graph_conv, or of all of a loss's.
    convolved = 1 if stages == (1, 1) else sum(stages)
    others = [
        *build.unit_rows(sum(stages)), *second_order(build), *small_batches(build, *stages),
        *neighbors(build, walk, convolved), *pair_losses(build), *angles(build),
    ]  # fmt: skip
    if walk is None:
        return [*build.strips(*stages), *others]
    return [*walk.relation_kl(*stages), *walk.node_contrast(*stages), *walk.graph_conv(convolved), *others]


class _Builder:
    def __init__(self, arch: str, product: Product, dim: int, dtype: str | None = None):
        """dtype: the product precision that was asked for, where kernels that walk tiles have ``product`` instead."""
        self.arch, self.product, self.dim, self.width = arch, product, dim, padded_width(dim)
        self.dtype = dtype or product.name
        self.row = "*fp64" if product.name == "float64" else "*fp32"
        self.column = {"bfloat16": "*bf16", "float16": "*fp16", "float16x3": "*fp16"}.get(product.name, self.row)
        self.polynomials = polynomials(arch, product.name)

    def relation_kl(self, students: int, teachers: int):
        stages, pairs = students + teachers, students * teachers
        shared = teachers_at_once(self.arch, self.product.name, self.width, teachers)
        yield from self.operands("relation_kl", stages)
        of_all = dict.fromkeys(
            ("rows", "row_numbers", "columns", "column_numbers", "centres", "dims", "gradients"), stages
        )  # fmt: skip
        constants = {"S": students, "T": teachers, "OWN_SHIFT": False, "STRIP": False}
        forward, backward = constants | {"TEACHERS": shared}, constants | {"WANTED": 1, "SCALED": self.product.scaled}
        yield self._walk(
            "relation_kl", relation_sums, "forward", forward, of_all, products=1 + shared, bounded=1 + shared,
            exponentials=1 + 2 * shared, in_product_type=("rows", "columns"),
            pairs=students * triton.cdiv(teachers, shared), teachers=shared,
        )  # fmt: skip
        yield self._walk(
            "relation_kl", relation_gradients, "backward", backward, of_all, products=3, bounded=2, exponentials=2,
            in_product_type=("rows", "columns"), pairs=pairs,
        )  # fmt: skip
        statistics = {"S": students, "T": teachers, "OWN_SHIFT": False, "SUM": self.product.SUM,
                      "BLOCK_ROWS": STATISTICS_BLOCK}  # fmt: skip
        constants = statistics | {"TEACHERS": shared}
        yield self._small("relation_kl", relation_losses, "forward", constants, {}, STATISTICS_BLOCK)
        constants = statistics | {"HAS_LOSSES": True, "SCALED": self.product.scaled}
        yield self._small("relation_kl", relation_factors, "backward", constants, {}, STATISTICS_BLOCK, pairs)
        if pairs > 1:
            lists = dict.fromkeys(("slots", "gradients", "sizes", "counts"), students)
            yield self._small("relation_kl", add_slots, "backward", {"BLOCK": SLOT_BLOCK}, lists, SLOT_BLOCK)
        constants = {"EXCEPT_OWN": True, "WIDTH": self.width}
        yield self._walk("relation_kl", row_maxima_kernel, "forward", constants, {}, products=1,
                         in_product_type=() if self.product.split else ("columns",),
                         tiles_of=graph_degree_sums)  # fmt: skip

    def node_contrast(self, students: int, teachers: int):
        yield from self.operands("node_contrast", students + teachers)
        of_teachers = dict.fromkeys(("partners", "columns", "centres"), teachers)
        lists = {"rows": students} | of_teachers
        sides = {"S": students, "T": teachers}
        of_both = dict.fromkeys(("rows", "centres", "own_rows"), students + teachers)
        constants = sides | {"WIDTH": OPERAND_WIDTH, "BLOCK_ROWS": OPERAND_ROWS, "SUM": self.product.SUM}
        yield self._small("node_contrast", cross_numbers, "forward", constants, of_both, OPERAND_ROWS,
                          3 * students * teachers)  # fmt: skip
        for keep in (True, False):
            constants = sides | {"KEEP": keep, "OWN_SHIFT": False}
            yield self._walk(
                "node_contrast", contrast_sums, "forward", constants, lists, products=1 + keep,
                exponentials=1, name="contrast_sums" if keep else "contrast_sums without weighted",
                pairs=students * teachers, in_product_type=("rows", "columns"),
            )  # fmt: skip
        epilogue = {"WIDTH": self.width, "BLOCK_ROWS": EPILOGUE_ROWS, "SUM": self.product.SUM}
        constants = sides | epilogue | {"KEEP": True, "OWN_SHIFT": False}
        yield self._small("node_contrast", contrast_losses, "forward", constants, of_teachers, EPILOGUE_ROWS)
        lists = of_teachers | {"gradients": students}
        yield self._small("node_contrast", contrast_differences, "backward", sides | epilogue, lists, EPILOGUE_ROWS)
        constants = {"SUM": self.product.SUM, "BLOCK_ROWS": LOG_SUMS_BLOCK}
        yield self._small("node_contrast", log_sum_shifts, "backward", constants, {}, LOG_SUMS_BLOCK)
        for by_column, stages, partners in ((False, students, teachers), (True, teachers, students)):
            constants = {
                "STAGES": stages, "PARTNERS": partners, "BY_COLUMN": by_column, "SCALED": self.product.scaled,
            }  # fmt: skip
            lists = dict.fromkeys(("rows", "gradients"), stages)
            lists |= dict.fromkeys(("partners", "columns", "centres"), partners)
            yield self._walk(
                "node_contrast", contrast_gradients, "backward", constants, lists, products=2, exponentials=1,
                name=f"contrast_gradients of {'teachers' if by_column else 'students'}", pairs=stages, walks=partners,
                in_product_type=("rows", "columns"),
            )  # fmt: skip

    def operands(self, op: str, stages: int):
        """What makes the operands of a call."""
        constants = {"SUM": self.product.SUM, "ROWS": OPERAND_ROWS, "WIDTH": block_width(self.product)}
        lists = dict.fromkeys(
            ("rows", "factors", "powers", "dims", "widths", "kinds", "centres", "others", "out", "numbers",
             "own_centres", "partial"), stages
        )  # fmt: skip
        yield self._small(op, row_sums, "forward", constants, lists, OPERAND_ROWS, stages, f"row_sums of {op}")
        constants = constants | {
            "SCALED": self.product.limited, "CENTRED": True, "SPLIT": self.product.split, "PARTS": MOST_PARTS,
            "TYPE": self.product.TYPE,
        }  # fmt: skip
        yield self._small(
            op, round_rows, "forward", constants, lists, OPERAND_ROWS, stages, f"round_rows of {op}", ("out",)
        )  # fmt: skip

    def graph_conv(self, stages: int):
        yield from self.operands("graph_conv", stages)
        if self.product.limited:
            constants = {"SUM": self.product.SUM, "ROWS": OPERAND_ROWS, "WIDTH": OPERAND_WIDTH}
            lists = dict.fromkeys(("rows", "dims"), stages)
            yield self._small("graph_conv", row_lengths, "forward", constants, lists, OPERAND_ROWS, stages)
            constants = {"LONGEST": self.product.longest, "PARTS": MOST_PARTS}
            yield self._small("graph_conv", length_powers, "forward", constants, {}, OPERAND_ROWS, stages)
        names = (
            "nodes", "numbers", "column_nodes", "column_numbers", "degrees", "inverse_variances", "values", "centres",
            "row_degrees", "outputs", "sums", "powers", "widths", "messages", "upstream", "column_messages",
            "column_upstream", "terms", "column_terms", "gradients", "dims", "partial", "partial_degrees", "convolved",
            "messages_gradients", "message_numbers", "upstream_numbers", "log_sums", "column_log_sums",
        )  # fmt: skip
        lists = dict.fromkeys(names, stages)
        of_product = ("nodes", "column_nodes", "values", "messages", "upstream", "column_messages", "column_upstream")
        walk = {"products": 1, "exponentials": 1, "in_product_type": of_product, "pairs": stages}
        yield self._walk("graph_conv", graph_degree_sums, "forward", {}, lists, **walk)
        values = {"VALUE_WIDTH": self.width, "SCALED": self.product.limited, "DIAGONAL": 1.0} | share_constants(None)
        for name, constants in (
            ("symmetric", {"DEGREES": False, "ROW_FACTOR": INVERSE_ROOT}),
            ("row", {"DEGREES": True, "ROW_FACTOR": INVERSE}),
        ):
            options = walk | {"products": 2, "name": f"graph_sums, {name}"}
            yield self._walk("graph_conv", graph_sums, "forward", constants | values, lists, **options)
        constants = {"HAS_UPSTREAM": True} | {key: values[key] for key in ("VALUE_WIDTH", "SCALED")}
        options = walk | {"products": 4}
        yield self._walk("graph_conv", graph_gradients, "backward", constants, lists, **options)
        constants = {"BLOCK_ROWS": TERMS_ROWS, "BLOCK_WIDTH": TERMS_WIDTH, "SUM": self.product.SUM}
        symmetric = constants | {"SYMMETRIC": True}
        yield self._small("graph_conv", graph_terms, "backward", symmetric, lists, TERMS_ROWS, stages)
        constants = {
            "BLOCK_ROWS": PARTS_ROWS, "BLOCK_WIDTH": PARTS_WIDTH, "SUM": self.product.SUM,
        }  # fmt: skip
        yield self._small("graph_conv", graph_parts, "forward", constants, lists, PARTS_ROWS, stages)
        constants = {"MEANS": True, "BLOCK_ROWS": MOMENT_ROWS, "BLOCK_WIDTH": MOMENT_WIDTH}
        of_nodes = dict.fromkeys(("nodes", "dims", "places", "widths", "centres"), stages)
        yield self._small("graph_conv", graph_moments, "forward", constants, of_nodes, MOMENT_ROWS, stages)
        constants = {"BLOCK_WIDTH": MOMENT_WIDTH, "SUM": self.product.SUM}
        del of_nodes["nodes"]
        yield self._small("graph_conv", graph_bandwidths, "forward", constants, of_nodes, MOMENT_ROWS, stages)

    def strips(self, students: int, teachers: int):
        """What wide rows need beside cuBLAS."""
        scaled, S, T = self.product.scaled, students, teachers
        of_stages = ("rows", "row_numbers", "columns", "column_numbers")
        constants = {"S": S, "T": T, "TEACHERS": 1, "OWN_SHIFT": False}
        yield self._strip("relation_kl", relation_sums, "forward", constants, dict.fromkeys(of_stages, S + T))
        lists = dict.fromkeys((*of_stages, "centres", "dims"), 2) | {"gradients": 1}
        constants = {"S": 1, "T": 1, "WANTED": 1, "OWN_SHIFT": False, "SCALED": scaled}
        yield self._strip("relation_kl", relation_gradients, "backward", constants, lists, ("gradients",))
        for name, direction, keep, factors, both in (
            ("contrast_sums", "forward", True, NONE, False),
            ("contrast_sums without weighted", "forward", False, NONE, False),
            ("contrast_gradients of students", "backward", True, ROWS, False),
            ("contrast_gradients of teachers", "backward", True, COLUMNS, False),
            ("contrast_gradients of both", "backward", True, ROWS, True),
        ):  # fmt: skip
            constants = {"KEEP": keep, "FACTORS": factors, "COLUMN_SUMS": both}
            yield self._strip("node_contrast", contrast_strip, direction, constants, {}, ("weights",), name)
        for gradient in (False, True):
            constants, name = (
                {"GRADIENT": gradient, "SCALED": scaled, "DIAGONAL": 1.0} | share_constants(None),
                f"graph_strip{', gradient' if gradient else ''}",
            )
            direction = "backward" if gradient else "forward"
            yield self._strip("graph_conv", graph_strip, direction, constants, {}, ("weights",), name)

    def _strip(self, op, fn, direction, constants, lists, of_products=(), name=None):
        config = tiles("strip", self.arch, self.product.name, self.width)
        constants = {
            **constants, "STRIP": True, "ALIGNED": False, "WIDTH": 16, "BLOCK_ROWS": config.rows,
            "BLOCK_COLUMNS": config.columns, "POLYNOMIALS": self.polynomials, **self.product.constants(),
        }  # fmt: skip
        constants = {key: value for key, value in constants.items() if key in fn.arg_names}
        return self._make(
            op, fn, direction, constants, lists, config.warps, config.stages, config.rows, config.columns, 0, 0, 0,
            "cuBLAS multiplies wide rows", lambda batch: (triton.cdiv(min(batch, MOST_ROWS), config.rows), 1), name,
            of_products,
        )  # fmt: skip

    def unit_rows(self, stages: int):
        constants = {"TYPE": self.product.SUM, "ROWS": UNIT_ROWS, "WIDTH": UNIT_WIDTH}
        names = ("rows", "upstream", "row_strides", "strides", "dims", "units", "inverse_norms", "gradients")
        lists = dict.fromkeys(names, stages)
        for fn, direction in ((unit_rows_forward, "forward"), (unit_rows_gradient, "backward")):
            yield self._small("unit_rows", fn, direction, constants, lists, UNIT_ROWS, launches=stages)

    def _walk(self, op, fn, direction, constants, lists, *, products, bounded=0, exponentials=0, name=None,
              in_product_type=("columns", "column_nodes"), pairs=1, walks=1, teachers=1, tiles_of=None):  # fmt: skip
        """A kernel that walks tiles of the columns, in those of ``tiles_of`` or its own."""
        config = sharing(tiles((tiles_of or fn).__name__, self.arch, self.product.name, self.width), teachers)
        constants = {
            **constants, "WIDTH": self.width, "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns,
            **self.product.constants(),
        }  # fmt: skip
        if "POLYNOMIALS" in fn.arg_names:
            constants["POLYNOMIALS"] = self.polynomials

        def grid(batch: int) -> tuple[int, int]:
            row_blocks = triton.cdiv(batch, config.rows) * pairs
            parts = divide(row_blocks, batch, config.columns, MULTIPROCESSORS[self.arch])
            return row_blocks * parts, triton.cdiv(triton.cdiv(batch, config.columns), parts) * walks

        polynomials = bounded * self.polynomials / 2
        return self._make(
            op, fn, direction, constants, lists, config.warps, config.stages, config.rows, config.columns, products,
            exponentials + bounded - polynomials, polynomials, self._exemption(), grid, name, in_product_type,
        )  # fmt: skip

    def _small(self, op, fn, direction, constants, lists, rows, launches=1, name=None, of_products=()):
        """A kernel that reads every row once."""
        return self._make(
            op, fn, direction, constants, lists, 4, 2, rows, 0, 0, 0, 0, "it computes no matrix product",
            lambda batch: (triton.cdiv(batch, rows) * launches, 1), name, of_products,
        )  # fmt: skip

    def _make(self, op, fn, direction, constants, lists, warps, stages, rows, columns, products, exponentials,
              polynomials,
              exemption, grid, name, of_columns, **others):  # fmt: skip
        signature = {}
        for argument in fn.arg_names:
            kind = self._type(argument, of_columns)
            if argument in ("row_counts", "column_counts") and constants["GRAPHS"]:
                kind = "*i64"
            if argument in constants:
                kind = "constexpr"
            elif argument in lists:
                kind = (kind,) * lists[argument]
            signature[argument] = kind
        return Specialization(
            op, name or fn.__name__, direction, self.arch, self.dtype, self.dim, fn, signature, constants, warps,
            stages, rows, columns, products, exponentials, polynomials, exemption, grid,
            **others,
        )  # fmt: skip

    def _type(self, argument: str, of_columns: tuple[str, ...]) -> str:
        if argument in FLOATS:
            return "fp64"
        if argument in COUNTS or argument in SIZES or argument in ("kinds", "counts"):
            return "i32"
        if argument == "graph_counts":
            return "*i64"
        if argument.endswith("log_sums") or argument.endswith("means") or argument in DOUBLES:
            return "*fp64"
        return self.column if argument in of_columns else self.row

    def _exemption(self) -> str | None:
        if self.product.name == "float64" and self.arch == "sm_86":
            return "it has no matrix units for float64"
        return None
