"""Breaks the kernels on purpose: what would the checks have seen? ``fpe lab mutate``.

A mutant is a kernel with one instruction changed, drawn with a fixed seed from the changes that an execution of the
case would feel (:mod:`.felt`). It is killed where the execution faults or the result is wrong. What survives is a
change that this case cannot see: the document says of each class why.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import triton

from ...results import Results
from ...table import Table
from ..compile import insert
from .cases import Case, runs_on
from .execute import Row, execute, good, in_parallel
from .felt import Change, Watch, live, next_touch, pure
from .parse import Address, Immediate, Instruction, Kernel, Operand, Register, Vector

Mutation = Callable[[Instruction, random.Random, Kernel], Instruction | None]
"""Changes an instruction, or says with ``None`` that it is not for this class."""

PATIENCE = 4
"""A mutant that executes so many times the instructions of the whole kernel counts as endless."""

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
    Case("pack", "parent-fragments", shape=(120, 112), lying="padded"),
    Case("pack", "transposed-fragments", shape=(67, 130)),
    Case("bitmap", "kept_split", m=13, shape=(70, 1100), bias=True, activation="relu", density=0.75),
    Case("bitmap", "kept_merge", alpha=1, m=13, shape=(118, 1100), density=0.75),
)
"""With tails, with reductions of several steps, and with rows apart: what a case does not show cannot be seen in it."""


def _sources(instruction: Instruction) -> Iterator[tuple[int, Operand]]:
    start = 0 if isinstance(instruction.operands[0], Address) else 1
    yield from list(enumerate(instruction.operands))[start:]


def _with(instruction: Instruction, at: int, operand: Operand) -> Instruction:
    operands = (*instruction.operands[:at], operand, *instruction.operands[at + 1 :])
    return replace(instruction, operands=operands)


def _other_register(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """Exchanges two registers of the same width: two operands, or two parts of a vector."""
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
    """Lets the wait leave one more group under way."""
    if "wait_group" not in instruction.opcode:
        return None
    (count,) = instruction.operands
    assert isinstance(count, Immediate)
    return replace(instruction, operands=(Immediate(count.bits + 1),))


def _widened(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """Removes a guard, moves a limit by one, or lets a copy take all its bytes."""
    if instruction.guard is not None and instruction.opcode.startswith(("ld.", "st.")):
        return replace(instruction, guard=None)
    if instruction.opcode.startswith(("setp.lt.s", "setp.lt.u")):
        return replace(instruction, opcode=instruction.opcode.replace(".lt.", ".le."))
    if instruction.opcode.startswith("cp.async.c") and len(instruction.operands) == 4:
        return replace(instruction, operands=instruction.operands[:3])
    return None


def _other_constant(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """Flips one bit of an integer constant of the arithmetic."""
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
    """Moves an address by 16 bytes, those of its access."""
    held = [(at, o) for at, o in enumerate(instruction.operands) if isinstance(o, Address)]
    if not held or instruction.opcode.startswith(("ld.param", "mbarrier", "tcgen05")):
        return None
    at, address = random.choice(held)
    return _with(instruction, at, replace(address, offset=address.offset + random.choice((-16, 16))))


def _other_descriptor(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """Flips a bit of a matrix descriptor: of its start, its stride or its swizzle."""
    described = any(other.opcode.startswith(("wgmma.mma", "tcgen05.mma")) for other in kernel.instructions)
    if not described or not instruction.opcode.startswith(("or.b64", "add.s64")):
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
    """Exchanges opposites: addition and subtraction, left and right, and and or."""
    for name, other in EXCHANGED.items():
        if instruction.opcode.startswith(name) and "x2" not in instruction.opcode:
            kind = instruction.opcode.removeprefix(name)
            return None if "." in kind else replace(instruction, opcode=other + kind)
    return None


def _other_fill(instruction: Instruction, random: random.Random, kernel: Kernel) -> Instruction | None:
    """Sets every bit of what a masked load leaves."""
    if not instruction.opcode.startswith("mov.") or not isinstance(instruction.operands[1], Immediate):
        return None
    (register,) = instruction.destinations
    return _with(instruction, 1, Immediate((1 << register.bits) - 1))


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
    "fill changed": _other_fill,
    "address moved": _other_offset,
    "operation exchanged": _other_operation,
}


def changes(kernel: Kernel, classes: Iterable[str] = tuple(CLASSES)) -> Iterator[Change]:
    """All changes of a kernel, the same ones in every run.

    What nobody reads, or what is written again before it is read, is not worth a change. A constant that stands where
    a masked load does not is a fill, a class of its own: all its bits are set, which is no number in any type, because
    a small one would vanish where the other operand is zero.
    """
    after, lives = [next_touch(kernel, at) for at in range(len(kernel.instructions))], live(kernel)
    for name in classes:
        drawn = random.Random(f"{kernel.name} {name}")
        for at, instruction in enumerate(kernel.instructions):
            place, becomes = after[at] or (at, "read")
            fills = becomes == "filled" and kernel.instructions[place].opcode.startswith("ld.")
            dead = becomes == "written" or (
                pure(instruction) and lives.isdisjoint(r.name for r in instruction.destinations)
            )
            if dead or fills != (name == "fill changed"):
                continue
            changed = CLASSES[name](instruction, drawn, kernel)
            if changed is not None and changed != instruction:
                yield Change(name, at, changed, place if fills else at)


def drawn(felt: Iterable[Change], kernel: Kernel, most: int) -> list[Change]:
    """At most so many changes of each class, the same ones in every run."""
    chosen = []
    for name in CLASSES:
        found = sorted((c for c in felt if c.kind == name), key=lambda c: (c.at, words(c.after)))
        chosen += random.Random(f"{kernel.name} {name}").sample(found, min(most, len(found)))
    return sorted(chosen, key=lambda c: c.at)


def changed(kernel: Kernel, at: int, instruction: Instruction) -> Kernel:
    """Returns the kernel with one instruction replaced."""
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

    guard = f"@{'!' * instruction.negated}{instruction.guard.name} " if instruction.guard is not None else ""
    return f"{guard}{instruction.opcode} {', '.join(map(said, instruction.operands))}"


def run_case(case: Case, arch: int, most: int, classes: Iterable[str] = tuple(CLASSES)) -> list[Row]:
    """The mutants of a case's kernels, one row for each; a sum of parts belongs to every family and is left out."""
    watch = Watch(lambda kernel: changes(kernel, classes))
    whole = execute(case, arch, watch=watch)
    if not good(whole):
        raise ValueError(f"{case.id} on sm_{arch} is wrong before anything is changed: {whole['status']}")
    rows = []
    for kernel, felt, tried in zip(watch.kernels, watch.felt, watch.tried, strict=True):
        if kernel.name == "_reduce":
            continue
        counts, idle = Counter(c.kind for c in felt), Counter(c.kind for c in tried)
        for change in drawn(felt, kernel, most):
            before = kernel.instructions[change.at]

            def other(given: Kernel, kernel: Kernel = kernel, change: Change = change) -> Kernel:
                return changed(given, change.at, change.after) if given is kernel else given

            row = execute(case, arch, other, limit=PATIENCE * whole["instructions"])
            rows.append(
                {
                    "arch": arch,
                    "case": case.id,
                    "kernel": kernel.name,
                    "class": change.kind,
                    "at": change.at,
                    "source": before.source,
                    "before": words(before),
                    "after": "" if change.after is NOTHING else words(change.after),
                    "of": counts[change.kind],
                    "without_effect": idle[change.kind] - counts[change.kind],
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


def joined(path: Path, results: Results, cases: Iterable[Case]) -> Results:
    """A file's rows with new ones in the place of those of the same cases and architectures; the rest stays.

    A file holds mutants of one version of Triton, at most so many of a class and case: a file of another is replaced
    whole.

    Args:
        path: The file; where there is none the new rows are all.
        results: Of :func:`run`.
        cases: What was run.
    """
    ids, architectures = {case.id for case in cases}, results.settings["architectures"]

    def replaced(row: Row, settings: Mapping[str, Any]) -> bool:
        same = all(settings[name] == results.settings[name] for name in ("triton", "most"))
        return not same or (row["arch"] in architectures and row["case"] in ids)

    return insert(path, results, replaced)


def table(results: Results) -> Table:
    """The kill rate of each class, over all cases and architectures, and how many changes there were to draw from."""
    rows = []
    for name in CLASSES:
        own = [row for row in results.rows if row["class"] == name]
        killed = [row for row in own if row["killed"]]
        result = sum(row["by"] == "wrong" for row in killed)
        of_kernel = {(row["arch"], row["case"], row["kernel"]): row for row in own}.values()
        left_out, changes_of = (sum(row[name] for row in of_kernel) for name in ("without_effect", "of"))
        if own:
            share = f"{len(killed) / len(own):.0%}"
            counts = (left_out, changes_of, len(own), len(killed) - result, result, len(own) - len(killed))
            rows.append((name, *(f"{count:,}" for count in counts), share))
    architectures = ", ".join(f"sm_{arch}" for arch in results.settings["architectures"])
    columns = (
        *("class", "changes without effect", "changes felt", "mutants drawn"),
        *("killed by a check", "killed by the result", "survived", "killed"),
    )
    return Table(f"Mutants of compiled kernels, {architectures}", columns, rows)
