"""Checkpoints that are damaged, foreign, or of another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gkd_fast.train import checkpoint
from gkd_fast.train.checkpoint import CheckpointError
from gkd_fast.train.config import TrainError
from gkd_fast.train.progress import Display
from gkd_fast.train.run import train
from tests.train.conftest import quiet, tiny_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A short teacher training."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_config(folder), "teacher", quiet())
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def _resume(run: Path) -> str:
    """Resumes the run; what it said."""
    with open(run / "notes", "w+") as notes:
        train(replace(tiny_config(run), resume=True), "teacher", Display(Console(file=notes, width=500), brief=True))
        notes.seek(0)
        return notes.read()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated weights": ("model.safetensors", _truncate, "model.safetensors has"),
    "changed optimizer": ("optimizer.bin", _flip_a_bit, "the checksum of optimizer.bin is wrong"),
    "missing random state": ("random_states_0.pkl", Path.unlink, "random_states_0.pkl is missing"),
    "truncated manifest": ("manifest.json", _truncate, "manifest.json cannot be read"),
    "no manifest": ("manifest.json", Path.unlink, "is not a gkd_fast checkpoint"),
    "foreign manifest": ("manifest.json", lambda f: f.write_text('{"format": 1}'), "is not a gkd_fast checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_and_the_previous_one_used(run, finished, damage):
    name, spoil, message = DAMAGES[damage]
    previous, newest = sorted((run / "checkpoints").iterdir())
    spoil(newest / name)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.check(newest)
    said = _resume(run)
    assert message in said and f"going on from {previous.name}" in said
    checkpoint.check(newest)  # written again, whole
    states = [torch.load(folder / "weights.pt", weights_only=True)["model"] for folder in (run, finished)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_no_good_checkpoint_is_an_error(run):
    for path in (run / "checkpoints").iterdir():
        _truncate(path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no good checkpoint is left"):
        _resume(run)


def test_two_checkpoints_are_kept(run):
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000000006", "step-000000008"]


def test_checkpoint_of_other_options_is_refused(run):
    config = tiny_config(run)
    other = replace(config, resume=True, seed=1, teacher_training=replace(config.teacher_training, lr=0.1))
    with pytest.raises(TrainError, match="seed is 1, was 0; teacher_training.lr is 0.1, was 0.05"):
        train(other, "teacher", quiet())


def test_options_that_change_nothing_may_differ(run):
    config = tiny_config(run)
    other = replace(config, resume=True, save_every=1, data=replace(config.data, data_dir="elsewhere"))
    train(other, "teacher", quiet())


def test_checkpoint_of_another_role_is_refused(run, tiny_teacher):
    with pytest.raises(TrainError, match="role is 'student', was 'teacher'"):
        train(replace(tiny_config(run), resume=True, method="kd", teacher=tiny_teacher), "student", quiet())


def test_a_run_is_not_overwritten(run):
    with pytest.raises(TrainError, match="already holds a run: go on with --resume"):
        train(tiny_config(run), "teacher", quiet())


@pytest.mark.parametrize("name", [checkpoint.STATE, "optimizer.bin"])
def test_files_are_read_without_running_code(run, name):
    """A pickle that would call something is refused, its checksum being right or not."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    torch.save({"position": Path("x")}, newest / name)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][name] = checkpoint._describe(newest / name)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is refused, it holds more than tensors and plain values"):
        _resume(run)
