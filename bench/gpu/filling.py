"""Fills Triton's cache for a run on a GPU that is not here, so that none of its minutes goes into compiling."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench import machine, peers
from bench.cases import problem
from bench.gpu import measured, session
from bench.gpu.targets import TARGETS, Target

# As many rows as large batches' kernels need; how many there are is no part of a kernel.
ROWS = 1024
# The tests that hold results against the definition launch the others' kernels too.
TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu")


def fill(arch: str, targets: tuple[Target, ...] = TARGETS, tiles: bool = True) -> list[str]:
    """The names of the kernels that the measured calls need, compiled or found in the cache. In a process of its own:
    the kernels stand in for those of the CPU.
    """
    from gkd_fast import kernels
    from gkd_fast.kernels.common.offline import offline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernels.register("CPU")
        with offline(arch) as driver:
            for target in targets:
                _at_precision(target)()
            if tiles:
                for work in session.TILED:
                    for _ in _tiled(work):
                        pass
                for case in session.PEER_CASES:
                    here = replace(case, device="cpu", batch=ROWS)
                    torch.set_float32_matmul_precision(case.precision)
                    problem(here).results(peers.build("triton", here))
        return driver.compiled


def _at_precision(target: Target):
    torch.set_float32_matmul_precision(target.case.precision)
    return measured.prepared(replace(target.work(), batch=min(target.case.batch, ROWS)), "cpu")


def _tiled(work) -> Iterator[None]:
    from gkd_fast.kernels.common import table

    call = measured.prepared(replace(work, batch=ROWS), "cpu")
    for key, tile in session.tile_sizes(call):
        table.overrides[key] = tile
        try:
            call()
        finally:
            del table.overrides[key]
        yield


def fill_tests(arch: str) -> int:
    """The tests' exit status."""
    environment = os.environ | {"GKD_FAST_COMPILE_FOR": arch}
    return subprocess.run([sys.executable, *TESTS], cwd=machine.REPOSITORY, env=environment).returncode
