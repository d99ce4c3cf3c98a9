"""Where a training runs: the device that was asked for, accelerate's view of it, and time on it."""

import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from gkd_fast.train.config import Config, TrainError
from gkd_fast.train.files import TRACKERS_FOLDER

# Step times kept for the medians.
KEPT_TIMES = 500


def make_accelerator(config: Config) -> Accelerator:
    """Hugging Face accelerate's view of the devices and processes of this run."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    choose_cuda_device(config.device)
    _check_trackers(config.log_with)
    try:
        return Accelerator(
            cpu=config.device == "cpu",
            mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
            log_with=config.log_with or None,
            project_config=ProjectConfiguration(logging_dir=str(Path(config.output) / TRACKERS_FOLDER)),
        )
    except ValueError as error:
        raise TrainError(f"precision {config.precision} cannot be had here: {error}") from None


def _check_trackers(names: list[str]) -> None:
    """accelerate passes over those whose packages are missing."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in (*installed, "all"):
            raise TrainError(f"log_with {name} needs the package {name}: pip install {name}")


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
