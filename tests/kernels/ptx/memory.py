"""The memories that a program sees, with the checks: bounds, and accesses that no barrier orders."""

import ctypes
from collections.abc import Iterable

import numpy as np
import torch

Array = np.ndarray


class Fault(Exception):
    """An access outside what the program was given, or an instruction that this machine does not know."""


class Global:
    """The storages of the tensors of a launch, at their real addresses."""

    def __init__(self):
        self._buffers: dict[int, Array] = {}

    def hold(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            raw = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
            self._buffers[storage.data_ptr()] = np.frombuffer(raw, np.uint8)
        return tensor.data_ptr()

    def load(self, address: Array, size: int) -> Array:
        """``[count, size]`` bytes."""
        found = np.empty((len(address), size), np.uint8)
        for which, raw, first in self._places(address, size, "load"):
            found[which] = raw[first[:, None] + np.arange(size)]
        return found

    def store(self, address: Array, data: Array) -> None:
        for which, raw, first in self._places(address, data.shape[1], "store"):
            raw[first[:, None] + np.arange(data.shape[1])] = data[which]

    def _places(self, address: Array, size: int, what: str) -> Iterable[tuple[Array, Array, Array]]:
        if (address % size).any():
            raise Fault(f"{what} of {size} bytes at {int(address[(address % size).argmax()]):#x}, which is not aligned")
        left = np.ones(len(address), bool)
        for base, raw in self._buffers.items():
            inside = (address >= base) & (address + np.uint64(size) <= base + len(raw))
            if inside.any():
                left &= ~inside
                yield inside, raw, (address[inside] - np.uint64(base)).astype(np.int64)
        if left.any():
            wrong = int(address[left][0])
            near = {hex(base): len(raw) for base, raw in self._buffers.items() if abs(wrong - base) < 2**20}
            raise Fault(f"{what} of {size} bytes at {wrong:#x}, outside all buffers; near it: {near}")


class Shared:
    """The memory of a program's threads, which only barriers order.

    ``hazards`` says what happened out of order: a read of what another warp wrote, a write over what another read or
    over what a product in flight reads, and the matrix units' read of ordinary stores without a proxy fence.
    """

    def __init__(self, size: int):
        self.raw = np.full(size, 0xFF, np.uint8)  # NaN in every floating-point type
        self.hazards: set[str] = set()
        self._writer = np.full(size, -1, np.int64)
        self._readers = np.zeros(size, np.int64)
        self._unfenced = np.zeros(size, bool)
        # Places that products read which nobody has waited for, by committed group, and their warps.
        self._flying: list[tuple[Array, int]] = []
        self._open: list[tuple[Array, int]] = []

    def places(self, address: Array, size: int) -> Array:
        """``[count, size]``: the indices of the bytes."""
        first = (address & np.uint64(0xFFFFFFFF)).astype(np.int64)
        if (first + size > len(self.raw)).any():
            raise Fault(f"{size} bytes of shared memory at {first.max()}, of {len(self.raw)}")
        if (first % size).any():
            raise Fault(f"{size} bytes of shared memory at {first[(first % size).argmax()]}, which is not aligned")
        return first[:, None] + np.arange(size)

    def load(self, places: Array, warps: Array, at: str) -> Array:
        for warp in np.unique(warps):
            self._read(places[warps == warp], 1 << int(warp), at)
        return self.raw[places]

    def store(self, places: Array, data: Array, warps: Array, at: str, ordinary: bool = True) -> None:
        self.claim(places, warps, at)
        self.raw[places] = data
        self._writer[places] = warps[:, None]
        self._unfenced[places] = ordinary

    def claim(self, places: Array, warps: Array, at: str) -> None:
        """The places are about to be written."""
        if (self._readers[places] & ~(1 << warps)[:, None]).any():
            self.hazards.add(f"write over what another warp reads, no barrier between: {at}")
        if any(mask[places].any() for mask, _ in (*self._flying, *self._open)):
            self.hazards.add(f"write over what a product in flight reads: {at}")

    def load_operand(self, places: Array, warps: int, at: str) -> Array:
        """Of a matrix product, by all the warps of a group (as bits); it lasts until the product is waited for."""
        self._read(places, warps, at)
        if self._unfenced[places].any():
            self.hazards.add(f"the matrix unit reads ordinary stores without fence.proxy.async: {at}")
        mask = np.zeros(len(self.raw), bool)
        mask[places] = True
        self._open.append((mask, warps))
        return self.raw[places]

    def _read(self, places: Array, warps: int, at: str) -> None:
        writer = self._writer[places]
        own = (warps >> np.maximum(writer, 0)) & 1
        # A group reads what each of its warps wrote: only with a barrier.
        others = (writer >= 0) & ((own == 0) | (warps.bit_count() > 1))
        if others.any():
            self.hazards.add(f"read of what another warp wrote, no barrier between: {at}")
        self._readers[places] |= warps

    def fence(self) -> None:
        self._unfenced[:] = False

    def commit(self) -> None:
        mask, warps = np.zeros(len(self.raw), bool), 0
        for places, group in self._open:
            mask |= places
            warps |= group
        self._flying.append((mask, warps))
        self._open = []

    def wait(self, left: int) -> None:
        while len(self._flying) > left:
            mask, warps = self._flying.pop(0)
            self._readers[mask] |= warps

    def barrier(self) -> None:
        self._writer[:] = -1
        self._readers[:] = 0
        for mask, warps in self._flying:
            self._readers[mask] |= warps
