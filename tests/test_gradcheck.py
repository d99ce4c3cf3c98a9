"""First and second derivatives in float64 against finite differences."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gkd_fast import GraphKDLoss, functional


def _matrices(batch: int, *widths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, w, dtype=torch.float64, generator=generator).requires_grad_() for w in widths]


def _check(function, inputs, *, fast_second: bool = False) -> None:
    """``fast_second``: second derivatives along random directions instead of entry by entry."""
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=fast_second)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("normalization", ["symmetric", "row"])
@pytest.mark.parametrize("self_weight", [None, 0.3])
def test_graph_conv(batch, normalization, self_weight):
    options = {"bandwidth": 0.6, "normalization": normalization, "self_weight": self_weight, "backend": "reference"}
    _check(lambda nodes, messages: functional.graph_conv(nodes, messages, **options), _matrices(batch, 4, 3))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_node_contrast(batch):
    _check(
        lambda a, b, t, u: functional.node_contrast([a, b], [t, u], temperature=0.4, backend="reference"),
        _matrices(batch, 3, 3, 3, 3),
    )


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_relation_kl(batch):
    _check(
        lambda a, b, t, u: functional.relation_kl([a, b], [t, u], temperature=0.4, bandwidth=0.8, backend="reference"),
        _matrices(batch, 3, 2, 4, 3),
    )


@pytest.mark.parametrize(("teacher_graph", "self_weight"), [("labels", None), ("frozen", None), ("labels", 0.8)])
def test_graph_kd_loss(teacher_graph, self_weight):
    """With respect to the student's features, the weights and every parameter of the loss."""
    torch.manual_seed(0)
    # A fixed bandwidth: the adaptive one is taken without gradient, which finite differences do not know.
    criterion = GraphKDLoss(
        [3, 2], [4, 4], num_classes=3, embed_dim=4, layers=2, bandwidth=0.7, node_temperature=0.4,
        relation_temperature=0.4, teacher_graph=teacher_graph, self_weight=self_weight, backend="reference",
    ).double()  # fmt: skip
    student_a, student_b, teacher_a, teacher_b = _matrices(5, 3, 2, 4, 4)
    weights = torch.rand(5, 2, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 1, 0])
    names, parameters = zip(*criterion.named_parameters())

    def loss(a, b, w, *values):
        return torch.func.functional_call(
            criterion,
            dict(zip(names, values)),
            ([a, b], [teacher_a.detach(), teacher_b.detach()], target),
            {"weights": w},
        )

    inputs = (student_a, student_b, weights, *parameters)
    if teacher_graph == "frozen":
        _check(loss, inputs, fast_second=True)
        return
    # The teacher's embeddings are detached in the node and relation losses, so its graph convolutions follow the
    # cross-entropy alone: they are checked on that, and the rest with them held fixed.
    teacher_side = [i for i, name in enumerate(names) if name.startswith("teacher_heads")]
    student_side = [i for i in range(len(names)) if i not in teacher_side]

    def holding(indices, values):
        held = [p.detach() for p in parameters]
        for i, value in zip(indices, values):
            held[i] = value
        return held

    def teacher_loss(*values):
        term = _TeacherGraphTerm(criterion)
        named = {f"criterion.{n}": v for n, v in zip(names, holding(teacher_side, values))}
        features = [student_a.detach(), student_b.detach()], [teacher_a.detach(), teacher_b.detach()]
        return torch.func.functional_call(term, named, (*features, target))

    _check(
        lambda a, b, w, *values: loss(a, b, w, *holding(student_side, values)),
        (student_a, student_b, weights, *(parameters[i] for i in student_side)),
        fast_second=True,
    )
    _check(teacher_loss, [parameters[i] for i in teacher_side], fast_second=True)


class _TeacherGraphTerm(torch.nn.Module):
    def __init__(self, criterion: GraphKDLoss):
        super().__init__()
        self.criterion = criterion

    def forward(self, student_feats, teacher_feats, target):
        return self.criterion.terms(student_feats, teacher_feats, target)["teacher_graph"]
