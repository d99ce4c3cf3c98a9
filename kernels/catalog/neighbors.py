"""neighbor_conv's kernels as they are compiled by default; see ``catalog``."""

from collections.abc import Iterator
from dataclasses import replace

import triton

from gkd_fast.kernels.common import small
from gkd_fast.kernels.graph_conv.launches import PARTS_WIDTH, TERMS_ROWS
from gkd_fast.kernels.graph_conv.tiles import graph_degree_sums, graph_strip, graph_sums
from gkd_fast.kernels.graph_conv.values import ONE
from gkd_fast.kernels.neighbor_conv import bandwidths
from gkd_fast.kernels.neighbor_conv.small import neighbor_small_gradients, neighbor_small_weighted
from gkd_fast.kernels.neighbor_conv.sum_tiles import neighbor_small_sums, neighbor_sum_parts, neighbor_sums
from gkd_fast.kernels.neighbor_conv.sums import PARTS_ROWS
from gkd_fast.kernels.neighbor_conv.tiles import neighbor_gradients, neighbor_strip, neighbor_terms

OP = "neighbor_conv"
_SHARES = {"ROW_SHARE": 0.5, "COLUMN_SHARE": 0.5}
OTHERS = _SHARES | {"DIAGONAL": 0.0}
LISTS = (
    "nodes", "numbers", "column_nodes", "column_numbers", "log_sums", "column_log_sums", "sharp_log_sums", "means",
    "sharp_means", "starts", "bandwidths", "inverse_variances", "dims", "widths", "partial_log_sums",
    "partial_sharp_log_sums", "partial_means", "partial_sharp_means", "values", "centres", "row_degrees", "outputs",
    "sums", "powers", "messages", "upstream", "column_messages", "column_upstream", "terms", "others", "column_terms",
    "column_others", "gradients", "partial", "convolved", "messages_gradients", "upstream_numbers", "upstream_centres",
    "upstream_powers", "message_numbers", "message_centres", "message_powers", "strides", "kinds",
)  # fmt: skip
OF_PRODUCT = ("nodes", "column_nodes", "values", "messages", "upstream", "column_messages", "column_upstream")


def neighbors(build, walk, stages: int) -> Iterator:
    """``build``, ``walk``: the builders of ``catalog``, and of the kernels that walk tiles; None: rows are too wide."""
    lists = dict.fromkeys(LISTS, stages)
    yield from _small(build, lists, stages)
    yield build._small(OP, neighbor_sum_parts, "forward", {"BLOCK_ROWS": PARTS_ROWS}, lists, PARTS_ROWS, stages)
    constants = {"BLOCK_ROWS": bandwidths.BLOCK_ROWS, "STATE": bandwidths.STATE, "SUM": build.product.SUM}
    # A program for each stage, whatever the batch.
    yield replace(
        build._small(OP, bandwidths.neighbor_bandwidths, "forward", constants, lists, bandwidths.BLOCK_ROWS),
        grid=lambda batch: (stages, 1),
    )
    yield _terms(walk or build, lists, stages)
    yield from _strips(build) if walk is None else _walks(walk, lists, stages)


def _terms(build, lists: dict, stages: int):
    product = build.product
    constants = {
        "SYMMETRIC": True, "ADDS": True, "SCALED": product.limited, "SPLIT": product.split, "BLOCK_ROWS": TERMS_ROWS,
        "BLOCK_WIDTH": PARTS_WIDTH, "SUM": product.SUM,
    }  # fmt: skip
    of_product = ("upstream", "messages")
    return build._small(OP, neighbor_terms, "backward", constants, lists, TERMS_ROWS, stages, None, of_product)


def _walks(build, lists: dict, stages: int) -> Iterator:
    scaled = build.product.limited
    walk = {"products": 1, "exponentials": 1, "in_product_type": OF_PRODUCT, "pairs": stages}
    yield build._walk(OP, neighbor_sums, "forward", {"STRIP": False}, lists, **walk, tiles_of=graph_degree_sums)
    values = {"VALUE_WIDTH": build.width, "SCALED": scaled}
    constants = values | {"DEGREES": False, "ROW_FACTOR": ONE} | OTHERS
    options = walk | {"products": 2, "name": "graph_sums, over the others"}
    yield build._walk(OP, graph_sums, "forward", constants, lists, **options)
    for symmetric in (True, False):
        constants = values | {"SYMMETRIC": symmetric, "HAS_UPSTREAM": True}
        name = f"neighbor_gradients, {'symmetric' if symmetric else 'row'}"
        options = walk | {"products": 4, "exponentials": 2, "name": name}
        yield build._walk(OP, neighbor_gradients, "backward", constants, lists, **options)


def _strips(build) -> Iterator:
    scaled = build.product.scaled
    yield build._strip(OP, neighbor_sums, "forward", {}, dict.fromkeys(LISTS, 1))
    constants = {"GRADIENT": False, "SCALED": scaled} | OTHERS
    yield build._strip(OP, graph_strip, "forward", constants, {}, ("weights",), "graph_strip, over the others")
    for symmetric in (True, False):
        constants = {"SYMMETRIC": symmetric, "HAS_UPSTREAM": True, "SCALED": scaled}
        name = f"neighbor_strip, {'symmetric' if symmetric else 'row'}"
        yield build._strip(OP, neighbor_strip, "backward", constants, {}, ("weights",), name)


# Each: kernel, direction, name, compile-time arguments, loops over the width for so many tiles of weights, exponentials
# per entry.
_SMALL = (
    (neighbor_small_sums, "forward", None, {}, lambda tiles: 1, 1),
    (neighbor_small_weighted, "forward", None, _SHARES, lambda tiles: 2 * tiles, 1),
    (neighbor_small_gradients, "backward", "neighbor_small_gradients, symmetric", {"SYMMETRIC": True},
     lambda tiles: 4 * tiles, 2),
    (neighbor_small_gradients, "backward", "neighbor_small_gradients, row", {"SYMMETRIC": False},
     lambda tiles: 4 * tiles, 2),
)  # fmt: skip


def _small(build, lists: dict, stages: int) -> Iterator:
    for fn, direction, name, constants, loops, exponentials in _SMALL:
        settings = small.constants(build.arch, build.product)
        if fn is not neighbor_small_sums:
            settings = small.gradient_constants(build.arch, build.product)
        warps, num_stages, registers = (settings.pop(name, None) for name in ("num_warps", "num_stages", "maxnreg"))
        pieces, columns = triton.cdiv(build.dim, settings["BLOCK_WIDTH"]), settings["BLOCK_COLUMNS"]

        def grid(batch: int, pieces=pieces, columns=columns, loops=loops) -> tuple[int, int]:
            return small.row_blocks(batch) * stages, pieces * loops(triton.cdiv(batch, columns))

        settings = {key: value for key, value in settings.items() if key in fn.arg_names}
        yield build._make(
            OP, fn, direction, constants | settings, lists, warps, num_stages, settings["BLOCK_ROWS"], columns, 1,
            exponentials, 0, build._exemption(), grid, name, (), max_registers=registers, small=True,
        )  # fmt: skip
