"""The files of a run's folder."""

import json
import os
from pathlib import Path

import torch

CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
TRACKERS_FOLDER = "trackers"  # of those of accelerate that write files
BEST_WEIGHTS_FILE = "best.pt"  # of the epoch that was best on the validation images


def write_weights(network: torch.nn.Module, path: Path, name: str) -> None:
    partial = path.with_suffix(".partial")
    torch.save({"network": name, "model": {k: v.cpu() for k, v in network.state_dict().items()}}, partial)
    os.replace(partial, path)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)
