"""Loading weights from the field's checkpoints."""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gkd_fast.train.models.staged import StagedNetwork

# Where a training script's checkpoint keeps the weights.
CONTAINERS = ("model", "net", "network", "state_dict")
# What wrappers put before every name.
WRAPPERS = ("module.", "_orig_mod.")
# Harmless types beside the weights: a script's options and accuracies.
BYSTANDERS = [
    argparse.Namespace,
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
]


def load_weights(network: StagedNetwork, path: str | Path) -> list[str]:
    """Loads a checkpoint's weights into a network, all or none.

    The file holds a ``state_dict``, perhaps under ``model``, ``net``, ``network`` or ``state_dict``, perhaps with
    ``module.`` before every name. A classifier called ``linear`` is taken for ``fc``, and batch norms without a batch
    count keep theirs. It is read with ``weights_only=True``.

    Returns:
        The names that only one side has, all of them of auxiliary branches: those of the network keep their initial
        values, those of the file are left out. Empty if everything matched.

    Raises:
        ValueError: no such file, not a checkpoint, or its names or shapes are not those of the network.
    """
    theirs = _rename(_read(Path(path)), network)
    ours = network.state_dict()
    missing = [name for name in ours if name not in theirs and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in theirs if name not in ours]
    problems = {
        "missing": [name for name in missing if not _auxiliary(name)],
        "unexpected": [name for name in unexpected if not _auxiliary(name)],
        "of another shape": [
            f"{name} ({list(value.shape)}, the network's is {list(ours[name].shape)})"
            for name, value in theirs.items()
            if name in ours and value.shape != ours[name].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{problem}: {_some(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"{path} does not fit the network, {found}")
    network.load_state_dict(theirs, strict=False)
    return missing + unexpected


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        with torch.serialization.safe_globals(BYSTANDERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can raise anything in the unpickler
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    for candidate in (content, *(content.get(key) for key in CONTAINERS if isinstance(content, dict))):
        if isinstance(candidate, dict) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            return candidate
    raise ValueError(f"{path} holds no state_dict, neither by itself nor under {', '.join(CONTAINERS)}")


def _rename(state: dict[str, Tensor], network: StagedNetwork) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    prefix = network.checkpoint_prefix
    if prefix and not all(name.startswith(prefix) for name in state):
        state = {prefix + name: value for name, value in state.items()}
    if "fc.weight" not in state:
        state = {re.sub(r"^linear\.", "fc.", name): value for name, value in state.items()}
    return state


def _auxiliary(name: str) -> bool:
    return name.startswith("branches.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
