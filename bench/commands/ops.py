"""``python -m bench ops``: the ops at chosen sizes, every backend side by side."""

import argparse
from dataclasses import replace

from bench import cases, peers
from bench.commands import common


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
    common.add_common_arguments(parser)


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
    return common.measure_all(arguments, chosen_cases(arguments))
