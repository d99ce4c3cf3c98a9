import pytest
import torch

from gkd_fast import BatchGCN, PairWeightNetwork, reference
from gkd_fast.functional import adaptive_bandwidth, neighbor_bandwidth


def test_one_layer_is_the_convolution_of_a_linear_map():
    gcn = BatchGCN(5, 3, bandwidth=0.6, normalization="row", backend="reference")
    x = torch.randn(8, 5)
    expected = reference.graph_conv(x, gcn.linears[0](x), 0.6, "row")
    torch.testing.assert_close(gcn(x), expected)


def test_layers_share_the_graph_and_have_relu_between():
    x = torch.randn(20, 5)
    forms = (
        (neighbor_bandwidth(x, 8, backend="reference"), 0.8, {}),
        (adaptive_bandwidth(x), None, {"neighbors": None, "self_weight": None}),
    )
    for sigma, self_weight, options in forms:
        gcn = BatchGCN(5, 3, layers=2, backend="reference", **options)
        settings = sigma, "symmetric", self_weight
        hidden = reference.graph_conv(x, gcn.linears[0](x), *settings)
        expected = reference.graph_conv(x, gcn.linears[1](hidden.relu()), *settings)
        torch.testing.assert_close(gcn(x), expected)
    assert (gcn(x) < 0).any()  # none after the last


def test_half_precision_features_meet_float32_heads():
    gcn = BatchGCN(5, 3)
    assert gcn(torch.randn(4, 5).half()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert gcn(torch.randn(4, 5)).dtype == torch.bfloat16


def test_weights_follow_the_formula():
    network = PairWeightNetwork(4, 2, 3, width=6)
    es, et = [*torch.randn(2, 7, 4)], [*torch.randn(3, 7, 4)]
    weights = network(es, et)
    assert weights.shape == (7, 2, 3)
    for s in range(2):
        for t in range(3):
            a, b = network.student_projections[s](es[s]), network.teacher_projections[t](et[t])
            expected = torch.cosine_similarity(a, b, dim=1).sigmoid()
            torch.testing.assert_close(weights[:, s, t], expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BatchGCN(0), ValueError, "in_dim must be at least 1, got 0"),
        (lambda: BatchGCN(3, 2.5), TypeError, "embed_dim must be an int, got float"),
        (lambda: BatchGCN(3, layers=0), ValueError, "layers must be at least 1, got 0"),
        (lambda: BatchGCN(3, bandwidth=-1), ValueError, "bandwidth must be positive"),
        (lambda: BatchGCN(3, normalization="none"), ValueError, "normalization must be one of"),
        (lambda: BatchGCN(3, backend="none"), ValueError, "backend must be one of"),
        (lambda: BatchGCN(3)(torch.ones(2, 4)), ValueError, r"nodes must have shape \[batch, 3\], got \(2, 4\)"),
        (lambda: PairWeightNetwork(4, 0, 1), ValueError, "num_student_stages must be at least 1"),
        (
            lambda: PairWeightNetwork(4, 2, 1)([torch.ones(2, 4)], [torch.ones(2, 4)]),
            ValueError,
            "student_embeddings must hold 2 stages, got 1",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()
