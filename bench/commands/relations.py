"""``python -m bench relations``: the losses over a batch's relations beside torchdistill's, forward and backward."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import machine
from bench.memory import extra_peak
from bench.peers import relations as peers
from bench.report import console, markdown_table, write_section
from gkd_fast import functional

WIDTH = 128
# Name: ours, the peer, the batch, whether the teacher has a gradient too.
ROWS: dict[str, tuple[Callable, Callable, int, bool]] = {
    "similarity_preserving, norm 2": (
        partial(functional.similarity_preserving, norm=2), peers.similarity_preserving_2, 8192, False,
    ),
    "similarity_preserving, norm 1": (functional.similarity_preserving, peers.similarity_preserving, 8192, False),
    "correlation_congruence, bilinear": (
        functional.correlation_congruence, peers.correlation_congruence, 8192, False,
    ),
    "pkt": (functional.pkt, peers.pkt, 8192, False),
    "rkd_distance": (functional.rkd_distance, peers.rkd_distance, 8192, False),
    "rkd_angle": (functional.rkd_angle, peers.rkd_angle, 384, False),
    "info_nce, both directions": (functional.info_nce, peers.info_nce, 8192, True),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of which the least counts")
    parser.add_argument("--markdown", type=Path, help="rewrites the table of this file")


def run(arguments: argparse.Namespace) -> int:
    table = [measured(name, arguments.repeats) for name in ROWS]
    headers = ["loss", "B", "ours ms", "peer ms", "times faster", "extra MiB", "error", "peer's error"]
    content = markdown_table(headers, table)
    console().print(f"{machine.cpu_name()}, {torch.get_num_threads()} threads, D = {WIDTH}, float32")
    console().print(content)
    if arguments.markdown:
        write_section(arguments.markdown, "relations", content)
    return 0


def measured(name: str, repeats: int) -> list[str]:
    """A row of the table; errors are relative ones of the loss, against float64."""
    ours, peer, batch, both = ROWS[name]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(batch, WIDTH, generator=generator) for _ in range(2)]
    truth = float(ours(*(x.double() for x in rows)))
    errors = [abs(float(function(*rows)) - truth) / abs(truth) for function in (ours, peer)]
    if errors[0] > 1e-4:
        raise ValueError(f"{name} is wrong: its relative error is {errors[0]:.2g}")
    times = [[step_seconds(function, rows, both) for function in (ours, peer)] for _ in range(repeats)]
    least = [min(x) for x in zip(*times)]
    extra = extra_peak(lambda: step(ours, rows, both)) / 2**20
    return [
        name, f"{batch:,}", f"{least[0] * 1e3:.1f}", f"{least[1] * 1e3:.0f}", f"{least[1] / least[0]:.1f}",
        f"{extra:.0f}", f"{errors[0]:.0e}", f"{errors[1]:.0e}",
    ]  # fmt: skip


def step(function: Callable[[Tensor, Tensor], Tensor], rows: list[Tensor], both: bool) -> list[Tensor]:
    """Forward and backward; the gradients."""
    leaves = rows[0].detach().requires_grad_(), rows[1].detach().requires_grad_(both)
    function(*leaves).backward()
    return [x.grad for x in leaves if x.grad is not None]


def step_seconds(function: Callable[[Tensor, Tensor], Tensor], rows: list[Tensor], both: bool) -> float:
    start = time.perf_counter()
    step(function, rows, both)
    return time.perf_counter() - start
