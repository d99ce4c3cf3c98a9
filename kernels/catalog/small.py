"""The kernels of small batches as they are compiled by default; see ``catalog``."""

from collections.abc import Iterator

import triton

from gkd_fast.kernels.common import small
from gkd_fast.kernels.graph_conv.small import graph_small_gradients, graph_small_sums
from gkd_fast.kernels.node_contrast.small import contrast_small_gradients, contrast_small_losses
from gkd_fast.kernels.relation_kl.small import relation_small_gradients, relation_small_losses

# What comes in the product's type where that is short: autocast's messages.
SHORT = {"graph_conv": ("values", "messages", "upstream")}


def small_batches(build, students: int, teachers: int) -> Iterator:
    """``build``: the builder of ``catalog``. Gradients are those of the students."""
    kernels = [
        *_relation_kl(students, teachers), *_node_contrast(students, teachers),
        *_graph_conv(students + teachers),
    ]  # fmt: skip
    columns = small.weight_columns(build.product)
    for op, fn, direction, name, constants, lists, programs, loops, exponentials in kernels:
        settings = small.constants(build.arch, build.product)
        if "WEIGHT_COLUMNS" in fn.arg_names:
            settings["WEIGHT_COLUMNS"] = columns
        elif direction == "backward":
            settings["BLOCK_COLUMNS"] = columns
        warps, num_stages, registers = (settings.pop(name, None) for name in ("num_warps", "num_stages", "maxnreg"))
        pieces = triton.cdiv(build.dim, settings["BLOCK_WIDTH"])

        def grid(batch: int, programs=programs, loops=loops, pieces=pieces) -> tuple[int, int]:
            blocks, tiles = small.row_blocks(batch), triton.cdiv(batch, columns)
            return blocks * programs, pieces * loops(blocks, tiles)

        yield build._make(
            op, fn, direction, constants | settings, lists, warps, num_stages, settings["BLOCK_ROWS"],
            settings["BLOCK_COLUMNS"], 1, exponentials, 0, build._exemption(), grid, name, SHORT.get(op, ()),
            max_registers=registers, small=True,
        )  # fmt: skip


# Each: op, kernel, direction, name, compile-time arguments, lengths of lists, programs per block of rows, loops over
# the width (of one product each) for so many blocks of rows and tiles of weights, exponentials per entry.


def _relation_kl(S: int, T: int) -> Iterator[tuple]:
    constants, stages = {"S": S, "T": T}, dict.fromkeys(("rows", "dims"), S + T)
    losses, gradients = relation_small_losses, relation_small_gradients
    yield ("relation_kl", losses, "forward", None, constants, stages, S * T, lambda blocks, tiles: 2, 5)
    stages = stages | {"gradients": S}
    loops = lambda blocks, tiles: tiles * (2 + T)  # noqa: E731
    yield "relation_kl", gradients, "backward", None, constants, stages, S, loops, 1 + 5 * T


def _node_contrast(S: int, T: int) -> Iterator[tuple]:
    constants = {"S": S, "T": T}
    for keep in (True, False):
        name = "contrast_small_losses" + ("" if keep else " without weighted")
        lists, kept = {"students": S, "teachers": T}, {"KEEP": keep}
        loops = lambda blocks, tiles, keep=keep: 1 + 2 * keep * tiles  # noqa: E731
        yield (
            "node_contrast", contrast_small_losses, "forward", name, constants | kept, lists, S * T, loops, 1 + keep
        )  # fmt: skip
    lists = {"rows": S + T, "gradients": S}
    for kept in (True, False):
        name = "contrast_small_gradients" + ("" if kept else " without weighted")
        loops = lambda blocks, tiles, kept=kept: 0 if kept else 2 * T * tiles  # noqa: E731
        yield (
            "node_contrast", contrast_small_gradients, "backward", name, constants | {"KEPT": kept}, lists, S, loops, T
        )  # fmt: skip


def _graph_conv(stages: int) -> Iterator[tuple]:
    names = (
        "nodes", "values", "degrees", "outputs", "terms", "messages", "upstream", "convolved", "inverse_variances",
        "dims", "widths", "gradients",
    )  # fmt: skip
    lists = dict.fromkeys(names, stages)
    for symmetric in (True, False):
        for backward in (False, True):
            name = f"graph_small_sums, {'symmetric' if symmetric else 'row'}{', backward' if backward else ''}"
            constants = {"SYMMETRIC": symmetric, "BACKWARD": backward}
            degrees = symmetric and not backward
            if degrees:  # the longest loops, of 64 rows; the others' have a quarter of them
                loops = lambda blocks, tiles: tiles * triton.cdiv(blocks, 4) + triton.cdiv(1 + 2 * tiles, 4)  # noqa: E731
            else:
                loops = lambda blocks, tiles, backward=backward: (not backward) + 2 * tiles  # noqa: E731
            direction = "backward" if backward else "forward"
            yield "graph_conv", graph_small_sums, direction, name, constants, lists, stages, loops, 2
    loops = lambda blocks, tiles: 4 * tiles  # noqa: E731
    yield "graph_conv", graph_small_gradients, "backward", None, {"SYMMETRIC": True}, lists, stages, loops, 1
