"""Features made under ``torch.inference_mode()``, as a frozen teacher's often are: they cannot be saved by autograd."""

import copy

import pytest
import torch

from gkd_fast import GraphKDLoss, functional

from .ops_cases import FUSED, GRAPHS, requires_fused, rows

pytestmark = requires_fused
OWN_NODE, OTHERS = GRAPHS["own node"], GRAPHS["others"]
FUNCTIONS = {
    "relation_kl": lambda x, y, **o: functional.relation_kl([x, x], y, **o),
    "relation_kl with a bank": lambda x, y, **o: functional.relation_kl(x, y, bank=([y[:3]], [y[3:6]]), **o),
    "node_contrast": lambda x, y, **o: functional.node_contrast([x, x], y, **o),
    "node_contrast with a bank": lambda x, y, **o: functional.node_contrast(x, y, bank=[y[:3]], **o),
    "graph_conv of frozen messages": lambda x, y, **o: functional.graph_conv(x, y, **OWN_NODE, **o),
    "graph_conv over frozen nodes": lambda x, y, **o: functional.graph_conv(y, x, **OWN_NODE, **o),
    "neighbor_conv of frozen messages": lambda x, y, **o: functional.graph_conv(x, y, **OTHERS, **o),
    "neighbor_conv over frozen nodes": lambda x, y, **o: functional.graph_conv(y, x, **OTHERS, **o),
    "graph_conv of a frozen bandwidth": lambda x, y, **o: functional.graph_conv(x, x, bandwidth=y.std(), **o),
}


@pytest.mark.parametrize("backend", [FUSED, "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_ordinary_features(name, dtype, backend):
    function = FUNCTIONS[name]
    x, y = (x.to(dtype) for x in rows(9, 4, 4))
    x.requires_grad_()
    with torch.inference_mode():
        frozen = y.clone()

    def every_order(y):
        output = function(x, y, backend=backend)
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return output, gradient, *torch.autograd.grad(gradient.square().sum(), x)

    for found, expected in zip(every_order(frozen), every_order(y), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", [FUSED, "reference"])
@pytest.mark.parametrize(
    ("teacher_graph", "graph"),
    [("labels", OWN_NODE), ("frozen", OWN_NODE), ("labels", OTHERS)],
    ids=["labels", "frozen", "others"],
)
def test_the_loss_trains_with_such_a_teacher(teacher_graph, graph, backend):
    torch.manual_seed(0)
    options = {"num_classes": 3, "embed_dim": 6, "teacher_graph": teacher_graph, "backend": backend, "column_bank": 16}
    options |= graph
    criterion = GraphKDLoss([4, 5], [6, 6], **options)
    start = copy.deepcopy(criterion.state_dict())
    students, labels = [torch.randn(8, d, requires_grad=True) for d in (4, 5)], torch.randint(3, (8,))
    features = [torch.randn(8, 6) for _ in range(2)]
    with torch.inference_mode():
        frozen = [x.clone() for x in features]
    wanted = [*students, *criterion.parameters()]
    results = []
    for teachers in (frozen, features):
        criterion.load_state_dict(start, strict=False)
        criterion(students, teachers, labels)  # fills the bank
        loss = criterion(students, teachers, labels)
        results.append([loss, *torch.autograd.grad(loss, wanted)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
