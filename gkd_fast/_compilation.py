"""Work that ``torch.compile`` leaves out of its graphs."""

from collections.abc import Callable
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


def meets_columns(*arguments, process_group=None, bank=None, **options) -> bool:
    """Whether rows meet those of other ranks or of a bank: collectives and blocks of columns are no part of a graph."""
    return process_group is not None or bank is not None
