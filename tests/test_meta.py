"""The hypergradient against autograd through a fully unrolled graph, and the rollback."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from gkd_fast import GraphKDLoss, PairWeightNetwork, UnrolledSGD
from gkd_fast.meta import SECOND_DERIVATIVES

D64 = torch.float64


class Problem:
    """A student with batch norm and dropout, graph heads, and a meta-network that sees both sides' embeddings.

    Every objective takes the parameters as a dict, so that an oracle can unroll it as one differentiable graph.
    ``student.spare`` is used by the task objective alone.
    """

    def __init__(self):
        torch.manual_seed(0)
        self.student = nn.ModuleDict(
            {
                "body": nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3)),
                "spare": nn.Linear(7, 3),
            }
        ).to(D64)
        self.criterion = GraphKDLoss(7, 5, num_classes=3, embed_dim=4, bandwidth=0.8, backend="reference").to(D64)
        self.meta = PairWeightNetwork(4, 1, 1, width=3).to(D64)
        self.images = torch.randn(9, 6, dtype=D64)
        self.teacher_features = torch.randn(9, 5, dtype=D64)
        self.labels = torch.randint(3, (9,))
        self.parameters = {
            **{f"student.{n}": p for n, p in self.student.named_parameters()},
            **{f"criterion.{n}": p for n, p in self.criterion.named_parameters() if "classifier" not in n},
        }

    def _part(self, values, name):
        return {k.removeprefix(name + "."): v for k, v in values.items() if k.startswith(name + ".")}

    def graph_objective(self, values, meta_values):
        features = functional_call(self.student["body"], self._part(values, "student.body"), (self.images,))
        embed = _Method(self.criterion, "embed")
        named = {f"module.{k}": v for k, v in self._part(values, "criterion").items()}
        es, et = functional_call(embed, named, (features, self.teacher_features))
        weights = functional_call(self.meta, meta_values, (es, et))
        terms = self.criterion.terms_from_embeddings(es, et, weights=weights)
        return terms["node"] + terms["relation"]

    def task_objective(self, values, meta_values):
        features = functional_call(self.student["body"], self._part(values, "student.body"), (self.images,))
        logits = functional_call(self.student["spare"], self._part(values, "student.spare"), (features,))
        return F.cross_entropy(logits, self.labels)


class _Method(nn.Module):
    def __init__(self, module, name):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *args):
        return getattr(self.module, self.name)(*args)


def _unrolled_by_autograd(problem, objectives, outer, settings) -> list[torch.Tensor]:
    """One differentiable graph over all steps; ``settings`` maps a parameter's name to its SGD settings."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in problem.parameters.items()}
    momentum = {name: torch.zeros_like(p) for name, p in theta.items()}
    meta = dict(problem.meta.named_parameters())
    for objective in objectives:
        names = list(theta)
        gradients = torch.autograd.grad(
            objective(theta, meta), [theta[n] for n in names], create_graph=True, allow_unused=True
        )
        updated = {}
        for name, gradient in zip(names, gradients):
            updated[name] = theta[name]
            if gradient is None:
                continue
            s = settings(name)
            gradient = gradient + s["weight_decay"] * theta[name]
            momentum[name] = s["momentum"] * momentum[name] + gradient
            step = gradient + s["momentum"] * momentum[name] if s["nesterov"] else momentum[name]
            updated[name] = theta[name] - s["lr"] * step
        theta = updated
    return list(torch.autograd.grad(outer(theta, meta), list(meta.values())))


def _bits(problem) -> list[torch.Tensor]:
    modules = (problem.student, problem.criterion, problem.meta)
    tensors = [t.detach().clone() for m in modules for t in (*m.parameters(), *m.buffers())]
    return [*tensors, torch.get_rng_state()]


def _same_bits(before, after) -> bool:
    return all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("steps", range(1, 7))
@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"),
    [(0.0, False, 0.0), (0.9, False, 0.0), (0.9, False, 5e-2), (0.9, True, 5e-2), (0.0, False, 5e-2), (0.7, True, 0.0)],
)
def test_hypergradient_is_that_of_the_unrolled_graph(steps, momentum, nesterov, weight_decay):
    problem = Problem()
    meta = dict(problem.meta.named_parameters())
    objectives = [
        problem.task_objective if step % 3 == 2 else problem.graph_objective for step in range(steps)
    ]  # fmt: skip
    settings = {"lr": 0.05, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    before = _bits(problem)
    unrolled = UnrolledSGD(problem.parameters.values(), [problem.student, problem.criterion], **settings)
    for objective in objectives:
        unrolled.step(lambda objective=objective: objective(problem.parameters, meta))
    found = unrolled.hypergradient(lambda: problem.task_objective(problem.parameters, meta), meta.values())
    assert _same_bits(before, _bits(problem))

    expected = _unrolled_by_autograd(problem, objectives, problem.task_objective, lambda name: settings)
    for g, e in zip(found, expected, strict=True):
        assert e.abs().max() > 0
        assert (g - e).norm() <= 1e-8 * e.norm()


def test_differences_estimate_the_hypergradient():
    """To the accuracy of a central difference, and no closer: that would be the exact one under another name."""
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 3)).to(D64)
    idle = nn.Parameter(torch.ones(2, dtype=D64))
    weights = nn.Parameter(torch.rand(9, dtype=D64))
    images, labels = torch.randn(9, 6, dtype=D64), torch.randint(3, (9,))

    def inner():
        return (weights * F.cross_entropy(model(images), labels, reduction="none")).mean()

    start = [*(t.clone() for t in model.state_dict().values()), torch.get_rng_state()]
    results = {}
    for kind in SECOND_DERIVATIVES:
        params = [*model.parameters(), idle]
        unrolled = UnrolledSGD(params, model, 0.05, 0.9, 5e-2, second_derivatives=kind)
        for _ in range(3):
            unrolled.step(inner)
        (results[kind],) = unrolled.hypergradient(lambda: F.cross_entropy(model(images), labels), [weights])
        assert _same_bits(start, [*model.state_dict().values(), torch.get_rng_state()])
    error = (results["differences"] - results["exact"]).norm() / results["exact"].norm()
    assert 0 < error <= 1e-7


def test_groups_have_their_own_settings():
    problem = Problem()
    meta = dict(problem.meta.named_parameters())
    fast = {"lr": 0.2, "momentum": 0.0, "nesterov": False, "weight_decay": 0.1}
    slow = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}
    groups = [
        {"params": [p for n, p in problem.parameters.items() if n.startswith("student")], **fast},
        {"params": [p for n, p in problem.parameters.items() if n.startswith("criterion")]},
    ]
    objectives = [problem.graph_objective, problem.task_objective, problem.graph_objective]
    unrolled = UnrolledSGD(groups, [problem.student, problem.criterion], **slow)
    for objective in objectives:
        unrolled.step(lambda objective=objective: objective(problem.parameters, meta))
    found = unrolled.hypergradient(lambda: problem.task_objective(problem.parameters, meta), meta.values())
    expected = _unrolled_by_autograd(
        problem, objectives, problem.task_objective, lambda name: fast if name.startswith("student") else slow
    )
    for g, e in zip(found, expected, strict=True):
        assert (g - e).norm() <= 1e-8 * e.norm()


def test_steps_are_those_of_torch_sgd():
    model = nn.Linear(4, 3).double()
    twin = nn.Linear(4, 3).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(8, 4, dtype=D64)
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    optimizer = torch.optim.SGD(twin.parameters(), **settings)
    with UnrolledSGD(model.parameters(), model, **settings) as unrolled:
        for _ in range(4):
            value = unrolled.step(lambda: model(x).square().mean())
            loss = twin(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(value, loss.detach())
            torch.testing.assert_close(model.weight, twin.weight, atol=1e-14, rtol=0)
    assert not torch.equal(model.weight, twin.weight)


def test_an_exception_rolls_back_too():
    problem = Problem()
    before = _bits(problem)
    meta = dict(problem.meta.named_parameters())

    def fails():
        problem.task_objective(problem.parameters, meta)
        raise KeyError("stop")

    for at in ("step", "replay", "outer"):
        calls = itertools.count()

        def inner(at=at, calls=calls):
            if at == "replay" and next(calls) == 1:
                fails()
            return problem.graph_objective(problem.parameters, meta)

        with pytest.raises(KeyError, match="stop"):
            with UnrolledSGD(problem.parameters.values(), [problem.student, problem.criterion], 0.05) as unrolled:
                unrolled.step(inner)
                assert not _same_bits(before, _bits(problem))
                if at == "step":
                    unrolled.step(fails)
                outer = fails if at == "outer" else lambda: problem.task_objective(problem.parameters, meta)
                unrolled.hypergradient(outer, meta.values())
        assert _same_bits(before, _bits(problem))


def test_a_buffer_that_a_forward_pass_replaces_is_put_back():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x) * self.calls

    model = Counting()
    buffer = model.calls
    with UnrolledSGD(model.parameters(), model, lr=0.1) as unrolled:
        unrolled.step(lambda: model(torch.ones(1, 2)).sum())
        assert model.calls == 1
    assert model.calls is buffer and buffer == 0


def test_it_can_be_used_again_and_leaves_grad_alone():
    problem = Problem()
    meta = dict(problem.meta.named_parameters())
    for p in problem.parameters.values():
        p.grad = torch.full_like(p, 7.0)
    unrolled = UnrolledSGD(problem.parameters.values(), [problem.student, problem.criterion], 0.05)
    results = []
    for _ in range(2):
        unrolled.step(lambda: problem.graph_objective(problem.parameters, meta))
        results.append(unrolled.hypergradient(lambda: problem.task_objective(problem.parameters, meta), meta.values()))
    assert _same_bits(*results)
    assert all((p.grad == 7).all() for p in problem.parameters.values())


def test_a_meta_parameter_without_influence_has_zero_gradient():
    model = nn.Linear(2, 1)
    idle = nn.Parameter(torch.ones(3))
    unrolled = UnrolledSGD(model.parameters(), model, lr=0.1)
    unrolled.step(lambda: model(torch.ones(1, 2)).square().sum())
    (gradient,) = unrolled.hypergradient(lambda: model(torch.ones(1, 2)).sum(), [idle])
    assert torch.equal(gradient, torch.zeros(3))


def test_autocast_sees_every_update():
    """Autocast caches low-precision copies of the parameters; a step must not leave them behind."""
    model = nn.Linear(4, 1, bias=False)
    x = torch.randn(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with UnrolledSGD(model.parameters(), model, lr=1.0, momentum=0.0) as unrolled:
            values = [unrolled.step(lambda: model(x).float().sum()) for _ in range(2)]
    assert values[0] != values[1]


def test_activation_memory_does_not_grow_with_the_steps():
    """Counts the activations that autograd keeps alive at any one time."""
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.Tanh())])
    x = torch.randn(64, 32)
    scale = nn.Parameter(torch.ones(()))

    def peak(steps: int) -> int:
        alive = most = 0

        class Saved:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor = tensor
                alive += tensor.numel()
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            unrolled = UnrolledSGD(model.parameters(), model, lr=0.01)
            for _ in range(steps):
                unrolled.step(lambda: (scale * model(x)).square().mean())
            unrolled.hypergradient(lambda: model(x).mean(), [scale])
        return most

    assert peak(1) > 0
    assert peak(6) == peak(1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: UnrolledSGD([], nn.Linear(1, 1), 0.1), ValueError, "params must hold at least one parameter"),
        (lambda p: UnrolledSGD(p[0], nn.Linear(1, 1), 0.1), TypeError, "params must be an iterable"),
        (lambda p: UnrolledSGD([p[0], p[0]], nn.Linear(1, 1), 0.1), ValueError, "the same parameter twice"),
        (lambda p: UnrolledSGD([{"params": p}, p[0]], [], 0.1), TypeError, "parameters or groups, got both"),
        (lambda p: UnrolledSGD(p, nn.Linear(1, 1), -0.1), ValueError, "lr must not be negative, got -0.1"),
        (lambda p: UnrolledSGD(p, nn.Linear(1, 1), 0.1, 0.0, nesterov=True), ValueError, "nesterov needs a momentum"),
        (
            lambda p: UnrolledSGD(p, [], 0.1, second_derivatives="none"),
            ValueError,
            "second_derivatives must be one of .* got 'none'",
        ),
        (lambda p: UnrolledSGD(p, [], 0.1).step(lambda: 1.0), TypeError, "objective must return a Tensor, got float"),
        (lambda p: UnrolledSGD(p, [], 0.1).step(lambda: p[0] * 1), ValueError, "objective must return a scalar"),
        (lambda p: UnrolledSGD(p, [], 0.1).step(lambda: torch.ones(())), ValueError, "depends on a parameter"),
    ],
)
def test_bad_input_says_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))])
