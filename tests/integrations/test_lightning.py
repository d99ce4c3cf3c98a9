"""The Lightning module: what moves, what is logged, and that a checkpoint goes on where it was written."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.test_distiller import batch, distiller_of, moved, state

lightning = pytest.importorskip("lightning", reason="needs the package lightning")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, on workers and devices
        yield


def trainer(folder, epochs: int, **options):
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def module_of(lr: float = 0.1):
    from gkd_fast.integrations.lightning import DistillationModule

    return DistillationModule(
        distiller_of(), lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=1e-3), meta_interval=1
    )


def test_two_steps_move_everything_and_a_checkpoint_goes_on(tmp_path):
    loader = DataLoader(TensorDataset(*batch(24)), batch_size=12)
    module = module_of()
    before, teacher = state(module.distiller), state(module.distiller.teacher)
    first = trainer(tmp_path, 1, enable_checkpointing=True)
    first.fit(module, loader, loader)
    for part in ("student.", "criterion.", "pair_weights.student_projections.0.weight"):
        assert moved(before, module.distiller, part), part
    assert all(torch.equal(x, teacher[name]) for name, x in module.distiller.teacher.state_dict().items())
    assert not module.distiller.teacher.training
    names = {
        "train/loss",
        "train/kd",
        "train/node",
        "train/relation",
        "train/meta_gradient_norm",
        "validation/accuracy",
    }
    assert names | {"diagnostics/student_neighbors/1", "diagnostics/weight_mean"} <= first.callback_metrics.keys()

    path = tmp_path / "last.ckpt"
    first.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert not any("teacher." in name for name in saved) and any("pair_weights" in name for name in saved)
    resumed = module_of()
    trainer(tmp_path, 2).fit(resumed, loader, ckpt_path=path, weights_only=False)
    straight = module_of()
    trainer(tmp_path, 2).fit(straight, loader)
    for name, x in straight.distiller.state_dict().items():
        torch.testing.assert_close(resumed.distiller.state_dict()[name], x, rtol=0, atol=0, msg=name)


def test_bfloat16(tmp_path):
    module = module_of()
    trainer(tmp_path, 1, precision="bf16-mixed").fit(module, DataLoader(TensorDataset(*batch(24)), batch_size=12))
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in module.distiller.parameters())
