"""Launches that run from their PTX on CPU tensors, in place: whole calls of backend "triton" without a GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.compiler import CompiledKernel

from gkd_fast import kernels, ops
from gkd_fast.ops import affinities
from gkd_fast.ops.neighbor_conv import composed_gradients

from ..launched import launches
from .machine import Machine
from .memory import Fault, Global
from .program import parse

_parsed = cache(parse)


@contextmanager
def compiled() -> Iterator[list[str]]:
    """Within this context launches run so; yields the names of the kernels, a launch each.

    Raises ``Fault`` at an access out of bounds and at a hazard.
    """
    names: list[str] = []

    def take(kernel: CompiledKernel, grid: tuple[int, int, int], values: list[Any]) -> None:
        names.append(kernel.metadata.name)
        run(kernel, grid, values)

    with launches(take):
        yield names


def run(kernel: CompiledKernel, grid: tuple[int, int, int], values: list[Any]) -> None:
    memory, program = Global(), _parsed(kernel.asm["ptx"])
    kinds = list(kernel.src.signature.values())
    arguments = [_bits(v, k, memory) for value, kind in zip(values, kinds, strict=True) for v, k in _flat(value, kind)]
    for z, y, x in np.ndindex(grid[::-1]):
        machine = Machine(program, arguments, memory, max(kernel.metadata.shared, 16), (x, y, z), grid)
        try:
            machine.run()
        except Fault as fault:
            raise Fault(f"{program.name}, program {(x, y, z)}: {fault}") from None
        if machine.hazards:
            raise Fault(f"{program.name}, program {(x, y, z)}: {sorted(machine.hazards)}")


def _flat(value: Any, kind: Any) -> Iterator[tuple[Any, str]]:
    """An argument's parts with their types, without those that were compiled in."""
    if isinstance(kind, (tuple, list)):
        for v, k in zip(value, kind, strict=True):
            yield from _flat(v, k)
    elif kind != "constexpr":
        yield value, kind


def _bits(value: Any, kind: str, memory: Global) -> int:
    if kind.startswith("*"):
        return memory.hold(value) if isinstance(value, torch.Tensor) else int(value or 0)
    if kind in ("fp32", "f32"):
        return int(np.float32(value).view(np.uint32))
    if kind in ("fp64", "f64"):
        return int(np.float64(value).view(np.uint64))
    return int(value) % 2**64


@contextmanager
def triton_on_cpu() -> Iterator[list[str]]:
    """As ``compiled``, for backend "triton" of the public functions: their ops' CPU kernels are the launchers."""
    library = torch.library.Library("gkd_fast", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch tells that a kernel is overridden
            for name, launcher in kernels.OPS.items():
                library.impl(name, launcher, "CPU")
            # Devices without a kernel of it take what it is composed of.
            library.impl("neighbor_conv_gradients", composed_gradients, "CPU")
        with (
            mock.patch.object(ops, "missing", lambda backend, device: None),
            mock.patch.object(affinities, "keeps", lambda *_: False),
            compiled() as names,
        ):
            yield names
    finally:
        library._destroy()
