"""Autocast where there is none: devices like "meta", on which torch.autocast itself is an error."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Device types without autocast: torch.compile of PyTorch 2.11 cannot trace torch.amp.is_autocast_available.
_WITHOUT_AUTOCAST = ("meta", "lazy", "vulkan")


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; never on a device that has none ("meta")."""
    device = tensor.device.type
    return device not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device)


def autocast_disabled(tensor: Tensor) -> AbstractContextManager[None]:
    """A context in which operations on the tensor's device keep their types."""
    return torch.autocast(tensor.device.type, enabled=False) if autocast_enabled(tensor) else nullcontext()
