"""What a loss is made of and called with: taken in every sensible kind, else an error that names it."""

import numpy as np
import pytest
import torch
from torch import nn

from gkd_fast import BatchGCN, GraphKDLoss, PairWeightNetwork, functional

X, TARGET = torch.randn(6, 4), torch.arange(6) % 3


def _made(**options) -> GraphKDLoss:
    torch.manual_seed(0)
    return GraphKDLoss(**({"student_dims": 4, "teacher_dims": 4, "num_classes": 3, "embed_dim": 5} | options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pairs": [0, 1]}, TypeError, r"pairs must be a list of \(student stage, teacher stage\), got \[0, 1\]"),
        ({"pairs": [(0, 0, 0)]}, TypeError, r"pairs must be a list of .*, got \[\(0, 0, 0\)\]"),
        ({"pairs": [(0.0, 0)]}, TypeError, r"pairs must be a list of .*, got \[\(0.0, 0\)\]"),
        ({"pairs": 3}, ValueError, "pairs must be 'all', 'matched' or a list of .*, got 3"),
        ({"node_weight": "1"}, TypeError, "node_weight must be a number, got str"),
        ({"relation_weight": None}, TypeError, "relation_weight must be a number, got NoneType"),
        ({"relation_weight": float("nan")}, ValueError, "relation_weight must be finite and not negative, got nan"),
        ({"node_temperature": torch.ones(1)}, TypeError, "node_temperature must be a number, got a Tensor of .* shape"),
        ({"relation_temperature": "0.1"}, TypeError, "relation_temperature must be a number, got str"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, got float"),
        ({"num_classes": 0, "teacher_graph": "frozen"}, ValueError, "num_classes must be at least 1, got 0"),
        ({"embed_dim": 4.0}, TypeError, "embed_dim must be an int, got float"),
        ({"layers": "two"}, TypeError, "layers must be an int, got str"),
        ({"student_dims": "4"}, TypeError, "student_dims must be a positive int or a list of them, got str"),
        ({"teacher_dims": 4.0}, TypeError, "teacher_dims must be a positive int or a list of them, got float"),
        ({"column_bank": 1.5}, ValueError, "column_bank must be a number of embeddings, 0 or more, got 1.5"),
        ({"bandwidth": "1"}, ValueError, "bandwidth must be a positive number or 'auto', got '1'"),
        ({"pairs": np.ones(3)}, ValueError, r"pairs must be 'all', 'matched' or a list of .*, got array"),
        ({"pool": np.ones(3)}, TypeError, r"pool must be 'mean', 'cls' or a callable, got array"),
        ({"student_dims": np.array(4.0)}, TypeError, "student_dims must be a positive int or a list of them, got nd"),
        ({"teacher_dims": torch.ones(())}, TypeError, "teacher_dims must be a positive int or a list of them, got Te"),
    ],
)
def test_options_that_are_not_taken(options, error, message):
    with pytest.raises(error, match=message):
        _made(**options)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_of_numpy_are_taken(kind):
    options = {"node_temperature": kind(0.5), "relation_temperature": kind(0.25), "node_weight": kind(2)}
    options |= {"bandwidth": kind(0.5), "embed_dim": np.int64(5), "num_classes": np.int32(3), "layers": np.int64(1)}
    options |= {"student_dims": [np.int64(4)], "pairs": [(np.int64(0), np.int64(0))], "column_bank": np.int64(0)}
    found = _made(**options)(X, X, TARGET)
    plain = {"node_temperature": 0.5, "relation_temperature": 0.25, "node_weight": 2.0, "bandwidth": 0.5}
    torch.testing.assert_close(found, _made(**plain)(X, X, TARGET))
    half = kind(0.5)
    for backend in ("reference", "auto"):
        for function in (functional.node_contrast, functional.relation_kl):
            expected = function(X, X + 1, temperature=0.5, backend=backend)
            assert torch.equal(function(X, X + 1, temperature=half, backend=backend), expected)
        expected = functional.graph_conv(X, X, bandwidth=0.5, backend=backend)
        assert torch.equal(functional.graph_conv(X, X, bandwidth=half, backend=backend), expected)
    assert BatchGCN(np.int64(4), np.int64(5))(X).shape == (6, 5)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_of_every_whole_type_are_taken(kind):
    criterion = _made()
    torch.testing.assert_close(criterion(X, X, TARGET.to(kind)), criterion(X, X, TARGET))


def test_labels_that_say_none_are_left_out():
    criterion, some = _made(), TARGET.clone()
    some[2:] = -100
    term = criterion.terms(X, X, some)["teacher_graph"]
    logits = criterion.classifier(criterion.embed(X, X)[1][0])
    torch.testing.assert_close(term, nn.functional.cross_entropy(logits[:2], some[:2], reduction="sum") / 6)


@pytest.mark.parametrize(
    ("arguments", "weights", "error", "message"),
    [
        ((X, X, TARGET.tolist()), None, TypeError, "target must be a Tensor, got list"),
        ((X, X, TARGET + 1), None, ValueError, "target must hold labels from 0 to 2, got 3"),
        ((X, X, TARGET - 1), None, ValueError, "target must hold labels from 0 to 2, got -1"),
        ((X, X, TARGET > 0), None, ValueError, "target must be 6 integer labels .* got torch.bool"),
        (({"a": X}, X, TARGET), None, TypeError, "student_feats must be a Tensor or a sequence of tensors, got dict"),
        ((X, {"a": X}, TARGET), None, TypeError, "teacher_feats must be a Tensor or a sequence of tensors, got dict"),
        ((X, 3, TARGET), None, TypeError, "teacher_feats must be a Tensor or a sequence of tensors, got int"),
        ((X, [None], TARGET), None, TypeError, r"teacher_feats\[0\] must be a Tensor, got NoneType"),
        (
            (X.to("meta"), X, TARGET),
            None,
            ValueError,
            r"student_feats\[0\] must be on the device of the loss \(cpu\), got",
        ),
        (
            (X, X.to("meta"), TARGET),
            None,
            ValueError,
            r"teacher_feats\[0\] must be on the device of the loss \(cpu\), got",
        ),
        ((X, X, TARGET), nn.Identity(), TypeError, "weights must be a .*PairWeightNetwork or None, got Identity"),
        (
            (X, X, TARGET),
            PairWeightNetwork(7, 1, 1),
            ValueError,
            r"weights must fit the embeddings: student_embeddings\[0\] must have width 7, got shape \(6, 5\)",
        ),
        (
            (X, X, TARGET),
            PairWeightNetwork(5, 2, 1),
            ValueError,
            "weights must fit the embeddings: student_embeddings must",
        ),
        (
            (X, X, TARGET),
            PairWeightNetwork(5, 1, 1).to("meta"),
            ValueError,
            r"weights must be on the device of the features \(cpu\), got a module on meta",
        ),
    ],
)
def test_calls_that_are_not_taken(arguments, weights, error, message):
    with pytest.raises(error, match=message):
        _made()(*arguments, weights=weights)


def test_a_loss_elsewhere_than_its_features():
    with pytest.raises(ValueError, match=r"student_feats\[0\] must be on the device of the loss \(meta\), got cpu"):
        _made().to("meta")(X, X, TARGET)
