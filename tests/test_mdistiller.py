"""The distiller for mdistiller, on its package where that can be imported, else on a stand-in with the interface of
its distillers: the base class's methods, the table of distillers and the configuration's nodes."""

import copy
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from gkd_fast import GraphKDLoss


class Base(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self):
        return list(self.student.parameters())

    def get_extra_parameters(self):
        return 0

    def forward(self, **batch):
        return self.forward_train(**batch) if self.training else self.student(batch["image"])[0]


class Network(nn.Module):
    """As those of mdistiller: logits, and feature maps by name."""

    def __init__(self, *widths):
        super().__init__()
        pairs = zip((3, *widths), widths)
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b)) for a, b in pairs)
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x):
        feats = []
        for stage in self.stages:
            x = stage(x).relu()
            feats.append(x)
        return self.fc(x.mean(dim=(2, 3))), {"feats": feats}


@pytest.fixture
def adapter(monkeypatch):
    if find_spec("mdistiller") is None:
        names = ["mdistiller", "mdistiller.distillers", "mdistiller.distillers._base"]
        package, distillers, base, engine, cfg = (
            ModuleType(n) for n in [*names, "mdistiller.engine", "mdistiller.engine.cfg"]
        )
        package.distillers, distillers.distiller_dict, base.Distiller = distillers, {}, Base
        cfg.CFG = SimpleNamespace()
        for module in (package, distillers, base, engine, cfg):
            monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "gkd_fast.integrations.mdistiller", raising=False)
    import gkd_fast.integrations.mdistiller as loaded

    yield loaded
    sys.modules.pop("gkd_fast.integrations.mdistiller", None)


def distiller_of(adapter):
    from mdistiller.distillers import distiller_dict
    from mdistiller.engine.cfg import CFG

    torch.manual_seed(0)
    return distiller_dict["GKD"](Network(8, 8, 16, 32), Network(8, 16, 32, 64), CFG)


def batch_of():
    torch.manual_seed(1)
    return {"image": torch.randn(16, 3, 32, 32), "target": torch.randint(10, (16,)), "epoch": 1}


def train(distiller, optimizer, steps=2):
    """As mdistiller's trainer does."""
    distiller.train()
    for _ in range(steps):
        optimizer.zero_grad()
        logits, losses = distiller(**batch_of())
        sum(loss.mean() for loss in losses.values()).backward()
        optimizer.step()
    return logits, losses


def test_student_and_graph_convolutions_train_and_a_checkpoint_restores_them(adapter):
    distiller = distiller_of(adapter)
    optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.05, momentum=0.9)
    before = copy.deepcopy(distiller.state_dict())
    logits, losses = train(distiller, optimizer)
    assert logits.shape == (16, 10) and set(losses) == {
        "loss_ce",
        "loss_kd",
    }  # what mdistiller's dot trainer takes apart
    after = distiller.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    trained = {name for name, _ in distiller.named_parameters() if not name.startswith("teacher.")}
    assert trained <= moved and not any(name.startswith("teacher.") for name in moved)
    assert distiller.get_extra_parameters() == sum(p.numel() for p in distiller.criterion.parameters())

    again = distiller_of(adapter)
    again.load_state_dict(after)
    again.eval(), distiller.eval()
    assert torch.equal(again(image=batch_of()["image"]), distiller(image=batch_of()["image"]))
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())


def test_the_loss_is_that_of_the_module(adapter):
    distiller = distiller_of(adapter).train()
    batch = batch_of()
    assert isinstance(distiller.criterion, GraphKDLoss) and len(distiller.criterion.student_dims) == 3
    _, losses = distiller(**batch)
    (logits, student), (teacher_logits, teacher) = distiller.student(batch["image"]), distiller.teacher(batch["image"])
    graph = copy.deepcopy(distiller.criterion)(student["feats"][-3:], teacher["feats"][-3:], batch["target"])
    soft = [torch.log_softmax(x / 4, dim=1) for x in (logits, teacher_logits)]
    kd = 16 * torch.nn.functional.kl_div(*soft, reduction="batchmean", log_target=True)
    torch.testing.assert_close(losses["loss_kd"], kd + graph)


def test_a_stage_that_is_not_there_raises(adapter):
    from mdistiller.engine.cfg import CFG

    CFG.GKD.STAGES = [-6, -1]
    with pytest.raises(ValueError, match=r"GKD.STAGES must be among 4 feature maps, got \[-6, -1\]"):
        distiller_of(adapter)
