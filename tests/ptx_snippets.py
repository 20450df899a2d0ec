"""Small kernels in PTX, run on the machine that executes the compiled ones."""

import numpy as np

from fpe.bench.lab.ptx.machine import Machine
from fpe.bench.lab.ptx.memory import Global, Region
from fpe.bench.lab.ptx.parse import parse
from fpe.bench.lab.ptx.table import table

MODULE = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry snippet(
	.param .u64 .ptr .global .align 1 snippet_param_0,
	.param .u64 .ptr .global .align 1 snippet_param_1
)
.reqntid 64
{
	.reg .pred %p<20>;
	.reg .b16 %rs<20>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<20>;
	ld.param.b64 %rd0, [snippet_param_0];
	ld.param.b64 %rd1, [snippet_param_1];
	mov.u32 %r0, %tid.x;
	mov.u32 %r1, %ctaid.x;
	mul.wide.u32 %rd2, %r0, 4;
	add.s64 %rd3, %rd0, %rd2; // this thread's word of the input
	add.s64 %rd4, %rd1, %rd2; // and of the output
	shl.b32 %r2, %r0, 2;
	mov.b32 %r3, smem;
	add.s32 %r4, %r3, %r2; // its word of shared memory
	xor.b32 %r5, %r2, 128;
	add.s32 %r5, %r3, %r5; // and that of a thread of the other warp
BODY
	ret;
}
"""
THREADS = 64


def machine(body: str, memory: Global, ctas: int = 1, shared: int = 1024, arch: int = 80) -> Machine:
    """A launch of the body of a kernel on two regions: the first is its input, the second its output."""
    kernel = parse(MODULE.replace("BODY", body))
    return Machine(kernel, (ctas, 1, 1), THREADS, memory.addresses, memory, shared, table(arch))


def region(name: str, words: np.ndarray, initialised: bool = True, every: int = 1) -> Region:
    """Words of memory; of every so many of them only the first is an element."""
    data = np.ascontiguousarray(words).view(np.uint8)
    accessible = np.repeat(np.arange(len(words)) % every == 0, words.itemsize)
    return Region(name, data, accessible, np.full(len(data), initialised))


def run(body: str, words: np.ndarray | None = None, out: int = THREADS, every: int = 1, **options: int) -> np.ndarray:
    """Runs the body on 64 words of input (0, 1, 2, ... unless given) and returns the words of output."""
    words = np.arange(THREADS, dtype=np.uint32) if words is None else words
    result = np.full(out, 0xDEADBEEF, np.uint32)
    memory = Global([region("input", words, every=every), region("output", result, initialised=False)])
    machine(body, memory, **options).run(limit=10_000)
    memory.write_back()
    return result
