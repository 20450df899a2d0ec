"""Runs PTX that a test writes by hand."""

import numpy as np

from fpe.bench.lab.ptx.machine import Machine
from fpe.bench.lab.ptx.memory import Fault, Global, Region
from fpe.bench.lab.ptx.parse import parse
from fpe.bench.lab.ptx.table import table

HEAD = """
.version 8.7
.target sm_{arch}
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(.param .u64 in, .param .u64 out)
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
    text = HEAD.format(arch=arch, threads=threads) + body + "\n\tret;\n}\n"
    regions = []
    for name, array in (("in", given), ("out", out)):
        data = array.reshape(-1).view(np.uint8)
        regions.append(Region(name, data, np.ones(len(data), bool), np.full(len(data), name == "in")))
    memory = Global(regions)
    machine = Machine(parse(text), (ctas, 1, 1), threads, memory.addresses, memory, shared, table(arch))
    machine.extra["asynchronous"] = asynchronous
    machine.run(100_000)
    memory.write_back()
    return machine


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
