"""What the CPU backends of the families share: whether they can run, their threads, and tensors as NumPy sees them.

The kernels are compiled by Numba, an optional dependency. They run without Python's lock, on threads of a pool of this
package: Numba's own threads abort a process that forks after it has used them, or that calls from two threads.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .memo import constant_to_compile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_ROWS = 64
"""Rows of activations that the kernels are made for; more belong to a GEMM."""
CHUNKS = 4
"""Pieces of work for each thread, so that one which is held up leaves its rest to the others."""
WORTH = 1 << 20
"""Products of a weight and an activation for which it is worth waking a thread: some 50 microseconds of work."""
AS_INTEGERS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""What Numba, which has no 16-bit floats on CPUs, takes them for; kernels tell one from the other by it."""


@constant_to_compile
def numba_installed() -> bool:
    """Whether Numba can be imported."""
    return _found("numba")


@cache
def _found(module: str) -> bool:
    return find_spec(module) is not None


def why_not_cpu(operand: Tensor, limit: str | None = None) -> str | None:
    """Returns why the CPU kernels cannot run a call, or ``None`` if they can."""
    if not numba_installed():
        return "Numba is not installed; pip install 'fixed-parameter-expansion[cpu]' brings it"
    if operand.is_cuda or not operand.is_cpu:
        return f"it needs tensors on a CPU, they are on {operand.device}"
    if operand.dtype not in DTYPES:
        return f"it takes float16, bfloat16 and float32, got {operand.dtype}"
    return limit


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a kernel for the types it is called with; binaries are kept on disk where a folder can be written to.

    Numba keeps them beside the module, else in the user's cache folder, or where ``NUMBA_CACHE_DIR`` says.
    """
    import numba

    try:
        return numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})(function)
    except RuntimeError:  # there is no such folder
        return numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})(function)


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process: a child that was forked has none of its parent's."""
    return ThreadPoolExecutor(max(os.cpu_count() or 1, 1), "fpe-cpu")


def threads_for(products: int) -> int:
    """How many threads share a multiplication, by its products of a weight and an activation."""
    return min(torch.get_num_threads(), max(products // WORTH, 1))


def shared_out(work: Callable[[int, int], object], size: int, unit: int, threads: int) -> None:
    """Calls ``work(start, stop)`` over ``range(size)`` from several threads.

    The calling thread takes pieces too, and waits for none that nobody has begun: it gets done alone where the pool is
    busy with other callers, and where the interpreter is on its way out and starts no thread.

    Args:
        work: Takes a piece; pieces run at the same time.
        size: Of the whole.
        unit: A piece is a multiple of it, but for the last.
        threads: How many, at most.
    """
    threads = min(threads, -(-size // unit))
    if threads <= 1:
        work(0, size)
        return
    piece = -(-size // (threads * CHUNKS * unit)) * unit
    starts = count(0, piece)

    def take() -> None:
        while (start := next(starts)) < size:
            work(start, min(start + piece, size))

    helpers = []
    with suppress(RuntimeError):  # "cannot schedule new futures after shutdown"
        for _ in range(threads - 1):
            helpers.append(_pool(os.getpid()).submit(take))
    take()
    for helper in helpers:
        if not helper.cancel():  # one that has not begun finds nothing left
            helper.result()


def numbers(t: Tensor) -> np.ndarray:
    """A contiguous tensor's memory as a flat array; 16-bit floats as :data:`AS_INTEGERS` has their bits."""
    flat, kind = t.detach(), AS_INTEGERS.get(t.dtype)
    return (flat if kind is None else flat.view(kind)).numpy().reshape(-1)


def floats(t: Tensor) -> np.ndarray:
    """A tensor's numbers in float32; its own memory where it is that already."""
    return t.detach().float().numpy()


def padded(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Activations ``[M, ..., F]``, with zeros up to multiples of ``rows`` and ``columns``; contiguous.

    They are not written by PyTorch: its threads, once woken, keep the cores busy that ours are to run on.
    """
    m, features = x.shape[0], x.shape[-1]
    if m % rows == features % columns == 0:
        return np.ascontiguousarray(x)
    whole = np.zeros((-(-m // rows) * rows, *x.shape[1:-1], -(-features // columns) * columns), np.float32)
    whole[:m, ..., :features] = x
    return whole
