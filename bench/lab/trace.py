"""What a kernel really touched: every load and store of a launch, from TileLens's tracer on Triton's interpreter.

TileLens (PyPI ``tilelens``) is imported when first needed: it is an extra of the tests, not of the package.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import getmodule
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np


class Touch(NamedTuple):
    """One load or store of one program.

    Attributes:
        tensor: Name of the kernel's argument, without ``_ptr``.
        store: Whether it writes.
        offsets: Byte offsets of the active lanes from the tensor's start, in lane order.
        itemsize: Bytes of a lane.
    """

    tensor: str
    store: bool
    offsets: np.ndarray
    itemsize: int


class Trace(NamedTuple):
    """One launch of one kernel.

    Attributes:
        kernel: Its name.
        programs: What each program touched, in its order, by grid position.
        extents: Bytes from the first to the last element of each tensor, by argument name.
    """

    kernel: str
    programs: dict[tuple[int, int, int], list[Touch]]
    extents: dict[str, int]


Kernels = tuple[tuple[Any, str], ...]
"""Kernels by where their launchers find them: a module (or another object), and the attribute's name."""


def family_kernels(family: str) -> Kernels:
    """The kernels of the operations of a family in :data:`..families.FAMILIES`; imports Triton.

    Those of ``"bitmap"`` are also products by the kernels of ``"partition"``.
    """
    from ..families import FAMILIES, REDUCE

    lent = FAMILIES["partition"].KERNELS if family == "bitmap" else ()
    functions = [kernel.function.fn for kernel in (*FAMILIES[family].KERNELS, *lent, REDUCE)]
    return tuple((getmodule(function), function.__name__) for function in functions)


@contextmanager
def tracing(kernels: Kernels) -> Iterator[list[Trace]]:
    """Records the launches of kernels inside the ``with`` block, in their order.

    Args:
        kernels: See :data:`Kernels`.

    Yields:
        The list that the launches join as they end.
    """
    from tilelens.clients import Tracer
    from tilelens.core.data import Grid, Load, Store

    class Recorder(Tracer):
        """The tracer knows tensors by address; this one remembers which argument each was."""

        def __init__(self) -> None:
            super().__init__()
            self.arguments: dict[int, tuple[str, Any]] = {}

        def arg_callback(self, name: str, arg: Any, arg_cvt: Any) -> None:
            super().arg_callback(name, arg, arg_cvt)
            if hasattr(arg, "data_ptr"):
                self.arguments[arg.data_ptr()] = (name.removesuffix("_ptr"), arg)

    done: list[Trace] = []

    def collect(kernel: str, recorder: Recorder) -> None:
        programs: dict[tuple[int, int, int], list[Touch]] = {}
        current: list[Touch] = []
        for record in recorder.records:
            if isinstance(record, Grid):
                current = programs.setdefault(record.idx, [])
            elif isinstance(record, (Load, Store)):
                name, tensor = recorder.arguments[record.ptr]
                mask = np.broadcast_to(record.masks, record.offsets.shape).astype(
                    bool
                )  # the interpreter has integers too
                offsets = record.offsets[mask].astype(np.int64)
                current.append(Touch(name, isinstance(record, Store), offsets, tensor.element_size()))
        done.append(Trace(kernel, programs, {name: extent(t) for name, t in recorder.arguments.values()}))

    with watching(kernels, Recorder, collect):
        yield done


@contextmanager
def watching(kernels: Kernels, client: Callable[[], Any], collect: Callable[[str, Any], None]) -> Iterator[None]:
    """Puts a TileLens client of its own around every launch of some kernels.

    Args:
        kernels: See :data:`Kernels`.
        client: Makes a client; called once a launch.
        collect: Called with the kernel's name and the client after each launch.
    """
    import tilelens

    class Watched:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                watcher = client()
                tilelens.trace(client=watcher)(self.kernel)[grid](*args, **kwargs)
                tilelens.clear()  # it keeps every launch, tensors included
                collect(self.name, watcher)

            return launch

    with ExitStack() as stack:
        for module, name in kernels:
            stack.enter_context(patch.object(module, name, Watched(name, getattr(module, name))))
        yield


def extent(tensor: Any) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0
