"""Machine code searched for what a compiler may get wrong around asynchronous instructions.

A matrix instruction of a warpgroup (HGMMA) is issued and goes on by itself: it reads its left operand, where that is
in registers, and writes its sums at some time before ``WARPGROUP.DEPBAR.LE gsb0, n`` lets at most the last n groups be
unfinished. Nothing in hardware keeps another instruction off those registers until then. Every path through a binary is
followed until nothing new can happen, loops as often as it takes, and each of these is found:

- a register of a matrix instruction in flight that anything else reads or writes,
- an instruction that reads shared memory between the wait for copies into it and the barrier that shows them to all,
- a matrix instruction on shared memory that no fence separates from plain stores to it,
- tensor memory loaded to registers (LDTM) that are touched before the wait on its scoreboard,
- matrix instructions that the assembler made wait for each other although the program does not ask for it.

Addresses are not known: which buffer an access meets is not looked at.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .sass import TARGET, Instruction, Row

REGISTER = re.compile(r"(?<![\w.])R(\d+)(\.64)?\b")
PREDICATE = re.compile(r"(?<![\w.])U?P\d\b")
SHAPE = re.compile(r"\.64x(\d+)x\d+\.(F\d+)")
MOST_STATES = 100_000
"""States after which following a binary is given up."""
MOST_GROUPS = 64
"""Groups in flight after which they count as never waited for."""

SINGLE = re.compile(
    "BAR|BMSK|BREV|CCTL|ELECT|F2F|F2FP|F2I|FADD|FCHK|FFMA|FLO|FMNMX|FMUL|FRND|FSEL|FSET|FSETP|FSWZADD|HADD2|HFMA2|"
    "HMNMX2|HMUL2|HSET2|HSETP2|I2F|I2FP|IABS|IADD|IADD3|IMAD|IMNMX|ISETP|LDGDEPBAR|LDGSTS|LEA|LOP3|MOV|MUFU|P2R|PLOP3|"
    "POPC|PRMT|R2P|R2UR|REDUX|S2R|SEL|SGXT|SHF|SHFL|SYNCS|UTMALDG|VABSDIFF|VIADD|VIADDMNMX|VIMNMX|VIMNMX3|VOTE"
)
"""Opcodes whose register operands are single registers, or pairs that say so (``R2.64``)."""
STORES = ("STS", "STG", "ST", "STL")
LOADS = ("LDS", "LDG", "LD", "LDL", "LDC")
WIDE = ("CS2R", "LDSM", "STSM", "HMMA", "LDTM", "STTM", "FFMA2", "FADD2", "FMUL2")


@dataclass(frozen=True)
class Hazard:
    """Something that may go wrong.

    Attributes:
        kind: A name in ``KINDS``.
        position: Of the instruction at fault.
        said: The instruction, and what it does.
    """

    kind: str
    position: int
    said: str


KINDS = {
    "in flight": "touches registers of a matrix instruction in flight",
    "unknown": "is not known, beside a matrix instruction in flight",
    "endless": "is never waited for",
    "barrier": "reads shared memory that was waited for, before a barrier",
    "fence": "reads shared memory that was written without a fence since",
    "tensor memory": "touches registers that tensor memory is still loaded to",
    "serialised": "waits for the matrix instruction before it, which the program does not ask for",
}
"""What is looked for, and how it is said."""


def operands(instruction: Instruction) -> list[str]:
    """An instruction's operands, split at the commas outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", instruction.operands)]


def registers(instruction: Instruction) -> frozenset[int] | None:
    """Registers that an instruction reads or writes; ``None`` where that is not known."""
    found: set[int] = set()
    for part, width in zip(operands(instruction), _widths(instruction), strict=False):
        for match in REGISTER.finditer(part):
            first = int(match[1])
            count = 2 if match[2] else 1 if "[" in part else width
            found |= set(range(first, first + count))
    name = instruction.opcode.split(".")[0]
    known = SINGLE.fullmatch(name) or name[0] == "D" or name in (*STORES, *LOADS, *WIDE)
    return frozenset(found) if known or not found else None


def _widths(instruction: Instruction) -> Iterator[int]:
    """How many registers each operand names."""
    parts = instruction.opcode.split(".")
    name, count = parts[0], len(operands(instruction))
    wide = instruction.width // 32 or 1
    widths = [1] * count
    if name in LOADS:
        widths[0] = wide
    elif name in STORES:
        widths[-1] = wide
    elif name in ("LDSM", "STSM"):
        widths[0 if name == "LDSM" else -1] = int(parts[-1]) if parts[-1].isdigit() else 1
    elif name in ("LDTM", "STTM"):
        bits = re.search(r"dp(\d+)bit", instruction.opcode)
        per_turn = max(int(bits[1]) // 64, 1) if bits else 1
        turns = next((int(part[1:]) for part in parts if re.fullmatch(r"x\d+", part)), 1)
        widths = [per_turn * turns] * count
    elif name == "HMMA":
        widths = [4, 4, 4 if "SP" in parts else 2, 4, *widths]
    elif name == "CS2R":
        widths[0] = 1 if "32" in parts else 2
    elif name == "IMAD" and ("WIDE" in parts or "HI" in parts):  # .HI adds a pair and keeps its upper half
        sources = [i for i, part in enumerate(operands(instruction)) if not PREDICATE.fullmatch(part.strip("!"))]
        for i in (sources[0], sources[-1])["HI" in parts :]:
            widths[i] = 2
    elif name[0] == "D" or name in ("FFMA2", "FADD2", "FMUL2") or "64" in parts or "F64" in parts:
        widths = [2] * count
    return iter(widths)


@dataclass(frozen=True)
class MatrixInstruction:
    """What an HGMMA holds while it is in flight.

    Attributes:
        sums: Registers of its sums.
        left: Registers of its left operand; empty where that is in shared memory.
        ends: Whether it ends a group.
    """

    sums: range
    left: range
    ends: bool

    @classmethod
    def of(cls, instruction: Instruction) -> "MatrixInstruction":
        """Reads ``HGMMA.64x16x16.F32 R32, R88, gdesc[UR12], R32, gsb0``."""
        shape, parts = SHAPE.search(instruction.opcode), operands(instruction)
        sums, left = (REGISTER.match(part) for part in parts[:2])
        if not shape or not sums:
            raise ValueError(f"hazards: cannot read {instruction.opcode} {instruction.operands}")
        count = int(shape[1]) // (2 if shape[2] == "F32" else 4)
        first, of_left = int(sums[1]), int(left[1]) if left else 0
        return cls(range(first, first + count), range(of_left, of_left + 4 if left else 0), "gsb0" in parts)


State = Any
"""What is under way at a position; hashable."""
Step = Callable[[State, int], State]


@dataclass
class Program:
    """A binary's instructions and labels, and what was found in it so far."""

    instructions: list[Instruction]
    labels: dict[str, int]
    found: dict[tuple[str, int], Hazard] = field(default_factory=dict)

    def report(self, kind: str, position: int, said: str = "") -> None:
        """Notes a hazard, once for each instruction and kind."""
        instruction = self.instructions[position]
        where = f"{instruction.opcode}{instruction.operands.rstrip()}, line {instruction.source[1]}"
        self.found.setdefault((kind, position), Hazard(kind, position, f"{where}: {KINDS[kind]}{said}"))

    @cached_property
    def joins(self) -> set[int]:
        """Positions that a branch leads to."""
        return set(self.labels.values())

    def follow(self, start: State, step: Step, matters: tuple[str, ...]) -> None:
        """Follows every path, a state with it.

        A guarded instruction that does not matter counts as executed. Where one matters, or branches, both ways are
        followed, and remembered until the predicate is written or the state is ``start`` again.

        Args:
            start: The state with nothing under way.
            step: The state after the instruction at a position; it reports what it finds.
            matters: Opcodes that change the state.
        """
        waiting: list[tuple[int, State, frozenset[tuple[str, bool]]]] = [(0, start, frozenset())]
        seen: set[tuple[int, State, frozenset[tuple[str, bool]]]] = set()
        while waiting:
            position, state, known = waiting.pop()
            while position < len(self.instructions):
                instruction = self.instructions[position]
                if position in self.joins:
                    known = known if state != start else frozenset()
                    if (position, state, known) in seen:
                        break
                    seen.add((position, state, known))
                    if len(seen) > MOST_STATES:
                        raise ValueError(f"hazards: more than {MOST_STATES} states at {len(self.joins)} labels")
                name, sign = instruction.guard.lstrip("!"), not instruction.guard.startswith("!")
                runs = True if not name else sign if name in ("PT", "UPT") else _known(known, name, sign)
                if runs is None and instruction.named(*matters, "BRA", "EXIT"):
                    waiting.append((self._past(position, False), state, known | {(name, not sign)}))
                    known |= {(name, sign)}
                if runs is False:
                    position = self._past(position, False)
                    continue
                state = step(state, position)
                written = set(PREDICATE.findall(",".join(operands(instruction)[:2])))
                if not instruction.named("BRA"):
                    known = frozenset(pair for pair in known if pair[0] not in written)
                if instruction.named("BRA") and (condition := PREDICATE.search(instruction.operands)):
                    taken = "!" + condition[0] not in instruction.operands
                    runs = _known(known, condition[0], taken)
                    if runs is not True:
                        waiting.append((position + 1, state, known | {(condition[0], not taken)}))
                    if runs is False:
                        break
                    known |= {(condition[0], taken)}
                elif instruction.named("BRA") and "," in instruction.operands:
                    waiting.append((position + 1, state, known))
                position = self._past(position, True)

    def _past(self, position: int, executed: bool) -> int:
        """Where a path goes on after an instruction."""
        instruction = self.instructions[position]
        if executed and instruction.named("EXIT", "RET"):
            return len(self.instructions)
        if executed and instruction.named("BRX", "JMX"):
            raise ValueError(f"hazards: cannot follow {instruction.opcode}")
        if executed and instruction.named("BSYNC"):
            barrier = instruction.operands.strip()
            before = (i for i in reversed(self.instructions[:position]) if i.named("BSSY"))
            instruction = next(i for i in before if i.operands.strip().startswith(barrier))
        elif not executed or not instruction.named("BRA"):
            return position + 1
        target = TARGET.search(instruction.operands)
        if not target or target[1] not in self.labels:
            raise ValueError(f"hazards: cannot follow {instruction.opcode}{instruction.operands}")
        return self.labels[target[1]]


def _known(known: frozenset[tuple[str, bool]], name: str, sign: bool) -> bool | None:
    """Whether a predicate has a value, where that is known."""
    return True if (name, sign) in known else False if (name, not sign) in known else None


def _matrix_registers(program: Program) -> None:
    """Finds registers that are touched while a matrix instruction may still use them."""
    matrix = {p: MatrixInstruction.of(i) for p, i in enumerate(program.instructions) if i.named("HGMMA")}
    touched = {p: registers(i) for p, i in enumerate(program.instructions) if p not in matrix}

    def check(flying: tuple[int, ...], position: int) -> None:
        for other in flying:
            theirs, mine = matrix[other], matrix.get(position)
            taken = {*theirs.sums, *theirs.left}
            if mine is None:
                regs = touched[position]
                if regs is None:
                    program.report("unknown", position)
                shared = taken & (regs or set())
            else:
                # Matrix instructions on the same sums follow each other; a left operand may be read twice.
                shared = {*mine.left} & {*theirs.sums} | {*mine.sums} & {*theirs.left}
                shared |= {*mine.sums} & {*theirs.sums} if mine.sums != theirs.sums else set()
            if shared:
                program.report("in flight", position, f" (R{min(shared)} of {program.instructions[other].opcode})")

    def step(state: State, position: int) -> State:
        groups, unfinished = state
        instruction = program.instructions[position]
        flying = (*(p for group in groups for p in group), *unfinished)
        if flying:
            check(flying, position)
        if position in matrix:
            unfinished = tuple(dict.fromkeys((*unfinished, position)))
            if matrix[position].ends:
                groups, unfinished = (*groups, unfinished), ()
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            left = int(operands(instruction)[1], 0)
            groups = groups[len(groups) - left :] if left < len(groups) else groups
        if len(groups) > MOST_GROUPS:
            program.report("endless", position)
            groups = groups[-MOST_GROUPS:]
        return groups, unfinished

    if matrix:
        program.follow(((), ()), step, ("HGMMA", "WARPGROUP"))


def _shared_memory(program: Program) -> None:
    """Finds reads of shared memory that no barrier or fence separates from what was written there."""

    def step(state: State, position: int) -> State:
        arrived, unfenced = state
        instruction = program.instructions[position]
        described = instruction.named("HGMMA", "UTCHMMA", "UTCQMMA") and "gdesc" in instruction.operands
        if arrived and (described or instruction.named("LDS", "LDSM")):
            program.report("barrier", position)
        if unfenced and described and not REGISTER.match(operands(instruction)[1]):
            program.report("fence", position)
        if instruction.opcode.startswith("DEPBAR") and "SB0" in instruction.operands:
            return True, True
        if instruction.named("STS", "STSM"):
            return arrived, True
        if instruction.named("BAR"):
            return False, unfenced
        # The same fence for tensor memory ends in T.
        return arrived, unfenced and instruction.opcode not in ("FENCE.VIEW.ASYNC", "FENCE.VIEW.ASYNC.S")

    if any(i.named("HGMMA", "LDGSTS") for i in program.instructions):
        program.follow((False, False), step, ("DEPBAR", "STS", "STSM", "BAR", "FENCE"))


def _tensor_memory(program: Program) -> None:
    """Finds registers that are touched before tensor memory has arrived in them.

    Loads arrive in order: the scoreboard that one sets stands for those before it too.
    """
    loads = {p: registers(i) or frozenset() for p, i in enumerate(program.instructions) if i.named("LDTM")}
    touched = {p: registers(i) or frozenset() for p, i in enumerate(program.instructions)} if loads else {}

    def step(state: State, position: int) -> State:
        instruction = program.instructions[position]
        state = tuple(pair for pair in state if pair[1] is None or not instruction.waits >> pair[1] & 1)
        if position in loads:
            first_board = instruction.sets
            before = [(p, first_board if board is None else board) for p, board in state if p != position]
            return (*before, (position, first_board))
        for load, _ in state:
            if shared := touched[position] & loads[load]:
                program.report("tensor memory", position, f" (R{min(shared)})")
        return state

    if loads:
        program.follow((), step, ("LDTM",))


PTX_MATRIX = re.compile(r"\bwgmma\.(mma_async|commit_group|wait_group)[\w.:]*(?:\s+(\d+)\s*;)?")


def _serial(events: list[tuple[str, int]]) -> bool:
    """Whether each matrix instruction is waited for before the next."""
    flying = 0
    for event, value in events:
        if event == "matrix" and flying:
            return False
        flying = flying + 1 if event == "matrix" else 0 if event == "wait" and not value else flying
    return True


def _serialised(program: Program, ptx: str) -> None:
    """Finds whether the assembler serialised what the program does not (its warning C7515 and kin)."""
    meant = [
        ("matrix", 0) if match[1] == "mma_async" else ("wait", int(match[2])) if match[1] == "wait_group" else ("", 0)
        for match in PTX_MATRIX.finditer(ptx)
    ]
    done = [
        ("matrix", 0) if i.named("HGMMA") else ("wait", int(operands(i)[1], 0))
        for i in program.instructions
        if i.named("HGMMA") or i.opcode.startswith("WARPGROUP.DEPBAR")
    ]
    if _serial(done) and not _serial(meant):
        for position, instruction in enumerate(program.instructions):
            if instruction.named("HGMMA"):
                program.report("serialised", position)


def search(instructions: list[Instruction], labels: dict[str, int], ptx: str = "") -> list[Hazard]:
    """Hazards of a binary, in its order.

    Args:
        instructions: As :func:`fpe.bench.lab.sass.read_sass` reads them.
        labels: Positions of the labels.
        ptx: What the binary was assembled from; without it nothing is said of serialised instructions.

    Raises:
        ValueError: The binary cannot be followed.
    """
    program = Program(instructions, labels)
    for check in (_matrix_registers, _shared_memory, _tensor_memory):
        check(program)
    if ptx:
        _serialised(program, ptx)
    return sorted(program.found.values(), key=lambda hazard: hazard.position)


def counted(hazards: list[Hazard]) -> dict[str, int]:
    """Instructions at fault, by kind."""
    return dict(Counter(hazard.kind for hazard in hazards))


def complaints(row: Row) -> list[str]:
    """What is wrong with a binary whose row has its ``hazards`` and the ``first_hazard``, in words."""
    found = row["hazards"]
    said = ", ".join(f"{count} x {kind}" for kind, count in found.items())
    return [f"hazards: {said}; {row['first_hazard']}"] if found else []
