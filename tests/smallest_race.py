"""The smallest kernel whose matrix instructions race on compute capability 9.0, compiled by the Triton at hand.

A script, as Triton does not interpret in it. Prints what is found in the machine code, as JSON.
"""

import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fpe.bench.lab import hazards
from fpe.bench.lab.compile import disassemble
from fpe.bench.lab.sass import read_sass


@triton.jit
def computed_left(a_ptr, x_ptr, out_ptr, mask, steps, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):
    offs_n, offs_k, offs_m = tl.arange(0, 64), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    acc = tl.zeros([64, BLOCK_M], tl.float32)
    for step in range(steps):
        columns = step * BLOCK_K + offs_k
        a = tl.load(a_ptr + offs_n[:, None] * 4096 + columns[None, :])  # [64, BLOCK_K]
        x = tl.load(x_ptr + offs_m[None, :] * 4096 + columns[:, None])  # [BLOCK_K, BLOCK_M]
        acc = tl.dot((a & mask).to(tl.bfloat16, bitcast=True), x, acc)
    tl.store(out_ptr + offs_m[None, :] * 64 + offs_n[:, None], acc)


def compiled(block_k: int, block_m: int) -> CompiledKernel:
    """It, for compute capability 9.0."""
    names = ("a_ptr", "x_ptr", "out_ptr", "mask", "steps", "BLOCK_K", "BLOCK_M")
    types = ("*i16", "*bf16", "*fp32", "i16", "i32", "constexpr", "constexpr")
    source = ASTSource(
        computed_left,
        dict(zip(names, types, strict=True)),
        {"BLOCK_K": block_k, "BLOCK_M": block_m},
        {(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})


def found(block_k: int, block_m: int) -> dict[str, int]:
    """Instructions at fault, by kind."""
    kernel = compiled(block_k, block_m)
    code, _ = disassemble(kernel.asm["cubin"])
    return hazards.counted(hazards.search(*read_sass(code), kernel.asm["ptx"]))


if __name__ == "__main__":
    print(json.dumps({"triton": triton.__version__, "64x16": found(64, 16), "128x128": found(128, 128)}))
