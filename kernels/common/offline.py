"""Kernels for a GPU that is not here: compiled as if launched, and never run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from gkd_fast.kernels.common import launch, table

# What a kernel may use is compared with this when it is loaded; the largest of today's GPUs.
SHARED_MEMORY = 256 * 2**10


class Offline:
    """A Triton driver for an architecture: it compiles for it and counts launches instead of making them.

    Attributes:
        compiled: the kernels that were made ready, in order, by name.
        launched: the launches, in order, by the kernel's name.
    """

    def __init__(self, arch: str):
        self.target = target(arch)
        self.compiled: list[str] = []
        self.launched: list[str] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.compiled.append(name)
        # No module: there is nothing to unload.
        return None, 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any):
        return lambda *_: self.launched.append(metadata.name)


def target(arch: str) -> GPUTarget:
    """Triton's name of an architecture ("sm_90", "gfx942")."""
    if arch not in table.MULTIPROCESSORS:
        raise ValueError(f"arch must be one of {tuple(table.MULTIPROCESSORS)}, got {arch!r}")
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@contextmanager
def offline(arch: str) -> Iterator[Offline]:
    """Within this context Triton compiles for ``arch`` and runs nothing; launches take CPU tensors.

    In a process that has no GPU: Triton keeps what it compiled by device number, whatever the driver.
    """
    before = driver._active, launch.stand_in
    driver.set_active(Offline(arch))
    launch.stand_in = arch
    try:
        yield driver.active
    finally:
        driver._active, launch.stand_in = before
