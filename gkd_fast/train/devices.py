"""Where a training runs: the device that was asked for, accelerate's view of it, and time on it."""

import os
import time

import torch
from accelerate import Accelerator

from gkd_fast.train.config import Config, TrainError

# Step times kept for the medians.
KEPT_TIMES = 500


def make_accelerator(config: Config) -> Accelerator:
    """Hugging Face accelerate's view of the devices and processes of this run."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    choose_cuda_device(config.device)
    try:
        return Accelerator(
            cpu=config.device == "cpu", mixed_precision={"fp32": "no"}.get(config.precision, config.precision)
        )
    except ValueError as error:
        raise TrainError(f"precision {config.precision} cannot be had here: {error}") from None


def choose_cuda_device(name: str) -> None:
    """Makes "cuda:N" the current device, which accelerate takes; "cuda" leaves it: of several processes each has one.

    Raises:
        TrainError: the device is not here, or several processes ask for one.
    """
    if not name.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise TrainError(f"device {name} cannot be had here: torch.cuda.is_available() is False")
    index = torch.device(name).index
    if index is None:
        return
    if index >= torch.cuda.device_count():
        raise TrainError(f"device {name} cannot be had here: there are {torch.cuda.device_count()}, from cuda:0 on")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise TrainError(f"device {name} is one for several processes: with cuda each takes its own")
    torch.cuda.set_device(index)


class Clock:
    """Times laps of work on a device, where it is asked to; waiting for the device is part of a lap."""

    def __init__(self, device: torch.device, running: bool):
        self.device = device
        self.running = running
        self.started = self._now()

    def lap(self, seconds: list[float]) -> None:
        """Appends the time since the last lap, and forgets old laps."""
        if self.running:
            now = self._now()
            seconds.append(now - self.started)
            del seconds[:-KEPT_TIMES]
            self.started = now

    def _now(self) -> float:
        if self.running and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
