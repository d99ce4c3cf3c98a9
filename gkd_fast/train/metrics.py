"""What is measured epoch by epoch: JSON lines and, if wanted, TensorBoard."""

import json
import os
from pathlib import Path

from gkd_fast.train.config import TrainError


class MetricsLog:
    """Appends one record per epoch to ``metrics.jsonl``.

    Args:
        folder: of the run.
        first_epoch: records from this epoch on, left by a run that was stopped, are forgotten.
        active: False on the processes that do not write.
        tensorboard: write TensorBoard logs too.
    """

    def __init__(self, folder: Path, first_epoch: int, active: bool, tensorboard: bool):
        self.path = folder / "metrics.jsonl" if active else None
        self.writer = None
        if active:
            kept = [line for line in read_lines(self.path) if json.loads(line)["epoch"] < first_epoch]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            os.replace(partial, self.path)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise TrainError("tensorboard true needs the package tensorboard: pip install tensorboard") from None
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)

    def write(self, record: dict) -> None:
        """One epoch's numbers; nested dicts and lists become scalars ``a/b/0`` in TensorBoard."""
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for name, value in _scalars("", record):
                self.writer.add_scalar(name, value, record["epoch"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run, one per epoch."""
    return [json.loads(line) for line in read_lines(folder / "metrics.jsonl")]


def read_lines(path: Path) -> list[str]:
    """The whole lines of a file; one that a killed process left unfinished is not among them."""
    text = path.read_text() if path.exists() else ""
    return [line[:-1] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _scalars(prefix: str, value):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _scalars(f"{prefix}/{name}" if prefix else name, inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _scalars(f"{prefix}/{index}", inner)
    else:
        yield prefix, value
