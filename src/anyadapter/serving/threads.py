"""Threads beside the engine's own."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch


def helper(name: str) -> ThreadPoolExecutor:
    """One thread for tensor work beside the engine's, which uses no OpenMP threads for it.

    With threads of its own there would be more than cores. GNU's OpenMP then lets none of them wait awake any longer, and each
    of the engine's small products has to wake its threads: a step of 32 rows took 73 ms instead of 56 from then on.
    """
    return ThreadPoolExecutor(1, name, initializer=_alone)


def _alone() -> None:
    torch.get_num_threads()  # torch gives each thread its number once, at the first use: not after this
    with suppress(AttributeError, OSError, TypeError):  # no OpenMP is loaded, or not for all to see
        ctypes.CDLL(None).omp_set_num_threads(1)  # of this thread; torch's own function is also for those to come
