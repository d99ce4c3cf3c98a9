"""What a forward pass can change beside its output: buffers and random state."""

from collections.abc import Iterable

import torch
from torch import nn


class Snapshot:
    """The buffers of some modules and PyTorch's random state, to be put back exactly."""

    def __init__(self, modules: Iterable[nn.Module]):
        owners = {id(m): m for root in modules for m in root.modules()}.values()
        # The tensor objects too: a forward pass may replace a buffer instead of writing into it.
        self.buffers = [
            (owner, name, buffer, None if buffer is None else buffer.detach().clone())
            for owner in owners
            for name, buffer in owner._buffers.items()
        ]
        tensors = [t for m in owners for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        self.cpu_state = torch.get_rng_state()
        self.cuda_states = {
            device: torch.cuda.get_rng_state(device) for device in {t.device for t in tensors} if device.type == "cuda"
        }

    @torch.no_grad()
    def restore(self) -> None:
        for owner, name, buffer, value in self.buffers:
            owner._buffers[name] = buffer
            if buffer is not None and value is not None:
                buffer.copy_(value)
        torch.set_rng_state(self.cpu_state)
        for device, state in self.cuda_states.items():
            torch.cuda.set_rng_state(state, device)
