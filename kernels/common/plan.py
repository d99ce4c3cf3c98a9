"""Plans: what launchers derive of a call's types, shapes and options, made once and kept.

A plan holds numbers and launches, no tensor: a call fills in what it was given and allocates, so that plans serve any
stream and any capture of CUDA graphs.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

from gkd_fast.kernels.common import table

MOST = 4096
R = TypeVar("R")
_caches: list[Callable[[], None]] = []


def planned(make: Callable[..., R]) -> Callable[..., R]:
    """``make``, whose results are kept by its arguments, hashable ones all, and by the tiles that are forced."""

    @lru_cache(MOST)
    def kept(forced, *key):
        return make(*key)

    @wraps(make)
    def plan(*key) -> R:
        # Autotuning wants to be asked for every entry, and to change it.
        if table._recorded is not None or table.overrides:
            return make(*key)
        return kept(table._forced, *key)

    _caches.append(kept.cache_clear)
    return plan


def forget() -> None:
    """Makes all plans anew: for who changes a constant that they follow from."""
    for clear in _caches:
        clear()
