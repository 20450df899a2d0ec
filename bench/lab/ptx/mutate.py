"""Breaks the kernels on purpose: what would the checks have seen? ``fpe lab mutate``.

A mutant is a kernel with one instruction changed, drawn with a fixed seed from those that a case executes. It is killed
where the execution faults or the result is wrong. What survives is a change that this case cannot see: the document
says of each class why.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, product
from typing import Any

import triton

from ...results import Results
from ...table import Table
from .cases import Case, runs_on
from .execute import Row, execute, good, in_parallel
from .parse import Address, Immediate, Instruction, Kernel, Operand, Register, Vector

Mutation = Callable[[Instruction, random.Random, Kernel], Instruction | None]
"""Changes an instruction, or says with ``None`` that it is not for this class."""

NOTHING = Instruction("bar.warp.sync", (Immediate(-1),), None, False, "")
"""What stands in the place of an instruction that was removed."""

CASES = (
    Case("partition", "split", shape=(120, 752), m=31, lying="padded", bias=True, activation="relu"),
    Case("partition", "split", shape=(120, 656), m=90, lying="padded", bias=True, activation="relu"),
    Case("partition", "merge_t", "fp16", shape=(330, 112), m=31, alpha=3, lying="padded"),
    Case("partition", "grad", shape=(120, 112), m=310, alpha=3, holes=True, lying="padded"),
    Case("block", "forward", block=(32, 32), shape=(120, 400), m=31, density=0.7, lying="padded", bias=True),
    Case("mlp", "mlp", shape=(15, 336), m=31, lying="padded", bias=True, activation="relu", outputs=60),
    Case("sparse", "forward", m=31, shape=(250, 328)),
)
"""With tails, with reductions of several steps, and with rows apart: what a case does not show cannot be seen in it."""


def _sources(instruction: Instruction) -> Iterator[tuple[int, Operand]]:
    start = 0 if isinstance(instruction.operands[0], Address) else 1
    yield from list(enumerate(instruction.operands))[start:]


def _with(instruction: Instruction, at: int, operand: Operand) -> Instruction:
    operands = (*instruction.operands[:at], operand, *instruction.operands[at + 1 :])
    return replace(instruction, operands=operands)


def _other_register(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """Two registers of the same width change places: two operands, or two parts of a vector."""
    if not instruction.operands:
        return None
    vectors = [(at, o) for at, o in enumerate(instruction.operands) if isinstance(o, Vector) and len(o.parts) > 1]
    if vectors and "tcgen05" not in instruction.opcode:
        at, vector = random.choice(vectors)
        parts = list(vector.parts)
        i, j = random.sample(range(len(parts)), 2)
        if parts[i] == parts[j] or None in (parts[i], parts[j]):
            return None
        parts[i], parts[j] = parts[j], parts[i]
        return _with(instruction, at, Vector(tuple(parts)))
    held = [(at, o) for at, o in _sources(instruction) if isinstance(o, Register)]
    pairs = [(a, b) for a, b in product(held, held) if a[0] < b[0] and a[1].bits == b[1].bits and a[1] != b[1]]
    symmetric = instruction.opcode.startswith(("add.", "mul.", "and.", "or.", "xor.", "min.", "max.", "fma.", "mad."))
    if not pairs or symmetric or instruction.opcode.startswith(("setp.eq", "setp.ne")):
        return None
    (i, one), (j, other) = random.choice(pairs)
    return _with(_with(instruction, i, other), j, one)


def _transposed(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """``ldmatrix`` and ``stmatrix`` with ``.trans`` toggled."""
    if not instruction.opcode.startswith(("ldmatrix.", "stmatrix.")):
        return None
    opcode = instruction.opcode
    changed = opcode.replace(".trans", "") if ".trans" in opcode else opcode.replace(".shared", ".trans.shared")
    return replace(instruction, opcode=changed)


def _removed(*names: str) -> Mutation:
    def mutation(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
        return NOTHING if instruction.opcode.startswith(names) else None

    return mutation


def _waits_less(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """One more group may still be under way."""
    if "wait_group" not in instruction.opcode:
        return None
    (count,) = instruction.operands
    assert isinstance(count, Immediate)
    return replace(instruction, operands=(Immediate(count.bits + 1),))


def _widened(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """A guard is lifted, a limit is one too far, or a copy takes all its bytes."""
    if instruction.guard is not None and instruction.opcode.startswith(("ld.", "st.")):
        return replace(instruction, guard=None)
    if instruction.opcode.startswith(("setp.lt.s", "setp.lt.u")):
        return replace(instruction, opcode=instruction.opcode.replace(".lt.", ".le."))
    if instruction.opcode.startswith("cp.async.c") and len(instruction.operands) == 4:
        return replace(instruction, operands=instruction.operands[:3])
    return None


def _other_constant(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """An integer constant of the arithmetic with one bit flipped."""
    if not instruction.operands or instruction.opcode.startswith(
        ("ld.", "st.", "cp.", "bar.", "shfl.", "wgmma", "tcgen")
    ):
        return None
    held = [(at, o) for at, o in _sources(instruction) if isinstance(o, Immediate) and not o.floating]
    if not held or "f32" in instruction.opcode:
        return None
    at, constant = random.choice(held)
    bit = random.randrange(max(constant.bits.bit_length(), 1))
    return _with(instruction, at, Immediate(constant.bits ^ (1 << bit)))


def _other_offset(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """An address off by its access's 16 bytes."""
    held = [(at, o) for at, o in enumerate(instruction.operands) if isinstance(o, Address)]
    if not held or instruction.opcode.startswith(("ld.param", "mbarrier", "tcgen05")):
        return None
    at, address = random.choice(held)
    return _with(instruction, at, replace(address, offset=address.offset + random.choice((-16, 16))))


def _other_descriptor(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """A bit of a matrix descriptor: its start, its stride, its swizzle."""
    if not instruction.opcode.startswith(("or.b64", "add.s64")):
        return None
    for at, operand in _sources(instruction):
        if isinstance(operand, Immediate) and 0 < (operand.bits >> 32 & 0x3FFF) < 0x3FFF:
            bit = random.choice((1, 4, 32, 33, 62, 63))
            return _with(instruction, at, Immediate((operand.bits ^ 1 << bit) & 0xFFFF_FFFF_FFFF_FFFF))
    return None


EXCHANGED = {
    "add.s": "sub.s",
    "sub.s": "add.s",
    "shl.b": "shr.b",
    "shr.u": "shl.b",
    "and.b": "or.b",
    "or.b": "and.b",
    "xor.b": "and.b",
    "min.s": "max.s",
    "mul.f": "add.f",
    "add.f": "mul.f",
    "and.pred": "or.pred",
}


def _other_operation(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """Addition for subtraction, left for right, and for or, and so on."""
    for name, other in EXCHANGED.items():
        if instruction.opcode.startswith(name) and "x2" not in instruction.opcode:
            kind = instruction.opcode.removeprefix(name)
            return None if "." in kind else replace(instruction, opcode=other + kind)
    return None


CLASSES: dict[str, Mutation] = {
    "registers swapped": _other_register,
    "matrix transposed": _transposed,
    "barrier removed": _removed("bar.sync"),
    "fence removed": _removed("fence.proxy", "wgmma.fence"),
    "commit removed": _removed("cp.async.commit", "wgmma.commit", "tcgen05.commit"),
    "wait one group less": _waits_less,
    "wait for tensor memory removed": _removed("tcgen05.wait"),
    "descriptor changed": _other_descriptor,
    "predicate widened": _widened,
    "constant changed": _other_constant,
    "address moved": _other_offset,
    "operation exchanged": _other_operation,
}


def mutants(kernel: Kernel, visited: Iterable[bool], name: str, most: int) -> Iterator[tuple[int, Instruction]]:
    """Places and changed instructions of a class, at most so many, the same ones in every run."""
    drawn = random.Random(f"{kernel.name} {name}")
    found = []
    for at, (instruction, was) in enumerate(zip(kernel.instructions, visited, strict=True)):
        changed = CLASSES[name](instruction, drawn, kernel) if was else None
        if changed is not None and changed != instruction:
            found.append((at, changed))
    yield from sorted(drawn.sample(found, min(most, len(found))), key=lambda pair: pair[0])


def changed(kernel: Kernel, at: int, instruction: Instruction) -> Kernel:
    """The kernel with one other instruction."""
    instructions = [*kernel.instructions[:at], instruction, *kernel.instructions[at + 1 :]]
    return replace(kernel, instructions=instructions)


def words(instruction: Instruction) -> str:
    """An instruction as it might be written."""

    def said(operand: Operand | None) -> str:
        if isinstance(operand, Vector):
            return "{" + ", ".join(map(said, operand.parts)) + "}"
        if isinstance(operand, Address):
            return f"[{said(operand.base)}+{operand.offset}]"
        return str(operand.bits) if isinstance(operand, Immediate) else getattr(operand, "name", "_")

    return f"{instruction.opcode} {', '.join(map(said, instruction.operands))}"


def run_case(case: Case, arch: int, most: int, classes: Iterable[str] = tuple(CLASSES)) -> list[Row]:
    """The mutants of a case's first kernel, one row for each."""
    launches: list[Any] = []
    whole = execute(case, arch, launches=launches)
    if not good(whole):
        raise ValueError(f"{case.id} on sm_{arch} is wrong before anything is changed: {whole['status']}")
    kernel, visited = launches[0].kernel, launches[0].visited
    rows = []
    for name in classes:
        for at, instruction in mutants(kernel, visited, name, most):

            def change(given: Kernel, at: int = at, instruction: Instruction = instruction) -> Kernel:
                return changed(given, at, instruction) if given is kernel else given

            try:
                row = execute(case, arch, change)
            except TypeError:  # its registers have other types: the assembler would not take it
                continue
            rows.append(
                {
                    "arch": arch,
                    "case": case.id,
                    "class": name,
                    "at": at,
                    "source": kernel.instructions[at].source,
                    "before": words(kernel.instructions[at]),
                    "after": "" if instruction is NOTHING else words(instruction),
                    "killed": not good(row),
                    "by": "" if good(row) else row["status"].partition(":")[0],
                }
            )
    return rows


def run(
    cases: Iterable[Case] = CASES,
    architectures: Iterable[int] = (80, 90, 100),
    most: int = 6,
    jobs: int | None = 1,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda rows, total: rows,
) -> Results:
    """Mutants of every class and case, at most ``most`` of each; the other arguments are those of ``execute.run``."""
    cases, architectures = tuple(cases), tuple(architectures)
    todo = [(case, arch, most) for arch, case in product(architectures, cases) if runs_on(case, arch)]
    rows = list(chain.from_iterable(progress(in_parallel(run_case, todo, jobs), len(todo))))
    settings = {"triton": triton.__version__, "architectures": list(architectures), "most": most}
    return Results("lab-mutation", settings, rows)


def table(results: Results) -> Table:
    """The kill rate of each class, over all cases and architectures."""
    rows = []
    for name in CLASSES:
        own = [row for row in results.rows if row["class"] == name]
        killed = [row for row in own if row["killed"]]
        result = sum(row["by"] == "wrong" for row in killed)
        if own:
            share = f"{len(killed) / len(own):.0%}"
            rows.append((name, *map(str, (len(own), len(killed) - result, result, len(own) - len(killed))), share))
    architectures = ", ".join(f"sm_{arch}" for arch in results.settings["architectures"])
    columns = ("class", "mutants", "killed by a check", "killed by the result", "survived", "killed")
    return Table(f"Mutants of compiled kernels, {architectures}", columns, rows)
