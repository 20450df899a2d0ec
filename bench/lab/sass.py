"""Reading a binary: its machine code, its resources, and how many programs a multiprocessor holds."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...kernels.gpus import architecture

Row = dict[str, Any]


REGISTERS = 65_536
"""Of a multiprocessor."""


def programs_per_sm(arch: int, warps: int, registers: int, shared: int, tensor: int = 0) -> dict[str, int]:
    """How many programs a multiprocessor holds by each resource; the smallest counts.

    Args:
        arch: Compute capability, as 90.
        warps: Warps of a program.
        registers: Registers of a thread; given to warps in units of 256, and to four warps at a time.
        shared: Bytes of shared memory that a program asks for; given in units of 128.
        tensor: Columns of tensor memory of a program.
    """
    limits = architecture(arch)
    of_a_warp = -(-max(registers, 1) * 32 // 256) * 256
    held = {
        "programs": limits.programs,
        "warps": limits.warps // warps,
        "registers": REGISTERS // of_a_warp // 4 * 4 // warps,
        "shared": limits.shared_sm // (-(-(shared + 1024) // 128) * 128),
    }
    if tensor:
        held["tensor"] = limits.tensor // tensor
    return held


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;?]*?)(?:\s+\?[^;]*)?;")
"""Guard, name and operands, without the hints that some disassemblers print behind them, as ``?trans5``."""

HIGH_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INTEGER = (
    "LOP3",
    "PRMT",
    "SHF",
    "IADD",
    "IADD3",
    "VIADD",
    "LEA",
    "SEL",
    "ISETP",
    "IMNMX",
    "VIMNMX",
    "MOV",
    "SGXT",
    "BMSK",
)
"""What runs at the integer rate, half of what can be issued (CUDA programming guide, arithmetic instructions)."""
MATRIX = re.compile(r"^(HMMA|[HQI]GMMA|UTC[A-Z]*MMA|IMMA|QMMA|OMMA|DMMA)\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: With modifiers.
        operands: As they are printed.
        guard: The predicate under which it runs, as ``"!P0"``; empty where it always does.
        source: File and line that it comes from.
        control: How it is scheduled, the bits 105 to 125 of its encoding; 0 where that was not printed.
    """

    opcode: str
    operands: str
    guard: str
    source: tuple[str, int]
    control: int = 0

    @property
    def predicated(self) -> bool:
        """Whether it runs under a predicate."""
        return bool(self.guard)

    @property
    def waits(self) -> int:
        """Scoreboards that it waits for, a bit each."""
        return self.control >> 11 & 63

    @property
    def sets(self) -> int | None:
        """The scoreboard that is set when its results have arrived."""
        board = self.control >> 5 & 7
        return None if board == 7 else board

    @property
    def width(self) -> int:
        """Bits that a memory instruction moves for each thread."""
        sizes = {"8": 8, "U8": 8, "S8": 8, "16": 16, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
        return next((sizes[part] for part in self.opcode.split(".")[1:] if part in sizes), 32)

    def named(self, *names: str) -> bool:
        """Whether the opcode without modifiers is one of these."""
        return self.opcode.split(".")[0] in names


def read_sass(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Reads what ``nvdisasm -c -g -hex`` prints: instructions, and the position of each label among them."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = ("", 0)
    for line in text.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := LINE.search(line):
            source = (Path(found[1]).name, int(found[2]))
        elif found := INSTRUCTION.search(line):
            instructions.append(Instruction(found[2], found[3], found[1] or "", source))
        elif instructions and (found := HIGH_WORD.match(line)):
            instructions[-1] = replace(instructions[-1], control=int(found[1], 16) >> 41 & 0x1FFFFF)
    return instructions, labels


PTX_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"[^"\n]*"\s+)?"([^"\n]+)"', re.MULTILINE)
PTX_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
PTX_LOAD = re.compile(r"^\s*(?:@\S+\s+)?(?:ld\.global|cp\.async\.c[ag])")


def lines_in_binary(ptx: str, source: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Lines that a binary gives for the loads of some source lines.

    Triton writes a load as inline assembly: what stands in for masked elements, then the load itself. From version 3.8
    on the compiler counts a source line for every line of that text, so that the load seems to stand below its own.

    Args:
        ptx: What the binary was assembled from.
        source: File names and lines of the loads in the source.

    Raises:
        ValueError: A line of the binary is that of such a load and of another.
    """
    files = {number: Path(name).name for number, name in PTX_FILE.findall(ptx)}
    found: dict[tuple[str, int], set[bool]] = {}
    current, block, began = ("", 0), False, None
    for line in ptx.splitlines():
        if "inline asm" in line:
            block, began = "begin" in line, None
        elif at := PTX_LINE.match(line):
            current = (files.get(at[1], at[1]), int(at[2]))
        elif line.strip().endswith(";"):
            began = (began or current) if block else current
            if PTX_LOAD.match(line):
                found.setdefault(current, set()).add(began in source)
    twice = sorted(line for line, ours in found.items() if len(ours) > 1)
    if twice:
        raise ValueError(f"the binary gives line {twice[0][1]} of {twice[0][0]} for loads of different lines")
    return {line for line, ours in found.items() if True in ours}


def main_loop(instructions: list[Instruction], labels: dict[str, int], multiplies: bool = True) -> range:
    """Positions of the innermost loop with the most matrix instructions; empty where there is none.

    FFMA counts where there are no matrix instructions. A range around an unconditional EXIT is no loop: it ends with
    the way back from code that was moved out of line.
    """
    matrix = [bool(MATRIX.match(i.opcode)) for i in instructions]
    work = matrix if any(matrix) else [i.named("FFMA", "FFMA2") for i in instructions]
    loops = []
    for end, instruction in enumerate(instructions):
        target = TARGET.search(instruction.operands) if instruction.named("BRA") else None
        if multiplies and target and labels.get(target[1], end) < end:
            loop = range(labels[target[1]], end + 1)
            if any(work[i] for i in loop) and not any(
                instructions[i].named("EXIT") and not instructions[i].predicated for i in loop
            ):
                loops.append(loop)
    inner = [a for a in loops if not any(a != b and b.start >= a.start and b.stop <= a.stop for b in loops)]
    return max(inner, key=lambda loop: sum(work[i] for i in loop), default=range(0))


def most_in_flight(loop: list[Instruction], streams: set[tuple[str, int]]) -> int:
    """Bytes of streamed loads that a thread has under way at the most, in turn after turn of a loop.

    A load is under way until an instruction waits for the scoreboard that it sets. Copies to shared memory set none
    that says when they have arrived; they are not counted.
    """
    under_way: Counter[int] = Counter()
    most = 0
    for instruction in loop + loop:
        for board in [board for board in under_way if instruction.waits >> board & 1]:
            del under_way[board]
        if instruction.named("LDG") and instruction.source in streams and instruction.sets is not None:
            under_way[instruction.sets] += instruction.width // 8
            most = max(most, under_way.total())
    return most


def analyse(sass: str, resources: str, streams: set[tuple[str, int]], multiplies: bool) -> Row:
    """Facts of one binary.

    Args:
        sass: What ``nvdisasm -c -g -hex`` prints.
        resources: What ``cuobjdump -res-usage`` prints.
        streams: File names and lines of the loads of streamed operands.
        multiplies: Whether there is a main loop to look for.
    """
    found = RESOURCES.search(resources)
    if not found:
        raise ValueError(f"cuobjdump: expected REG, STACK, SHARED and LOCAL, got {resources!r}")
    instructions, labels = read_sass(sass)
    loop = main_loop(instructions, labels, multiplies)
    loads = [i for i in instructions if i.source in streams and i.named("LDG", "LDGSTS")]
    in_loop = [i for i in (instructions[p] for p in loop) if i.source in streams and i.named("LDG", "LDGSTS")]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local": int(found[4]),
        "spill_stores": sum(i.width // 8 for i in instructions if i.named("STL")),
        "spill_loads": sum(i.width // 8 for i in instructions if i.named("LDL")),
        "matrix": sorted({i.opcode for i in instructions if MATRIX.match(i.opcode)}),
        "multiply_adds": sum(i.named("FFMA", "FFMA2") for i in instructions),
        "loads": dict(sorted(Counter(i.opcode for i in loads).items())),
        "load_bits": min((i.width for i in loads), default=0),
        "synchronous": sum(i.named("LDG") for i in in_loop),
        "instructions": len(instructions),
        "loop_instructions": len(loop),
        "loop_load_bytes": sum(i.width // 8 for i in in_loop),
        "loop_loads": len(in_loop),
        "loop_integer": sum(instructions[p].named(*INTEGER) for p in loop),
        "loop_in_flight": most_in_flight([instructions[p] for p in loop], streams),
        "loop_prefetches": sum(instructions[p].opcode.startswith("CCTL.E.PF2") for p in loop),
        "loop_shared": sum(instructions[p].named("LDS", "STS", "LDSM", "STSM") for p in loop),
    }
