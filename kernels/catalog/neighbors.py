"""neighbor_conv's kernels as they are compiled by default; see ``catalog``."""

from collections.abc import Iterator

import triton

from gkd_fast.kernels.common import small
from gkd_fast.kernels.common.launch import padded_width
from gkd_fast.kernels.common.table import largest_width
from gkd_fast.kernels.graph_conv.tiles import graph_degree_sums
from gkd_fast.kernels.neighbor_conv.sum_tiles import neighbor_small_sums, neighbor_sum_parts, neighbor_sums
from gkd_fast.kernels.neighbor_conv.sums import PARTS_ROWS

OP = "neighbor_conv"
LISTS = (
    "nodes", "numbers", "column_nodes", "column_numbers", "log_sums", "sharp_log_sums", "means", "sharp_means",
    "inverse_variances", "dims", "partial_log_sums", "partial_sharp_log_sums", "partial_means", "partial_sharp_means",
)  # fmt: skip


def neighbors(build, stages: int) -> Iterator:
    """``build``: the builder of ``catalog``."""
    lists = dict.fromkeys(LISTS, stages)
    yield from _small(build, lists, stages)
    yield build._small(OP, neighbor_sum_parts, "forward", {"BLOCK_ROWS": PARTS_ROWS}, lists, PARTS_ROWS, stages)
    if padded_width(build.dim) > largest_width(build.arch, build.product.name):
        yield build._strip(OP, neighbor_sums, "forward", {}, dict.fromkeys(LISTS, 1))
        return
    yield build._walk(
        OP, neighbor_sums, "forward", {"STRIP": False}, lists, products=1, exponentials=1,
        in_product_type=("nodes",), pairs=stages, tiles_of=graph_degree_sums,
    )  # fmt: skip


def _small(build, lists: dict, stages: int) -> Iterator:
    settings = small.constants(build.arch, build.product)
    warps, num_stages, registers = (settings.pop(name, None) for name in ("num_warps", "num_stages", "maxnreg"))
    pieces = triton.cdiv(build.dim, settings["BLOCK_WIDTH"])

    def grid(batch: int) -> tuple[int, int]:
        return small.row_blocks(batch) * stages, pieces

    constants = {key: value for key, value in settings.items() if key in neighbor_small_sums.arg_names}
    yield build._make(
        OP, neighbor_small_sums, "forward", constants, lists, warps, num_stages, settings["BLOCK_ROWS"],
        settings["BLOCK_COLUMNS"], 1, 1, 0, build._exemption(), grid, None, (), max_registers=registers, small=True,
    )  # fmt: skip
