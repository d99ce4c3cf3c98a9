"""Extra peak memory of one op, in a process of its own: ``python -m bench.memory`` reads a request, prints a result.

The peak is the kernel's own high-water mark of resident memory, reset after a warm-up (so that the pages of the
libraries' code are not counted); on CUDA it is the caching allocator's. Inputs are there before; outputs and
gradients, which are there after, are taken off.
"""

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from bench import peers
from bench.cases import Case, problem

WARM_UP_BATCH = 64
# Keeps the C library from holding freed blocks back, which would hide a later use of them.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MKL_DISABLE_FAST_MM": "1"}


class MemoryUnknown(RuntimeError):
    """The measuring process failed; the message is its last words."""


def measure(case: Case, backend: str, threads: int) -> int:
    """Bytes beyond inputs, outputs and gradients at the peak of forward and backward (and double backward)."""
    return request({"case": case.to_dict(), "backend": backend, "threads": threads})


def request(message: dict, module: str = "bench.memory") -> int:
    """Asks a fresh process that runs ``module`` and prints the number of bytes last."""
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(message["threads"])}
    child = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(message), capture_output=True, text=True, env=environment
    )
    if child.returncode:
        last_words = child.stderr.strip().splitlines() or [f"ended with code {child.returncode}"]
        raise MemoryUnknown(last_words[-1])
    return int(child.stdout.strip().splitlines()[-1])


def extra_peak(run: Callable[[], object], device: str = "cpu") -> int:
    """Peak bytes while ``run()`` lasts, beyond what was there before and beyond the tensors that it returns."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        _release_freed_memory()
        high_water = _reset_high_water()
        before = psutil.Process().memory_info().rss
        kept = run()
        peak = high_water() - before
    return max(0, peak - sum(x.numel() * x.element_size() for x in kept))


def limit_to_available() -> None:
    """Makes an allocation beyond the memory that is free now fail with an error instead of exhausting the machine."""
    used = psutil.Process().memory_info().rss
    data = _status_bytes("VmData") or used
    available = int(0.9 * psutil.virtual_memory().available)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data + available, hard))


def _reset_high_water() -> Callable[[], int]:
    """Resets the high-water mark and returns its reader; where that is not allowed, the mark of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return lambda: _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _release_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _main() -> None:
    message = json.load(sys.stdin)
    torch.set_num_threads(message["threads"])
    case = Case(**message["case"])
    torch.set_float32_matmul_precision(case.precision)
    function = peers.build(message["backend"], case)
    inputs = problem(case)
    # What is compiled for one size is warm only after a call at that size.
    warm_up = case if message["backend"] in ("compile", "keops") else case.at(min(case.batch, WARM_UP_BATCH))
    problem(warm_up).results(function)
    if case.device == "cpu":
        limit_to_available()
    print(extra_peak(lambda: list(inputs.results(function).values()), case.device))


if __name__ == "__main__":
    _main()
