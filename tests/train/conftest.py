from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console

from gkd_fast.train.config import Config, GraphConfig, MetaConfig, NetworkConfig, TrainingConfig
from gkd_fast.train.data import DataConfig
from gkd_fast.train.progress import Display
from gkd_fast.train.run import train


def tiny_config(output: Path) -> Config:
    """A training of a second: 200 digits, four batches an epoch, a meta-step on every second."""
    training = TrainingConfig(epochs=2, batch_size=50, milestones=[1])
    return Config(
        output=str(output),
        device="cpu",
        threads=1,
        save_every=3,
        data=DataConfig(train_size=200, noise=0.3),
        teacher_network=NetworkConfig("small_4"),
        teacher_training=training,
        student_network=NetworkConfig("small_2"),
        student_training=training,
        graph=GraphConfig(embed_dim=16),
        meta=MetaConfig(interval=2, width=16),
    )


@pytest.fixture
def tiny(tmp_path) -> Config:
    return tiny_config(tmp_path / "run")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> str:
    """The folder of a trained teacher for ``tiny``."""
    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    train(tiny_config(folder), "teacher", quiet())
    AcceleratorState._reset_state(reset_partial_state=True)
    return str(folder)


def quiet() -> Display:
    return Display(Console(quiet=True))


@pytest.fixture(autouse=True)
def separate_runs():
    """Each test chooses precision and threads anew; accelerate keeps its choice for the process otherwise."""
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)
