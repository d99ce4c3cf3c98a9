"""The distiller for mdistiller: on a stand-in with the interface of its distillers (the base class's methods, the table
of distillers, the configuration's nodes), and by its own trainers too on a checkout of its repository, which MDISTILLER
names and which needs the packages yacs, tensorboardX and tqdm."""

import copy
import os
import sys
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


def stand_in() -> dict[str, ModuleType]:
    names = (
        "mdistiller mdistiller.distillers mdistiller.distillers._base mdistiller.engine mdistiller.engine.cfg".split()
    )
    modules = {name: ModuleType(name) for name in names}
    package, distillers, base, _, cfg = modules.values()
    package.distillers, distillers.distiller_dict, base.Distiller = distillers, {}, Base
    cfg.CFG = SimpleNamespace()
    return modules


@pytest.fixture(params=["stand-in", "published"])
def adapter(request, monkeypatch):
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mdistiller"}
    for name in before:
        del sys.modules[name]
    if request.param == "stand-in":
        sys.modules.update(stand_in())
    elif "MDISTILLER" in os.environ:
        monkeypatch.syspath_prepend(os.environ["MDISTILLER"])
    else:
        pytest.skip("MDISTILLER names no checkout of mdistiller")
    sys.modules.pop("gkd_fast.integrations.mdistiller", None)
    import gkd_fast.integrations.mdistiller as loaded

    yield loaded
    for name in [name for name in sys.modules if name.split(".")[0] == "mdistiller"]:
        del sys.modules[name]
    sys.modules.update(before)
    del sys.modules["gkd_fast.integrations.mdistiller"]


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


@pytest.mark.parametrize("adapter", ["published"], indirect=True)
@pytest.mark.parametrize("trainer", ["base", "dot"])
def test_the_published_trainers_train_its_networks_and_go_on(adapter, trainer, tmp_path, monkeypatch):
    from mdistiller.distillers import distiller_dict
    from mdistiller.engine import trainer_dict
    from mdistiller.engine.cfg import CFG
    from mdistiller.models import cifar_model_dict

    if not torch.cuda.is_available():  # which the trainers take for granted
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    cfg = CFG.clone()
    options = f"DISTILLER.TYPE GKD GKD.EMBED_DIM 16 SOLVER.EPOCHS 1 SOLVER.TRAINER {trainer} LOG.WANDB False"
    cfg.merge_from_list([*options.split(), "LOG.PREFIX", str(tmp_path)])
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    batches = [(images[k : k + 8], labels[k : k + 8], torch.arange(k, k + 8)) for k in (0, 8)]

    def trainer_of():
        torch.manual_seed(0)
        networks = (cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "resnet8x4"))
        distiller = distiller_dict["GKD"](*networks, cfg)
        distiller = distiller.cuda() if torch.cuda.is_available() else distiller
        judged = [batch[:2] for batch in batches]
        return trainer_dict[trainer]("run", nn.DataParallel(distiller), batches, judged, cfg)

    first = trainer_of()
    before = copy.deepcopy(first.distiller.module.state_dict())
    first.train()
    after = first.distiller.module.state_dict()
    trained = [n for n, _ in first.distiller.module.named_parameters() if not n.startswith("teacher.")]
    assert any(n.startswith("criterion.student_heads") for n in trained)
    assert not [n for n in trained if torch.equal(before[n], after[n])]
    assert all(torch.equal(before[n], x) for n, x in after.items() if n.startswith("teacher."))
    again = trainer_of()
    again.train(resume=True)  # from "latest", which is the last epoch's
    assert all(torch.equal(x, after[n]) for n, x in again.distiller.module.state_dict().items())
    assert len(again.optimizer.state) == len(trained)
