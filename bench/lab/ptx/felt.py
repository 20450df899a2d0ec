"""Tells changes of an instruction from those that are none.

A change may leave everything as it is: nobody reads the register (Triton loads a value once for each of its copies and
leaves it to the assembler to drop them), or it is written again before it is read; a guard that is lifted was true in
every thread; a limit one further is met by no thread; two registers that change places are equal. Nothing can tell such
a kernel from the whole one, because both do the same. So it is no mutant, and is not counted.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from .machine import Machine, UnknownOpcode
from .memory import Array, Fault
from .parse import Address, Instruction, Kernel, Operand, Register, Vector

PURE = frozenset(
    (
        *("abs", "add", "and", "bfe", "bfi", "brev", "clz", "copysign", "cvt", "div", "ex2", "fma", "ld", "ldmatrix"),
        *("lg2", "lop3", "mad", "max", "min", "mma", "mov", "mul", "neg", "not", "or", "popc", "prmt", "rcp", "rem"),
        *("rsqrt", "selp", "set", "setp", "shf", "shfl", "shl", "shr", "sqrt", "sub", "xor"),
    )
)
"""Instructions that do nothing but write the registers of their first operand."""


def pure(instruction: Instruction) -> bool:
    """Whether an instruction does nothing but write the registers of its first operand."""
    return instruction.opcode.partition(".")[0] in PURE


@dataclass(frozen=True)
class Change:
    """One instruction that takes another's place.

    Attributes:
        kind: The class of the change.
        at: The place.
        after: The instruction that is put there.
        shows_at: Where it shows whether the change is one: the same place, or the guarded load that leaves a changed
            fill as it is.
    """

    kind: str
    at: int
    after: Instruction
    shows_at: int


@dataclass
class Watch:
    """Watches an execution and notes which changes would be felt in it.

    Attributes:
        changes_of: Of a kernel: the changes to look for.
        kernels: The kernels that were executed.
        felt: The changes that would be felt, of each.
        tried: How many changes of each there are at places that some thread has come to.
    """

    changes_of: Callable[[Kernel], Iterable[Change]]
    kernels: list[Kernel] = field(default_factory=list)
    felt: list[list[Change]] = field(default_factory=list)
    tried: list[list[Change]] = field(default_factory=list)
    _open: list[dict[int, list[Change]]] = field(default_factory=list)
    _reached: list[set[int]] = field(default_factory=list)

    def __call__(self, state: Machine, instruction: Instruction, here: Array | None) -> None:
        """As :class:`.machine.Machine` calls it."""
        which = self._index(state.kernel)
        waiting = self._open[which].get(state.at)
        if not waiting:
            return
        if state.at not in self._reached[which]:
            self._reached[which].add(state.at)
            self.tried[which] += waiting
        left = []
        for change in waiting:
            if shows(state, instruction, change, here):
                self.felt[which].append(change)
            else:
                left.append(change)
        self._open[which][state.at] = left

    def _index(self, kernel: Kernel) -> int:
        for index, known in enumerate(self.kernels):
            if known is kernel:
                return index
        places: dict[int, list[Change]] = {}
        for change in self.changes_of(kernel):
            places.setdefault(change.shows_at, []).append(change)
        self.kernels.append(kernel)
        self._open.append(places)
        self._reached.append(set())
        self.felt.append([])
        self.tried.append([])
        return len(self.kernels) - 1


def shows(state: Machine, before: Instruction, change: Change, here: Array | None) -> bool:
    """Whether a change makes a difference at this moment; an instruction that cannot be assembled makes none."""
    after = change.after
    if change.shows_at != change.at or after.guard != before.guard:
        return state.passes(replace(before, negated=not before.negated), here)
    if before.opcode.startswith("cp.async.c") and len(after.operands) < len(before.operands):
        _, _, size, taken = before.operands
        short = state.read(taken, "u32") < state.read(size, "u32")
        return bool((short if here is None else short & here).any())
    elsewhere = [a != b for a, b in zip(before.operands, after.operands, strict=False) if isinstance(a, Address)]
    if not pure(before) or any(elsewhere):  # reading elsewhere might itself be a race
        return state.passes(before, here)
    if not state.held.keys().isdisjoint(_read(before)):  # whatever is done with them now is noted there
        return True
    try:
        changed = state.outcome(after, here)
    except (TypeError, UnknownOpcode):
        return False
    except Fault:
        return True
    whole = state.outcome(before, here)
    if [r.name for r in after.destinations] != [r.name for r in before.destinations]:
        order = {register.name: values for register, values in zip(before.destinations, whole, strict=False)}
        whole = [order[register.name] for register in after.destinations] if whole else whole
    return any((one != other).any() for one, other in zip(changed, whole, strict=True))


def _read(instruction: Instruction) -> Iterator[str]:
    """Names of the registers that an instruction reads."""
    if instruction.guard is not None:
        yield instruction.guard.name
    for at, operand in enumerate(instruction.operands):
        if at or not pure(instruction) or isinstance(operand, Address):
            yield from _names(operand)


def _names(operand: Operand | None) -> Iterator[str]:
    if isinstance(operand, Vector):
        for part in operand.parts:
            yield from _names(part)
    elif isinstance(operand, Address):
        yield from _names(operand.base)
    elif isinstance(operand, Register):
        yield operand.name


def live(kernel: Kernel) -> frozenset[str]:
    """Names of the registers on which memory, barriers or branches depend, however many steps away."""
    found: set[str] = set()
    computed = []
    for instruction in kernel.instructions:
        if pure(instruction):
            computed.append(({register.name for register in instruction.destinations}, set(_read(instruction))))
        else:
            found.update(_read(instruction))
    before = -1
    while len(found) != before:
        before = len(found)
        for written, read in reversed(computed):
            if written & found:
                found |= read
    return frozenset(found)


def next_touch(kernel: Kernel, at: int) -> tuple[int, str] | None:
    """Finds what happens next to the one register that an instruction writes, in the straight code after it.

    Returns:
        The place that touches it next, and ``"read"``, ``"written"`` or, where a guard may leave it, ``"filled"``;
        ``None`` where a label, a branch or the end comes first.
    """
    destinations = kernel.instructions[at].destinations
    if len(destinations) != 1 or not pure(kernel.instructions[at]):
        return None
    (name,) = (register.name for register in destinations)
    labels = set(kernel.labels.values())
    for place in range(at + 1, len(kernel.instructions)):
        instruction = kernel.instructions[place]
        base = instruction.opcode.partition(".")[0]
        if place in labels or base in ("bra", "ret", "exit"):
            return None
        if name in _read(instruction):
            return place, "read"
        if any(register.name == name for register in instruction.destinations):
            return place, "written" if instruction.guard is None else "filled"
    return None
