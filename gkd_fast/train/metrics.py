"""What is measured epoch by epoch: JSON lines, which reports read, and accelerate's trackers."""

import json
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator

PROJECT = "gkd_fast"


class MetricsLog:
    """Appends one record per epoch to ``metrics.jsonl``, and gives it to the trackers that the accelerator has.

    Args:
        folder: of the run.
        first_epoch: records from this epoch on, left by a run that was stopped, are forgotten; by TensorBoard too.
        accelerator: on its main process alone is anything written.
        options: of the run, for the trackers.
    """

    def __init__(self, folder: Path, first_epoch: int, accelerator: Accelerator, options: dict[str, Any]):
        self.accelerator = accelerator
        self.path = folder / "metrics.jsonl" if accelerator.is_main_process else None
        if self.path is not None:
            kept = [line for line in read_lines(self.path) if json.loads(line)["epoch"] < first_epoch]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            os.replace(partial, self.path)
        plain = {name: x if isinstance(x, (bool, int, float, str)) else str(x) for name, x in _flat("", options, dict)}
        accelerator.init_trackers(PROJECT, plain, {"tensorboard": {"purge_step": first_epoch}})

    def write(self, record: dict) -> None:
        """One epoch's numbers; nested dicts and lists become ``a/b/0`` in the trackers."""
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        self.accelerator.log(dict(_flat("", record, (dict, list))), step=record["epoch"])

    def close(self) -> None:
        # Not accelerator.end_training, which ends the process group too.
        for tracker in self.accelerator.trackers:
            tracker.finish()


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run, one per epoch."""
    return [json.loads(line) for line in read_lines(folder / "metrics.jsonl")]


def read_lines(path: Path) -> list[str]:
    """The whole lines of a file; one that a killed process left unfinished is not among them."""
    text = path.read_text() if path.exists() else ""
    return [line[:-1] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _flat(prefix: str, value: Any, nested: type | tuple[type, ...]):
    """Names and values of what is not nested."""
    if not isinstance(value, nested):
        yield prefix, value
        return
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _flat(f"{prefix}/{name}" if prefix else str(name), inner, nested)
