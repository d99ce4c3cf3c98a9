"""The standard table: which cases are measured beside which backends, and the targets that they are held against."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from bench import machine
from bench.cases import STEP, Case
from bench.measure import Row
from bench.results import Results

RELATION = Case("relation_kl", 1)
NODE = Case("node_contrast", 1)
SYMMETRIC = Case("graph_conv", 1, normalization="symmetric")
ROW = Case("graph_conv", 1, normalization="row")
OPS = (RELATION, NODE, SYMMETRIC, ROW)
BFLOAT16_BATCH = 4096
EAGER = "eager"
FUSED = "cpp"


def cases() -> dict[Case, list[str]]:
    """Every case of the table with its backends (eager comes with each), sizes ascending within an op."""
    table = {}
    for op in OPS:
        peers = [FUSED, "compile", *(["attention"] if op is ROW else [])]
        for batch in (64, 256, 1024, 4096, 8192, 16384):
            extra = ["published", "reference"] if batch in (1024, 4096) else []
            table[op.at(batch)] = [*peers, *extra]
    for op in (RELATION, NODE):
        table[replace(op, stages=3).at(4096)] = [FUSED, "compile"]
    table[replace(RELATION, dim=512).at(4096)] = [FUSED, "compile"]
    for op in OPS:
        table[replace(op, dtype="bfloat16").at(BFLOAT16_BATCH)] = [FUSED]
    for op in OPS:
        table[replace(op, order=2).at(8192)] = [FUSED]
    table[Case(STEP, 4096, stages=3)] = [FUSED]
    return table


@dataclass(frozen=True)
class Target:
    """``value(results)`` must be at least (or, with ``at_most``, at most) ``limit``."""

    work: str
    wanted: str
    limit: float
    value: Callable[[Results], float]
    at_most: bool = False
    unit: str = "×"

    def measured(self, results: Results) -> tuple[str, str]:
        """(the figure, "holds" / "does not hold"), or why there is none."""
        try:
            value = self.value(results)
        except Missing as reason:
            return str(reason), "not measured"
        holds = value <= self.limit if self.at_most else value >= self.limit
        figure = f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"
        return f"{figure} {self.unit}".strip(), "holds" if holds else "does not hold"


class Missing(Exception):
    """Why a target has no figure."""


def targets() -> list[Target]:
    found = []
    for batch in (8192, 16384):
        found.append(_faster(RELATION.at(batch), 13))
    found.append(_faster(RELATION.at(16384), 6, "compile"))
    for batch in (8192, 16384):
        found.append(_near_floor(RELATION.at(batch), 1.2))
    found += [_faster(replace(RELATION, stages=3).at(4096), 12), _faster(RELATION.at(1024), 4)]
    found.append(_faster(replace(RELATION, dim=512).at(4096), 3))
    found += [_faster(NODE.at(8192), 3), _faster(replace(NODE, stages=3).at(4096), 3.2)]
    found += [_faster(SYMMETRIC.at(8192), 1.8), _faster(SYMMETRIC.at(16384), 2.1)]
    found.append(_faster(ROW.at(16384), 1.3, "attention"))
    found += [_bfloat16(op.at(BFLOAT16_BATCH), 2) for op in OPS]
    found += [_faster(op.at(batch), 1) for op in OPS for batch in (64, 256)]
    found += [_little_memory(op.at(16384), 64) for op in OPS]
    step = Case(STEP, 4096, stages=3)
    found += [_faster(step, 4, "reference"), _less_memory(step, 20, "reference")]
    for op, speed, memory in ((RELATION, 6, 20), (NODE, 3, 20), (SYMMETRIC, 1.6, 10), (ROW, 1.6, 10)):
        second = replace(op, order=2).at(8192)
        found += [_faster(second, speed), _less_memory(second, memory)]
    return found


def _row(results: Results, case: Case, backend: str) -> Row:
    row = results.row(case, backend)
    if row is None:
        raise Missing("not measured yet")
    if row.status != "ok":
        raise Missing(f"{backend}: {row.status}: {row.reason}")
    return row


def _peak(results: Results, case: Case, backend: str) -> int:
    row = _row(results, case, backend)
    if row.peak_bytes is None:
        raise Missing(f"{backend}: memory not measured{f': {row.memory_reason}' if row.memory_reason else ''}")
    return row.peak_bytes


def _faster(case: Case, limit: float, peer: str = EAGER) -> Target:
    def value(results: Results) -> float:
        return _row(results, case, peer).least() / _row(results, case, FUSED).least()

    return Target(case.name(), f"≥ {limit} × {peer}", limit, value)


def _near_floor(case: Case, limit: float) -> Target:
    def value(results: Results) -> float:
        return _row(results, case, FUSED).least() / _row(results, case, "floor").least()

    return Target(case.name(), f"≤ {limit} × product floor", limit, value, at_most=True)


def _bfloat16(case: Case, limit: float) -> Target:
    """Inputs in bfloat16 against the same op's own float32."""

    def value(results: Results) -> float:
        if not machine.has_bfloat16_matrix_units(results.machine):
            raise Missing("this CPU has no bfloat16 matrix units")
        low = replace(case, dtype="bfloat16")
        return _row(results, case, FUSED).least() / _row(results, low, FUSED).least()

    return Target(f"{case.name()} → bfloat16", f"≥ {limit} × its own float32", limit, value)


def _little_memory(case: Case, limit: float) -> Target:
    def value(results: Results) -> float:
        return _peak(results, case, FUSED) / 1e6

    return Target(f"{case.name()}, extra peak memory", f"≤ {limit} MB", limit, value, at_most=True, unit="MB")


def _less_memory(case: Case, divisor: float, peer: str = EAGER) -> Target:
    def value(results: Results) -> float:
        return _peak(results, case, FUSED) / _peak(results, case, peer)

    return Target(f"{case.name()}, extra peak memory", f"≤ 1/{divisor} of {peer}", 1 / divisor, value, at_most=True)
