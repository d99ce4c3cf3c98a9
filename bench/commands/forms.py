"""``python -m bench forms``: a whole ``GraphKDLoss`` step by the form of its graphs, both forms in turn.

The graph with the own node in it and a bandwidth by mean distance, and the graph over the others with a bandwidth by
number of neighbours, found in each step from that of the step before. Each is checked against its own truth first.
"""

import argparse
from dataclasses import replace

import torch
from rich.table import Table

from bench import machine, measure, report, timing
from bench import truth as oracle
from bench.cases import STEP, Case, problem
from bench.commands import common

MOST = 1.15  # what a step over the others may cost of the other form's, from LARGE on
LARGE = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 256, 1024, 4096])
    parser.add_argument("--dim", type=int, default=128, help="width of the graph embeddings")
    parser.add_argument("--stages", type=int, default=3, help="S = T")
    parser.add_argument("--neighbors", type=float, default=8.0)
    parser.add_argument("--self-weight", type=float, default=0.8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)


def run(arguments: argparse.Namespace) -> int:
    """1 if a result is wrong or a target does not hold."""
    if common.device_missing(arguments.device):
        return 0
    torch.set_num_threads(arguments.threads)
    own = Case(STEP, 1, arguments.dim, arguments.stages, device=arguments.device)
    others = replace(own, neighbors=arguments.neighbors, self_weight=arguments.self_weight)
    table = Table(title="GraphKDLoss, forward and backward (least and median of the runs, ms)", title_justify="left")
    for header in ("B", "own node", "median", "others", "median", "ratio", "of medians", "target"):
        table.add_column(header, justify="right", no_wrap=True)
    failed = False
    for batch in arguments.batch:
        rows = beside([own.at(batch), others.at(batch)], arguments.repeats)
        if wrong := [row.reason for row in rows if row.status != "ok"]:
            table.add_row(str(batch), *wrong)
            failed = True
            continue
        times = [row.forward_backward for row in rows]
        least, median = (times[1][key] / times[0][key] for key in ("least", "median"))
        target = "–" if batch < LARGE else f"≤ {MOST}: {'holds' if least <= MOST else 'does not hold'}"
        failed |= batch >= LARGE and least > MOST
        figures = [report.milliseconds(of_form[key]) for of_form in times for key in ("least", "median")]
        table.add_row(str(batch), *figures, report.ratio(least), report.ratio(median), target)
    console = report.console()
    console.print(report.describe(machine.describe(arguments.device)))
    console.print(table)
    return int(failed)


def beside(cases: list[Case], repeats: int) -> list[measure.Row]:
    """The fused backend's rows of several cases, which take turns."""
    rows = [measure.Row(case, common.DEFAULT_BACKENDS[case.device][0]) for case in cases]
    contenders = {}
    for row in rows:
        inputs = problem(row.case)
        function = measure.checked(row, inputs, oracle.truth(row.case, inputs))
        if function:
            contenders[row.case.name()] = timing.contender(inputs, function)
    times = timing.interleave(contenders, repeats, cases[0].device) if len(contenders) == len(cases) else {}
    for row in rows:
        if times:
            measure.fill_times(row, times[row.case.name()])
    return rows
