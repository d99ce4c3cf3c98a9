"""The second order's kernels as they are compiled by default; see ``catalog``."""

from collections.abc import Iterator

import triton

from gkd_fast.kernels.common.strips import strip_rows
from gkd_fast.kernels.common.table import PRODUCTS_APART, block_width, tiles
from gkd_fast.kernels.common.tangents import columns_at_a_time
from gkd_fast.kernels.graph_conv.tangent_tiles import (
    graph_degree_tangents,
    graph_double_gradients,
    graph_tangent_weights,
)  # fmt: skip
from gkd_fast.kernels.node_contrast.tangent_tiles import contrast_double_gradients, contrast_tangent_sums
from gkd_fast.kernels.relation_kl.tangent_tiles import relation_double_gradients, relation_tangent_sums

DIRECTION = "double backward"

# Arguments in the product's type.
OF_PRODUCT = (
    "rows", "row_tangents", "columns", "column_tangents", "moving", "still", "left", "right", "extra", "column_left",
    "column_right", "column_extra",
)  # fmt: skip


def second_order(build) -> Iterator:
    """``build``: the builder of ``catalog``.

    Kernels with two sides come where a student moves alone, as beside a frozen teacher, and where both move.
    """
    kernels = [
        *_relation_kl(1, 1), *_node_contrast(),
        *_graph_conv(build.product.scaled),
    ]  # fmt: skip
    for op, fn, name, constants, lists, loops, exponentials, weights in kernels:
        config = tiles(fn.__name__, build.arch, build.product.name, 0)
        width = block_width(build.product.name)
        constants = {
            **constants, "APART": build.arch in PRODUCTS_APART, "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS":
            config.columns, "BLOCK_WIDTH": width,
            **build.product.constants(),
        }  # fmt: skip
        # Programs make a tile each, in steps of the width; what the shorter loops take counts as steps of the longest.
        steps = triton.cdiv(triton.cdiv(build.dim, width) * sum(loops), max(loops))

        rows = strip_rows(build.dim)
        strip = rows, columns_at_a_time(build.product, rows, weights)

        def grid(batch: int, config=config, steps=steps, strip=strip) -> tuple[int, int]:
            rows, columns = (min(batch, most) for most in strip)
            return triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns), steps

        yield build._make(
            op, fn, DIRECTION, constants, lists, config.warps, config.stages, config.rows, config.columns, sum(loops),
            exponentials, 0, build._exemption(), grid, name, OF_PRODUCT, strip=strip,
        )  # fmt: skip


# Each: op, kernel, name, compile-time arguments, lengths of lists, products of each loop, exponentials per entry, and
# the strips of weights that bound the columns of a launch.


def _node_contrast() -> Iterator[tuple]:
    for moving, both in (("student", False), ("both", True)):
        movement, loops = {"ROWS_MOVE": True, "COLUMNS_MOVE": both}, (2 + both,)
        name = f"contrast_tangent_sums, {moving} moving"
        yield "node_contrast", contrast_tangent_sums, name, movement, {}, loops, 1, 2
        name = f"contrast_double_gradients of students, {moving} moving"
        movement = movement | {"BY_COLUMN": False}
        yield "node_contrast", contrast_double_gradients, name, movement, {}, loops, 1, 2


def _relation_kl(S: int, T: int) -> Iterator[tuple]:
    students, teachers = (1 << S) - 1, (1 << T) - 1 << S
    stages = dict.fromkeys(("rows", "columns", "numbers", "column_numbers", "dims"), S + T)
    for moving, bits in (("students", students), ("both", students | teachers)):
        count = bits.bit_count()
        constants = {"S": S, "T": T, "MOVING": bits, "OWN_SHIFT": False}
        of_moving = ("row_tangents", "column_tangents", "row_along", "column_along")
        lists = stages | dict.fromkeys(of_moving, count)
        loops = (3,) * count + (1,) * (S + T - count)
        work = loops, 2 * (S + T)
        yield (
            "relation_kl",
            relation_tangent_sums,
            f"relation_tangent_sums, {moving} moving",
            constants,
            lists,
            *work,
            1,
        )
        for side, wanted in (("students", students), ("teachers", teachers)):
            if wanted & bits:
                name = f"relation_double_gradients of {side}, {moving} moving"
                of_side = lists | {"moving": wanted.bit_count(), "still": (wanted & bits).bit_count()}
                weights = of_side["moving"] + of_side["still"]
                constants_of_side = constants | {"WANTED": wanted}
                yield "relation_kl", relation_double_gradients, name, constants_of_side, of_side, *work, weights


def _graph_conv(scaled: bool) -> Iterator[tuple]:
    yield "graph_conv", graph_degree_tangents, "graph_degree_tangents", {}, {}, (3,), 1, 2
    constants = {"NODES_MOVE": True, "SCALED": scaled}
    yield "graph_conv", graph_tangent_weights, "graph_tangent_weights", constants, {}, (3,), 1, 2
    for moving, extra in (("nodes", False), ("nodes and messages", True)):
        name, constants = f"graph_double_gradients, {moving} moving", {"NODES_MOVE": True, "HAS_EXTRA": extra}
        yield "graph_conv", graph_double_gradients, name, constants, {}, (3, 2) + (2,) * extra, 1, 2
