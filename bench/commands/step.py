"""``python -m bench step``: forward and backward of a whole ``GraphKDLoss``, fused against the reference backend.

The loss is measured like an op: its parameters and the student's features are the inputs with gradient
(:mod:`bench.cases`). The float64 truth is the loss itself with its three functions computed on strips
(:mod:`bench.truth`). Graphs have their own nodes in them; ``python -m bench forms`` sets the default graph beside them.
"""

import argparse

from bench.cases import STEP, Case
from bench.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", nargs="+", type=int, default=[4096])
    parser.add_argument("--dim", type=int, default=128, help="width of the graph embeddings")
    parser.add_argument("--stages", type=int, default=3, help="S = T")
    parser.add_argument("--backend", nargs="+", choices=("cpp", "triton"), help="reference is always measured as well")
    parser.add_argument("--no-memory", action="store_true", help="measure no memory (one process per backend)")
    common.add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    base = Case(STEP, 1, arguments.dim, arguments.stages, device=arguments.device)
    return common.measure_all(arguments, [base.at(batch) for batch in arguments.batch])
