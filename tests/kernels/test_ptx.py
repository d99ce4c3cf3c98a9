"""The compiled code of the kernels for Hopper, run on numpy against the reference: layouts, masks, bounds and barriers.

The interpreter sees none of these. Every buffer that a launcher allocates is NaN until it is written.
"""

import math
import os
from functools import partial

import pytest
import torch

from gkd_fast import functional
from gkd_fast.kernels.common import launch, small
from gkd_fast.kernels.node_contrast import launches as node_contrast
from tests.second_order_cases import second_order

from .interpreted.judge import features, judge_as_launched
from .ptx.run import triton_on_cpu

# All of them take some minutes: `make test-ptx` runs them, `make test` these.
ALL = os.environ.get("GKD_FAST_PTX_ALL") == "1"
full = pytest.mark.skipif(not ALL, reason="make test-ptx runs it")

D64, D32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Of tf32's products, relative to the largest entry; other types, and tf32's kernels that walk tiles, as in the
# interpreter.
TF32 = 4e-3
# Products by their name in the kernels, and the inputs' type.
PRODUCTS = {"float64": D64, "tf32x3": D32, "tf32": D32, "bfloat16": BF16, "float16": F16}

# A tile of 64 rows and a few of the next one; all tiles of up to 128 rows are crossed or ragged.
ROWS = 70


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is not written shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def filled(x):
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **options: filled(new_empty(x, *size, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: filled(empty_like(x, **options)))


@pytest.fixture
def product(request, monkeypatch):
    """A type of products by its name in the kernels: the settings that lead there."""
    name = request.param
    if name == "tf32":
        # What the settings of a GPU would choose.
        monkeypatch.setattr(functional, "product_precision", lambda x: name)
    return name


@pytest.fixture
def large(monkeypatch):
    """The kernels of large batches, at few rows."""
    monkeypatch.setattr(small, "SMALL_BATCH", 0)
    monkeypatch.setattr(node_contrast, "LEAST_SAVED", 0)


def each_product(*quick):
    """All types in the full run."""
    marks = [pytest.param(x, marks=() if x in quick else full) for x in PRODUCTS]
    return pytest.mark.parametrize("product", marks, indirect=True)


def judge(function, product, *widths, rows=ROWS, **options):
    inputs = features(rows, *widths, dtype=PRODUCTS[product])
    with triton_on_cpu() as launched:
        judge_as_launched(function, inputs, **options)
    return {*launched}


def tolerance(product):
    return TF32 if product == "tf32" else None


def graph_conv(normalization="symmetric", self_weight=None):
    options = {"bandwidth": 0.7, "normalization": normalization, "self_weight": self_weight}
    return lambda nodes, messages, backend: functional.graph_conv(nodes, messages, backend=backend, **options)


def losses(name, students, **options):
    function = getattr(functional, name)
    return lambda *x, backend: function(x[:students], x[students:], backend=backend, **options)


@each_product("bfloat16", "tf32x3")
@pytest.mark.parametrize("widths", [(16, 64), pytest.param((8, 64), marks=full), pytest.param((200, 40), marks=full)])
def test_graph_conv(product, widths, large):
    names = judge(graph_conv(), product, *widths)
    assert "graph_gradients" in names or "graph_strip" in names


@each_product("bfloat16")
@pytest.mark.parametrize("normalization", ["symmetric", pytest.param("row", marks=full)])
def test_graph_conv_over_the_others(product, normalization, large):
    names = judge(graph_conv(normalization, 0.3), product, 16, 64)
    assert {"neighbor_sums", "neighbor_gradients"} <= names


@pytest.mark.parametrize("start", [None, 0.3, 3.0])
def test_the_search_for_bandwidths(start):
    """At 0.3 and 3 the wanted number is far; without a start all bounds and growths of the steps are met."""
    (nodes,) = features(ROWS, 16, dtype=D64)
    with triton_on_cpu() as names:
        found = functional.neighbor_bandwidth(nodes, 8, start=start, backend="triton")
    assert names.count("neighbor_bandwidths") == (8 if start is None else 1)
    expected = functional.neighbor_bandwidth(nodes, 8, start=start, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@full
@each_product("bfloat16", "tf32x3")
def test_graph_conv_normalized_by_rows(product, large):
    judge(graph_conv("row"), product, 16, 40)


@each_product("float16", "tf32x3")
def test_relation_kl(product, large):
    """Stages of unequal widths in one call; 200 is more than a program holds in most types."""
    widths = (8, 40, 200) if ALL else (8, 40)
    assert {"relation_sums", "relation_gradients"} <= judge(losses("relation_kl", 1), product, *widths)


@each_product("tf32")
def test_node_contrast(product, large):
    assert {"contrast_sums", "contrast_gradients"} <= judge(losses("node_contrast", 1), product, 24, 24, 24)


@full
@each_product()
@pytest.mark.parametrize("op", ["relation_kl", "node_contrast", "graph_conv", "graph_conv row", "graph_conv others"])
def test_small_batches(product, op):
    if op.startswith("graph_conv"):
        form = {"normalization": "row" if "row" in op else "symmetric", "self_weight": 0.3 if "others" in op else None}
        names = judge(graph_conv(**form), product, 12, 40, tolerance=tolerance(product))
    else:
        widths = (8, 40) if op == "relation_kl" else (24, 24)
        names = judge(losses(op, 1), product, *widths, tolerance=tolerance(product))
    assert any("small" in name for name in names)


@full
@each_product()
@pytest.mark.parametrize("op", ["relation_kl", "node_contrast", "graph_conv"])
def test_second_order(product, op):
    widths = {"relation_kl": (8, 40), "node_contrast": (24, 24), "graph_conv": (12, 40)}[op]
    function = graph_conv() if op == "graph_conv" else losses(op, 1, temperature=0.4)
    names = judge(function, product, *widths, results=second_order, tolerance=tolerance(product))
    assert any("tangent" in name for name in names)


def relations(name, **options):
    return partial(getattr(functional, name), reduction="none", **options)


# float16 rows are multiplied as tf32.
PAIR_PRODUCTS = ["bfloat16", *(pytest.param(x, marks=full) for x in ("float16", "tf32x3", "float64"))]
each_pair_product = pytest.mark.parametrize("product", PAIR_PRODUCTS, indirect=True)
PAIR_LOSSES = {
    "pkt": relations("pkt"),
    "rkd_distance": relations("rkd_distance"),
    "correlation_congruence": relations("correlation_congruence", kernel="gaussian", squared=True),
}


@each_pair_product
@pytest.mark.parametrize("name", ["pkt", *(pytest.param(x, marks=full) for x in PAIR_LOSSES if x != "pkt")])
def test_losses_over_pairs(product, name):
    assert {"pair_row_sums", "pair_weights"} <= judge(PAIR_LOSSES[name], product, 8, 40)


@full
@pytest.mark.parametrize("product", ["tf32x3", "float64"], indirect=True)
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_second_order_of_losses_over_pairs(product, name):
    judge(PAIR_LOSSES[name], product, 8, 40, rows=20, results=second_order)


@full
@pytest.mark.parametrize("product", ["tf32x3", "float64"], indirect=True)
def test_rkd_angle(product):
    assert {"angle_products", "angle_sums", "angle_weights"} <= judge(relations("rkd_angle"), product, 8, 40, rows=20)


@full
@pytest.mark.parametrize("op", ["relation_kl", "node_contrast"])
def test_own_shifts_where_the_shared_one_would_underflow(op, large):
    assert "row_maxima_kernel" in judge(losses(op, 1, temperature=0.01), "tf32x3", 24, 24)


@full
@each_product()
def test_columns_in_pieces(product, large, monkeypatch):
    monkeypatch.setattr(launch, "COLUMN_BYTES", 1)
    monkeypatch.setattr(launch, "COLUMN_MULTIPLE", 32)
    judge(graph_conv(), product, 16, 40)
