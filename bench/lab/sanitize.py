"""Memory safety of the kernels under the interpreter: out-of-bounds accesses and races between programs.

What TileLens 3.1 can do here, tried: its sanitizer follows addresses symbolically, loops and indices read from memory
included, and names the tensor that a pointer came from. It gives equal ``tl.arange`` of one program the same symbol,
so that of a square tile it sees the diagonal alone. Its race detector records accesses and judges none of them (its
solver is an empty file). So bounds are checked twice, by the sanitizer and lane by lane in the trace; those of kept
values only in the trace (:data:`UNFOLLOWED`). Races are found in the trace. It is exact for what was run, and blind to
atomics, which these kernels do not use.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .ptx.cases import BITMAP, BLOCK, KEPT, PARTITION, Case, problem
from .trace import Kernels, Touch, Trace, family_kernels, tracing, watching


@dataclass(frozen=True)
class Finding:
    """Something that a kernel must not do.

    Attributes:
        kernel: Its name.
        kind: ``"bounds"`` (sanitizer), ``"bounds, traced"`` or ``"race"``.
        tensor: The argument.
        detail: What happened.
    """

    kernel: str
    kind: str
    tensor: str
    detail: str


def _each(family: str, operations: tuple[str, ...] = (), **fields: Any) -> tuple[Case, ...]:
    """A case of each of a family's operations, in float16 if nothing else is said, bias and activation together."""
    defaults = {"dtype": "fp16", "activation": "relu" if fields.get("bias") else None, "integers": False}
    return tuple(Case(family, op, **(defaults | fields)) for op in operations or OPERATIONS[family])


OPERATIONS = {"block": BLOCK, "partition": PARTITION, "mlp": ("mlp",), "bitmap": BITMAP}
CASES = (
    *_each("block", block=(16, 32)),
    *_each("block", block=(16, 32), m=1, bias=True),
    *_each("block", block=(16, 16), bias=True, lying="strided"),
    *_each("block", block=(32, 32), m=32, shape=(64, 96)),
    *_each("block", block=(16, 16), m=3, shape=(20, 300), density=2.0, bias=True),
    *_each("block", block=(16, 16), m=530, shape=(17, 33), density=0.7),
    *_each("block", block=(64, 64), m=5, shape=(65, 70), dtype="fp32", lying="strided"),
    *_each("block", block=(16, 16), m=1100, shape=(33, 16), density=0.8),  # programs in groups
    *_each("block", block=(16, 16), density=0.1),
    *_each("block", block=(16, 32), density=0.0),
    *_each("partition"),
    *_each("partition", shape=(65, 91), lying="strided", bias=True),
    *_each("partition", m=32, shape=(128, 256), bias=True),
    *_each("partition", m=3, shape=(40, 1100), bias=True),
    *_each("partition", m=3, shape=(1100, 40), bias=True),
    *_each("partition", alpha=3, holes=True),
    *_each("partition", alpha=8, m=5, dtype="fp32", lying="strided", holes=True),
    *_each("partition", m=1, shape=(1, 1), bias=True),
    *_each("partition", m=600, shape=(20, 40), alpha=4, holes=True),
    *_each("bitmap", m=5, shape=(17, 70), density=0.25),
    *_each("bitmap", KEPT, alpha=1, m=3, shape=(20, 1100), bias=True),
    *_each("bitmap", KEPT, alpha=3, m=3, shape=(270, 20), dtype="fp32", density=1.0),
    *_each("bitmap", BITMAP[:2], shape=(70, 1100), density=0.75),  # more positions than one base covers
    *_each("mlp", shape=(13, 70), bias=True),
    *_each("mlp", alpha=3, shape=(17, 71), outputs=70, merged=True, bias=True),
    *_each("mlp", alpha=8, m=1, shape=(1, 8), outputs=1, bias=True),
    *_each("mlp", m=64, shape=(16, 128), outputs=64, merged=True, bias=True),
)
"""Tails, one row, strides, whole tiles, split reductions, empty and odd ones."""
UNFOLLOWED = ("bitmap",)
"""Families whose addresses hold sums of what was loaded, which the sanitizer cannot follow: traces are checked."""


def check_kernels(cases: Iterable[Case] = CASES) -> list[Finding]:
    """Runs every case under all checks; needs ``TRITON_INTERPRET=1`` and TileLens.

    Returns:
        What was found; nothing, if all is well.
    """
    return [
        finding
        for case in cases
        for finding in check(family_kernels(case.family), launch(case), case.family not in UNFOLLOWED)
    ]


def launch(case: Case) -> Callable[[], Any]:
    """What launches a case."""
    posed = problem(case)
    return lambda: posed.kernel(*posed.operands)


def check(kernels: Kernels, run: Callable[[], Any], symbolic: bool = True) -> list[Finding]:
    """Runs launches twice, under the sanitizer and under the tracer.

    Args:
        kernels: What is launched.
        run: Makes the launches. Under the sanitizer nothing is computed: its results are not to be looked at.
        symbolic: Whether the sanitizer can follow the addresses; else the tracer alone watches.
    """
    from tilelens.clients import Sanitizer

    findings: list[Finding] = []

    def collect(kernel: str, sanitizer: Any) -> None:
        for r in sanitizer.records:
            line = r.user_code_tracebacks[-1].lineno if r.user_code_tracebacks else "?"
            access = r.op_type.__name__.lower()
            findings.append(Finding(kernel, "bounds", _name(r.tensor_name), f"{access} in line {line} may leave it"))

    if symbolic:
        with watching(kernels, lambda: Sanitizer(abort_on_error=False), collect):
            run()
    if any(finding.detail.startswith("store") for finding in findings):
        return findings  # the tracer would let it happen and take this process with it
    with tracing(kernels) as traces:
        run()
    for trace in traces:
        findings += [*bounds(trace), *races(trace)]
    return findings


def bounds(trace: Trace) -> Iterator[Finding]:
    """Active lanes outside of the tensor that their access starts in."""
    for position, touches in trace.programs.items():
        for t in touches:
            outside = (t.offsets < 0) | (t.offsets + t.itemsize > trace.extents[t.tensor])
            if outside.any():
                where = f"byte {t.offsets[outside][0]} of {trace.extents[t.tensor]}"
                detail = f"{_verb(t)} by program {position} at {where}"
                yield Finding(trace.kernel, "bounds, traced", t.tensor, detail)


def races(trace: Trace) -> Iterator[Finding]:
    """Elements that one program writes and another reads or writes, or two lanes of one store write.

    The programs of a launch have no order, so each is a race whatever the values are.
    """
    writer = {name: np.full(size + 1, -1) for name, size in trace.extents.items()}
    programs = list(trace.programs.items())
    # All writes first: a reader may come before the writer in the trace and still race with it.
    for stores in (True, False):
        for number, (position, touches) in enumerate(programs):
            for t in touches:
                if t.store != stores:
                    continue
                lanes = t.offsets[(t.offsets >= 0) & (t.offsets < trace.extents[t.tensor])]
                others = writer[t.tensor][lanes]
                clash = (others != -1) & (others != number)
                if clash.any():
                    other = programs[others[clash][0]][0]
                    detail = f"{_verb(t)} by program {position} at byte {lanes[clash][0]}, written by program {other}"
                    yield Finding(trace.kernel, "race", t.tensor, detail)
                if t.store:
                    if len(np.unique(lanes)) < len(lanes):
                        yield Finding(trace.kernel, "race", t.tensor, f"two lanes of a store of program {position}")
                    writer[t.tensor][lanes] = number


def _verb(touch: Touch) -> str:
    return "store" if touch.store else "load"


def _name(tensor: str | None) -> str:
    return (tensor or "?").removesuffix("_ptr")
