"""Reads the PTX of one kernel: its parameters, registers, shared variables and instructions."""

import re
from dataclasses import dataclass, field
from functools import cached_property

WIDTHS = {"pred": 1, **{f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)}}
"""Bits of a register or parameter by its declared type; a predicate's one is a bool."""


@dataclass(frozen=True)
class Register:
    """A register.

    Attributes:
        name: With its percent sign; names that are local to a ``{ }`` block end with the block's number.
        bits: Declared width; 1 for a predicate.
    """

    name: str
    bits: int


@dataclass(frozen=True)
class Immediate:
    """A constant.

    Attributes:
        bits: An integer, or the bits of a float.
        floating: 32 or 64 where it was written as ``0f...`` or ``0d...``, else 0.
    """

    bits: int
    floating: int = 0


@dataclass(frozen=True)
class Special:
    """A special register, as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A shared variable, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: "Register | Symbol | Immediate"
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``, and ``a|b`` of an instruction with two results; ``None`` stands for ``_``."""

    parts: "tuple[Operand | None, ...]"


Operand = Register | Immediate | Special | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: With all its modifiers.
        operands: In their order; the destination, if there is one, comes first.
        guard: The predicate it is executed under.
        negated: Whether the predicate is.
        source: Where it comes from, as ``triton.py:103``, or the line of the PTX.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    source: str

    @property
    def destinations(self) -> tuple[Register, ...]:
        """The registers of the first operand: what an instruction writes, if it is one with a result."""
        first = self.operands[0] if self.operands else None
        parts = first.parts if isinstance(first, Vector) else (first,)
        return tuple(part for part in parts if isinstance(part, Register))


@dataclass
class Kernel:
    """One kernel.

    Attributes:
        name: Its name.
        target: As ``"sm_90a"``.
        parameters: Bits by name, in their order.
        shared: Bytes of shared variables by name; 0 for the one that a launch sizes.
        instructions: The code.
        labels: Index of the instruction that follows a label, by name.
    """

    name: str
    target: str
    parameters: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @cached_property
    def written(self) -> frozenset[str]:
        """Names of the registers that some instruction may write."""
        return frozenset(register.name for i in self.instructions for register in i.destinations)


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_HEADER = re.compile(r"\.visible\s+\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<directives>[^{]*)\{")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d*)\]")
_PIECE = re.compile(r"\{(?=\s*(?:$|\n))|\}(?=\s*(?:$|\n))|[\w$]+:(?=\s)|\.loc[^\n]*|[^;{}]*(?:\{[^}]*\}[^;{}]*)*;")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_SPLIT = re.compile(r",(?![^{\[]*[}\]])")


class _Names:
    """Registers and labels by the nested blocks they are declared in."""

    def __init__(self) -> None:
        self.blocks: list[tuple[str, dict[str, int], dict[str, int]]] = [("", {}, {})]  # suffix, names, families
        self.opened = 0

    def open(self) -> None:
        self.opened += 1
        self.blocks.append((f"#{self.opened}", {}, {}))

    def declare(self, kind: str, names: str) -> None:
        _, single, families = self.blocks[-1]
        for name in re.split(r"\s*,\s*", names.strip()):
            family = re.fullmatch(r"([%\w$]+)<\d+>", name)
            if family:
                families[family[1]] = WIDTHS[kind]
            else:
                single[name] = WIDTHS[kind]

    def register(self, name: str) -> Register | None:
        stem = name.rstrip("0123456789")
        for suffix, single, families in reversed(self.blocks):
            if name in single:
                return Register(name + suffix, single[name])
            if stem in families:
                return Register(name + suffix, families[stem])
        return None


def parse(text: str) -> Kernel:
    """Reads a module with one kernel.

    Raises:
        ValueError: There is not exactly one kernel, or something in it cannot be read.
    """
    text = _COMMENT.sub("", text)
    headers = list(_HEADER.finditer(text))
    if len(headers) != 1:
        raise ValueError(f"expected PTX with one kernel, got {len(headers)}")
    header = headers[0]
    target = re.search(r"\.target\s+(\w+)", text)
    kernel = Kernel(header["name"], target[1] if target else "")
    for parameter in filter(None, (part.strip() for part in header["parameters"].split(","))):
        words = parameter.split()
        kernel.parameters[words[-1]] = WIDTHS[words[1].removeprefix(".")]
    end = _end(text, header.end())
    outside = text[: header.start()] + text[end:]
    kernel.shared = {name: int(size or 0) for name, size in _SHARED.findall(outside + text[header.end() : end])}
    files = {number: path.rpartition("/")[2] for number, path in _FILE.findall(outside)}
    _body(kernel, text[header.end() : end], files)
    return kernel


def _end(text: str, start: int) -> int:
    """The place of the brace that closes a body."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return match.start()
    raise ValueError("expected a closing brace at the end of the kernel, got the end of the text")


def _body(kernel: Kernel, body: str, files: dict[str, str]) -> None:
    names, source, place = _Names(), "", 0
    parsed: list[tuple[Instruction, str]] = []
    while place < len(body):
        rest = re.compile(r"\s*").match(body, place)
        place = rest.end() if rest else place
        if place == len(body):
            break
        piece = _PIECE.match(body, place)
        if piece is None:
            raise ValueError(f"{kernel.name}: cannot read {body[place : place + 60]!r}")
        place, statement = piece.end(), piece[0].rstrip(";").strip()
        suffix = names.blocks[-1][0]
        if statement == "{":
            names.open()
        elif statement == "}":
            names.blocks.pop()
        elif statement.startswith(".loc"):
            at = _LOC.match(statement)
            source = f"{files.get(at[1], at[1])}:{at[2]}" if at else source
        elif statement.endswith(":"):
            # A block's labels are its own, as its registers are.
            kernel.labels[statement[:-1] + ("" if statement.startswith("$") else suffix)] = len(parsed)
        elif declared := _DECLARED.match(statement):
            names.declare(declared[1], declared[2])
        elif statement and not statement.startswith("."):
            parsed.append((_instruction(statement, names, source), suffix))
    kernel.instructions = [_resolved(kernel, instruction, suffix) for instruction, suffix in parsed]


def _resolved(kernel: Kernel, instruction: Instruction, suffix: str) -> Instruction:
    """Gives a branch the label of its own block, if the block declares it."""
    if instruction.opcode.partition(".")[0] == "bra":
        (target,) = instruction.operands
        if isinstance(target, Symbol) and target.name + suffix in kernel.labels:
            moved = (Symbol(target.name + suffix),)
            return Instruction(instruction.opcode, moved, instruction.guard, instruction.negated, instruction.source)
    return instruction


def _instruction(statement: str, names: _Names, source: str) -> Instruction:
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise ValueError(f"cannot read the instruction {statement!r}")
    negated, guard, opcode, rest = match.groups()
    held = names.register(guard) if guard else None
    if guard and held is None:
        raise ValueError(f"{statement!r}: unknown predicate {guard}")
    return Instruction(opcode, _operands(rest, names), held, bool(negated), source or statement)


def _operands(text: str, names: _Names) -> tuple[Operand, ...]:
    parts = (_operand(part.strip(), names) for part in _SPLIT.split(text) if part.strip())
    return tuple(part for part in parts if part is not None)


def _operand(text: str, names: _Names) -> Operand | None:
    if text == "_":
        return None
    if text[0] == "{" and text[-1] == "}":
        return Vector(tuple(_operand(part.strip(), names) for part in text[1:-1].split(",")))
    if text[0] == "[" and text[-1] == "]":
        base, sign, offset = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text).groups()  # type: ignore[union-attr]
        number = int(offset, 0) if offset else 0
        held = _operand(base, names)
        assert isinstance(held, (Register, Symbol, Immediate))
        return Address(held, -number if sign == "-" else number)
    if "|" in text:
        return Vector(tuple(_operand(part.strip(), names) for part in text.split("|")))
    if match := re.fullmatch(r"0([fFdD])([0-9A-Fa-f]+)", text):
        return Immediate(int(match[2], 16), 32 if match[1] in "fF" else 64)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    if text in ("true", "false"):
        return Immediate(int(text == "true"))
    register = names.register(text)
    if register is not None:
        return register
    return Special(text) if text[0] == "%" else Symbol(text)
