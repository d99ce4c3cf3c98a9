"""What a forward pass depends on, and can change, beside its inputs: buffers, modes and random state."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """The buffers and modes of some modules and PyTorch's random state, to be put back exactly.

    Attributes that say on the host what is in a module's buffers go with them: those in its ``beside_buffers``.

    Args:
        modules: with all that is in them.
        inputs: of a forward pass; the random state is that of the CPU and of every device of these and the modules.
    """

    def __init__(self, modules: Iterable[nn.Module], inputs: Iterable[Tensor] = ()):
        owners = list({id(m): m for root in modules for m in root.modules()}.values())
        self.attributes = [
            (owner, name, getattr(owner, name))
            for owner in owners
            for name in ("training", *getattr(owner, "beside_buffers", ()))
        ]
        # The tensor objects too: a forward pass may replace a buffer instead of writing into it.
        self.buffers = [
            (owner, name, buffer, None if buffer is None else buffer.detach().clone())
            for owner in owners
            for name, buffer in owner._buffers.items()
        ]
        tensors = [t for m in owners for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        self.random_state = _RandomState({t.device for t in (*tensors, *inputs)})

    @torch.no_grad()
    def restore(self) -> None:
        for owner, name, buffer, value in self.buffers:
            owner._buffers[name] = buffer
            if buffer is not None and value is not None:
                buffer.copy_(value)
        _set(self.attributes)
        self.random_state.restore()

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Within the block all is as it was at the snapshot, after it as before the block.

        The modules see copies of the buffers: the originals are left alone, since autograd may have saved them.
        """
        buffers = [(owner, name, owner._buffers.get(name)) for owner, name, *_ in self.buffers]
        attributes = [(owner, name, getattr(owner, name)) for owner, name, _ in self.attributes]
        random_state = _RandomState(self.random_state.devices)
        copies = {id(buffer): value.clone() for _, _, buffer, value in self.buffers if value is not None}
        try:
            for owner, name, buffer, _ in self.buffers:
                owner._buffers[name] = copies.get(id(buffer))
            _set(self.attributes)
            self.random_state.restore()
            yield
        finally:
            for owner, name, buffer in buffers:
                owner._buffers[name] = buffer
            _set(attributes)
            random_state.restore()


def _set(attributes: Iterable[tuple[nn.Module, str, Any]]) -> None:
    for owner, name, value in attributes:
        setattr(owner, name, value)


class _RandomState:
    """State of PyTorch's default generators: the CPU's and those of CUDA devices."""

    def __init__(self, devices: Iterable[torch.device]):
        self.devices = {device for device in devices if device.type == "cuda"}
        self.cpu_state = torch.get_rng_state()
        self.cuda_states = {device: torch.cuda.get_rng_state(device) for device in self.devices}

    def restore(self) -> None:
        torch.set_rng_state(self.cpu_state)
        for device, state in self.cuda_states.items():
            torch.cuda.set_rng_state(state, device)
