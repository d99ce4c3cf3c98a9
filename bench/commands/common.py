"""What the commands that measure chosen cases share: arguments, and measuring, printing and keeping the rows."""

import argparse
from pathlib import Path

import torch

from bench import cases, machine, measure, plot, report
from bench.gpu import expected
from bench.results import load_or_new

DEFAULT_BACKENDS = {"cpu": ["cpp"], "cuda": ["triton", "compile", "attention"]}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="rows are added to this file, replacing those of the same case")
    parser.add_argument("--plot", type=Path, help="PNG of time and memory against batch size")


def measure_all(arguments: argparse.Namespace, chosen: list[cases.Case]) -> int:
    """Measures the cases, prints a table of each, and writes what was asked for; 1 if a result was wrong."""
    if device_missing(arguments.device):
        return 0
    torch.set_num_threads(arguments.threads)
    described = machine.describe(arguments.device)
    results = load_or_new(arguments.json, described, arguments.repeats)
    console = report.console()
    console.print(report.describe(described))
    backends = arguments.backend or DEFAULT_BACKENDS[arguments.device]
    measured = []
    for case in chosen:
        rows = measure.time_case(case, backends, arguments.repeats)
        if not arguments.no_memory:
            measure.measure_memory(rows)
        console.print(report.case_table(case, rows))
        for line in remarks(rows, described):
            console.print(line)
        measured += rows
        results.add(rows)
        if arguments.json:
            results.save(arguments.json)
    if arguments.plot:
        plot.draw(measured, arguments.plot, report.describe(described))
        console.print(f"drawn: {arguments.plot}")
    return 1 if any(row.status == "wrong" for row in measured) else 0


def device_missing(device: str) -> bool:
    """Says so and returns True if the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device here (torch.cuda.is_available() is False)")
        return True
    return False


def remarks(rows: list[measure.Row], described: dict) -> list[str]:
    """On a GPU the fused kernels' times beside the predicted ones."""
    if "gpu" not in described or not any(row.backend == "triton" and row.status == "ok" for row in rows):
        return []
    return expected.remarks(rows, described["gpu"])
