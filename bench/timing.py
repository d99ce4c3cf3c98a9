"""Interleaved times: in every round each contender runs once, so that a busy moment hurts all alike."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.cases import Problem

SAMPLE_SECONDS = 0.03  # a sample of a fast contender is the mean of enough calls to last this long
MAX_CALLS = 1000

# One call of a contender: runs it and returns the marks between its parts (two marks: one part).
Contender = Callable[["Clock"], list]


class Clock:
    """Marks points in time, on the CPU's clock or in the CUDA stream."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


@dataclass
class Samples:
    """Seconds per call, one entry per round."""

    seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Least, median and spread (largest over least, minus 1); the samples themselves too."""
        least = min(self.seconds)
        return {
            "least": least,
            "median": statistics.median(self.seconds),
            "spread": max(self.seconds) / least - 1,
            "samples": self.seconds,
        }


def contender(problem: Problem, function: Callable) -> Contender:
    """Times [forward, backward] of a first-order problem, [double backward] of a second-order one."""

    def first_order(clock: Clock) -> list:
        marks = [clock.mark()]
        output = problem.forward(function)
        marks.append(clock.mark())
        problem.backward(output)
        marks.append(clock.mark())
        return marks

    def second_order(clock: Clock) -> list:
        gradients = problem.backward(problem.forward(function), create_graph=True)
        marks = [clock.mark()]
        problem.double_backward(gradients)
        marks.append(clock.mark())
        return marks

    return second_order if problem.cotangents else first_order


def interleave(contenders: dict[str, Contender], repeats: int, device: str) -> dict[str, list[Samples]]:
    """``repeats`` rounds over all contenders, each already warm; per contender, the samples of each of its parts."""
    clock = Clock(device)
    calls: dict[str, int] = {}
    parts: dict[str, list[Samples]] = {}
    names = list(contenders)
    gc.collect()
    gc.disable()
    try:
        for round_index in range(repeats):
            turn = round_index % len(names)
            for name in names[turn:] + names[:turn]:
                if name not in calls:
                    calls[name], marks = _first_sample(contenders[name], clock)
                else:
                    marks = [contenders[name](clock) for _ in range(calls[name])]
                seconds = [
                    sum(clock.seconds(m[part], m[part + 1]) for m in marks) / len(marks)
                    for part in range(len(marks[0]) - 1)
                ]
                for samples, value in zip(parts.setdefault(name, [Samples() for _ in seconds]), seconds):
                    samples.seconds.append(value)
    finally:
        gc.enable()
    return parts


def _first_sample(run: Contender, clock: Clock) -> tuple[int, list[list]]:
    """Doubles the number of calls until they last long enough; the number, and the marks of the last set of calls."""
    calls = 1
    while True:
        marks = [run(clock) for _ in range(calls)]
        if calls >= MAX_CALLS or clock.seconds(marks[0][0], marks[-1][-1]) >= SAMPLE_SECONDS:
            return calls, marks
        calls *= 2
