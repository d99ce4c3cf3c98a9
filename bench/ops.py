"""``python -m bench ops``: the ops at chosen sizes, every backend side by side."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from bench import cases, machine, measure, peers, plot, report
from bench.results import load_or_new

DEFAULT_BACKENDS = {"cpu": ["cpp"], "cuda": ["triton", "compile", "attention"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", choices=cases.OPS, default=list(cases.OPS))
    parser.add_argument("--normalization", nargs="+", choices=cases.NORMALIZATIONS, default=["symmetric"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--dim", nargs="+", type=int, default=[128])
    parser.add_argument("--stages", nargs="+", type=int, default=[1], help="S = T; graph_conv has none")
    parser.add_argument("--dtype", nargs="+", choices=cases.DTYPES, default=["float32"])
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="highest")
    parser.add_argument("--order", type=int, choices=(1, 2), default=1, help="2: the double backward alone")
    parser.add_argument("--backend", nargs="+", choices=peers.BACKENDS, help="eager is always measured as well")
    parser.add_argument("--no-memory", action="store_true", help="measure no memory (one process per backend)")
    add_common_arguments(parser)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="rows are added to this file, replacing those of the same case")
    parser.add_argument("--plot", type=Path, help="PNG of time and memory against batch size")


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
    from bench.gpu import expected

    return expected.remarks(rows, described["gpu"])


def chosen_cases(arguments: argparse.Namespace) -> list[cases.Case]:
    found = []
    for op in arguments.op:
        normalizations = arguments.normalization if op == "graph_conv" else [None]
        stage_counts = [1] if op == "graph_conv" else arguments.stages
        for normalization in normalizations:
            for stages in stage_counts:
                for dtype in arguments.dtype:
                    for dim in arguments.dim:
                        base = cases.Case(op, 1, dim, stages, normalization, dtype)
                        base = replace(
                            base, device=arguments.device, order=arguments.order, precision=arguments.precision
                        )
                        found += [base.at(batch) for batch in arguments.batch]
    return found


def run(arguments: argparse.Namespace) -> int:
    return measure_all(arguments, chosen_cases(arguments))


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
