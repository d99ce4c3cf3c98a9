"""Affinities that a forward pass keeps for its backward pass."""

import pytest
import torch

from gkd_fast import functional
from tests.ops_cases import (
    D64,
    FUNCTIONS,
    TILES,
    Calls,
    requires_cpp,
    results,
    rows,
    same_bits,
)  # fmt: skip

pytestmark = requires_cpp
KEEPING = "graph_conv", "neighbor_conv", "relation_kl"  # the ops that keep affinities
GRAPHS = [name for name in FUNCTIONS if name.startswith(KEEPING)]
BACKWARD = [f"{op}_{'gradients' if op == 'neighbor_conv' else 'backward'}" for op in KEEPING]


@pytest.fixture
def keeping():
    """Switches the keeping of affinities, for the time of a test."""
    from gkd_fast import _C

    yield _C._set_keeping
    _C._set_keeping(True)


def kept(calls: Calls) -> list[int]:
    """Of every backward op among the calls, the elements of the affinities that it was given."""
    return [arguments["affinities"].numel() for name in BACKWARD for arguments in calls.arguments(name)]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("dtype", [D64, torch.float32, torch.bfloat16])
def test_kept_and_recomputed_affinities_give_the_same_bits(tile_rows, keeping, name, dtype):
    make, widths = FUNCTIONS[name]
    for tile, batch in TILES:
        if batch == 1 and name.startswith("neighbor_conv"):
            continue  # A node without others keeps its message.
        tile_rows(tile)
        inputs = [x.to(dtype) for x in rows(batch, *widths, kind="zero rows")]
        found = []
        for keep in (True, False):
            keeping(keep)
            with Calls() as calls:
                found.append(results(make("cpp"), inputs))
            (elements,) = kept(calls)
            assert (elements >= batch * (batch + 1) // 2) if keep else elements == 0
        assert same_bits(*found)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_second_backward_pass_finds_them_unchanged_and_second_order_does_without(keeping, name):
    make, widths = FUNCTIONS[name]
    leaves = [x.requires_grad_() for x in rows(67, *widths)]
    found = []
    for keep in (True, False):
        keeping(keep)
        output = make("cpp")(*leaves)
        first, second = (torch.autograd.grad(output.sum(), leaves, retain_graph=True) for _ in range(2))
        assert same_bits(first, second)
        gradients = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves)])
    assert same_bits(*found)


def test_they_are_kept_while_they_take_at_most_five_times_the_rows_or_16_mib_and_never_more_than_128():
    from gkd_fast import _C

    mib = 2**20
    for batch in (1, 100, 256, 1000, 2000, 4000, 6000, 20_000, 200_000):
        for graphs, width, is_double in ((1, 8, False), (2, 256, False), (6, 768, True), (2, 4096, False)):
            size = 8 if is_double else 4
            most = min(max(16 * mib, 5 * batch * width * size), 128 * mib)
            found = _C._kept_elements(batch, graphs, width, is_double) * size
            # Tiles are whole, up to 96 rows, also on the diagonal.
            least, largest = (graphs * n * (n + 1 + extra) // 2 * size for n, extra in ((batch, 0), (batch + 95, 96)))
            assert least <= found <= most or (found == 0 and largest > most)


def test_they_are_kept_for_a_backward_pass_alone():
    x, y = rows(40, 3, 3)
    for gradient, grad_mode, name in ((True, True, "keep"), (False, True, ""), (True, False, "")):
        leaf = x.clone().requires_grad_(gradient)
        with Calls() as calls, torch.set_grad_enabled(grad_mode):
            functional.relation_kl(leaf, y)
            functional.graph_conv(leaf, y, bandwidth=0.5)
            functional.graph_conv(leaf, y, bandwidth=0.5, self_weight=0.3)
        names = [called for called, _ in calls.calls if called not in ("unit_rows", "neighbor_sums")]
        expected = "relation_kl", "graph_conv", "neighbor_conv"
        assert names == [f"{op}_{name}" if name else op for op in expected]


def test_affinities_of_another_batch_or_with_a_column_set_are_an_error():
    calls = torch.ops.gkd_fast
    (x, y), _ = calls.unit_rows(rows(40, 3, 3), D64)
    settings = 0.4, 0.8, "float64"
    *results, affinities = calls.relation_kl_keep([x], [y], *settings)
    upstream = torch.ones(40, 1, 1, dtype=D64)
    arguments = upstream, [x], [y], *results, *settings, [True, False]
    with pytest.raises(RuntimeError, match="affinities must have shape"):
        calls.relation_kl_backward(*arguments, affinities=affinities[:-1])
    with pytest.raises(RuntimeError, match="affinities are kept where the columns are the rows"):
        calls.relation_kl_backward(*arguments, [x], [y], affinities=affinities)
