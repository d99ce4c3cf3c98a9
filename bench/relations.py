"""The losses over a batch's relations beside those that are used today: checked, timed in turns, memory measured in a
process of its own."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench import machine, memory
from bench.peers import relations as peers
from bench.timing import Clock, Contender, interleave
from gkd_fast import functional

WIDTH = 128
WARM_UP_BATCH = 64
AGREEMENT_BATCH = 192  # at which both are compared in float64
AGREEMENT = 1e-9

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """A loss at a batch size.

    Attributes:
        ours, peer: functions of students and teachers ``[B, 128]``; no peer: it takes more memory than machines have.
        batch: B.
        both: the teachers have a gradient too.
        times, megabytes: what is wanted: how much faster than the peer, at least, and extra memory, at most.
        allowed_error: of loss and gradients in float32.
    """

    ours: Loss
    peer: Loss | None
    batch: int
    both: bool = False
    times: float | None = None
    megabytes: float | None = None
    allowed_error: float = 1e-4


WORK = {
    "similarity_preserving, norm 2": Work(
        partial(functional.similarity_preserving, norm=2), peers.similarity_preserving_2, 8192, times=60, megabytes=10
    ),
    "similarity_preserving, norm 1": Work(
        functional.similarity_preserving,
        peers.similarity_preserving,
        8192,
        times=60,
        megabytes=10,
        allowed_error=1e-3,  # of 67 million products a few are so near 0 that float32 turns their sign
    ),
    "correlation_congruence, bilinear": Work(
        functional.correlation_congruence, peers.correlation_congruence, 8192, times=60, megabytes=10
    ),
    "pkt": Work(functional.pkt, peers.pkt, 8192, times=8, megabytes=64),
    "rkd_distance": Work(functional.rkd_distance, peers.rkd_distance, 8192, times=12, megabytes=64),
    "rkd_angle": Work(functional.rkd_angle, peers.rkd_angle, 384, times=15),
    "rkd_angle, large": Work(functional.rkd_angle, None, 2048, megabytes=64),
    "info_nce, both directions and gradients": Work(
        functional.info_nce, peers.info_nce, 8192, both=True, times=2.5, megabytes=64
    ),
}


@dataclass
class Measured:
    """Seconds of forward and backward (least and median of the rounds), bytes beyond inputs and gradients, and
    :func:`error` in float32 against float64."""

    ours: float
    ours_median: float
    peer: float | None
    peer_median: float | None
    extra_bytes: int
    error: float
    peer_error: float | None
    commit: str

    @property
    def times(self) -> float | None:
        return None if self.peer is None else self.peer / self.ours


class Wrong(ValueError):
    """A loss that does not compute what it should gets no time."""


def measure(name: str, repeats: int) -> Measured:
    """Figures of a loss.

    Raises:
        Wrong: ours is not the peer's function, or is off in float32.
    """
    work = WORK[name]
    if work.peer is not None:
        small = rows(min(work.batch, AGREEMENT_BATCH), torch.float64)
        difference = error(step(work.ours, small, work.both), step(work.peer, small, work.both))
        if not difference < AGREEMENT:
            raise Wrong(f"{name} is not what its peer computes: in float64 they differ by {difference:.1e}")
    inputs = rows(work.batch)
    truth = step(work.ours, [x.double() for x in inputs], work.both)
    functions = {"ours": work.ours} | ({} if work.peer is None else {"peer": work.peer})
    errors = {key: error(step(function, inputs, work.both), truth) for key, function in functions.items()}
    if not errors["ours"] < work.allowed_error:
        raise Wrong(f"{name} is off by {errors['ours']:.1e} in float32")
    contenders = {key: contender(function, inputs, work.both) for key, function in functions.items()}
    found = {key: parts[0].summary() for key, parts in interleave(contenders, repeats, "cpu").items()}
    peer = found.get("peer", {})
    return Measured(
        found["ours"]["least"],
        found["ours"]["median"],
        peer.get("least"),
        peer.get("median"),
        memory.request({"name": name, "threads": torch.get_num_threads()}, "bench.relations"),
        errors["ours"],
        errors.get("peer"),
        machine.commit(),
    )


def holds(work: Work, found: Measured) -> str:
    """What was wanted, and whether it is so."""
    wanted, kept = [], True
    if work.times is not None:
        wanted.append(f"≥ {work.times:g} ×")
        kept = found.times is not None and found.times >= work.times
    if work.megabytes is not None:
        wanted.append(f"≤ {work.megabytes:g} MB")
        kept = kept and found.extra_bytes <= work.megabytes * 1e6
    return f"{', '.join(wanted)}: {'holds' if kept else 'does not hold'}"


def rows(batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, WIDTH, generator=generator, dtype=dtype) for _ in range(2)]


def step(function: Loss, inputs: list[Tensor], both: bool) -> list[Tensor]:
    """Forward and backward: the loss and the gradients."""
    leaves = inputs[0].detach().requires_grad_(), inputs[1].detach().requires_grad_(both)
    loss = function(*leaves)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves if x.grad is not None)]


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    """‖found − truth‖/‖truth‖, the largest of the loss's and the gradients'; inf where one is not finite."""
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
    return max(x if math.isfinite(x) else math.inf for x in errors)


def contender(function: Loss, inputs: list[Tensor], both: bool) -> Contender:
    def run(clock: Clock) -> list:
        start = clock.mark()
        step(function, inputs, both)
        return [start, clock.mark()]

    return run


def _main() -> None:
    message = json.load(sys.stdin)
    torch.set_num_threads(message["threads"])
    work = WORK[message["name"]]
    inputs = rows(work.batch)
    step(work.ours, [x[:WARM_UP_BATCH] for x in inputs], work.both)
    memory.limit_to_available()
    print(memory.extra_peak(lambda: step(work.ours, inputs, work.both)))


if __name__ == "__main__":
    _main()
