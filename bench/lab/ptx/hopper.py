"""What sm_90 adds: ``wgmma``, the fence between proxies, and ``stmatrix``.

A ``wgmma`` works by itself until a ``wait_group`` covers it. Till then nobody else may touch its registers, and what it
reads of shared memory must stay. ``state.extra["asynchronous"]`` says what becomes of a kernel that breaks this:

- ``"refuse"``: it faults (the default);
- ``"keep"``: operands are taken as the instruction is issued, as if it were done at once;
- ``"late"``: operands are taken at the wait that covers it, as the hardware may.

Checked in every mode: a ``wgmma.fence`` between the writing of a register and the instruction that takes it, a proxy
fence between ordinary writes to shared memory and an asynchronous read, races, and warpgroups that are not whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

from .descriptors import Matrix, wgmma_matrix
from .floats import from_bfloat16, from_half, from_tf32
from .fragments import WARPGROUP, ldmatrix, wgmma_a, wgmma_d
from .machine import WARP, Handler, Machine, UnknownOpcode
from .matrix import whole_warps
from .memory import ELEMENT, Array, Fault
from .parse import Immediate, Instruction, Operand, Register, Vector

MODES = ("refuse", "keep", "late")
CHUNK = 16
ITEMSIZES = {"f16": 2, "bf16": 2, "tf32": 4}
FLOATS = {"f16": from_half, "bf16": from_bfloat16, "tf32": from_tf32}
"""What tensor cores see in an element."""


def mode(state: Machine) -> str:
    """What becomes of operands that change while an asynchronous operation uses them: of :data:`MODES`."""
    found = state.extra.get("asynchronous", "refuse")
    if found not in MODES:
        raise ValueError(f"asynchronous: one of {', '.join(MODES)} expected, got {found!r}")
    return found


# Operands in shared memory.


@cache
def _chunks(descriptor: int, read: Callable[[int], Matrix], mn: int, k: int, itemsize: int, mn_major: bool) -> Array:
    addresses = read(descriptor).addresses(mn, k, itemsize, mn_major)
    held = CHUNK // itemsize
    return (addresses[::held] if mn_major else addresses[:, ::held]).reshape(-1)


@dataclass(frozen=True)
class SharedOperand:
    """A matrix in shared memory that an asynchronous operation reads.

    Attributes:
        shape: ``(mn, k)``.
        kind: ``"f16"``, ``"bf16"`` or ``"tf32"``.
        mn_major: How it lies.
        at: ``[ctas, chunks]``: its 16-byte chunks, as indices into ``state.shared``.
    """

    shape: tuple[int, int]
    kind: str
    mn_major: bool
    at: Array

    @classmethod
    def find(
        cls,
        state: Machine,
        ctas: Array,
        descriptors: Array,
        read: Callable[[int], Matrix],
        shape: tuple[int, int],
        kind: str,
        mn_major: bool,
    ) -> "SharedOperand":
        """Finds a matrix and checks that it may be read.

        Args:
            state: The launch.
            ctas: Numbers ``[n]`` of programs.
            descriptors: Theirs ``[n]``, uint64.
            read: Reads a descriptor.
            shape: ``(mn, k)``.
            kind: Type of the elements.
            mn_major: From the instruction.

        Raises:
            Fault: The descriptor says what cannot be; or what it points to is not written, fenced, aligned, is out
                of bounds, or written in the same interval.
        """
        itemsize = ITEMSIZES[kind]
        values, which = np.unique(descriptors, return_inverse=True)
        try:
            places = [_chunks(int(descriptor), read, *shape, itemsize, mn_major) for descriptor in values]
        except ValueError as wrong:
            raise Fault("descriptor", str(wrong)) from wrong
        offsets = np.stack(places)[which.reshape(-1)]
        each = np.repeat(ctas, offsets.shape[1])
        at = state.shared.place(each, offsets.reshape(-1), CHUNK)
        state.shared.check_read(each, np.full(len(each), -1), at, CHUNK)
        unfenced = state.shared.unfenced.view(ELEMENT[CHUNK])[at].view(np.uint64) != 0
        if unfenced.any():
            offset = offsets.reshape(-1)[np.flatnonzero(unfenced)[0] // 2]
            raise Fault(
                "proxy fence", f"an asynchronous read at {offset:#x} of an ordinary write without a fence between"
            )
        return cls(shape, kind, mn_major, at.reshape(offsets.shape))

    def values(self, state: Machine, rows: Array) -> Array:
        """Returns its numbers as they are now, in some of its programs: float32 ``[rows, mn, k]``."""
        itemsize = ITEMSIZES[self.kind]
        (mn, k), held = self.shape, CHUNK // itemsize
        bits = state.shared.data.view(ELEMENT[CHUNK])[self.at[rows]].view(ELEMENT[itemsize])
        if self.mn_major:
            bits = bits.reshape(-1, mn // held, k, held).swapaxes(2, 3)
        return FLOATS[self.kind](np.ascontiguousarray(bits).reshape(-1, mn, k))

    def lock(self, state: Machine, rows: Array, change: int) -> None:
        """Adds 1 or -1 to the number of operations that read it, in some of its programs."""
        plane = state.shared.locked.reshape(-1, CHUNK)
        plane[self.at[rows].reshape(-1)] += np.uint8(change & 0xFF)
        state.shared.has_locked = True


# wgmma.


@dataclass
class Issued:
    """One ``wgmma`` of one warpgroup, in all programs that issued it together.

    Attributes:
        opcode: Its opcode: accumulators of equal opcodes are of one shape.
        source: Where it is from.
        group: Number of the warpgroup.
        ctas: Numbers ``[n]`` of the programs.
        running: bool ``[n]``: where no wait has covered it yet.
        number: ``[n]``: number of the group it was committed to, -1 before that.
        d: The accumulator's registers.
        a: Operand A, in registers or in shared memory.
        b: Operand B.
        add: bool ``[n]``: whether the accumulator is added.
    """

    opcode: str
    source: str
    group: int
    ctas: Array
    running: Array
    number: Array
    d: tuple[Register, ...]
    a: tuple[Register, ...] | SharedOperand
    b: SharedOperand
    add: Array

    @property
    def registers(self) -> tuple[Register, ...]:
        """All registers that it uses."""
        return self.d if isinstance(self.a, SharedOperand) else self.d + self.a

    def lock(self, state: Machine, rows: Array, change: int) -> None:
        """:meth:`SharedOperand.lock` of what it reads."""
        for operand in (self.a, self.b):
            if isinstance(operand, SharedOperand):
                operand.lock(state, rows, change)


@dataclass
class Warpgroups:
    """What the launch's warpgroups have under way.

    Attributes:
        committed: ``[ctas, warpgroups]``: groups that each has committed.
        fenced: The arrays that registers had at the last ``wgmma.fence``, or got from ``wgmma`` since, by identity: any
            other is a value that was made since. (A copy of an old value is none: the assembler keeps both in one
            register. LLVM puts such copies behind the fence.)
        issued: What no wait has covered, in its order.
    """

    committed: Array
    fenced: dict[int, Array] = field(default_factory=dict)
    issued: list[Issued] = field(default_factory=list)


def _warpgroups(state: Machine) -> Warpgroups:
    if "wgmma" not in state.extra:
        if state.size % WARPGROUP:
            raise Fault("divergence", f"wgmma in a program of {state.size} threads: no whole warpgroups")
        state.extra["wgmma"] = Warpgroups(np.zeros((state.ctas, state.size // WARPGROUP), np.int64))
    found: Warpgroups = state.extra["wgmma"]
    return found


def _active(state: Machine, mask: Array | None) -> Array:
    """Which warpgroups take part: bool ``[ctas, warpgroups]``."""
    if mask is None:
        return np.ones((state.ctas, state.size // WARPGROUP), bool)
    lanes = mask.reshape(state.ctas, -1, WARPGROUP)
    some, every = np.any(lanes, 2), np.all(lanes, 2)
    if (some != every).any():
        raise Fault("divergence", "a warpgroup's instruction that not all of its threads execute")
    return np.asarray(every)


def _value(state: Machine, register: Register, ctas: Array, group: int) -> Array:
    """Returns a register of one warpgroup, ``[n, 128]``, even if an operation is using it."""
    held = state.held
    state.held = {}
    try:
        return state.read(register, f"u{register.bits}")[ctas, group * WARPGROUP : (group + 1) * WARPGROUP]
    finally:
        state.held = held


def _uniform(values: Array, what: str) -> Array:
    """The one value of every row of ``[n, 128]``.

    Raises:
        Fault: There are several.
    """
    if (values != values[:, :1]).any():
        raise Fault("divergence", f"{what} differs between the threads of a warpgroup")
    return values[:, 0]


def _mma_async(state: Machine, instruction: Instruction, mask: Array | None, n: int, k: int, kind: str) -> None:
    d, a, b, add, *rest = instruction.operands
    constants = [operand.bits for operand in rest if isinstance(operand, Immediate)]
    in_registers = isinstance(a, Vector)
    transposed = constants[2:] if kind != "tf32" else [0] * (1 if in_registers else 2)
    if constants[:2] != [1, 1] or len(transposed) != (1 if in_registers else 2):
        raise UnknownOpcode(f"{instruction.opcode} with the constants {constants}")
    groups = _warpgroups(state)
    d_registers, a_registers = _registers(d), _registers(a) if in_registers else ()
    _check_fence(state, groups, d_registers + a_registers)
    for group, active in enumerate(_active(state, mask).T):
        ctas = np.flatnonzero(active)
        if not len(ctas):
            continue
        for other in groups.issued:
            shared = other.group == group and {r.name for r in other.d} & {r.name for r in d_registers + a_registers}
            if shared and (other.opcode != instruction.opcode or other.d != d_registers):
                raise Fault("register in use", f"{min(shared)} accumulates {other.opcode} of {other.source}")
        lanes = slice(group * WARPGROUP, (group + 1) * WARPGROUP)
        find = partial(_find, state, ctas, lanes, kind=kind)
        issued = Issued(
            instruction.opcode,
            instruction.source,
            group,
            ctas,
            np.ones(len(ctas), bool),
            np.full(len(ctas), -1),
            d_registers,
            a_registers if in_registers else find(a, (64, k), mn_major=bool(transposed[0])),
            find(b, (n, k), mn_major=bool(transposed[-1])),
            _uniform(state.read(add, "pred")[ctas, lanes], "scale-d"),
        )
        groups.issued.append(issued)
        if mode(state) != "late":
            _multiply(state, groups, issued, np.arange(len(ctas)))
        if mode(state) == "refuse":
            issued.lock(state, np.arange(len(ctas)), 1)
            state.hold(issued.registers, f"{instruction.opcode} of {instruction.source} is not waited for")


def _registers(operand: Operand) -> tuple[Register, ...]:
    assert isinstance(operand, Vector)
    found = tuple(part for part in operand.parts if isinstance(part, Register))
    if len(found) != len(operand.parts):
        raise UnknownOpcode("wgmma with a constant in place of a register")
    return found


def _find(
    state: Machine, ctas: Array, lanes: slice, operand: Operand, shape: tuple[int, int], kind: str, mn_major: bool
) -> SharedOperand:
    descriptors = _uniform(state.read(operand, "u64")[ctas, lanes], "a matrix descriptor")
    return SharedOperand.find(state, ctas, descriptors, wgmma_matrix, shape, kind, mn_major)


def _check_fence(state: Machine, groups: Warpgroups, registers: tuple[Register, ...]) -> None:
    if not groups.fenced:
        raise Fault("wgmma fence", "no wgmma.fence stands before the first wgmma")
    for register in registers:
        value = state.registers.get(register.name)
        if value is not None and id(value) not in groups.fenced:
            raise Fault("wgmma fence", f"{register.name} has a value that no wgmma.fence has followed")


def _multiply(state: Machine, groups: Warpgroups, issued: Issued, rows: Array) -> None:
    """Multiplies a ``wgmma`` in some of its programs with the operands as they are now; sums are rounded once."""
    ctas, (n, k), kind = issued.ctas[rows], issued.b.shape, issued.b.kind
    if isinstance(issued.a, SharedOperand):
        a = issued.a.values(state, rows)
    else:
        words = np.stack([_value(state, register, ctas, issued.group) for register in issued.a], -1)
        places = wgmma_a(k, ITEMSIZES[kind])
        a = np.empty((len(ctas), 64, k), np.float32)
        a[:, places[0], places[1]] = FLOATS[kind](words.view(ELEMENT[ITEMSIZES[kind]]))
    product = a.astype(np.float64) @ issued.b.values(state, rows).swapaxes(1, 2)
    places, add = wgmma_d(n), issued.add[rows][:, None]
    lanes = slice(issued.group * WARPGROUP, (issued.group + 1) * WARPGROUP)
    for i, register in enumerate(issued.d):
        result = product[:, places[0][:, i], places[1][:, i]]  # [n, 128]
        if add.any():
            before = _value(state, register, ctas, issued.group).view(np.float32)
            result = np.where(add, result + before, result)
        array = state.registers.get(register.name)
        array = np.zeros(state.shape, np.uint32) if array is None else array.copy()
        array[ctas, lanes] = result.astype(np.float32).view(np.uint32)
        state.registers[register.name] = groups.fenced[id(array)] = array
        if register.name in state.undefined:
            state.undefined[register.name][ctas, lanes] = False


def _fence(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    _active(state, mask)
    _warpgroups(state).fenced = {id(array): array for array in state.registers.values()}


def _commit_group(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    groups, active = _warpgroups(state), _active(state, mask)
    for issued in groups.issued:
        now = (issued.number < 0) & active[issued.ctas, issued.group]
        issued.number[now] = groups.committed[issued.ctas[now], issued.group]
    groups.committed += active


def _wait_group(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    (count,) = instruction.operands
    assert isinstance(count, Immediate)
    groups, active = _warpgroups(state), _active(state, mask)
    for issued in groups.issued:
        first_left = groups.committed[issued.ctas, issued.group] - count.bits
        done = issued.running & active[issued.ctas, issued.group] & (issued.number >= 0) & (issued.number < first_left)
        rows = np.flatnonzero(done)
        if not len(rows):
            continue
        if mode(state) == "late":
            _multiply(state, groups, issued, rows)
        if mode(state) == "refuse":
            issued.lock(state, rows, -1)
        issued.running[rows] = False
    over = [issued for issued in groups.issued if not issued.running.any()]
    groups.issued = [issued for issued in groups.issued if issued.running.any()]
    used = {register.name for issued in groups.issued for register in issued.registers}
    state.release(register for issued in over for register in issued.registers if register.name not in used)


# Proxies, matrices.


def fence_proxy(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    """Asynchronous reads see from here on what these warps wrote to shared memory, and what a barrier showed them.

    An asynchronous copy is written when it is waited for: a fence before that is not of it.
    """
    shared = state.shared
    if mask is None:
        shared.unfenced[:] = 0
        return
    shape = (state.ctas, shared.pitch)
    warps = np.any(mask.reshape(state.ctas, -1, WARP), 2)
    own = np.concatenate([np.zeros((state.ctas, 1), bool), warps], 1)
    mine = np.take_along_axis(own, shared.writer.reshape(shape).astype(np.intp), 1)
    earlier = shared.written.reshape(shape) != shared.interval[:, None]
    some = np.any(own, 1, keepdims=True)
    shared.unfenced.reshape(shape)[mine | (earlier & some)] = 0


def _stmatrix(state: Machine, instruction: Instruction, mask: Array | None, count: int, transposed: bool) -> None:
    address, source = instruction.operands
    warps, count_rows = whole_warps(state, mask), 8 * count
    givers, columns = ldmatrix(count, transposed)
    rows = np.empty((len(warps.cta), count_rows, 8), np.uint16)
    rows[:, givers, columns] = warps.values(state, source).view(np.uint16)
    offset = state.address(address, 32).reshape(state.ctas, state.warps, WARP)[warps.cta, warps.warp, :count_rows]
    cta, warp = np.repeat(warps.cta, count_rows), np.repeat(warps.warp, count_rows)
    state.shared.store(cta, warp, offset.reshape(-1), rows.view(np.uint8).reshape(-1, CHUNK))


def _products() -> dict[str, Handler]:
    handlers: dict[str, Handler] = {}
    for kind, k in (("f16", 16), ("bf16", 16), ("tf32", 8)):
        for n in range(8, 257, 8):
            opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind}"
            handlers[opcode] = partial(_mma_async, n=n, k=k, kind=kind)
    return handlers


STMATRIX: dict[str, Any] = {
    f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16": partial(_stmatrix, count=count, transposed=bool(trans))
    for count in (1, 2, 4)
    for trans in ("", ".trans")
}

HANDLERS: dict[str, Handler] = {
    **_products(),
    **STMATRIX,
    "wgmma.fence.sync.aligned": _fence,
    "wgmma.commit_group.sync.aligned": _commit_group,
    "wgmma.wait_group.sync.aligned": _wait_group,
    "fence.proxy.async.shared::cta": fence_proxy,
}
