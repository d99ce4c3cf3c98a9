"""Time and peak memory of a training step and a meta-step, without and with the graph terms, backend by backend."""

import contextlib
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from gkd_fast import functional
from gkd_fast.train.build import build_distiller, build_network_for
from gkd_fast.train.config import Config
from gkd_fast.train.data import load_splits
from gkd_fast.train.devices import Clock, make_accelerator
from gkd_fast.train.engine import Distiller


def available_backends(device: torch.device) -> list[str]:
    """The backends of the graph terms that run here."""
    rows = torch.eye(2, device=device)
    found = []
    for backend in functional.BACKENDS:
        try:
            functional.graph_conv(rows, rows, bandwidth=1.0, backend=backend)
        except (RuntimeError, ImportError):
            continue
        if backend != "auto":
            found.append(backend)
    return found


def measure_costs(config: Config, backends: list[str] | None = None) -> list[dict]:
    """Steps of kd and of gkd on random images, at each of ``compare.cost_batch_sizes``.

    Every round runs each case once, so that a busy moment hits all alike.

    Args:
        config: all options.
        backends: of the graph terms; those that run here by default.

    Returns:
        For each batch size and case: ``batch_size``, ``case``, ``seconds`` (median), ``fastest_seconds`` and
        ``peak_bytes``: the most that a step holds at once beyond what was there before it. With graph terms also
        ``meta_seconds``, ``meta_over_train`` (both of the fastest) and ``graph_peak_bytes``: the peak of the graph
        terms' second derivatives alone, on features that are there before.
    """
    accelerator = make_accelerator(config)
    splits = load_splits(config.data, config.seed)
    teacher = build_network_for(config.teacher_network, splits, config.seed)
    cases = {"kd": ("kd", "auto")}
    cases |= {f"gkd, {name}": ("gkd", name) for name in backends or available_backends(accelerator.device)}
    rows = []
    for batch_size in config.compare.cost_batch_sizes:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch_size, *splits.sample_shape, generator=generator).to(accelerator.device)
        labels = torch.randint(splits.num_classes, (batch_size,), generator=generator).to(accelerator.device)
        distillers = {
            case: build_distiller(
                replace(config, graph=replace(config.graph, backend=backend)),
                splits,
                method,
                config.student_network,
                config.student_training,
                teacher,
                make_accelerator(config),
            )
            for case, (method, backend) in cases.items()
        }
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        meta_seconds: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(1 + config.compare.cost_repeats):  # the first round warms up
            for case, distiller in distillers.items():
                clock = Clock(accelerator.device, running=True)
                distiller.train_step(images, labels)
                clock.lap(seconds[case])
                if distiller.pair_weights is not None:
                    distiller.meta_step(images, labels)
                    clock.lap(meta_seconds[case])
        for case, distiller in distillers.items():
            row = {
                "batch_size": batch_size,
                "case": case,
                "seconds": statistics.median(seconds[case][1:]),
                "fastest_seconds": min(seconds[case][1:]),
                "peak_bytes": peak_bytes(partial(distiller.train_step, images, labels), accelerator.device),
            }
            if meta_seconds[case]:
                row["meta_seconds"] = min(meta_seconds[case][1:])
                row["meta_over_train"] = row["meta_seconds"] / row["fastest_seconds"]
                work = second_derivatives(distiller, images, labels)
                row["graph_peak_bytes"] = peak_bytes(work, accelerator.device)
            rows.append(row)
    return rows


def second_derivatives(distiller: Distiller, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A function that takes what a meta-step takes of the graph terms: their gradient, and a derivative of it."""
    module = distiller.module
    with torch.no_grad():
        students, teachers = module.student_outputs(images).features, module.teacher_outputs(images).features
    students = [x.detach().requires_grad_() for x in students]
    inputs = [*students, *module.pair_weights.parameters()]

    def run() -> None:
        with module.weights_with_gradient():
            embeddings = module.criterion.embed(students, teachers)
            weights = module.weights_of(embeddings)
            terms = module.criterion.terms_from_embeddings(*embeddings, labels, weights=weights)
            gradients = torch.autograd.grad(terms["node"] + terms["relation"], students, create_graph=True)
            torch.autograd.grad(torch.stack([g.square().sum() for g in gradients]).sum(), inputs)

    return run


def peak_bytes(work, device: torch.device) -> int:
    """The most memory that PyTorch's allocator holds during ``work``, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _without_stderr():
    """The profiler's library writes lines of its own to the file descriptor, past Python and every setting."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
