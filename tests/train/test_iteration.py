"""The driver's training step and meta-step against an independent transcription of the method."""

import copy

import pytest
import torch

from gkd_fast import GraphDistiller, GraphKDLoss, PairWeightNetwork
from gkd_fast.train.cost import available_backends
from gkd_fast.train.engine import Distiller
from gkd_fast.train.models import build_network
from tests.train import transcription as by_hand

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


BACKENDS = available_backends(torch.device("cpu"))


def _distiller(backend: str) -> Distiller:
    student, teacher = (build_network(name, 4, (1, 8, 8)).double() for name in ("small_2", "small_3"))
    criterion = GraphKDLoss(
        student.feature_dims, teacher.feature_dims, num_classes=4, embed_dim=6, backend=backend,
        neighbors=None, self_weight=None,  # the graph of the transcription
    ).double()  # fmt: skip
    pair_weights = PairWeightNetwork(6, 3, 3, width=5).double()
    module = GraphDistiller(student, teacher, criterion=criterion, meta=True, pair_weights=pair_weights)
    return Distiller(module, torch.optim.SGD(module.parameters(), **SGD))


def _parameters(distiller: Distiller) -> dict[str, torch.Tensor]:
    modules = {"student": distiller.student, "criterion": distiller.criterion}
    return {
        f"{prefix}.{name}": p.detach().clone().requires_grad_()
        for prefix, module in modules.items()
        for name, p in module.named_parameters()
    }


def _close(found: dict, expected: dict, tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name].detach(), expected[name].detach(), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_whole_iterations_agree_with_the_transcription(iterations, backend):
    distiller = _distiller(backend)
    oracle_student = copy.deepcopy(distiller.student).train()
    params = _parameters(distiller)
    meta = {n: p.detach().clone().requires_grad_() for n, p in distiller.pair_weights.named_parameters()}
    momenta = {n: torch.zeros_like(p) for n, p in params.items()}
    meta_momenta = {n: torch.zeros_like(p) for n, p in meta.items()}
    initial_meta = {n: p.clone() for n, p in meta.items()}

    for _ in range(iterations):
        images, labels = torch.randn(12, 1, 8, 8, dtype=torch.float64), torch.randint(4, (12,))
        terms = distiller.train_step(images, labels)
        after_training = {**_parameters(distiller), **dict(distiller.student.named_buffers())}
        after_training = {n: t.clone() for n, t in after_training.items()}
        distiller.meta_step(images, labels)
        # The meta-step leaves no trace on what it unrolled, batch statistics included.
        _close({**_parameters(distiller), **dict(distiller.student.named_buffers())}, after_training, tolerance=0)

        with torch.no_grad():
            teacher_outputs = distiller.teacher(images)
        expected = by_hand.train_objective(oracle_student, params, meta, teacher_outputs, images, labels)
        _close(terms, expected)
        gradients = torch.autograd.grad(sum(expected.values()), list(params.values()))
        params, momenta = by_hand.nesterov_step(params, dict(zip(params, gradients)), momenta)
        params = {n: p.detach().requires_grad_() for n, p in params.items()}
        _close(_parameters(distiller), params)
        _close(dict(distiller.student.named_buffers()), dict(oracle_student.named_buffers()))

        rehearsal = copy.deepcopy(oracle_student)
        meta_gradient = by_hand.meta_gradient(rehearsal, params, meta, teacher_outputs, images, labels)
        meta, meta_momenta = by_hand.nesterov_step(meta, meta_gradient, meta_momenta)
        meta = {n: p.detach().requires_grad_() for n, p in meta.items()}
        _close(dict(distiller.pair_weights.named_parameters()), meta)

    # Not only by weight decay, which alone would leave the direction of every parameter as it was.
    moved = {n: torch.cosine_similarity(meta[n].flatten(), initial_meta[n].flatten(), dim=0) for n in meta}
    assert min(moved.values()) < 1 - 1e-9


def hypergradient(distiller: Distiller, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in distiller.module.hypergradient(images, labels)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_hypergradient_under_bfloat16_autocast(backend):
    """Near that in float32, and not the same: the products were bfloat16."""
    distiller = _distiller(backend)
    distiller.module.float()
    images, labels = torch.randn(64, 1, 8, 8), torch.randint(4, (64,))
    exact = hypergradient(distiller, images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = hypergradient(distiller, images, labels)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    assert torch.cosine_similarity(found, exact, dim=0) > 0.9
    with torch.autocast("cpu", torch.float16):
        again = hypergradient(distiller, images, labels)
    assert torch.equal(again, exact)
