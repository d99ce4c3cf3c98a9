"""node_contrast on the CPU kernels against the reference, and its row and column sets against dense formulas."""

from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gkd_fast import ops, reference
from tests.ops_cases import D64, DTYPES, KINDS, TILES, Calls, check, node_contrast, requires_cpp, results, rows

pytestmark = requires_cpp
OP = import_module("gkd_fast.ops.node_contrast")


def definition(num_students: int, temperature: float = 0.1):
    return lambda *x: reference.node_contrast(x[:num_students], x[num_students:], temperature)


def agree(num_students: int, draws, dtype, temperature: float = 0.1):
    fused = node_contrast(num_students, temperature=temperature)
    check(fused, definition(num_students, temperature), draws, dtype, 1 / temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tile", "batch"), TILES)
def test_batches(tile_rows, tile, batch, dtype):
    tile_rows(tile)
    agree(1, [rows(batch, 5, 5, seed=seed) for seed in range(3)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("students", "teachers", "width"), [(1, 1, 1), (2, 3, 33), (3, 3, 257), (5, 4, 3)])
def test_stages_and_widths(tile_rows, students, teachers, width, dtype):
    tile_rows(32)
    agree(students, [rows(37, *[width] * (students + teachers))], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_kinds_of_rows_and_temperatures(tile_rows, kind, temperature, dtype):
    """A temperature of 0.01 takes each row's own shift."""
    tile_rows(32)
    agree(2, (rows(41, 6, 6, 6, 6, kind=kind, seed=seed) for seed in range(3)), dtype, temperature)


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 0)], [(1, 1)], []])
def test_pairs_that_are_not_wanted_have_no_loss_and_no_gradient(tile_rows, pairs):
    tile_rows(32)
    inputs = rows(37, 4, 4, 4, 4)
    mask = torch.zeros(2, 2, dtype=D64)
    for pair in pairs:
        mask[pair] = 1
    expected = results(lambda *x: definition(2)(*x) * mask, inputs)
    torch.testing.assert_close(results(node_contrast(2, pairs=pairs), inputs), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_weighted_sums_kept_and_recomputed_agree(tile_rows, monkeypatch, temperature):
    tile_rows(32)
    inputs = rows(37, 4, 4, 4)

    def kept_and_results(budget):
        monkeypatch.setattr(OP, "KEEP_WEIGHTED_BYTES", budget)
        with Calls() as calls:
            values = results(node_contrast(1, temperature=temperature), inputs)
        return [x["keep_weighted"] for x in calls.arguments("node_contrast")], values

    size = 2 * 37 * 4 * 8  # pairs · B · D doubles
    kept, values = kept_and_results(size)
    recomputed, others = kept_and_results(size - 1)
    assert (kept, recomputed) == ([True], [False])
    torch.testing.assert_close(values, others, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "precision", "widest"),
    [
        (torch.float32, "float32", 128),
        (torch.float32, "tf32", 128),
        (torch.float32, "bfloat16", 256),
        (D64, "float64", 64),
        (D64, "bfloat16", 64),
    ],
)
def test_a_gpu_keeps_no_weighted_sums_of_rows_in_strips_for_gradients_of_both_sides(dtype, precision, widest):
    def keeps(width, needs_teachers=True, device="cuda", batch=257):
        x, y = (torch.empty(batch, width, dtype=dtype, device=device) for _ in range(2))
        x.requires_grad_(), y.requires_grad_(needs_teachers)
        return OP.node_contrast_call([x], [y], dtype, [True], 0.1, precision).keep

    with FakeTensorMode():
        assert keeps(widest) and not keeps(widest + 1)
        assert keeps(widest + 1, needs_teachers=False) and keeps(widest + 1, device="cpu")
        assert keeps(1024, batch=256) and not keeps(1025, batch=256)


def test_weighted_sums_are_kept_where_the_kernels_walk_tiles():
    pytest.importorskip("triton")
    table, small = (import_module(f"gkd_fast.kernels.common.{name}") for name in ("table", "small"))
    for precision, widest in OP.WIDEST_TILES.items():
        walked = {"float32": "float16x3", "tf32": "float16x3"}.get(precision, precision)
        assert {table.largest_width(arch, walked) for arch in table.MULTIPROCESSORS} == {widest}
    assert (OP.SMALL_BATCH, OP.SMALL_WIDTH) == (small.SMALL_BATCH, small.SMALL_WIDTH)


def dense(students, columns, temperature, offset):
    """Losses ``[I, S, T]`` of unit rows with the teachers' columns, by its formula."""

    def loss(e, c):
        logits = e @ c.T / temperature
        own = torch.arange(len(e))
        return logits.logsumexp(dim=1) - logits[own, own + offset]

    return torch.stack([torch.stack([loss(e, c) for c in columns], dim=1) for e in students], dim=1)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_shards_of_rows_give_the_whole_batch(tile_rows, temperature, keep):
    tile_rows(32)
    unit = [reference.unit_rows(x).requires_grad_() for x in rows(101, 5, 5, 5, 5)]
    wanted = [True, False, True, True]
    mask = torch.tensor(wanted, dtype=D64).view(2, 2)
    whole = dense(unit[:2], unit[2:], temperature, 0) * mask
    upstream = torch.randn(101, 2, 2, dtype=D64)
    expected = torch.autograd.grad(whole, unit, upstream)
    students, teachers = ([x.detach() for x in side] for side in (unit[:2], unit[2:]))
    bounds = [slice(0, 3), slice(3, 61), slice(61, 101)]
    forward = [
        torch.ops.gkd_fast.node_contrast(
            [x[part] for x in students], [x[part] for x in teachers], wanted, temperature, "float64", keep, teachers,
            part.start,
        )
        for part in bounds
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat([x[0] for x in forward]), whole.detach(), rtol=1e-10, atol=1e-12)
    log_sums = torch.cat([x[1] for x in forward], dim=1)
    for needs in ([True] * 4, [False, True, False, False], [False, False, True, False]):
        parts = [
            torch.ops.gkd_fast.node_contrast_backward(
                upstream[part], [x[part] for x in students], [x[part] for x in teachers], *values[1:], wanted,
                temperature, "float64", needs, teachers, students, part.start, upstream, log_sums,
            )
            for part, values in zip(bounds, forward)
        ]  # fmt: skip
        gradients = [gradient for gradient, needed in zip(expected, needs) if needed]
        torch.testing.assert_close([torch.cat(x) for x in zip(*parts)], gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("columns", "dtype"), [(150, D64), (1_000_000, torch.float32)])
def test_few_rows_against_columns(columns, dtype):
    """The student's gradient reads the teacher's columns alone; a million columns overflow no index."""
    offset = columns - 7
    unit = reference.unit_rows(rows(5, 4)[0])
    bank = reference.unit_rows(rows(columns, 4, seed=1)[0]).to(dtype)
    truth_rows = unit.to(dtype).to(D64, copy=True).requires_grad_()
    truth = dense([truth_rows], [bank.double()], 0.1, offset)
    upstream = torch.randn(5, 1, 1, dtype=D64).to(dtype)
    (expected,) = torch.autograd.grad(truth, truth_rows, upstream.double())
    student, teacher = [unit.to(dtype)], [bank[offset : offset + 5]]
    options = ([True], 0.1, str(dtype).removeprefix("torch."))
    losses, *statistics = torch.ops.gkd_fast.node_contrast(student, teacher, *options, True, [bank], offset)
    (gradient,) = torch.ops.gkd_fast.node_contrast_backward(
        upstream, student, teacher, *statistics, *options, [True, False], [bank], None, offset
    )
    # A wrong index would err by 1/τ; float32 sums of a million addends keep five digits of it.
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == D64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(losses.double(), truth.detach(), **tolerance)
    torch.testing.assert_close(gradient.double(), expected, **tolerance)


def test_own_columns_are_all_columns_or_none():
    x = ops.unit_rows(rows(5, 4), D64)
    contrast = torch.ops.gkd_fast.node_contrast
    with pytest.raises(RuntimeError, match="must all be columns or none of them: 5 rows, 5 columns, offset 1"):
        contrast(x, x, [True], 0.1, "float64", False, x, 1)
    losses, log_sums, _ = contrast(x, x, [True], 0.1, "float64", False, x, 5)
    torch.testing.assert_close(losses[:, 0, 0], log_sums[0])
