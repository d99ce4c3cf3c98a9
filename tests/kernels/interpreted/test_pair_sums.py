"""The losses over pairs of rows on interpreted kernels: published values, the reference, types, row sets."""

from functools import partial

import pytest
import torch

from gkd_fast import functional
from gkd_fast.kernels.common import table
from tests.ops_cases import DTYPES, check, rows
from tests.second_order_cases import second_order
from tests.test_relations import DEFINITIONS, KINDS, PER_SAMPLE, pair_problem, published, whole_batch_and_row_sets

from .judge import features, judge

# The losses whose tiles are kernels; the others are D×D forms.
KERNELS = ("pkt", "rkd_distance", "similarity_preserving", "correlation_gaussian", "correlation_gaussian of order 5")
LOSSES = {name: partial(PER_SAMPLE[name], reduction="none") for name in KERNELS}
each_loss = pytest.mark.parametrize("name", LOSSES)
each_definition = pytest.mark.parametrize("name", KERNELS)


@pytest.mark.parametrize("name", ["pkt", "rkd_distance", "similarity_preserving", "correlation_gaussian"])
@pytest.mark.parametrize("case", ["relational_a", "relational_b"])
def test_the_published_values(case, name):
    with table.forced(16, 16):
        published(case, name, "triton")


@each_loss
@pytest.mark.parametrize("batch", [1, 2, 15, 17, 37])
def test_batches_and_unequal_widths(name, batch, division):
    division("whole")
    judge(LOSSES[name], features(batch, 5, 19))


@each_loss
@pytest.mark.parametrize("divided", ["programs", "strips"])
def test_columns_divided(name, divided, division):
    """Among programs, and weights in strips of 16 × 16, up to the second order."""
    judge(LOSSES[name], features(37, 18, 5), division(divided), second_order)


@each_definition
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", ["clustered", "zero rows", "nearly converged"])
def test_types_and_kinds_of_rows(name, kind, dtype, division):
    """Clustered rows have cosines near 1, and distances of a fiftieth of their lengths."""
    division("whole")
    with table.forced(16, 16):
        draws = [rows(20, 17, 17, kind=kind, seed=seed) for seed in range(2)]
        check(partial(LOSSES[name], backend="triton"), DEFINITIONS[name], draws, dtype, gain=10)


@each_loss
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side(name, frozen):
    inputs = features(20, 3, 9)
    inputs[frozen].requires_grad_(False)
    judge(LOSSES[name], inputs, results=second_order)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divided", ["whole", "strips"])
def test_row_sets_give_the_whole_batch(kind, divided, division):
    with table.forced(16, 16, **division(divided)):
        whole_batch_and_row_sets(kind, 37, (slice(0, 3), slice(3, 20), slice(20, 37)))


def test_same_bits_every_time():
    inputs = [x.float().requires_grad_() for x in rows(40, 9, 6)]
    runs = []
    for _ in range(2):
        with table.forced(16, 16):
            loss = functional.rkd_distance(*inputs, backend="triton")
            runs.append((loss, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("name", ["pkt", "rkd_distance", "correlation_gaussian"])
def test_nan_in_gives_nan_out(name):
    x, y = (x.float() for x in rows(20, 9, 6))
    x[1, 2] = torch.nan
    with table.forced(16, 16):
        assert LOSSES[name](x, y, backend="triton")[1].isnan()


def test_errors_name_the_argument():
    sides, terms, constants = pair_problem("pkt", 5)
    op = torch.ops.gkd_fast.pair_sums
    with pytest.raises(ValueError, match="kind must be one of"):
        op("park", sides, terms, constants, "float64")
    with pytest.raises(ValueError, match="pkt has 2 sides, got 1"):
        op("pkt", sides[:1], terms, constants, "float64")
    with pytest.raises(ValueError, match=r"terms of sides must have shape \(2, 5\)"):
        op("pkt", sides, terms[:1], constants, "float64")
    with pytest.raises(ValueError, match="columns and column_terms go together"):
        op("pkt", sides, terms, constants, "float64", sides)


def test_products_of_tf32_see_the_rows_that_norms_are_of(monkeypatch):
    """What computes on the rows' norms has the rows as they are multiplied: tf32 keeps eleven bits."""
    seen = {}
    monkeypatch.setattr(
        "gkd_fast.ops.pair_losses", lambda kind, sides, *rest: seen.update(sides=sides) or sides[0][:, 0]
    )
    for dtype in (torch.float16, torch.bfloat16):
        functional.rkd_distance(*(x.to(dtype) for x in rows(5, 9, 6)), backend="triton")
        for x in seen["sides"]:
            assert x.dtype == torch.float32
            assert (x.view(torch.int32) & 0x1FFF).count_nonzero() == 0
