"""``python -m bench picture``: time and memory of a whole step against the batch size, from figures measured before."""

import argparse
import json
from pathlib import Path

MEASURED = Path(__file__).parents[1] / "measured" / "h200_step.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--measured", type=Path, default=MEASURED, help="JSON: device, software, work, lines")
    parser.add_argument("--output", type=Path, default=Path("docs/time_memory.png"))


def run(arguments: argparse.Namespace) -> None:
    draw(json.loads(arguments.measured.read_text()), arguments.output)


def draw(measured: dict, path: Path) -> None:
    """Writes a PNG: a panel for time and one for memory, log-log, a line for each way to compute; the device's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    batches = sorted({int(batch) for line in measured["lines"].values() for batch in line["milliseconds"]})
    for axis, unit, title in ((axes[0], "milliseconds", "time [ms]"), (axes[1], "megabytes", "memory [MB]")):
        for index, (name, line) in enumerate(measured["lines"].items()):
            if unit in line:
                points = sorted((int(batch), value) for batch, value in line[unit].items())
                axis.plot(*zip(*points), marker="o", color=f"C{index}", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
        axis.set(xlabel="batch size", title=title)
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize="small")
    axes[1].set_xlim(axes[0].get_xlim())
    figure.suptitle(f"{measured['device']}: {measured['work']} ({measured['software']})", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
