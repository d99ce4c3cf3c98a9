"""The losses in torchdistill's own boxes, from the example's configuration."""

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchdistill", reason="torchdistill is not installed")
pytest.importorskip("torchvision")

from torchdistill.common.main_util import import_dependencies, load_ckpt, save_ckpt  # noqa: E402
from torchdistill.common.yaml_util import load_yaml_file  # noqa: E402
from torchdistill.core.distillation import get_distillation_box  # noqa: E402
from torchdistill.models.official import get_image_classification_model  # noqa: E402

import gkd_fast  # noqa: E402
from gkd_fast import losses  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples" / "torchdistill.yaml"
pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the tests run without the source folder")


@pytest.fixture
def config():
    loaded = load_yaml_file(EXAMPLE)
    import_dependencies(loaded["dependencies"])
    loader = loaded["train"]["train_data_loader"]["kwargs"]
    loader["batch_size"] = 8  # of the example's images, two steps
    loaded["datasets"]["random/train"] = torch.utils.data.Subset(loaded["datasets"]["random/train"], range(16))
    for model in loaded["models"].values():
        model["key"] = "resnet18"
    return loaded


def box_of(config):
    torch.manual_seed(0)
    teacher, student = (
        get_image_classification_model(config["models"][f"{side}_model"]) for side in ("teacher", "student")
    )
    teacher.eval()
    train = copy.copy(config["train"])
    device = torch.device("cpu")
    return get_distillation_box(teacher, student, config["datasets"], train, device, None, False, 1)


def train(box, epochs=1):
    """As torchdistill's image classification script does."""
    found = []
    for epoch in range(epochs):
        box.pre_epoch_process(epoch=epoch)
        for images, targets, supplement in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(images, targets, supplement)
            box.post_forward_process(loss=loss)
            found.append(float(loss.detach()))
        box.post_epoch_process()
    return found


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_student_and_graph_convolutions_train_and_a_checkpoint_restores_them(config, tmp_path):
    box = box_of(config)
    assert isinstance(box.student_model.criterion, gkd_fast.GraphKDLoss)
    before = state(box.student_model)
    found = train(box)
    assert len(found) == 2 and all(torch.tensor(found).isfinite())
    after = state(box.student_model)
    still = [n for n, p in box.student_model.named_parameters() if torch.equal(before[n], after[n])]
    assert not still
    assert {n.split(".")[1] for n in after if n.startswith("criterion.")} == {
        "student_heads", "teacher_heads", "classifier"
    }  # fmt: skip

    save_ckpt(box.student_model, box.optimizer, None, 0.0, None, tmp_path / "student.pt")
    again = box_of(config)
    load_ckpt(str(tmp_path / "student.pt"), again.student_model, again.optimizer)
    assert all(torch.equal(value, after[name]) for name, value in again.student_model.state_dict().items())
    momenta = [state_of["momentum_buffer"] for state_of in again.optimizer.state.values()]
    assert len(momenta) == len(list(again.student_model.parameters()))
    assert train(again) and not torch.equal(
        again.student_model.criterion.classifier.weight, after["criterion.classifier.weight"]
    )


def test_the_loss_is_that_of_the_module(config):
    box = box_of(config)
    images, targets, _ = next(iter(box.train_data_loader))
    total = box.forward_process(images, targets, None)
    names = ["layer3", "layer4"]
    with torch.no_grad():
        _, teachers = gkd_fast.StageFeatures(box.teacher_model, names)(images)
    logits, students = gkd_fast.StageFeatures(box.student_model.student_model, names)(images)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    expected = expected + copy.deepcopy(box.student_model.criterion)(students, teachers, targets)
    torch.testing.assert_close(total, expected)


def test_a_forgotten_wrapper_raises(config):
    del config["train"]["student"]["auxiliary_model_wrapper"]
    stages = ["layer3", "layer4"]
    config["train"]["student"]["forward_hook"]["output"] = stages
    config["train"]["criterion"]["kwargs"]["sub_terms"]["graph"]["criterion"]["kwargs"]["student_stages"] = stages
    with pytest.raises(ValueError, match="auxiliary_model_wrapper: .key: GKDStudent"):
        train(box_of(config))


def test_a_stage_without_a_hook_raises(config):
    config["train"]["teacher"]["forward_hook"]["output"] = ["layer4"]
    with pytest.raises(ValueError, match=r"teacher_stages names 'layer3'.*recorded are \['layer4'\]"):
        train(box_of(config))


def test_an_unknown_criterion_raises(config):
    config["train"]["student"]["auxiliary_model_wrapper"]["kwargs"]["criterion"] = {"key": "KLDivLoss"}
    with pytest.raises(ValueError, match="criterion's key must be one of"):
        box_of(config)


@pytest.mark.parametrize("name", sorted(losses.__all__))
def test_losses_without_parameters_need_no_wrapper(config, name):
    options = {"student_dim": 512, "teacher_dim": 512} if name == "InfoNCE" else {}
    stage = "fc" if name == "KDDivergence" else "layer4"
    terms = config["train"]["criterion"]["kwargs"]["sub_terms"]
    terms["graph"]["criterion"] = {
        "key": f"gkd_fast.{name}",
        "kwargs": {"student_stage": stage, "teacher_stage": stage, **options},
    }
    for side in ("student", "teacher"):
        hooks = {"forward_hook": {"output": [stage]}, "forward_proc": "forward_batch_only"}
        config["train"][side] = {**hooks, "requires_grad": side == "student"}
    box = box_of(config)
    images, targets, _ = next(iter(box.train_data_loader))
    total = box.forward_process(images, targets, None)
    with torch.no_grad():
        _, (teacher,) = gkd_fast.StageFeatures(box.teacher_model, [stage])(images)
    logits, (student,) = gkd_fast.StageFeatures(box.student_model, [stage])(images)
    expected = torch.nn.functional.cross_entropy(logits, targets) + getattr(losses, name)(**options)(student, teacher)
    torch.testing.assert_close(total, expected)


def test_parameters_of_a_loss_belong_into_the_wrapper(config):
    terms = config["train"]["criterion"]["kwargs"]["sub_terms"]
    options = {"student_dim": 512, "teacher_dim": 256}
    stages = {"student_stage": "student_model.layer4", "teacher_stage": "layer3"}
    terms["graph"]["criterion"] = {"key": "gkd_fast.InfoNCE", "kwargs": {**stages, **options}}
    with pytest.raises(ValueError, match=r"gkd_fast.InfoNCE has parameters.*GKDStudent"):
        box_of(config)
    terms["graph"]["criterion"] = {
        "key": "GKDLoss",
        "kwargs": {"student_stages": ["student_model.layer4"], "teacher_stages": ["layer3"]},
    }
    wrapper = config["train"]["student"]["auxiliary_model_wrapper"]
    wrapper["kwargs"]["criterion"] = {"key": "InfoNCE", "kwargs": options}
    box = box_of(config)
    before = box.student_model.criterion.projection.weight.detach().clone()
    train(box)
    assert not torch.equal(before, box.student_model.criterion.projection.weight)
