"""Schedules, optimizers, smoothing, mixup, short epochs, the best epoch's weights, and models of other libraries."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gkd_fast.train import cli
from gkd_fast.train.build import build_optimizer, build_scheduler
from gkd_fast.train.config import GraphConfig, TrainingConfig, relevant_options
from gkd_fast.train.metrics import read_metrics
from gkd_fast.train.models import build_network
from gkd_fast.train.run import _mixup, train
from tests.train.conftest import quiet


def rates(epochs: int, **options) -> list[float]:
    training = TrainingConfig(epochs=epochs, lr=1.0, **options)
    optimizer = build_optimizer(training, [nn.Parameter(torch.zeros(1))])
    scheduler = build_scheduler(training, optimizer)
    found = []
    for _ in range(epochs):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_learning_rates():
    assert rates(4, milestones=[1, 3]) == pytest.approx([1, 0.1, 0.1, 0.01])
    assert rates(4, schedule="cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rates(5, schedule="cosine", warmup=1) == pytest.approx([0.5, 1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rates(6, warmup=2, milestones=[3, 5]) == pytest.approx([1 / 3, 2 / 3, 1, 0.1, 0.1, 0.01])


def test_optimizers_by_name_and_by_path():
    parameters = [nn.Parameter(torch.zeros(1))]
    for name, kind in (("sgd", "SGD"), ("adamw", "AdamW"), ("torch.optim:RAdam", "RAdam")):
        optimizer = build_optimizer(TrainingConfig(optimizer=name, lr=0.3, weight_decay=0.1), parameters)
        assert type(optimizer).__name__ == kind
        assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.3, 0.1)
    with pytest.raises(ValueError, match="optimizer must be sgd, adamw or MODULE:CLASS, got 'adam'"):
        TrainingConfig(optimizer="adam")
    with pytest.raises(ValueError, match="torch.optim:Nothing cannot be imported"):
        build_optimizer(TrainingConfig(optimizer="torch.optim:Nothing"), parameters)


def test_mixed_labels_are_those_of_the_mixed_images():
    images, labels = torch.eye(4).view(4, 1, 2, 2), torch.arange(4)
    mixed, probabilities = _mixup(1.0, 4)(images, labels)
    assert 0 < probabilities.max() < 1 or probabilities.sum() == 4
    torch.testing.assert_close(mixed.flatten(1), probabilities)
    assert _mixup(0.0, 4)(images, labels) == (images, labels)


def test_a_run_with_all_of_them(tiny, tiny_teacher):
    training = replace(
        tiny.student_training, epochs=3, optimizer="adamw", lr=0.01, schedule="cosine", warmup=1, mixup=0.5,
        label_smoothing=0.1,
    )  # fmt: skip
    config = replace(tiny, method="gkd", teacher=tiny_teacher, student_training=training, limit_batches=2)
    result = train(config, "student", quiet())
    folder = Path(config.output)
    records = read_metrics(folder)
    assert [r["learning_rate"] for r in records] == pytest.approx([0.005, 0.01, 0.005])
    assert json.loads(next(folder.glob("checkpoints/step-000000006/manifest.json")).read_text())["step"] == 6
    best = torch.load(folder / "best.pt", weights_only=True)["model"]
    last = torch.load(folder / "weights.pt", weights_only=True)["model"]
    same = all(torch.equal(x, last[name]) for name, x in best.items())
    assert same == (result["best"]["epoch"] == 2)


def make_model(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes)
    )


def test_own_models_by_import_path():
    path = f"{__name__}:make_model"
    network = build_network(path, 5, (1, 8, 8), stages=["0", "1"])
    features, logits = network(torch.randn(3, 1, 8, 8))
    assert [x.shape for x in (*features, *logits)] == [(3, 6), (3, 6), (3, 5)] and network.feature_dims == [6, 6]
    with pytest.raises(ValueError, match="no default stages"):
        build_network(path, 5, (1, 8, 8))
    with pytest.raises(ValueError, match="nowhere:make cannot be imported"):
        build_network("nowhere:make", 5, (1, 8, 8), stages=["0"])


@pytest.mark.parametrize(
    ("name", "dims"),
    [("resnet10t", [64, 128, 256, 512]), ("vit_tiny_patch16_224", [192] * 4), ("test_convnext", [24, 32, 48, 64])],
)
def test_models_of_timm(name, dims):
    pytest.importorskip("timm", reason="needs the package timm")
    network = build_network(f"timm/{name}", 5, (3, 64, 64)).eval()
    features, logits = network(torch.randn(2, 3, 64, 64))
    assert [x.shape[1] for x in features] == network.feature_dims == dims and logits[0].shape == (2, 5)
    with pytest.raises(ValueError, match="timm has no model 'resnet0'"):
        build_network("timm/resnet0", 5, (3, 64, 64))


@pytest.mark.parametrize(
    ("graph", "form"),
    [({}, (8, 0.8)), ({"neighbors": None, "self_weight": None}, (None, None)), ({"bandwidth": 0.5}, (None, None))],
)
def test_a_run_can_be_resumed_with_what_its_graph_stood_for(tiny, graph, form):
    """And with nothing else, whatever the default is by then."""
    options = relevant_options(replace(tiny, graph=GraphConfig(**graph)), "student")
    assert (options["graph.neighbors"], options["graph.self_weight"]) == form


def test_help_has_the_choices(capsys):
    with pytest.raises(SystemExit):
        cli.main(["student", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for choices in ("{steps,cosine}", "{fp32,bf16,fp16}", "{auto,reference,cpp,triton}", "{current,held-out}"):
        assert choices in told, choices
    assert "--method {ce,kd,gkd," in told
    assert "'cifar10', 'cifar100', 'imagefolder'" in told and "Literal['sgd', 'adamw']" in told
    assert "'tensorboard', 'wandb'" in told
    assert "Short names: --data-dir for --data.data_dir" in told and "--limit-batches for --limit_batches" in told
