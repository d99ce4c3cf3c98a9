"""One case measured: each backend's result checked first, then times, interleaved, and memory, apart."""

import gc
from dataclasses import dataclass, field

import torch

from bench import floor, memory, peers, timing
from bench import truth as oracle
from bench.cases import Case, Problem, problem


@dataclass
class Row:
    """What one backend did in one case. ``status`` is "ok", or why there is no time: "wrong", "skipped", "refused"."""

    case: Case
    backend: str
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    forward: dict | None = None
    forward_backward: dict | None = None
    double_backward: dict | None = None
    peak_bytes: int | None = None
    memory_reason: str = ""
    speedup: float | None = None
    floor_ratio: float | None = None
    commit: str = ""
    details: dict = field(default_factory=dict)

    def headline(self) -> dict | None:
        """The times that are compared: forward and backward, or the double backward."""
        return self.double_backward if self.case.order == 2 else self.forward_backward

    def least(self) -> float | None:
        return self.headline()["least"] if self.headline() else None


def time_case(case: Case, backends: list[str], repeats: int) -> list[Row]:
    """A row for each backend, the base of the speed-ups always among them, and one called "floor" for an op."""
    backends = list(dict.fromkeys([*backends, case.base()]))
    torch.set_float32_matmul_precision(case.precision)
    torch.compiler.reset()
    if case.device == "cpu":
        memory.limit_to_available()
    inputs = problem(case)
    expected = oracle.truth(case, inputs)
    rows = {backend: Row(case, backend) for backend in backends}
    functions = {backend: function for backend in backends if (function := checked(rows[backend], inputs, expected))}
    del expected
    contenders = {backend: timing.contender(inputs, function) for backend, function in functions.items()}
    floor_contenders = floor.contenders(case) if floor.has_floor(case) else {}
    for run in floor_contenders.values():
        run(timing.Clock(case.device))
    times = timing.interleave(contenders | floor_contenders, repeats, case.device)
    for backend in functions:
        fill_times(rows[backend], times[backend])
    if floor_contenders:
        rows["floor"] = _floor_row(case, times)
    for row in rows.values():
        _fill_ratios(row, rows)
    return list(rows.values())


def measure_memory(rows: list[Row], again: bool = False) -> None:
    """Fills in the extra peak memory of the rows whose results were right, one process after the other."""
    gc.collect()
    for row in rows:
        known = row.peak_bytes is not None or row.memory_reason
        if row.status != "ok" or row.backend == "floor" or (known and not again):
            continue
        row.memory_reason = ""
        try:
            row.peak_bytes = memory.measure(row.case, row.backend, torch.get_num_threads())
        except memory.MemoryUnknown as error:
            row.memory_reason = str(error)


def checked(row: Row, inputs: Problem, expected: dict[str, torch.Tensor]):
    """The backend's function if its results are right; else None, and the row says why."""
    case = row.case
    try:
        function = peers.build(row.backend, case)
        found = oracle.errors(inputs.results(function), expected)
    except peers.Unavailable as error:
        row.status, row.reason = "skipped", str(error)
        return None
    except Exception as error:  # whatever a peer raises is its answer, and is shown
        row.status, row.reason = _refusal(error)
        return None
    row.error = max(found.values())
    row.details["errors"] = found
    if row.error <= oracle.tolerance(case):
        return function
    worst = max(found, key=found.get)
    row.status = "wrong"
    row.reason = f"{worst} is off by {found[worst]:.1e} of its largest entry, allowed {oracle.tolerance(case):.0e}"
    return None


def _refusal(error: Exception) -> tuple[str, str]:
    message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "skipped", "needs more memory than is available here"
    return "refused", message


def fill_times(row: Row, parts: list[timing.Samples]) -> None:
    if row.case.order == 2:
        row.double_backward = parts[0].summary()
        return
    forward, backward = parts
    both = timing.Samples([f + b for f, b in zip(forward.seconds, backward.seconds)])
    row.forward, row.forward_backward = forward.summary(), both.summary()


def _floor_row(case: Case, times: dict[str, list[timing.Samples]]) -> Row:
    names = [name for name in times if name.startswith("floor ")]
    least = {name: times[name][0].summary()["least"] for name in names}
    forward, both = floor.floor_seconds(case, least)
    row = Row(case, "floor", forward={"least": forward}, forward_backward={"least": both})
    row.details = {"products": {name.removeprefix("floor "): seconds for name, seconds in least.items()}}
    row.details["units"] = [part.units() for part in floor.products(case)]
    return row


def _fill_ratios(row: Row, rows: dict[str, Row]) -> None:
    if row.least() is None:
        return
    base = rows[row.case.base()].least()
    if base is not None:
        row.speedup = base / row.least()
    if "floor" in rows:
        row.floor_ratio = row.least() / rows["floor"].least()
