"""The transforms of ``torch.func``: each gives what it gives on the reference, or an error that says what does."""

from functools import partial

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

from gkd_fast import GraphKDLoss, functional

from .ops_cases import BANKED, FUNCTIONS, FUSED, GRAPHS, leaves, requires_fused, rows

pytestmark = requires_fused
CASES = {
    **FUNCTIONS,
    "graph_conv, adaptive": (lambda backend: partial(functional.graph_conv, backend=backend), (4, 3)),
    "neighbor_conv, adaptive": (
        lambda backend: partial(functional.graph_conv, neighbors=3, self_weight=0.3, backend=backend),
        (4, 3),
    ),
}


def scalar(function):
    def total(*x):
        output = function(*x)
        return (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)).sum()

    return total


def every_gradient(function, count):
    return grad(function, argnums=tuple(range(count)))


def squares(function, count):
    return lambda *x: sum(g.square().sum() for g in every_gradient(function, count)(*x))


def stacked(inputs):
    """The first input in three versions, along its second dimension; the others once."""
    return torch.stack([inputs[0], inputs[0].flip(0), 2 * inputs[0] + 1], dim=1), *inputs[1:]


def over_samples(function, count):
    return vmap(function, in_dims=(1, *[None] * (count - 1)))


def recorded(function, inputs):
    """Gradients by autograd outside."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs).square().sum(), inputs)


# Name: what is computed of a function and its inputs.
TRANSFORMS = {
    "grad": lambda f, x: every_gradient(scalar(f), len(x))(*x),
    "grad of grad": lambda f, x: every_gradient(squares(scalar(f), len(x)), len(x))(*x),
    "autograd of grad": lambda f, x: recorded(squares(scalar(f), len(x)), x),
    "jacrev": lambda f, x: jacrev(f, argnums=tuple(range(len(x))))(*x),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(scalar(f)))(*x),
    "vmap": lambda f, x: over_samples(f, len(x))(*stacked(x)),
    "vmap of grad": lambda f, x: over_samples(every_gradient(scalar(f), len(x)), len(x))(*stacked(x)),
    "grad of vmap": lambda f, x: every_gradient(
        lambda *y: over_samples(f, len(x))(*y).square().sum(), len(x)
    )(*stacked(x)),
    "autograd of vmap": lambda f, x: recorded(over_samples(f, len(x)), stacked(x)),
}  # fmt: skip


OF_RELATIONS = {
    "info_nce": (lambda backend: partial(functional.info_nce, reduction="none", backend=backend), (4, 4)),
    "rkd_angle": (lambda backend: partial(functional.rkd_angle, reduction="none", backend=backend), (4, 3)),
    "similarity_preserving": (
        lambda backend: partial(functional.similarity_preserving, norm=2, backend=backend),
        (4, 3),
    ),
    "correlation": (lambda backend: partial(functional.correlation_congruence, squared=True, backend=backend), (4, 3)),
}


@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap", "vmap of grad", "grad of vmap"])
@pytest.mark.parametrize("name", OF_RELATIONS)
def test_losses_over_relations(name, transform):
    make, widths = OF_RELATIONS[name]
    inputs = rows(7, *widths)
    found, expected = (tree_leaves(TRANSFORMS[transform](make(b), inputs)) for b in (FUSED, "reference"))
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= 1e-10 * max(1, y.abs().max())


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev"])
@pytest.mark.parametrize("within", ["batch", "tokens"])
@pytest.mark.parametrize("name", ["pkt", "rkd_distance", "similarity_preserving"])
def test_losses_over_pairs_name_the_reference_which_is_transformed(name, within, transform):
    def make(backend):
        return partial(getattr(functional, name), within=within, reduction="none", backend=backend)

    inputs = [x if within == "batch" else x.view(2, 3, -1) for x in rows(6, 4, 3)]
    with pytest.raises(NotImplementedError, match=f"{name} is not transformed by torch.func .* backend=.reference."):
        TRANSFORMS[transform](make(FUSED), inputs)
    if within == "batch":
        assert all(x.isfinite().all() for x in tree_leaves(TRANSFORMS[transform](make("reference"), inputs)))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CASES)
def test_is_what_the_reference_gives(name, transform):
    make, widths = CASES[name]
    inputs = rows(7, *widths)
    found, expected = (tree_leaves(TRANSFORMS[transform](make(b), inputs)) for b in (FUSED, "reference"))
    assert len(found) == len(expected)
    for x, y in zip(found, expected):
        assert x.shape == y.shape
        assert (x - y).abs().max() <= 1e-10 * max(1, y.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_offered_names_the_reference(name):
    make, widths = CASES[name]
    function, inputs = make(FUSED), tuple(rows(5, *widths))
    with pytest.raises(NotImplementedError, match="forward-mode .* backend=.reference."):
        jvp(function, inputs, inputs)
    with pytest.raises(NotImplementedError, match="backend=.reference."):
        hessian(scalar(function))(*inputs)
    count = len(inputs)
    with pytest.raises(NotImplementedError, match="third-order .* backend=.reference."):
        every_gradient(squares(squares(scalar(function), count), count), count)(*inputs)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "grad of vmap"])
@pytest.mark.parametrize("name", BANKED)
def test_banks_name_the_reference_which_takes_them(name, transform):
    make, widths = BANKED[name]
    inputs = rows(7, *widths)
    with pytest.raises(NotImplementedError, match="over a bank .* backend=.reference."):
        TRANSFORMS[transform](make(FUSED), inputs)
    assert all(x.isfinite().all() for x in tree_leaves(TRANSFORMS[transform](make("reference"), inputs)))


@pytest.mark.parametrize("others", [False, True])
def test_diagnostics_of_many_batches(others):
    x = torch.stack(rows(9, 4, 4, 4))
    of_one = partial(functional.effective_neighbors, others=others, backend=FUSED)
    torch.testing.assert_close(vmap(of_one)(x), torch.stack([of_one(y) for y in x]))


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_the_loss_by_its_parameters(training, graph):
    torch.manual_seed(0)
    criterion = GraphKDLoss([4, 3], [5, 5], num_classes=3, embed_dim=6, backend=FUSED, **graph).double()
    criterion.train(training)
    students, teachers = leaves((4, 3)), rows(11, 5, 5)
    arguments = students, teachers, torch.arange(11) % 3
    parameters = dict(criterion.named_parameters())
    expected = torch.autograd.grad(criterion(*arguments), list(parameters.values()))
    found = grad(lambda p: functional_call(criterion, p, arguments))({k: p.detach() for k, p in parameters.items()})
    for name, y in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], y, rtol=1e-9, atol=1e-12)
