"""Time and memory against batch size, log-log: a row of panels for each op, a line for each backend."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend is chosen first)

from bench.cases import Case  # noqa: E402
from bench.measure import Row  # noqa: E402
from bench.peers import BACKENDS  # noqa: E402

STYLES = {name: f"C{index}" for index, name in enumerate(BACKENDS)}


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Writes a PNG. Cases that differ in batch size alone share a panel; a case measured at one size gets none."""
    panels: dict[Case, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.status == "ok":
            panels[replace(row.case, batch=1)][row.backend].append(row)
    panels = {key: lines for key, lines in panels.items() if max(map(len, lines.values())) > 1} or panels
    size = (11, 3.4 * len(panels) + 0.6)
    figure, axes = pyplot.subplots(len(panels), 2, figsize=size, squeeze=False, layout="constrained")
    for (time_axis, memory_axis), (key, lines) in zip(axes, panels.items()):
        _panel(time_axis, lines, lambda row: row.least() and row.least() * 1000)
        _panel(memory_axis, lines, lambda row: row.peak_bytes and row.peak_bytes / 1e6)
        work = "double backward" if key.order == 2 else "forward + backward"
        time_axis.set(title=_title(key), ylabel=f"{work} [ms]")
        memory_axis.set(title="extra peak memory", ylabel="MB beyond inputs, outputs, gradients")
        time_axis.legend(fontsize="small")
    figure.suptitle(title, fontsize="small", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _title(case: Case) -> str:
    return case.name().replace(" B=1 ", " ")


def _panel(axis, lines: dict[str, list[Row]], value) -> None:
    batches = sorted({row.case.batch for rows in lines.values() for row in rows})
    for backend, rows in lines.items():
        points = sorted((row.case.batch, value(row)) for row in rows if value(row))
        if points:
            style = {"color": "black", "linestyle": ":"} if backend == "floor" else {"color": STYLES[backend]}
            label = "product floor" if backend == "floor" else backend
            axis.plot(*zip(*points), marker="." if backend == "floor" else "o", label=label, **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axis.set_xlabel("batch size")
    axis.grid(True, which="both", alpha=0.3)
