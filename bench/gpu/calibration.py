"""The model held against tiles that were timed on a GPU, and the fit of what it adds to published rates.

``bench/measured/h200_tiles.json`` has the times of one kernel in many tile sizes (some with the kernels that run with
it) and, of the binaries that ran, the clocks at published rates as :func:`bench.gpu.model.work` counts them. Every
second configuration, in the file's order, is fitted; the others tell whether the fit holds. ``h200_ops.json`` has
times of whole ops and of kernels alone, which nothing is fitted to but the time from launch to launch: how many
launches the ops made, PyTorch's copies and sums among them, and the bytes of the copies.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path

from bench.gpu import devices, model

MEASURED = Path(__file__).parents[1] / "measured" / "h200_tiles.json"
OPS = MEASURED.with_name("h200_ops.json")
NEAR = 1.2  # measured within this factor of predicted, either way
CLIPPED = 0.5  # of |log(measured / predicted)|: a far miss counts as one of this size
GRID = {
    "wait": (0, 10, 20, 30, 40),
    "shallow": (0, 50, 100, 150, 200, 250, 300, 350, 400),
    "integer": (0.7, 0.8, 0.9, 1.0),
    "apart": (0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "together": (0, 0.2, 0.4, 0.6, 0.8, 1),
    "cache": (0.8, 0.9, 1.0, 1.1),
    "exponential": (0.7, 0.8, 0.9, 1.0),
    "matrix": (0.9, 1.0, 1.1, 1.2),
}
FIRST = 3  # how far down the predicted order the fastest tile may be found


@dataclass(frozen=True)
class Launched:
    """One kernel's binary, and the grid that was launched."""

    inside: Counter[str]
    outside: Counter[str]
    warps: int
    resident: int
    programs: int
    steps: int
    launches: int
    loops: bool

    def milliseconds(self, device: devices.Device) -> float:
        inside, outside = (model.calibrated(clocks, device) for clocks in (self.inside, self.outside))
        grid = self.warps, self.resident, self.programs, self.steps
        return model.predict_clocks(inside, outside, device, *grid, self.loops).seconds * 1e3 * self.launches


@dataclass(frozen=True)
class Configuration:
    """A tile size of a kernel; ``launched`` is all that its time holds, but for what ``launches`` and copies take."""

    sweep: str  # the file it was written to
    kernel: str
    dtype: str
    dim: int
    tile: str
    milliseconds: float
    launched: tuple[Launched, ...]
    batch: int = 16_384
    launches: int = 0
    copied_bytes: int = 0

    def predicted(self, device: devices.Device) -> float:
        others = self.launches * devices.LAUNCH_SECONDS + self.copied_bytes / device.memory_bandwidth
        return sum(kernel.milliseconds(device) for kernel in self.launched) + others * 1e3

    def ratio(self, device: devices.Device) -> float:
        """Measured over predicted."""
        return self.milliseconds / self.predicted(device)


@cache
def configurations() -> tuple[Configuration, ...]:
    content, kernels = json.loads(MEASURED.read_text()), _kernels()
    return tuple(
        Configuration(**(c | {"launched": tuple(kernels[k] for k in c["launched"])})) for c in content["configurations"]
    )


@cache
def operations() -> tuple[Configuration, ...]:
    """Whole ops in the table's tiles of that time, at several batches, and kernels alone, with grids of their own."""
    kernels = _kernels()

    def launched(grids: list[dict]) -> tuple[Launched, ...]:
        return tuple(replace(kernels[g["kernel"]], programs=g["programs"], steps=g["steps"]) for g in grids)

    found = json.loads(OPS.read_text())["configurations"]
    return tuple(Configuration(**(c | {"launched": launched(c["launched"])})) for c in found)


@cache
def _kernels() -> list[Launched]:
    return [
        Launched(**(kernel | {part: Counter(kernel[part]) for part in ("inside", "outside")}))
        for kernel in json.loads(MEASURED.read_text())["kernels"]
    ]


def device() -> devices.Device:
    return next(d for d in devices.DEVICES if d.name == "H200")


def near(chosen: Iterable[Configuration], on: devices.Device) -> int:
    return sum(1 / NEAR <= c.ratio(on) <= NEAR for c in chosen)


def fit() -> devices.Calibration:
    """The point of :data:`GRID` that a search from published rates ends in, on every second configuration. It moves two
    constants at a time: one by one ends where another point is nearer.
    """
    fitted, found = configurations()[::2], devices.Calibration()
    least = _error(found, fitted)
    improved = True
    while improved:
        improved = False
        for pair in combinations(GRID, 2):
            for numbers in product(*(GRID[name] for name in pair)):
                tried = found
                for name, number in zip(pair, numbers, strict=True):
                    tried = _with(tried, name, number)
                if (error := _error(tried, fitted)) < least - 1e-6:
                    found, least, improved = tried, error, True
    return found


def _with(calibration: devices.Calibration, name: str, number: float) -> devices.Calibration:
    if name in ("wait", "shallow", "apart", "together"):
        return replace(calibration, **{name: number})
    return replace(calibration, clocks=calibration.clocks | {name: number})


def _error(calibration: devices.Calibration, chosen: tuple[Configuration, ...]) -> float:
    """Root of the mean square of the logarithms of the ratios, each clipped."""
    on = replace(device(), calibration=calibration)
    return math.sqrt(sum(min(abs(math.log(c.ratio(on))), CLIPPED) ** 2 for c in chosen) / len(chosen))


def sweeps() -> dict[tuple[str, str, int], list[Configuration]]:
    """By kernel, type and width: one of them chooses a tile."""
    found: dict[tuple[str, str, int], list[Configuration]] = {}
    for c in configurations():
        found.setdefault((c.kernel, c.dtype, c.dim), []).append(c)
    return found


def rank(sweep: list[Configuration], on: devices.Device) -> int:
    """Which place in the predicted order the fastest has."""
    fastest = min(sweep, key=lambda c: c.milliseconds)
    return 1 + sum(c.predicted(on) < fastest.predicted(on) for c in sweep)


def loss(sweep: list[Configuration], on: devices.Device) -> float:
    """The measured time of the tile predicted to be the fastest, over the fastest."""
    chosen = min(sweep, key=lambda c: c.predicted(on))
    return chosen.milliseconds / min(c.milliseconds for c in sweep)


def table() -> tuple[list[str], list[list[str]]]:
    """A line per sweep, and the counts of each half, of each file and of all."""
    on = device()
    published = replace(on, calibration=devices.Calibration())

    def counts(chosen: list[Configuration]) -> list[str]:
        return [str(len(chosen)), str(near(chosen, published)), str(near(chosen, on))]

    rows = [
        [kernel, dtype, str(dim), *counts(sweep), str(rank(sweep, on)), f"{loss(sweep, on):.2f}"]
        for (kernel, dtype, dim), sweep in sorted(sweeps().items())
    ]
    swept = list(configurations())
    everything = [*swept, *operations()]
    files = ("sweep", "sweep2", "times", "proto")
    groups = {"fitted": swept[::2], "not fitted": swept[1::2]}
    groups |= {name: [c for c in everything if c.sweep == name] for name in files} | {"all": everything}
    rows += [[name, "", "", *counts(chosen), "", ""] for name, chosen in groups.items()]
    headers = ["kernel", "type", "D", "tiles", "near, published rates", "near, calibrated", "rank of the fastest",
               "chosen / fastest"]  # fmt: skip
    return headers, rows
