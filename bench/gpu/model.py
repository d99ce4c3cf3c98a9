"""The issue-slot model: a kernel's predicted time on a device, from its disassembly and published ceilings alone.

A step of a program's loop keeps each unit busy for c_u clocks (:mod:`bench.gpu.units`). The units that a program
uses in turn do not overlap within it; programs that share a multiprocessor run out of step, so that each one
beyond the first adds only what it does on the busiest unit:

    step(k) = max( A + shallow + max((k − 1) · max c_u, waits),  k · max c_u,  k · max c_v ),
    A = (1 − a) · Σ c_u + a · max( (Σ c_u + (g − 1) · max c_u) / g,  issue ),
    u: units used in turn, v: units that work beside

which is the makespan of k equal jobs through a line of stations; max c_u includes the issue slots, which all
instructions share. The g groups of four warps of a program, which meet at every step, are such jobs for a share a of
it (0 without calibration). A program's waits pass unseen where the others keep the busiest unit busy meanwhile. The
clocks are the published ones, times the factors of the device's calibration if it has one. That also says what share of
a step's bytes from the second-level cache comes once for all k, which walk over the same columns. What stands outside
the loop is passed once, in the same way, and its loads are each program's own. Programs come in
whole waves: time = Σ over waves of (once(k) + steps · step(k)), where the last wave may hold fewer programs per
multiprocessor.
A kernel without a loop of products reads and writes memory, not the cache. Not counted: a launch (some microseconds,
less within a CUDA graph), the first load's latency, clocks below the published boost clock.
"""

from collections import Counter
from dataclasses import dataclass

from bench.gpu import units
from bench.gpu.devices import Device
from bench.gpu.disassembly import Binary

GROUP_WARPS = 4  # that issue a product together


@dataclass(frozen=True)
class Prediction:
    seconds: float
    limit: str  # the unit that the time depends on most
    busy: float  # the share of the time for which it is
    resident: int  # programs per multiprocessor in a full wave
    waves: int


class DoesNotFit(ValueError):
    """Not even one program fits on a multiprocessor of the device."""


def predict(binary: Binary, device: Device, programs: int, steps: int) -> Prediction:
    """The time of one launch of ``programs`` programs of ``steps`` steps each."""
    resident = binary.resident_programs()
    if not resident:
        raise DoesNotFit(
            f"{binary.registers} registers × {binary.warps} warps, {binary.shared_bytes} bytes on {device.name}"
        )
    inside, outside = (calibrated(clocks, device) for clocks in work(binary, device))
    return predict_clocks(inside, outside, device, binary.warps, resident, programs, steps, bool(binary.step))


def predict_clocks(
    inside: Counter[str],
    outside: Counter[str],
    device: Device,
    warps: int,
    resident: int,
    programs: int,
    steps: int,
    loops: bool,
) -> Prediction:
    """The same from calibrated clocks; ``loops``: whether there is a loop of products."""
    per_wave = device.multiprocessors * resident
    full_waves, rest = divmod(programs, per_wave)
    waves = [resident] * full_waves
    if rest:
        waves.append(-(-rest // device.multiprocessors))
    line = max(warps // GROUP_WARPS, 1), device.calibration.apart
    cycles = sum(makespan(outside, k, *line) + steps * makespan(_together(inside, k, device), k, *line) for k in waves)
    if not loops:
        published = outside["cache"] / device.calibration.clocks.get("cache", 1)
        memory = published * device.cache_bandwidth / device.memory_bandwidth
        cycles = max(cycles, memory * programs / device.multiprocessors)
    limit = limiting_unit(_together(inside, waves[0], device) if loops else outside, waves[0])
    busy = (inside[limit] * steps + outside[limit]) * programs / device.multiprocessors / cycles
    return Prediction(device.seconds(cycles), limit, busy, resident, len(waves))


def work(binary: Binary, device: Device) -> tuple[Counter[str], Counter[str]]:
    """Clocks by unit of one program at published rates, and a step's waits: (in one step of the loop, outside it)."""
    inside, outside = units.waiting(binary), Counter()
    for in_loop, clocks in units.walk(binary, device):
        (inside if in_loop else outside).update(clocks)
    return inside, outside


def calibrated(clocks: Counter[str], device: Device) -> Counter[str]:
    """Clocks by unit as the device's measured times have them, and clocks of ``waits`` and ``shallow``."""
    calibration = device.calibration
    per_count = calibration.clocks | {"waits": calibration.wait, "shallow": calibration.shallow}
    return Counter({unit: amount * per_count.get(unit, 1) for unit, amount in clocks.items()})


def _together(clocks: Counter[str], programs: int, device: Device) -> Counter[str]:
    """A step's clocks where a share of the loads of ``programs`` programs comes once."""
    own = 1 - device.calibration.together * (programs - 1) / programs
    return Counter({**clocks, "cache": own * clocks["cache"]})


def makespan(clocks: Counter[str], programs: int, groups: int = 1, apart: float = 0) -> float:
    """``programs`` equal jobs of ``groups`` groups through the units: see the head of this file."""
    beside = max(clocks[unit] for unit in units.BESIDE)
    return max(_in_turn(clocks, programs, groups, apart), programs * beside)


def limiting_unit(clocks: Counter[str], programs: int) -> str:
    """The busiest of the units that the makespan depends on."""
    beside = max(units.BESIDE, key=lambda unit: clocks[unit])
    if programs * clocks[beside] > _in_turn(clocks, programs):
        return beside
    return max((*units.TURNS, "issue"), key=lambda unit: clocks[unit])


def _in_turn(clocks: Counter[str], programs: int, groups: int = 1, apart: float = 0) -> float:
    in_turn = [clocks[unit] for unit in units.TURNS]
    busiest = max(*in_turn, clocks["issue"])
    out_of_step = max((sum(in_turn) + (groups - 1) * max(in_turn)) / groups, busiest)
    alone = (1 - apart) * sum(in_turn) + apart * out_of_step + clocks["shallow"]
    return max(alone + max((programs - 1) * busiest, clocks["waits"]), programs * busiest)
