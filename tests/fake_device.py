"""A CUDA device that is none: tensors on the CPU that say they are on it, real launches, and whatever may go wrong.

Inside :func:`fake_device` every tensor that is not on ``meta`` says ``is_cuda``. A kernel's launch goes through the
launch code of Triton itself: it is specialised as on the device and, where ``compiled`` says so, compiled by the real
``ptxas`` for the architecture; the binary's shared memory is held against the device's. Nothing is executed. What the
launcher returns is then the eager twin's result in float64, rounded once: the arithmetic of a perfect device.

Faults are planted by name of a launcher, and by the operand with which it must go wrong: see :class:`Fault`.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fpe.bench.latency import timing
from fpe.kernels.device import KNOWN
from fpe.kernels.partition.eager import split_matmul_eager
from fpe.kernels.partition.interleaved import as_merge

LAUNCHERS = {
    "block.triton": ("block_matmul_triton", "block_matmul_t_triton", "block_grad_triton"),
    "partition.triton": ("split_matmul_triton", "merge_matmul_triton", "partition_grad_triton"),
    "mlp.triton": ("expanded_mlp_triton",),
    "bitmap.triton": ("unpack_values_triton", "pack_values_triton"),
    "semi_structured.triton": (
        "semi_structured_matmul_triton",
        "semi_structured_matmul_t_triton",
        "semi_structured_grad_triton",
        "semi_structured_compress_triton",
        "semi_structured_expand_triton",
    ),
    "semi_structured.sparse_tensor_core": (
        "semi_structured_matmul_sparse_tensor_core",
        "semi_structured_matmul_t_sparse_tensor_core",
        "semi_structured_grad_sparse_tensor_core",
        "multiply_interleaved",
        "split_matmul_seeded",
    ),
    "semi_structured.torch_sparse": (
        "semi_structured_matmul_torch",
        "semi_structured_matmul_t_torch",
        "semi_structured_grad_torch",
        "multiply_interleaved",
    ),
}
"""What returns a device's results, by module of ``fpe.kernels``."""
FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "arange", "linspace", "tensor", "as_tensor")
FACTORIES += ("empty_like", "zeros_like", "ones_like", "randn_like")


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        kind: ``"wrong"`` (a result is two per cent off), ``"rounded"`` (a float32 result has TF32's eleven bits),
            ``"chain"`` (float32 sums, each one chain of fused multiply-adds), ``"hang"``, ``"illegal"`` (an access
            that loses the device) or ``"crash"`` (a signal ends the process).
        launcher: Whose.
        dtype: Of the operand, as ``"bfloat16"``.
        shape: Of the first operand; any if not given.
    """

    kind: str
    launcher: str
    dtype: str = "bfloat16"
    shape: tuple[int, ...] = ()


@dataclass
class FakeDevice:
    """The device's state.

    Attributes:
        arch: Compute capability, as 90.
        shared: Bytes of shared memory that a program may use.
        compiled: Whether a kernel of this name is compiled; the others are specialised only.
        faults: What goes wrong.
        lost: Whether it answers no more.
        capturing: Whether a graph is being captured.
        stream: The current stream.
        launched: Kernel, key of its specialisation, and stream of each launch.
        now: Milliseconds of its clock ahead of the host's.
        waits: How often the host has waited for it.
    """

    arch: int = 90
    shared: int = 0
    compiled: Callable[[str], bool] = lambda name: False
    faults: tuple[Fault, ...] = ()
    lost: bool = False
    capturing: bool = False
    stream: int = 0
    launched: list[tuple[str, str, int]] = field(default_factory=list)
    now: float = 0.0
    waits: int = 0

    def synchronize(self, *unused: Any) -> None:
        """Waits for the device."""
        self.waits += 1
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more that one may read")
        if self.capturing:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def clock(self) -> float:
        """Milliseconds at which what was queued so far is done; every look takes a microsecond."""
        self.now = max(self.now, 1e3 * time.perf_counter()) + 1e-3
        return self.now

    def sleep(self, cycles: int) -> None:
        """Keeps the device busy for so many cycles of 2 GHz."""
        self.now = self.clock() + cycles / 2e6


class _Driver:
    """What Triton asks of a driver."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        limits = {"max_shared_mem": device.shared, "sm_clock_rate": 1_980_000, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            get_device_properties=lambda index: limits, load_binary=lambda *a: (object(), object(), 32, 0, 1024)
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *a, **k: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, index: int) -> int:
        return self.device.stream


def _on_device(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


def _on_the_cpu(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with the CPU in the device's place."""

    @wraps(call)
    def made(*args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if _on_device(value) else value for value in args)
        return call(*args, **{n: "cpu" if n == "device" and _on_device(v) else v for n, v in kwargs.items()})

    return made


def _refuses(device: FakeDevice, call: Callable[..., Any]) -> Callable[..., Any]:
    """A call that waits for the device."""

    @wraps(call)
    def made(*args: Any, **kwargs: Any) -> Any:
        device.synchronize()
        return call(*args, **kwargs)

    return made


def _interleaved_eager(x: Tensor, w: Tensor, alpha: int, layout: Any, bias: Tensor | None = None) -> Tensor:
    """The twin of ``multiply_interleaved``."""
    y = x @ layout.to_dense(layout.from_parent(w))[0].T
    return y if bias is None else y + bias


def _seeded_eager(x: Tensor, w: Tensor, labels: Any, alpha: int = 2, *rest: Any) -> Tensor:
    """The twin of ``split_matmul_seeded``."""
    return split_matmul_eager(x, w, labels, alpha, *rest)


def _launcher(device: FakeDevice, module: str, name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A launcher that launches and then returns its eager twin's result, or what a fault makes of it."""
    op = name.removesuffix("_torch").removesuffix("_triton").removesuffix("_sparse_tensor_core")
    eager = import_module(f"fpe.kernels.{module.partition('.')[0]}.eager")
    own = {"multiply_interleaved": _interleaved_eager, "split_matmul_seeded": _seeded_eager}
    twin = own[name] if name in own else getattr(eager, f"{op}_eager")

    @wraps(real)
    def launch(*args: Any, config: Any = None, **kwargs: Any) -> Tensor:
        if args[0].is_meta:
            return real(*args, **({} if config is None else {"config": config}), **kwargs)
        if device.lost:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        if not module.endswith("torch_sparse"):
            real(*args, **({} if config is None else {"config": config}), **kwargs)
        operand = args[0]
        floats = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]
        more = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in kwargs.items()}
        with _unlaunched(device):
            kept = more.pop("kept", None)
            result = twin(*floats, **more) if kept is None else _of_kept(twin, op, floats, more, kept)
        for fault in device.faults:
            here = fault.launcher == name and str(operand.dtype) == f"torch.{fault.dtype}"
            here = here and (kept is None or fault.kind != "chain")
            if here and tuple(fault.shape) in ((), tuple(operand.shape)):
                result = _fail(device, fault, result, args)
        return result.to(operand.dtype)

    return launch


def _of_kept(twin: Callable[..., Tensor], op: str, args: list, options: dict[str, Any], kept: Any) -> Tensor:
    """What a twin makes of a weight of which kept values alone are stored; one child needs no labels."""
    if args[2] is None:
        args[2] = torch.zeros(kept.sizes, dtype=torch.uint8)
    if op == "partition_grad":
        return kept.from_dense(twin(*args, **options))
    args[1] = kept.to_dense(args[1])
    return twin(*args, **options)


@contextmanager
def _unlaunched(device: FakeDevice) -> Iterator[None]:
    """Within it nothing counts as waiting for the device: a twin is no part of the run."""
    before, device.capturing = device.capturing, False
    try:
        yield
    finally:
        device.capturing = before


def _fail(device: FakeDevice, fault: Fault, result: Tensor, args: tuple[Any, ...]) -> Tensor:
    if fault.kind == "hang":
        time.sleep(1000)
    if fault.kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault.kind == "illegal":
        device.lost = True  # the call itself returns: launches are asynchronous
    if fault.kind == "chain" and args[5] is None:
        return _chain(*args[:5])
    if fault.kind == "rounded":
        return (result.float().view(torch.int32) & -(1 << 13)).view(torch.float32)
    return 1.02 * result if fault.kind == "wrong" else result


def _chain(x: Tensor, w: Tensor, labels: Any, alpha: int, bias: Tensor | None) -> Tensor:
    """``split_matmul`` in float32, every sum one chain of fused multiply-adds."""
    table = labels if isinstance(labels, Tensor) else labels.unpack()
    wide = torch.stack([torch.where(table == child, w, 0) for child in range(alpha)])  # [alpha, N, K]
    y = x.new_zeros(x.shape[0], *wide.shape[:2])
    for k in range(x.shape[1]):
        y = (y.double() + x[:, k, None, None].double() * wide[None, :, :, k].double()).float()
    return y if bias is None else y + bias


class _Event:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.clock()

    def synchronize(self) -> None:
        self.device.synchronize()

    def elapsed_time(self, end: "_Event") -> float:
        return end.at - self.at


class _Generator(torch.Generator):
    """One of the CPU, whatever device is asked for."""

    def __new__(cls, *unused: Any) -> "_Generator":
        return super().__new__(cls)


class _Graph:
    def replay(self) -> None: ...


@contextmanager
def fake_device(**given: Any) -> Iterator[FakeDevice]:
    """Installs the device; yields its state. Keywords are the fields of :class:`FakeDevice`."""
    device = FakeDevice(**given)
    known = KNOWN[device.arch]
    device.shared = device.shared or known.shared
    properties = SimpleNamespace(
        major=device.arch // 10,
        minor=device.arch % 10,
        multi_processor_count=known.sms,
        L2_cache_size=known.l2,
        name="NVIDIA H200",
        uuid="1234",
    )

    @contextmanager
    def capture(graph: _Graph) -> Iterator[None]:
        device.capturing = True
        try:
            yield
        finally:
            device.capturing = False

    @contextmanager
    def on_stream(stream: int) -> Iterator[None]:
        before, device.stream = device.stream, stream
        try:
            yield
        finally:
            device.stream = before

    def note(*, key: str, fn: Any, **unused: Any) -> bool:
        device.launched.append((fn.name.rpartition(".")[2], key, device.stream))
        return not device.compiled(fn.name)

    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "synchronize": device.synchronize,
        "get_device_name": lambda *a: "NVIDIA H200",
        "get_device_properties": lambda *a: properties,
        "device_of": lambda tensor: nullcontext(),
        "Event": lambda enable_timing=False: _Event(device),
        "_sleep": device.sleep,
        "CUDAGraph": _Graph,
        "graph": capture,
        "stream": on_stream,
        "mem_get_info": lambda *a: (1 << 30, 1 << 30),
        "is_current_stream_capturing": lambda: device.capturing,
        "memory_allocated": lambda *a: 0,
        "max_memory_allocated": lambda *a: 0,
        "reset_peak_memory_stats": lambda *a: None,
    }
    where = torch.device("cuda", 0)
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        for name in FACTORIES:
            stack.enter_context(patch.object(torch, name, _on_the_cpu(getattr(torch, name))))
        stack.enter_context(patch.object(Tensor, "to", _on_the_cpu(Tensor.to)))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        stack.enter_context(patch.object(timing, "FLUSH", 1 << 16))
        for name in ("item", "tolist", "__bool__", "nonzero"):
            stack.enter_context(patch.object(Tensor, name, _refuses(device, getattr(Tensor, name)), create=True))
        real = Tensor.device
        own = {
            "is_cuda": property(lambda t: real.__get__(t).type != "meta"),
            "is_cpu": property(lambda t: False),
            "device": property(lambda t: where if real.__get__(t).type != "meta" else real.__get__(t)),
            "get_device": lambda t: 0,
        }
        for name, value in own.items():
            stack.enter_context(patch.object(Tensor, name, value, create=True))
        for name in ("is_cuda", "is_cpu"):
            stack.enter_context(patch.object(torch.nn.Parameter, name, own[name], create=True))
        stack.enter_context(patch.object(torch.backends.cusparselt, "is_available", lambda: True))
        # Optimizers ask whether a graph is captured; a build with CUDA would ask the driver.
        asked = SimpleNamespace(is_capturing=lambda: device.capturing)
        stack.enter_context(patch.object(torch.accelerator, "current_stream", lambda *a: asked))
        stack.enter_context(patch.object(triton.runtime.driver, "_active", _Driver(device)))
        stack.enter_context(patch.object(triton.knobs.runtime, "jit_cache_hook", note))
        for module, names in LAUNCHERS.items():
            loaded = import_module(f"fpe.kernels.{module}")
            for name in names:
                stack.enter_context(patch.object(loaded, name, _launcher(device, module, name, getattr(loaded, name))))
            replaced = {
                op: getattr(loaded, run.__name__, None) or as_merge(loaded.multiply_interleaved)
                for op, run in loaded.OPERATIONS.items()
            }
            stack.enter_context(patch.dict(loaded.OPERATIONS, replaced))
        packed = import_module("fpe.kernels.semi_structured.sparse_tensor_core")
        stack.enter_context(patch.object(packed, "_misplaced", lambda values, layout: None))  # nothing is packed here
        _forget()
        stack.callback(_forget)
        yield device


def _forget() -> None:
    """Drops what was learnt of another device."""
    from fpe.kernels import device, dispatch
    from fpe.kernels.semi_structured import sparse_tensor_core

    for cached in (device._query, dispatch.roof_of, sparse_tensor_core._is_sound):
        cached.cache_clear()
    dispatch.ranked_on.cache_clear()
    for value in list(vars(import_module("fpe.kernels.block.triton")).values()):
        if isinstance(value, JITFunction):
            value.device_caches.clear()
