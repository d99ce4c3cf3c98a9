"""relation_kl on the CPU kernels against the reference, and its row and column sets against dense formulas."""

import pytest
import torch

from gkd_fast import reference
from tests.ops_cases import D64, DTYPES, KINDS, TILES, check, relation_kl, requires_cpp, rows

pytestmark = requires_cpp


def definition(num_students: int, **options):
    return lambda *x: reference.relation_kl(x[:num_students], x[num_students:], **options)


def agree(num_students: int, draws, dtype, temperature: float = 0.1, bandwidth: float = 1.0):
    options = {"temperature": temperature, "bandwidth": bandwidth}
    # A rounding of the relation is one of R/τ; one of the similarity moves R/τ by ε/(2σ²τ).
    gain = max(1, 0.5 / bandwidth**2) / temperature
    fused = relation_kl(num_students, **options)
    check(fused, definition(num_students, **options), draws, dtype, gain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tile", "batch"), TILES)
def test_batches(tile_rows, tile, batch, dtype):
    tile_rows(tile)
    agree(1, [rows(batch, 5, 3)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("students", "teachers"), [([1], [3]), ([33, 5], [3, 1, 257]), ([257, 1, 9], [33] * 3), ([3] * 5, [7, 5, 3, 1])]
)
def test_stages_and_widths(tile_rows, students, teachers, dtype):
    tile_rows(32)
    agree(len(students), [rows(37, *students, *teachers)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "bandwidth"), [(0.1, 1.0), (0.01, 1.0), (0.1, 0.05), (0.01, 0.05)])
def test_kinds_of_rows_and_settings(tile_rows, kind, temperature, bandwidth, dtype):
    """A temperature of 0.01 takes each row's own shift."""
    tile_rows(32)
    draws = (rows(41, 6, 6, 6, 6, kind=kind, seed=seed) for seed in range(3))
    agree(2, draws, dtype, temperature=temperature, bandwidth=bandwidth)


@pytest.mark.parametrize(("temperature", "bandwidth"), [(0.02, 1.0), (0.01, 0.5)])
def test_teachers_whose_rows_have_one_near_partner(tile_rows, temperature, bandwidth):
    """Nearly all of a row's weight is then that partner's, whose Δ − h is what two numbers near 1/τ leave."""
    tile_rows(32)
    draws = [rows(31, 129, 5, seed=seed) for seed in range(8)]
    agree(1, draws, torch.float32, temperature, bandwidth)


def dense(students, teachers, student_columns, teacher_columns, temperature, bandwidth, offset):
    """Losses ``[I, S, T]`` of unit rows with a column set, by its formula."""

    def log_relations(e, columns):
        relations = torch.exp((e @ columns.T - 1) / bandwidth**2)
        own = torch.arange(len(e))[:, None] + offset == torch.arange(len(columns))
        return torch.log_softmax(relations.masked_fill(own, 0) / temperature, dim=1)

    log_s = [log_relations(e, c) for e, c in zip(students, student_columns)]
    log_t = [log_relations(e, c) for e, c in zip(teachers, teacher_columns)]
    return torch.stack([torch.stack([(t.exp() * (t - s)).sum(dim=1) for t in log_t], dim=1) for s in log_s], dim=1)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_shards_of_rows_give_the_whole_batch(tile_rows, temperature):
    tile_rows(32)
    options = (temperature, 0.7, "float64")
    unit = [reference.unit_rows(x).requires_grad_() for x in rows(101, 7, 4, 5)]
    students, teachers = unit[:2], unit[2:]
    whole = dense(students, teachers, students, teachers, temperature, 0.7, 0)
    upstream = torch.randn(101, 2, 1, dtype=D64)
    expected = torch.autograd.grad(whole, unit, upstream)
    students, teachers = ([x.detach() for x in side] for side in (students, teachers))
    bounds = [slice(0, 3), slice(3, 61), slice(61, 101)]
    forward = [
        torch.ops.gkd_fast.relation_kl(
            [x[part] for x in students], [x[part] for x in teachers], *options, students, teachers, part.start
        )
        for part in bounds
    ]
    losses = torch.cat([x[0] for x in forward])
    log_sums = [torch.cat([x[k] for x in forward], dim=1) for k in (1, 2)]
    torch.testing.assert_close(losses, whole.detach(), rtol=1e-10, atol=1e-12)
    for needs in ([True, True, True], [True, False, False], [False, False, True]):
        parts = [
            torch.ops.gkd_fast.relation_kl_backward(
                upstream[part], [x[part] for x in students], [x[part] for x in teachers], *values, *options, needs,
                students, teachers, part.start, upstream, losses if needs[2] else None, *log_sums,
            )
            for part, values in zip(bounds, forward)
        ]  # fmt: skip
        wanted = [gradient for gradient, needed in zip(expected, needs) if needed]
        torch.testing.assert_close([torch.cat(x) for x in zip(*parts)], wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("columns", "offset", "dtype"),
    [(150, 40, D64), (150, 1000, D64), (150, -1000, D64), (1_000_000, 999_990, torch.float32)],
)
def test_few_rows_against_columns_without_upstream(columns, offset, dtype):
    """The own column is one of the columns or none of them; a million columns overflow no index."""
    unit = [reference.unit_rows(x) for x in rows(5, 4, 3)]
    bank = [reference.unit_rows(x).to(dtype) for x in rows(columns, 4, 3, seed=1)]
    if 0 <= offset < columns:
        for e, c in zip(unit, bank):
            c[offset : offset + 5] = e
    unit = [x.to(dtype) for x in unit]
    truth_rows = [x.to(D64, copy=True).requires_grad_() for x in unit]
    truth = dense(*([x] for x in truth_rows), *([x.double()] for x in bank), 0.1, 0.7, offset)
    upstream = torch.randn(5, 1, 1).double()
    expected = torch.autograd.grad(truth, truth_rows, upstream)
    options = (0.1, 0.7, "float32" if dtype == torch.float32 else "float64")
    student, teacher, *column_sets = ([x] for x in (*unit, *bank))
    forward = torch.ops.gkd_fast.relation_kl(student, teacher, *options, *column_sets, offset)
    gradients = torch.ops.gkd_fast.relation_kl_backward(
        upstream.to(dtype), student, teacher, *forward, *options, [True, True], *column_sets, offset
    )
    # A wrong index would err by 1/τ; float32 sums of a million addends keep five digits of it.
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == D64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(forward[0].double(), truth.detach(), **tolerance)
    torch.testing.assert_close([x.double() for x in gradients], [*expected], **tolerance)
