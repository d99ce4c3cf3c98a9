"""``python -m gkd_fast.warm`` fills Triton's cache for a GPU that is not here: a first step there compiles nothing.

A training step of :class:`gkd_fast.GraphKDLoss` is made with a driver that compiles for the GPU and runs nothing. The
cache (``TRITON_CACHE_DIR``, else ``~/.triton/cache``) serves where it lies at the same path and Triton, PyTorch,
Python and this package are the same.
"""

import argparse
import os
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from gkd_fast import GraphKDLoss, kernels
from gkd_fast.ops.backends import TRITON_MISSING

AUTOCAST = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _widths(text: str) -> list[int]:
    return [int(width) for width in text.split(",")]


def _bandwidth(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _of_form(text: str) -> float | str | None:
    return {"auto": "auto", "none": None}[text] if text in ("auto", "none") else float(text)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gkd_fast.warm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", required=True, choices=kernels.ARCHITECTURES, help="of the GPU: sm_90 is Hopper")
    parser.add_argument("--stages", required=True, type=_widths, metavar="W,W", help="widths of the student's stages")
    parser.add_argument("--teacher-stages", required=True, type=_widths, metavar="W,W", help="of the teacher's")
    parser.add_argument("--batch", required=True, type=int, nargs="+", help="samples of a step; several are all made")
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--bandwidth", type=_bandwidth, default="auto")
    parser.add_argument("--neighbors", type=_of_form, default="auto", metavar="K", help="a number, auto or none")
    parser.add_argument("--self-weight", type=_of_form, default="auto", metavar="W", help="a number, auto or none")
    parser.add_argument("--normalization", choices=("symmetric", "row"), default="symmetric")
    parser.add_argument("--teacher-graph", choices=("labels", "frozen"), default="labels")
    parser.add_argument("--node-temperature", type=float, default=0.1)
    parser.add_argument("--relation-temperature", type=float, default=0.1)
    parser.add_argument("--autocast", choices=tuple(AUTOCAST), nargs="+", default=["none"])
    return parser.parse_args(given)


def warm(options: argparse.Namespace) -> list[str]:
    """The names of the kernels that a step needs, compiled or found in the cache."""
    offline = import_module("gkd_fast.kernels.common.offline").offline

    with warnings.catch_warnings():
        # The C++ kernels give way, and the graphs of what no kernel wrote say nothing.
        warnings.simplefilter("ignore")
        kernels.register("CPU")
        with offline(options.arch) as driver:
            for batch in options.batch:
                for autocast in options.autocast:
                    _step(options, batch, AUTOCAST[autocast])
        return driver.compiled


def _step(options: argparse.Namespace, batch: int, autocast: torch.dtype | None) -> None:
    criterion = GraphKDLoss(
        options.stages,
        options.teacher_stages,
        num_classes=2,
        embed_dim=options.embed_dim,
        layers=options.layers,
        bandwidth=options.bandwidth,
        neighbors=options.neighbors,
        self_weight=options.self_weight,
        normalization=options.normalization,
        teacher_graph=options.teacher_graph,
        node_temperature=options.node_temperature,
        relation_temperature=options.relation_temperature,
        backend="triton",
    )
    students = [torch.zeros(batch, width, requires_grad=True) for width in options.stages]
    teachers = [torch.zeros(batch, width) for width in options.teacher_stages]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = criterion(students, teachers, torch.zeros(batch, dtype=torch.long))
    loss.backward()


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    if TRITON_MISSING is not None:
        raise SystemExit(f"gkd_fast.warm: {TRITON_MISSING}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("gkd_fast.warm compiles kernels: unset TRITON_INTERPRET")
    names = warm(options)
    folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    print(f"{len(names)} kernels for {options.arch} in {folder}: {', '.join(sorted(set(names)))}")


if __name__ == "__main__":
    main()
