"""How well a network classifies."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gkd_fast.train.build import load_network, weights_file
from gkd_fast.train.config import Config, TrainingConfig
from gkd_fast.train.data import Images, load_splits
from gkd_fast.train.devices import make_accelerator
from gkd_fast.train.files import RESULT_FILE
from gkd_fast.train.models import StagedNetwork
from gkd_fast.train.progress import Display


def load_batches(
    images: Images, batches: list[list[int]], workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels, batch by batch, on the device."""
    # A generator of its own: otherwise every loader would draw a number from the training's random state.
    loader = DataLoader(images, batch_sampler=batches, num_workers=workers, generator=torch.Generator())
    for x, labels in loader:
        yield x.to(device), labels.to(device)


@torch.no_grad()
def accuracy(network: StagedNetwork, images: Images, batch_size: int, accelerator, workers: int = 0) -> float:
    """Share of images, in percent, whose class the network's own logits name."""
    network.eval()
    # A count, a sum over processes and a division, for which torchmetrics would be one more dependency.
    mine = list(range(accelerator.process_index, len(images), accelerator.num_processes))
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    correct = torch.zeros((), device=accelerator.device)
    for x, labels in load_batches(images, batches, workers, accelerator.device):
        with accelerator.autocast():
            correct += (network(x).logits[-1].argmax(dim=1) == labels).sum()
    return 100 * accelerator.reduce(correct, "sum").item() / len(images)


def evaluate_weights(config: Config, path: Path, display: Display) -> dict:
    """Accuracy of weights on the validation and test images, in percent.

    Args:
        config: of the run that made them; for other weights, ``student_network`` says what they belong to.
        path: the folder of a run, or a file.
        display: where notes are shown.
    """
    accelerator = make_accelerator(config)
    splits = load_splits(config.data, config.seed)
    file = weights_file(path)
    result_file = file.parent / RESULT_FILE
    of_teacher = result_file.is_file() and json.loads(result_file.read_text())["role"] == "teacher"
    network_config = config.teacher_network if of_teacher else config.student_network
    network = load_network(network_config, splits, file, display.note).to(accelerator.device)
    batch_size = evaluation_batch_size(config, config.student_training)
    return {
        "network": network_config.name,
        "validation_accuracy": accuracy(network, splits.validation, batch_size, accelerator),
        "test_accuracy": accuracy(network, splits.test, batch_size, accelerator),
    }


def evaluation_batch_size(config: Config, training: TrainingConfig) -> int:
    """The training's batch size, but no more than the networks take at a time."""
    return min(training.batch_size, config.micro_batch or training.batch_size)
