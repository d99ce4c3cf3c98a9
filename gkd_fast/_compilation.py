"""Work that ``torch.compile`` leaves out of its graphs, or that is done without them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def leaves_graphs(when: Callable[..., bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function leave the graph that it is compiled into where ``when(*arguments, **options)`` holds."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*arguments: P.args, **options: P.kwargs) -> R:
            if torch.compiler.is_compiling() and when(*arguments, **options):
                from gkd_fast._uncompiled import uncompiled

                return uncompiled(function, *arguments, **options)
            return function(*arguments, **options)

        return call

    return decorate


@contextmanager
def as_written() -> Iterator[None]:
    """Within the block nothing runs compiled: the graphs of ``torch.compile`` have no second derivatives."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes two seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def meets_columns(*arguments, process_group=None, bank=None, **options) -> bool:
    """Whether rows meet those of other ranks or of a bank: collectives and blocks of columns are no part of a graph."""
    return process_group is not None or bank is not None
