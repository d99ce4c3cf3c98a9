"""The command: prints what was run, and every failure with its case."""

import argparse
import sys
import traceback

import torch

from tests.ops_cases import FUSED

from . import __doc__ as about
from . import draw, fuzz, run


def main() -> None:
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone")
    arguments = parser.parse_args()
    if FUSED is None:
        sys.exit("no fused backend computes on this CPU")
    torch.set_num_threads(1)
    if arguments.case is not None:
        print(draw(arguments.seed, arguments.case, FUSED))
        print(run(arguments.seed, arguments.case, FUSED))
        return
    done, failures = fuzz(arguments.seconds, arguments.seed, FUSED)
    for failure in failures:
        print(failure)
        print("   ", *traceback.format_exception_only(failure.__cause__), end="")
    print(f"{sum(done.values())} cases on {FUSED}, {len(failures)} failures: {dict(sorted(done.items()))}")
    if failures:
        sys.exit(f"again with: python -m tests.fuzz --seed {arguments.seed} --case NUMBER")


if __name__ == "__main__":
    main()
