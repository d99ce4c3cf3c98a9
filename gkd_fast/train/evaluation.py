"""How well a network classifies."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gkd_fast.train.data import Images
from gkd_fast.train.models import StagedNetwork


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
    mine = list(range(accelerator.process_index, len(images), accelerator.num_processes))
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    correct = torch.zeros((), device=accelerator.device)
    for x, labels in load_batches(images, batches, workers, accelerator.device):
        with accelerator.autocast():
            correct += (network(x).logits[-1].argmax(dim=1) == labels).sum()
    return 100 * accelerator.reduce(correct, "sum").item() / len(images)
