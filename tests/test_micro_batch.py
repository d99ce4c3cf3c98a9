"""A batch in parts against the same parts in one graph, or the whole batch where samples are treated one by one."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from gkd_fast import GraphKDLoss, StageFeatures, micro_batched

D64 = torch.float64
BATCH, CLASSES = 11, 3
MICRO_BATCHES = [1, 3, BATCH - 1, BATCH, 4 * BATCH]


class Network(nn.Module):
    """Two stages; ``network(images) -> logits, [features, features]``."""

    def __init__(self, dropout: float = 0.0, norm=lambda channels: nn.GroupNorm(2, channels)):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.Tanh(), nn.Dropout(dropout))
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), norm(6), nn.Tanh(), nn.Dropout(dropout))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images):
        first = self.first(images)
        second = self.second(first).mean(dim=(2, 3))
        return self.fc(second), [first.mean(dim=(2, 3)), second]


class Problem:
    """A network, all terms of the graph loss and cross-entropy."""

    def __init__(self, dtype=D64, **options):
        torch.manual_seed(0)
        self.network = Network(**options).to(dtype)
        self.criterion = GraphKDLoss([4, 6], [5, 7], num_classes=CLASSES, embed_dim=8).to(dtype)
        self.images = torch.randn(BATCH, 1, 8, 8, dtype=dtype)
        self.teacher_features = [torch.randn(BATCH, d, dtype=dtype) for d in (5, 7)]
        self.labels = torch.randint(CLASSES, (BATCH,))

    def loss(self, run) -> torch.Tensor:
        logits, features = run(self.network, self.images)
        return F.cross_entropy(logits, self.labels) + self.criterion(features, self.teacher_features, self.labels)

    def loss_and_gradients(self, run) -> list[torch.Tensor]:
        torch.manual_seed(1)
        loss = self.loss(run)
        return [loss.detach(), *torch.autograd.grad(loss, self.parameters())]

    def parameters(self):
        return [*self.network.parameters(), *self.criterion.parameters()]


def in_parts(micro_batch: int):
    return lambda network, images: micro_batched(network, images, micro_batch=micro_batch)


def in_one_graph(micro_batch: int):
    """The same parts with all their activations, differentiated by autograd."""

    def run(network, images):
        outputs = [network(part) for part in images.tensor_split(-(-len(images) // micro_batch))]
        return torch.cat([y for y, _ in outputs]), [torch.cat(rows) for rows in zip(*(f for _, f in outputs))]

    return run


def whole(network, images):
    return network(images)


def error(found, expected) -> float:
    assert all(e.abs().max() > 0 for e in expected)
    return max(((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(D64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_loss_and_gradients_are_those_of_the_whole_batch(micro_batch, dtype, tolerance, dropout):
    """With dropout, of the parts in one graph: a whole batch draws its masks in another order."""
    problem = Problem(dtype, dropout=dropout)
    expected = problem.loss_and_gradients(in_one_graph(micro_batch) if dropout else whole)
    after = torch.get_rng_state()
    assert error(problem.loss_and_gradients(in_parts(micro_batch)), expected) <= tolerance
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_parameters_after_20_steps_are_those_of_the_whole_batch(dropout):
    trained = []
    for run in (in_one_graph(3) if dropout else whole, in_parts(3)):
        problem = Problem(dropout=dropout)
        start = copy.deepcopy(problem.parameters())
        optimizer = torch.optim.SGD(problem.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        for _ in range(20):
            problem.images.normal_()
            optimizer.zero_grad()
            problem.loss(run).backward()
            optimizer.step()
        trained.append(problem.parameters())
    assert min((p - q).abs().max() for p, q in zip(trained[0], start)) > 1e-3
    assert max((p - q).abs().max() for p, q in zip(*trained)) <= 1e-9


def test_without_the_random_state_the_second_pass_would_differ(monkeypatch):
    problem = Problem(dropout=0.3)
    expected = problem.loss_and_gradients(in_one_graph(3))
    monkeypatch.setattr("gkd_fast._snapshot._RandomState.restore", lambda self: None)
    assert error(problem.loss_and_gradients(in_parts(3)), expected) > 1e-2


@pytest.mark.parametrize("order", [1, 2])
def test_activations_are_those_of_one_part(order):
    """Bytes that autograd holds at once, beyond parameters, images and upstreams of the outputs."""
    network, images = Network().to(D64), torch.randn(64, 1, 8, 8, dtype=D64)
    upstreams = [torch.randn(64, d, dtype=D64, requires_grad=True) for d in (CLASSES, 4)]
    kept = {x.untyped_storage().data_ptr() for x in (*network.parameters(), images, *upstreams)}

    def peak(run, samples: int = 64) -> int:
        alive = most = 0

        class Saved:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor = tensor
                self.size = tensor.nbytes if tensor.untyped_storage().data_ptr() not in kept else 0
                alive += self.size
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            logits, features = run(network, images[:samples])
            given, parameters = [x[:samples] for x in upstreams], list(network.parameters())
            gradients = torch.autograd.grad([logits, features[0]], parameters, given, create_graph=order == 2)
            if order == 2:
                ones = [torch.ones_like(g) for g in gradients]
                torch.autograd.grad(gradients, [*parameters, *upstreams], ones, allow_unused=True)
        return most

    one_part = peak(whole, samples=8)
    assert peak(whole) >= 7 * one_part
    # Every part's group norms leave two statistics a sample in PyTorch 2.11's double backward: a twentieth in all.
    assert peak(in_parts(8)) <= 1.05 * one_part


def test_batch_norm_takes_the_statistics_of_each_part_and_updates_once():
    problem = Problem(norm=nn.BatchNorm2d, dropout=0.3)
    twin = copy.deepcopy(problem)
    buffers = dict(problem.network.named_buffers())
    expected = twin.loss_and_gradients(in_one_graph(4))
    torch.manual_seed(1)
    loss = problem.loss(in_parts(4))
    after = [b.clone() for b in buffers.values()]
    torch.rand(5)
    random_state = torch.get_rng_state()
    problem.network.eval()  # the second pass is in the mode of the first
    found = [loss.detach(), *torch.autograd.grad(loss, problem.parameters())]
    assert error(found, expected) <= 1e-12
    assert torch.equal(torch.get_rng_state(), random_state)
    for b, other, value in zip(problem.network.buffers(), twin.network.buffers(), after, strict=True):
        assert torch.equal(b, value) and torch.equal(b, other)
    assert all(b is buffers[name] for name, b in problem.network.named_buffers())
    assert not any(m.training for m in problem.network.modules())
    assert problem.network.first[1].num_batches_tracked == 3
    assert error(problem.loss_and_gradients(whole), expected) > 1e-3


def test_a_buffer_that_the_outputs_depend_on_is_replayed():
    problem = Problem()
    nn.utils.parametrizations.spectral_norm(problem.network.fc)  # a power iteration in each forward pass
    twin = copy.deepcopy(problem)
    assert error(problem.loss_and_gradients(in_parts(2)), twin.loss_and_gradients(in_one_graph(2))) <= 1e-12
    for b, other in zip(problem.network.buffers(), twin.network.buffers(), strict=True):
        assert torch.equal(b, other)


def test_buffers_that_autograd_saved_elsewhere_are_left_alone():
    problem = Problem(norm=nn.BatchNorm2d)
    problem.network.eval()
    images = problem.images.requires_grad_()
    gradients = []
    for run in (in_parts(4), whole):
        logits, _ = problem.network(images[:2])
        more, _ = run(problem.network, images)
        gradients.append(torch.autograd.grad(logits.square().sum() + more.square().sum(), images)[0])
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_second_derivatives_part_by_part_and_no_third():
    problem = Problem(dropout=0.3)
    variables = [*problem.parameters(), problem.images.requires_grad_()]
    results = []
    for run in (in_one_graph(4), in_parts(4)):
        torch.manual_seed(1)
        gradients = torch.autograd.grad(problem.loss(run), variables, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in gradients]).sum()
        after = torch.get_rng_state()
        results.append([penalty.detach(), *torch.autograd.grad(penalty, variables, retain_graph=True)])
        assert torch.equal(torch.get_rng_state(), after)
    assert error(results[1], results[0]) <= 1e-12
    logits, _ = in_parts(4)(problem.network, problem.images)
    (gradient,) = torch.autograd.grad(logits.square().sum(), problem.images, create_graph=True)
    with pytest.raises(NotImplementedError, match="no third"):
        torch.autograd.grad(gradient.square().sum(), problem.images, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_passes_run_under_the_same_autocast(dtype):
    """Gradients as near to float32's as those of one graph, with a loss scale and backward outside of autocast."""
    problem = Problem(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = []
    problem.network.fc.register_forward_hook(
        lambda *args: seen.append((args[-1].dtype, torch.is_autocast_enabled("cpu")))
    )
    results = {}
    for name, run in (("truth", whole), ("plain", in_one_graph(4)), ("fast", in_parts(4))):
        seen.clear()
        with torch.autocast("cpu", dtype) if name != "truth" else contextlib.nullcontext():
            logits, features = run(problem.network, problem.images)
        features = [f.float() for f in features]
        loss = logits.float().square().mean() + problem.criterion(features, problem.teacher_features, problem.labels)
        scaled = torch.autograd.grad(scaler.scale(loss), problem.parameters())
        results[name] = [g / scaler.get_scale() for g in scaled]
    assert seen == [(dtype, True)] * 6
    plain = error(results["plain"], results["truth"])
    assert 0 < error(results["fast"], results["truth"]) <= 1.5 * plain


def test_autocast_copies_of_parameters_do_not_lose_their_gradient():
    layer, x = nn.Linear(4, 2), torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        (micro_batched(layer, x, micro_batch=2).float().sum() + layer(x).float().sum()).backward()
    torch.testing.assert_close(layer.weight.grad, 2 * x.sum(dim=0).expand(2, 4), atol=0.1, rtol=0.02)


def test_parts_are_summed_in_float32():
    layer = nn.Linear(1, 1).bfloat16()
    micro_batched(layer, torch.ones(300, 1, dtype=torch.bfloat16), micro_batch=1).sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16 and layer.weight.grad.item() == 300  # in bfloat16: 256


def test_parameters_whose_gradient_is_one_tensor():
    pair = nn.ParameterList([torch.ones(3, dtype=D64), torch.zeros(3, dtype=D64)])
    x = torch.randn(7, 3, dtype=D64)
    micro_batched(lambda x: x * (pair[0] + pair[1]), x, micro_batch=2, modules=pair).sum().backward()
    assert error([p.grad for p in pair], [x.sum(dim=0)] * 2) <= 1e-12


def test_structures_unused_outputs_and_frozen_parameters():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4)
            self.frozen.requires_grad_(False)

        def forward(self, pair, *, scale, extra):
            x, y = pair["x"], pair["y"]
            hidden = self.frozen(self.used(x * scale)) + extra[0]
            return {"hidden": hidden, "others": [self.unused(y), None], "best": hidden.argmax(dim=1)}

    tower = Tower().double()
    x, y, extra = (torch.randn(7, d, dtype=D64, requires_grad=True) for d in (3, 3, 4))
    plain = tower({"x": x, "y": y}, scale=2.0, extra=(extra,))
    found = micro_batched(tower, {"x": x, "y": y}, scale=2.0, extra=(extra,), micro_batch=2)
    assert found.keys() == plain.keys() and found["others"][1] is None
    assert torch.equal(found["best"], plain["best"]) and not found["best"].requires_grad
    variables = [*tower.used.parameters(), x, extra]
    expected = torch.autograd.grad(plain["hidden"].square().sum(), variables)
    assert error(torch.autograd.grad(found["hidden"].square().sum(), variables, retain_graph=True), expected) <= 1e-12
    found["hidden"].square().sum().backward()
    assert tower.unused.weight.grad is None and tower.frozen.weight.grad is None and y.grad is None


def test_each_part_runs_twice_and_only_where_it_must():
    problem = Problem()
    sizes = []
    problem.network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    loss = problem.loss(in_parts(3))
    assert sizes == [3, 3, 3, 2]
    loss.backward(retain_graph=True)
    assert sizes == [3, 3, 3, 2] * 2
    once = [p.grad.clone() for p in problem.parameters()]
    loss.backward()
    assert error([p.grad for p in problem.parameters()], [2 * g for g in once]) <= 1e-12
    sizes.clear()
    problem.loss(in_parts(BATCH)).backward()
    assert sizes == [BATCH]
    with torch.no_grad():
        outputs, _ = in_parts(4)(problem.network, problem.images)
    assert sizes == [BATCH, 4, 4, 3] and not outputs.requires_grad


def test_it_runs_callables_over_modules():
    problem = Problem()
    stages = StageFeatures(problem.network, ["first.2", "second.2"])
    expected = problem.loss_and_gradients(whole)

    def run(network, images):
        (logits, _), features = micro_batched(stages, images, micro_batch=3, modules=network)
        return logits, features

    assert error(problem.loss_and_gradients(run), expected) <= 1e-12


def test_ddp_around_the_caller_reduces_once(tmp_path):
    class Caller(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, images):
            return micro_batched(self.network, images, micro_batch=3)[0]

    reductions = []

    def count(state, bucket):
        reductions.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    problem = Problem()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(Caller(problem.network))
        ddp.register_comm_hook(None, count)
        ddp(problem.images).square().mean().backward()
        with pytest.raises(ValueError, match="wrap the caller in DDP"):
            in_parts(3)(nn.parallel.DistributedDataParallel(problem.network), problem.images)
    finally:
        dist.destroy_process_group()
    assert sum(reductions) == sum(p.numel() for p in problem.network.parameters())
    found = [p.grad for p in problem.network.parameters()]
    logits, _ = problem.network(problem.images)
    assert error(found, torch.autograd.grad(logits.square().mean(), list(problem.network.parameters()))) <= 1e-12


def test_a_parameter_changed_between_the_passes_is_an_error():
    problem = Problem()
    loss = problem.loss(in_parts(3))
    with torch.no_grad():
        problem.network.fc.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_outside_the_modules_is_an_error():
    layer, scale, x = nn.Linear(3, 2), nn.Parameter(torch.ones(2)), torch.randn(5, 3)
    output = micro_batched(lambda x: layer(x) * scale, x, micro_batch=2, modules=layer)
    with pytest.raises(RuntimeError, match=r"tensor of shape \(2,\) .* neither an argument nor a parameter of modules"):
        output.sum().backward()


X = torch.randn(5, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: micro_batched(m, X, micro_batch=0), ValueError, "micro_batch must be an int of at least 1 or None"),
        (lambda m: micro_batched(m, X, micro_batch=2.0), ValueError, "micro_batch must be .* got 2.0"),
        (lambda m: micro_batched(m, 3, micro_batch=2), ValueError, r"tensors of one batch size, .* got shapes \[\]"),
        (lambda m: micro_batched(m, X, X[:4], micro_batch=2), ValueError, r"got shapes \[\(5, 3\), \(4, 3\)\]"),
        (lambda m: micro_batched(m, torch.ones(()), micro_batch=2), ValueError, r"got shapes \[\(\)\]"),
        (lambda m: micro_batched(m.forward, X, micro_batch=2), TypeError, "modules must be given .* got method"),
        (
            lambda m: micro_batched(lambda x: m(x).mean(), X, micro_batch=9, modules=m),
            ValueError,
            r"one row for each of the 5 samples, got shape \(\)",
        ),
        (
            lambda m: micro_batched(lambda x: (m(x), 1.0), X, micro_batch=2, modules=[m]),
            TypeError,
            "tensors or None in tuples, lists and dicts, got float",
        ),
        (
            lambda m: micro_batched(lambda x: [m(x)] * len(x), X, micro_batch=2, modules=m),
            ValueError,
            "the same structure for every part",
        ),
    ],
)
def test_wrong_use_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call(nn.Linear(3, 2))


def test_gradient_hooks_are_refused():
    layer = nn.Linear(3, 2)
    layer.weight.register_hook(lambda g: g.clamp(-1, 1))
    with pytest.raises(ValueError, match="gradient hooks, .* got one on 'weight'"):
        micro_batched(layer, X, micro_batch=2)
