"""graph_conv's kernels against the reference: types, shapes, divisions of the columns, column sets."""

import pytest
import torch

from gkd_fast import functional, ops
from gkd_fast.kernels.common import table

from .judge import BATCHES, between_nans, features, judge

D64 = torch.float64

pytestmark = pytest.mark.parametrize("normalization", ["symmetric", "row"])


def graph_conv(normalization: str, bandwidth=0.6):
    return lambda nodes, messages, backend: functional.graph_conv(
        nodes, messages, bandwidth=bandwidth, normalization=normalization, backend=backend
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(normalization, batch, small_or_large):
    judge(graph_conv(normalization), features(batch, 13, 7))


@pytest.mark.parametrize("dims", [(1, 17), (33, 1), (16, 16)])
def test_widths(normalization, dims, small_or_large):
    judge(graph_conv(normalization), features(17, *dims))


@pytest.mark.parametrize(
    "dims", [(16, 64), (8, 64), (4, 64), (16, 32), (64, 16), (128, 64), (200, 40), (1, 300)], ids=str
)
def test_unequal_widths(normalization, dims, division):
    judge(graph_conv(normalization), features(17, *dims, dtype=torch.float32), division("whole"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["small", "whole", "programs"])
def test_types(normalization, dtype, division, name):
    judge(graph_conv(normalization), features(37, 16, 16, dtype=dtype), division(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_messages_wider_than_nodes(normalization, dtype, division):
    judge(graph_conv(normalization), features(19, 5, 40, dtype=dtype), division("whole"))


@pytest.mark.parametrize("dtype", [D64, torch.float16])
@pytest.mark.parametrize("name", ["pieces", "strips", "divided strips"])
def test_divisions_of_the_columns(normalization, dtype, division, name):
    judge(graph_conv(normalization), features(37, 16, 12, dtype=dtype), division(name))


@pytest.mark.parametrize("scale", [1e-4, 3e4])
def test_float16_values_of_any_size(normalization, scale, small_or_large):
    nodes, messages = (x.detach() for x in features(20, 9, 9, dtype=torch.float16))
    judge(graph_conv(normalization), [nodes.requires_grad_(), messages.mul_(scale / 4).requires_grad_()])


def test_bandwidths_zero_rows_and_frozen_inputs(normalization, small_or_large):
    judge(graph_conv(normalization, 0.05), features(20, 9, 9, dtype=torch.float32))
    for frozen in (0, 1):
        inputs = [x.detach() for x in features(20, 9, 9)]
        inputs[0][3] = 0
        inputs[1 - frozen].requires_grad_()
        judge(graph_conv(normalization), inputs)


@pytest.mark.parametrize("name", ["whole", "pieces", "strips", "divided strips"])
def test_column_sets(normalization, division, name):
    """Rows 5 … 25 with all 37 columns give what the whole batch gives there."""
    rows, op = slice(5, 25), torch.ops.gkd_fast
    with table.forced(16, 16, **division(name)):
        (nodes,) = (between_nans(x) for x in ops.unit_rows(features(37, 9), D64))
        messages, upstream = (x.detach() for x in features(37, 6, 6, seed=3))
        variance = torch.tensor(2.5, dtype=D64)
        output, degrees = op.graph_conv(nodes, messages, variance, normalization, "float64")
        arguments = (variance, normalization, "float64", [True, True])
        gradients = op.graph_conv_backward(upstream, nodes, messages, output, degrees, *arguments)
        terms = ops.node_terms(upstream, output, messages, gradients[1], degrees, normalization)

        part = [between_nans(x[rows]) for x in (nodes, messages, upstream)]
        found_degrees = op.graph_degrees(part[0], variance, "float64", nodes, rows.start)
        torch.testing.assert_close(found_degrees, degrees[rows])
        found, _ = op.graph_conv(part[0], part[1], variance, normalization, "float64", nodes, messages, rows.start,
                                 found_degrees, degrees)  # fmt: skip
        torch.testing.assert_close(found, output[rows])
        found_gradients = op.graph_conv_backward(
            part[2], part[0], part[1], found, found_degrees, *arguments, nodes, messages, rows.start, upstream, degrees,
            between_nans(terms[rows]), terms,
        )  # fmt: skip
        torch.testing.assert_close(found_gradients, [g[rows] for g in gradients])
