"""Each kernel whose operands are both loaded, compiled as before Triton 3.7.1, its own fences told from the compiler's.

Printed: its own fences, its products, and what the search finds in its machine code with its own fences alone and with
none.
"""

import json
import re
import subprocess
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import triton

from fpe.bench.families import Case, block, partition, semi_structured
from fpe.bench.lab import compile as compiler
from fpe.bench.lab import hazards
from fpe.bench.lab.sass import read_sass
from fpe.kernels import device

FENCE = "fence.proxy.async.shared::cta;"
"""The compiler's; that of a kernel has a move behind it."""
CASES = (
    block.Case("forward", "bf16", 64, block=(64, 64)),
    block.Case("dx", "fp16", 1024, block=(64, 64)),
    block.Case("dw", "bf16", 1024, block=(128, 128)),
    partition.Case("grad", "bf16", 1024, alpha=2),
    semi_structured.Case("dw", "bf16", 1024),
    block.Case("forward", "bf16", 16, block=(64, 64)),
)
"""The last has too few rows for ``wgmma``."""


def found(ptx: str) -> dict[str, int]:
    """Instructions at fault in what the assembler makes of a program, by kind."""
    with TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "--gpu-name=sm_90a", str(source), "-o", str(binary)]
        subprocess.run(command, check=True, capture_output=True)
        code, _ = compiler.disassemble(binary.read_bytes())
    return hazards.counted(hazards.search(*read_sass(code), ptx))


def facts(case: Case, version: tuple[int, ...]) -> dict[str, object]:
    """Of a case's kernel, compiled as with a version of Triton."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(device, "triton_version", lambda: version))
        caught = stack.enter_context(compiler.catching(90, lambda kernel, key: kernel == "_reduce"))
        case.call()
    ((compiled, _),) = caught
    ptx = compiled.asm["ptx"]
    return {
        "own": ptx.count(f"{FENCE} mov"),
        "products": ptx.count("wgmma.commit_group"),
        "own alone": found(re.sub(rf"{FENCE}(?! mov)", "", ptx)),
        "none": found(ptx.replace(FENCE, "")),
    }


if __name__ == "__main__":
    rows = {case.id: facts(case, (3, 7, 0)) for case in CASES}
    print(json.dumps({"before": rows, "since": facts(CASES[0], (3, 7, 1))}))
