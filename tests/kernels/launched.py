"""What the launchers launch on Hopper, without a GPU: CPU tensors go in, compiled kernels are handed over."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import CompiledKernel

from gkd_fast.kernels.common.launcher import Launch
from gkd_fast.kernels.common.offline import offline

HOPPER = 90

# What becomes of a launch: (kernel, grid, all arguments in the kernel's order).
Take = Callable[[CompiledKernel, tuple[int, int, int], list[Any]], None]


@contextmanager
def launches(take: Take) -> Iterator[None]:
    """Within this context every launch is compiled for sm_90 and given to ``take``."""

    def call(self: Launch, grid: tuple[int, ...], *arguments: Any) -> None:
        kernel = self.kernel.warmup(*arguments, grid=grid, **self.constants)
        take(kernel, (*grid, 1, 1)[:3], [*arguments, *self._values])

    with offline(f"sm_{HOPPER}"), mock.patch.object(Launch, "__call__", call):
        yield


def ptxas_version() -> tuple[int, int]:
    """Of the assembler that Triton uses for Hopper."""
    major, minor = re.match(r"(\d+)\.(\d+)", get_ptxas(HOPPER).version).groups()
    return int(major), int(minor)


def assembler() -> str:
    major, minor = ptxas_version()
    return f"ptxas {major}.{minor} of Triton {triton.__version__}"
