"""``python -m bench scaling``: memory, traffic and arithmetic per rank of the graph terms, by formula, at any size."""

import argparse
from pathlib import Path

from bench.report import console, markdown_table, write_section
from bench.scaling import Step, memory, products, ring_from, traffic

RANKS = (1, 8, 64, 1024)
BATCHES = (2**14, 2**16, 2**18, 2**20, 2**22)
# Published link and matrix rates per GPU: 8 × 400 Gb/s network cards per 8-GPU node; bfloat16 matrix units of an H100.
LINK_BYTES_PER_SECOND = 50e9
MATRIX_FLOPS = 600e12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", type=Path, help="rewrites the table of this file")
    parser.add_argument("--plot", type=Path, help="PNG of the three against the global batch")


def run(arguments: argparse.Namespace) -> int:
    rows = [table_row(Step(batch, ranks)) for batch in BATCHES for ranks in RANKS]
    headers = ["global batch", "GPUs", "columns", "memory MB", "traffic MB", "link ms", "product TFLOP", "matrix ms"]
    content = markdown_table(headers, rows)
    console().print(content)
    if arguments.markdown:
        write_section(arguments.markdown, "scaling", content)
    if arguments.plot:
        draw(arguments.plot)
    return 0


def table_row(step: Step) -> list[str]:
    columns = "own" if step.ranks == 1 else "ring" if step.batch >= ring_from(step) else "gathered"
    sent, flops = traffic(step), products(step)
    return [
        f"{step.batch:,}", f"{step.ranks:,}", columns, f"{memory(step) / 1e6:,.0f}", f"{sent / 1e6:,.0f}",
        f"{sent / LINK_BYTES_PER_SECOND * 1e3:,.2f}", f"{flops / 1e12:,.2f}", f"{flops / MATRIX_FLOPS * 1e3:,.2f}",
    ]  # fmt: skip


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"memory [MB]": (memory, 1e6), "traffic [MB]": (traffic, 1e6), "products [TFLOP]": (products, 1e12)}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.8), layout="constrained")
    batches = [2**k for k in range(14, 23)]
    for axis, (label, (quantity, scale)) in zip(axes, panels.items()):
        for color, ranks in enumerate(RANKS):
            values = [quantity(Step(batch, ranks)) / scale for batch in batches]
            if any(values):
                axis.plot(batches, values, marker=".", color=f"C{color}", label=f"{ranks:,} GPUs")
        axis.axvline(ring_from(Step(1, 2)), color="grey", linestyle=":", label="losses: ring from here")
        axis.set(xlabel="global batch", title=f"{label} per GPU and step")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.suptitle(
        "GraphKDLoss, S = T = 3, width 128, float32, from the formulas of bench/scaling.py", fontsize="small"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
