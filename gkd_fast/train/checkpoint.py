"""Checkpoints of a training: whole or not there, checked when read, the previous one kept.

A checkpoint is a folder ``step-N`` with accelerate's files (weights, optimizer, loss scale, random states), the
driver's own state, and a manifest with the checksum of each. It is written beside its place and then renamed.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import torch

from gkd_fast.train.config import TrainError

FORMAT = "gkd_fast training checkpoint 2"
MANIFEST = "manifest.json"
STATE = "driver.pt"
PARTIAL = ".partial"
KEEP = 2


class CheckpointError(TrainError):
    """A checkpoint is damaged or not one of ours."""


def save(accelerator, folder: Path, step: int, state: dict, options: dict) -> Path:
    """Writes a checkpoint and removes all but the newest two.

    Args:
        accelerator: its prepared modules and optimizers, loss scale and random states are saved.
        folder: of the checkpoints.
        step: training steps so far; names the checkpoint.
        state: the driver's own state, of tensors and plain values.
        options: of the run, those that decide its outcome; a checkpoint goes on with these alone.
    """
    partial, final = folder / PARTIAL, folder / f"step-{step:09d}"
    if final.exists():
        with contextlib.suppress(CheckpointError):
            check(final)
            return final
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.save(state | {"random_state": torch.get_rng_state()}, partial / STATE)
        files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
        manifest = {
            "format": FORMAT,
            "step": step,
            "processes": accelerator.num_processes,
            "options": options,
            "files": files,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one, which was refused when the run resumed
        os.replace(partial, final)
        _flush(folder)
        for old in _checkpoints(folder)[KEEP:]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint, good or not."""
    return bool(_checkpoints(folder))


def load_newest(accelerator, folder: Path, options: dict, warn) -> dict | None:
    """Restores the newest good checkpoint.

    Args:
        accelerator: what :func:`save` was given, prepared the same way.
        folder: of the checkpoints.
        options: of the run.
        warn: called with one line for each newer checkpoint that is damaged.

    Returns:
        The driver's own state, or None where there is no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, but none is good.
        TrainError: the checkpoint belongs to a run with other options.
    """
    problems = []
    for path in _checkpoints(folder):
        try:
            manifest = check(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warn(f"{problem}; going on from {path.name}")
        _check_options(path, manifest, options, accelerator.num_processes)
        try:
            state = torch.load(path / STATE, weights_only=True, map_location="cpu")
            accelerator.load_state(str(path))
        except pickle.UnpicklingError as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} is refused, it holds more than tensors and plain values: {reason}") from None
        # accelerate only logs that random states could not be restored.
        if accelerator.is_main_process and not torch.equal(state.pop("random_state"), torch.get_rng_state()):
            raise CheckpointError(f"{path}: the random state could not be restored")
        return state
    if problems:
        raise CheckpointError("; ".join(problems) + "; no good checkpoint is left")
    return None


def check(path: Path) -> dict:
    """The manifest of a checkpoint whose files are all there and whole.

    Raises:
        CheckpointError: they are not, or the folder is something else.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a gkd_fast checkpoint: it has no {MANIFEST}") from None
    except ValueError:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} cannot be read") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a gkd_fast checkpoint: {MANIFEST} does not say {FORMAT!r}")
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} is damaged: {name} has {file.stat().st_size} of {expected['bytes']} bytes")
        if _describe(file) != expected:
            raise CheckpointError(f"{path} is damaged: the checksum of {name} is wrong")
    return manifest


def _check_options(path: Path, manifest: dict, options: dict, processes: int) -> None:
    saved = manifest["options"] | {"processes": manifest["processes"]}
    given = json.loads(json.dumps(options)) | {"processes": processes}
    differing = [
        f"{name} is {given.get(name)!r}, was {saved.get(name)!r}"
        for name in sorted(saved.keys() | given.keys())
        if saved.get(name) != given.get(name)
    ]
    if differing:
        raise TrainError(f"{path} was written with other options: {'; '.join(differing)}")


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _describe(path: Path) -> dict:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _flush(path: Path) -> None:
    """Sees to it that a file or folder is on the disk before anything later is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
