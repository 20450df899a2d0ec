"""Compiles kernels before the device is touched, by all cores: real launches on meta tensors, for an architecture.

A launch is specialised on meta tensors as it is on a GPU: aligned to 16 bytes, with the same sizes and strides. What is
compiled lies in Triton's own cache, by the hash of source, target and options; the launch on the device finds it there.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

from fpe.kernels.device import KNOWN, Device
from fpe.kernels.dispatch import never
from fpe.kernels.structures import BLOCK, RANDOM, SEEDED

from ..families import FAMILIES, block, partition, semi_structured
from ..families import Case as Launch
from ..lab.compile import catching
from ..latency.problems import Case
from .steps import Rows

COMPILED = ("triton", "sparse_tensor_core")
"""Backends whose kernels are ours."""


def launches(case: Case, level: str, passes: Iterable[str]) -> Iterator[Launch]:
    """The launches of this package's backends in a case of the suite, a training step's included."""
    m, n, k, alpha, dtype = case.m, case.n, case.k, case.alpha, case.dtype
    wanted = set(passes) & {"forward", "dX", "dW"} or {"forward", "dX", "dW"}
    second = level in ("merge", "mlp", "step")
    if level != "merge":
        yield from _expanded(case, wanted)
    if second and case.structure == BLOCK:
        for op in _named(wanted, "forward", "dx", "dw"):
            yield block.Case(op, dtype, m, alpha, shape=(k, alpha * n), block=case.block[::-1])
    elif second:
        for op in _named(wanted, "merge", "split_t", "grad_t"):
            yield partition.Case(op, dtype, m, alpha, shape=(k, n))
        if alpha in (2, 4) and dtype in ("bf16", "fp16") and "forward" in wanted:
            yield from _self_check(dtype)
            yield from _packs(dtype, (k, n), "parent" if alpha == 2 else "parent of four")
            yield semi_structured.Case("sparse", dtype, m, 1, shape=(k, alpha * n))


SELF_CHECK = (11, (136, 200))
"""Rows and shape with which sparse tensor cores are tried before their first use."""


def _expanded(case: Case, wanted: set[str]) -> Iterator[Launch]:
    m, n, k, alpha, dtype = case.m, case.n, case.k, case.alpha, case.dtype
    if case.structure == BLOCK:
        for op in _named(wanted, "forward", "dx", "dw"):
            yield block.Case(op, dtype, m, alpha, shape=(alpha * n, k), block=case.block)
    elif case.structure in (RANDOM, SEEDED):
        for op in _named(wanted, "split", "merge_t", "grad"):
            yield partition.Case(op, dtype, m, alpha, shape=(n, k), seeded=case.structure == SEEDED)
    elif dtype != "tf32":
        for op in ("compress", "expand", *_named(wanted, "forward", "dx", "dw")):
            yield semi_structured.Case(op, dtype, m, shape=(n, k))
        if dtype != "fp32":
            yield from _self_check(dtype)
            yield from _packs(dtype, (n, k), "values", "transposed values")
            yield semi_structured.Case("sparse", dtype, m, shape=(n, k))
            yield semi_structured.Case("sparse", dtype, m, 1, shape=(k, 2 * n))  # dX, by the transposed weight


def _self_check(dtype: str) -> Iterator[Launch]:
    m, shape = SELF_CHECK
    for children in (1, 2):
        yield semi_structured.Case("sparse", dtype, m, children, shape=shape)
    yield semi_structured.Case("sparse", dtype, m, shape=shape, seeded=True)
    yield from _packs(dtype, shape, "values", "parent", "parent.T", "transposed values", forms=("fragments",))


def _packs(
    dtype: str, shape: tuple[int, int], *sources: str, forms: tuple[str, ...] = ("fragments", "dense")
) -> Iterator[Launch]:
    for source in sources:
        for form in forms:
            yield semi_structured.Case(f"pack {source} into {form}", dtype, 1, shape=shape)


def _named(wanted: set[str], *names: str) -> list[str]:
    return [name for pass_, name in zip(("forward", "dX", "dW"), names, strict=True) if pass_ in wanted]


@contextmanager
def offline(arch: int, device: Device, skip: Callable[[str, str], bool]) -> Iterator[list[Any]]:
    """Within it a launch of any family compiles for ``arch``, if ``skip`` of kernel and key is false, and runs nothing.

    Backends take tensors that are not on a GPU meanwhile.

    Yields:
        What was compiled.
    """
    with ExitStack() as stack:
        caught = stack.enter_context(catching(arch, skip, device=device))
        for family in FAMILIES.values():
            for backends in family.BACKENDS:
                able = {name: replace(b, why_not=never) for name, b in backends.items() if name in COMPILED}
                stack.enter_context(patch.dict(backends, able))
        yield caught


Binary = tuple[str, str]
"""A kernel's name and the key of Triton's that tells its binaries apart."""


def binaries(todo: Iterable[Launch], arch: int, device: Device) -> dict[Binary, Launch]:
    """What has to be compiled, each binary once, with the first launch that needs it; nothing is compiled."""
    found: dict[Binary, Launch] = {}
    for launch in dict.fromkeys(todo):
        keys: list[Binary] = []

        def note(kernel: str, key: str, keys: list[Binary] = keys) -> bool:
            keys.append((kernel, key))
            return True

        with offline(arch, device, note):
            launch.call()
        for key in keys:
            found.setdefault(key, launch)
    return found


def compile_all(todo: Iterable[Launch], arch: int, device: Device | None = None, jobs: int | None = None) -> Rows:
    """Compiles launches by a pool of processes.

    Args:
        todo: What will be launched.
        arch: For which architecture.
        device: Of which properties; those known of the architecture if not given.
        jobs: Processes; as many as cores if not given.

    Returns:
        A row for each binary: ``kernel``, ``launch``, ``compile_seconds`` (of processor time), ``status``.
    """
    device = device or KNOWN[arch]
    wanted: dict[Launch, list[Binary]] = {}
    for binary, launch in binaries(todo, arch, device).items():
        wanted.setdefault(launch, []).append(binary)
    work = partial(_compile, arch=arch, device=device)
    if jobs == 1:
        return [row for pair in wanted.items() for row in work(*pair)]
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        pending = [pool.submit(work, *pair) for pair in wanted.items()]
        return [row for done in as_completed(pending) for row in done.result()]


def _compile(launch: Launch, wanted: list[Binary], arch: int, device: Device) -> Rows:
    rows = []
    for binary in wanted:
        start, status = _processor_seconds(), {"status": "ok"}
        try:
            with offline(arch, device, lambda *key, only=binary: key != only):
                launch.call()
        except Exception as error:  # the device will say the same, and in which call
            status = {"status": "error", "reason": str(error).strip().partition("\n")[0]}
        spent = _processor_seconds() - start
        rows.append({"kernel": binary[0], "launch": launch.name, "arch": arch, "compile_seconds": spent, **status})
    return rows


def compile_check(index: int, dtype: str, arch: int, device: Device) -> int:
    """Compiles what a check of the gate launches in a dtype, by every backend; returns how many binaries."""
    from .checks import checks
    from .gate import DTYPES, float32_as

    check = list(checks())[index]
    count = 0
    for backend in check.backends:
        if backend == "torch":
            continue
        with float32_as(dtype), offline(arch, device, lambda *key: False) as caught:
            with suppress(Exception):  # it refuses, or will say why on the device
                check.run(lambda t: t.to(DTYPES[dtype]), backend)
            count += len(caught)
    return count


def compile_gate(dtype: str, arch: int, device: Device, jobs: int | None = None) -> Rows:
    """Compiles every check's kernels in a dtype by a pool of processes; one row."""
    from .checks import checks

    start, count = time.perf_counter(), len(list(checks()))
    work = partial(compile_check, dtype=dtype, arch=arch, device=device)
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        made = sum(pool.map(work, range(count), chunksize=max(1, count // (8 * (jobs or os.cpu_count() or 1)))))
    return [{"status": "ok", "dtype": dtype, "binaries": made, "wall_seconds": time.perf_counter() - start}]


def _processor_seconds() -> float:
    """Processor time of this process and of what it has started and awaited."""
    return sum(os.times()[:4])
