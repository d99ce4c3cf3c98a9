"""The kernels of the losses over pairs as they are compiled by default; see ``catalog``."""

from collections.abc import Iterator

import triton

from gkd_fast.kernels.catalog.tangent import DIRECTION, OF_PRODUCT
from gkd_fast.kernels.common.launch import divide
from gkd_fast.kernels.common.strips import strip_rows
from gkd_fast.kernels.common.table import MULTIPROCESSORS, PRODUCTS_APART, block_width, tiles
from gkd_fast.kernels.common.tangents import columns_at_a_time
from gkd_fast.kernels.pair_sums.kinds import KINDS
from gkd_fast.kernels.pair_sums.tiles import pair_row_sums, pair_weights
from gkd_fast.kernels.rkd_angle.tiles import angle_products, angle_sums, angle_weights

# Constants per kind; the polynomial is of degree 2.
COUNTS = {"absolute_sums": 0, "distances": 0, "rkd_distance": 4, "polynomial": 3, "pkt": 1}
LOGARITHMS = {"pkt": (1, 2)}  # of sums and of weights
# Norms of products as they are, beside which PyTorch multiplies in the rows' own type.
OF_OWN_TYPE = ("absolute_sums",)
# Those that are compiled for many graphs too: one of every number of sides, terms and sums.
OF_GRAPHS = ("rkd_distance", "polynomial", "pkt")
# Of a student alone, as beside a frozen teacher, and of both.
MOVING = {"student": 1, "both": 3}


def pair_losses(build) -> Iterator:
    """``build``: the builder of ``catalog``. Gradients are those of the students; float16 is multiplied as tf32, and
    tangents in float32 or float64."""
    if build.product.name == "float16":
        return
    has_tangents = build.product.name in ("float32", "tf32x3", "float64")
    for kind, (sides, _, _) in KINDS.items():
        if kind in OF_OWN_TYPE and not has_tangents:
            continue
        logarithms = LOGARITHMS.get(kind, (0, 0))
        movements = [(name, moving) for name, moving in MOVING.items() if has_tangents and not moving >> sides]
        for of in ("", ", of graphs") if kind in OF_GRAPHS else ("",):
            yield _sums(build, f"pair_row_sums{of}", "forward", kind, 0, logarithms[0])
            for name, moving in movements:
                yield _sums(build, f"pair_sum_tangents, {name} moving{of}", DIRECTION, kind, moving, logarithms[0])
            if kind == "distances":  # those that rkd_distance divides by; their slopes are in its own
                continue
            yield _weights(build, f"pair_weights{of}", "backward", kind, 0, logarithms[1])
            for name, moving in movements:
                yield _weights(
                    build, f"pair_weight_tangents, {name} moving{of}", DIRECTION, kind, moving, logarithms[1]
                )


def _sums(build, name: str, direction: str, kind: str, moving: int, logarithms: int):
    config, common, constants, lists, products = _common(build, name, direction, kind, moving)

    def grid(batch: int) -> tuple[int, int]:
        row_blocks, tiles_of_row = triton.cdiv(batch, config.rows), triton.cdiv(batch, config.columns)
        parts = divide(row_blocks, batch, config.columns, MULTIPROCESSORS[build.arch])
        return row_blocks * parts, triton.cdiv(tiles_of_row, parts) * triton.cdiv(build.dim, common["BLOCK_WIDTH"])

    constants = constants | {"SUMS": KINDS[kind][2]}
    return _make(
        build, pair_row_sums, direction, constants, lists, config, products, logarithms, grid, name, kind, None
    )


def _weights(build, name: str, direction: str, kind: str, moving: int, logarithms: int):
    config, common, constants, lists, products = _common(build, name, direction, kind, moving)
    strips = 1 + (moving & 1)
    rows = strip_rows(build.dim)
    strip = rows, columns_at_a_time(build.product, rows, strips)

    def grid(batch: int) -> tuple[int, int]:
        rows, columns = (min(batch, most) for most in strip)
        steps = triton.cdiv(build.dim, common["BLOCK_WIDTH"])
        return triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns), steps

    constants, lists = constants | {"WANTED": 1}, lists | {"moving": 1, "still": 1}
    return _make(
        build, pair_weights, direction, constants, lists, config, products, logarithms, grid, name, kind, strip
    )


def _common(build, name: str, direction: str, kind: str, moving: int):
    """Tiles, sizes, compile-time arguments, lengths of lists and products per step of a kernel of this name."""
    sides, terms, _ = KINDS[kind]
    config = tiles(name.partition(",")[0], build.arch, build.product.name, 0)
    sizes = {
        "APART": build.arch in PRODUCTS_APART, "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns,
        "BLOCK_WIDTH": block_width(build.product.name), **build.product.constants(),
    }  # fmt: skip
    constants = {
        "KIND": kind, "SIDES": sides, "TERMS": terms, "COUNT": COUNTS[kind], "MOVING": moving,
        "TANGENT": direction == DIRECTION, "GRAPHS": name.endswith("of graphs"),
    }  # fmt: skip
    lists = dict.fromkeys(("rows", "row_tangents", "columns", "column_tangents", "dims"), sides)
    return config, sizes, sizes | constants, lists, sides + 2 * moving.bit_count()


def _make(build, fn, direction, constants, lists, config, products, logarithms, grid, name, kind, strip):
    return build._make(
        "pair_sums", fn, direction, constants, lists, config.warps, config.stages, config.rows, config.columns,
        products, logarithms, 0, build._exemption(), grid, f"{name} of {kind}", OF_PRODUCT, strip=strip,
    )  # fmt: skip


def angles(build) -> Iterator:
    """Those of rkd_angle, in the types of rows; a launch is that of a strip of nodes."""
    if build.product.name not in ("float32", "tf32x3", "float64"):
        return
    for fn, direction, constants in (
        (angle_products, "forward", {}), (angle_sums, "forward", {}), (angle_weights, "backward", {"WANTED": 1}),
    ):  # fmt: skip
        config = tiles(fn.__name__, build.arch, build.product.name, 0)
        sizes = {
            "BLOCK_ROWS": config.rows, "BLOCK_COLUMNS": config.columns,
            "BLOCK_WIDTH": block_width(build.product.name), **build.product.constants(),
        }  # fmt: skip

        def grid(batch: int, config=config, width=sizes["BLOCK_WIDTH"]) -> tuple[int, int]:
            return triton.cdiv(batch, config.rows) * triton.cdiv(batch, config.columns), triton.cdiv(build.dim, width)

        products = 1 if fn is angle_products else 2
        yield build._make(
            "rkd_angle", fn, direction, constants | sizes, {}, config.warps, config.stages, config.rows,
            config.columns, products, 0, 0, build._exemption(), grid, None, (),
        )  # fmt: skip
