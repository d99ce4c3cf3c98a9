"""Processes of a gloo group that run functions of the tests together."""

import os
import signal
import traceback
from datetime import timedelta
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TIMEOUT = timedelta(seconds=60)


class Pool:
    """``size`` processes; ``run`` calls a function on the first ``ranks`` of them.

    The function's first argument is the process group of these ranks.
    """

    def __init__(self, size: int, timeout: timedelta = TIMEOUT):
        self.folder = TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self.folder.name, timeout, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function, *arguments, ranks: int | None = None) -> list:
        """The results of ``function(group, *arguments)``, rank by rank; RuntimeError where one raised."""
        results = self.outcomes(function, *arguments, ranks=ranks)
        failed = [f"rank {rank}: {x}" for rank, x in enumerate(results) if isinstance(x, Failure)]
        if failed:
            raise RuntimeError("\n".join(failed))
        return results

    def outcomes(self, function, *arguments, ranks: int | None = None) -> list:
        """The same, with a :class:`Failure` for a rank that raised and None for one that died."""
        pipes = self.pipes[:ranks]
        for pipe in pipes:
            pipe.send((function, arguments, len(pipes)))
        results = []
        for pipe in pipes:
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(None)
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


class Failure(str):
    """The traceback of a rank that raised."""


def die() -> None:
    """Ends this process without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def _serve(rank: int, size: int, folder: str, timeout: timedelta, pipe) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    groups = {ranks: dist.new_group(list(range(ranks)), timeout=timeout) for ranks in range(1, size + 1)}
    while True:
        function, arguments, ranks = pipe.recv()
        try:
            result = function(groups[ranks], *arguments)
        except Exception:
            result = Failure(traceback.format_exc())
        pipe.send(result)
