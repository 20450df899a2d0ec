"""Runs PTX that a test writes by hand, on the machine that executes the compiled kernels."""

from collections.abc import Callable

import numpy as np

from fpe.bench.lab.ptx.machine import Handler, Machine
from fpe.bench.lab.ptx.memory import Fault, Global, Region
from fpe.bench.lab.ptx.parse import Kernel, parse
from fpe.bench.lab.ptx.table import table

HEAD = """
.version 8.7
.target sm_{arch}
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 in, .param .u64 .ptr .global .align 1 out)
.reqntid {threads}
{{
	.reg .pred %p<20>;
	.reg .b16 %rs<20>;
	.reg .b32 %r<200>;
	.reg .b64 %rd<40>;
	ld.param.b64 %rd1, [in];
	ld.param.b64 %rd2, [out];
	mov.u32 %r0, %tid.x;
"""

THREADS = 64
"""Of a program on words: two warps."""

WORDS = """
	mov.u32 %r1, %ctaid.x;
	mul.wide.u32 %rd0, %r0, 4;
	add.s64 %rd3, %rd1, %rd0; // this thread's word of the input
	add.s64 %rd4, %rd2, %rd0; // and of the output
	shl.b32 %r2, %r0, 2;
	mov.b32 %r3, smem;
	add.s32 %r4, %r3, %r2; // its word of shared memory
	xor.b32 %r5, %r2, 128;
	add.s32 %r5, %r3, %r5; // and that of a thread of the other warp
"""


def _parsed(body: str, arch: int, threads: int) -> Kernel:
    return parse(HEAD.format(arch=arch, threads=threads) + body + "\n\tret;\n}\n")


def _region(name: str, array: np.ndarray, every: int = 1) -> Region:
    """An array as the kernel sees it, input or output; of every so many elements only the first is one."""
    data = array.reshape(-1).view(np.uint8)
    accessible = np.repeat(np.arange(array.size) % every == 0, array.itemsize)
    return Region(name, data, accessible, np.full(len(data), name == "in"))


def run(
    body: str,
    given: np.ndarray,
    out: np.ndarray,
    arch: int,
    threads: int = 128,
    shared: int = 8192,
    asynchronous: str = "refuse",
    ctas: int = 1,
) -> Machine:
    """Executes a body, with ``%r0`` the thread and ``%rd1`` and ``%rd2`` pointers to ``given`` and ``out``."""
    memory = Global([_region("in", given), _region("out", out)])
    kernel = _parsed(body, arch, threads)
    machine = Machine(kernel, (ctas, 1, 1), threads, memory.addresses, memory, shared, table(arch))
    machine.extra["asynchronous"] = asynchronous
    machine.run(100_000)
    memory.write_back()
    return machine


def run_on_words(
    body: str,
    words: np.ndarray | None = None,
    out: int = THREADS,
    every: int = 1,
    ctas: int = 1,
    change: Callable[[Kernel], Kernel] = lambda kernel: kernel,
    watch: Handler | None = None,
) -> np.ndarray:
    """Runs a body on 64 words of input (0, 1, 2, ... unless given), with the registers of ``WORDS``.

    Of every so many words of the input only the first is an element.

    Returns:
        The words of output, 0xDEADBEEF where nothing was stored.
    """
    words = np.arange(THREADS, dtype=np.uint32) if words is None else words
    result = np.full(out, 0xDEADBEEF, np.uint32)
    memory = Global([_region("in", np.ascontiguousarray(words), every), _region("out", result)])
    kernel = change(_parsed(WORDS + body, 80, THREADS))
    Machine(kernel, (ctas, 1, 1), THREADS, memory.addresses, memory, 1024, table(80), watch).run(10_000)
    memory.write_back()
    return result


def fault(body: str, given: np.ndarray, out: np.ndarray, arch: int, **options: int | str) -> str:
    """The kind of the fault that a body ends with, or ``"none"``."""
    try:
        run(body, given, out, arch, **options)  # type: ignore[arg-type]
    except Fault as found:
        return found.kind
    return "none"


def changed(steps: dict[str, str], **changes: str) -> str:
    """The text of named steps, some replaced; ``before_x`` and ``after_x`` put text around step ``x``."""
    known = {prefix + name for name in steps for prefix in ("", "before_", "after_")}
    assert changes.keys() <= known, changes.keys() - known
    parts = []
    for name, text in steps.items():
        parts += [changes.get(f"before_{name}", ""), changes.get(name, text), changes.get(f"after_{name}", "")]
    return "\n".join(part for part in parts if part)
