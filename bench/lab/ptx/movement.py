"""Moving data: registers, global and shared memory, asynchronous copies, barriers, exchange between lanes."""

from dataclasses import dataclass

import numpy as np

from .integers import narrowed, widened
from .machine import DTYPES, WARP, Handler, Machine
from .memory import ELEMENT, Array, Fault
from .parse import Address, Instruction, Operand, Register, Symbol, Vector


def parts(operand: Operand | None) -> tuple[Operand | None, ...]:
    """The operands of a vector, or the operand itself."""
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _packed(state: Machine, part: Operand | None, kind: str) -> Array:
    """Returns a part of a vector; one that the compiler left undefined, because it is ignored, is all ones: NaN."""
    if isinstance(part, Register) and part.name not in state.kernel.written:
        return np.full(state.shape, -1).astype(DTYPES[kind])
    return state.read(part, kind)


def _move(kind: str) -> Handler:
    def handler(state: Machine, instruction: Instruction, mask: Array | None) -> None:
        destination, source = instruction.operands
        if isinstance(source, Vector):
            size = DTYPES[kind].itemsize // len(source.parts)
            each = np.stack([_packed(state, part, f"u{size * 8}") for part in source.parts], -1)
            state.write(destination, each.view(f"u{DTYPES[kind].itemsize}")[..., 0], mask)
        elif isinstance(destination, Vector):
            size = DTYPES[kind].itemsize // len(destination.parts)
            each = np.ascontiguousarray(state.read(source, kind))[..., None].view(f"u{size}")
            for i, part in enumerate(destination.parts):
                state.write(part, np.ascontiguousarray(each[..., i]), mask)
        else:
            state.write(destination, state.read(source, kind), mask)

    return handler


def _parameter(kind: str) -> Handler:
    def handler(state: Machine, instruction: Instruction, mask: Array | None) -> None:
        destination, source = instruction.operands
        assert isinstance(source, Address) and isinstance(source.base, Symbol)
        bits = DTYPES[kind].itemsize * 8
        value = state.parameters[source.base.name] >> (8 * source.offset) & ((1 << bits) - 1)
        values = np.full(state.shape, value, f"u{bits // 8}").view(DTYPES[kind])
        widened(state, destination, values, mask)

    return handler


def _load(space: str, kind: str) -> Handler:
    dtype = DTYPES[kind]

    def handler(state: Machine, instruction: Instruction, mask: Array | None) -> None:
        destination, source = instruction.operands
        registers, threads = parts(destination), state.threads(mask)
        width = dtype.itemsize * len(registers)
        if space == "shared":
            offset = threads.of(state.address(source, 32))
            raw = state.shared.load(threads.cta, threads.warp, offset, width)
        else:
            raw = state.memory.load(state.stamps(threads), threads.of(state.address(source)), width)
        for i, register in enumerate(registers):
            column = np.ascontiguousarray(raw[:, i * dtype.itemsize : (i + 1) * dtype.itemsize]).view(dtype)[:, 0]
            widened(state, register, state.spread(column, mask), mask)

    return handler


def _store(space: str, kind: str) -> Handler:
    def handler(state: Machine, instruction: Instruction, mask: Array | None) -> None:
        destination, source = instruction.operands
        threads = state.threads(mask)
        columns = [threads.of(narrowed(state, part, kind)) for part in parts(source)]
        values = np.stack(columns, -1).view(np.uint8)
        if space == "shared":
            state.shared.store(threads.cta, threads.warp, threads.of(state.address(destination, 32)), values)
        else:
            state.memory.store(state.stamps(threads), threads.of(state.address(destination)), values)

    return handler


def _prefetch(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    (source,) = instruction.operands
    state.memory.prefetch(state.threads(mask).of(state.address(source)))


# Asynchronous copies.


@dataclass
class _Copy:
    """Copies of one instruction that nobody has waited for yet, an element for each thread.

    Attributes:
        thread: Its index into ``[ctas * threads]``.
        group: Number of the thread's group that the copy belongs to.
        cta: Its program.
        warp: Its warp.
        at: Where it writes, as :meth:`~.memory.Shared.place` counts.
        width: Bytes.
    """

    thread: Array
    group: Array
    cta: Array
    warp: Array
    at: Array
    width: int

    def keep(self, some: Array) -> "_Copy":
        """Returns the copies of some of the threads."""
        each = (field[some] for field in (self.thread, self.group, self.cta, self.warp, self.at))
        thread, group, cta, warp, at = each
        return _Copy(thread, group, cta, warp, at, self.width)


@dataclass
class _Copies:
    committed: Array
    flying: list[_Copy]


def _copies(state: Machine) -> _Copies:
    return state.extra.setdefault("copies", _Copies(np.zeros(state.shape, np.int64), []))


def _copy(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    """``cp.async``: nobody may read what it writes before the thread that issued it has waited."""
    destination, source, size, *rest = instruction.operands
    threads, copies, shared = state.threads(mask), _copies(state), state.shared
    width = int(state.read(size, "u32").flat[0])
    taken = threads.of(state.read(rest[0], "u32")) if rest else np.full(len(threads.cta), width, np.uint32)
    if (taken > width).any():
        raise Fault("asynchronous copy", f"{taken.max()} bytes taken for a copy of {width}")
    address, values = threads.of(state.address(source)), np.zeros((len(taken), width), np.uint8)
    stamp = state.stamps(threads)
    for count in np.unique(taken[taken > 0]):
        some = taken == count
        if count == width:
            values[some] = state.memory.load(stamp[some], address[some], width)
            continue
        if (address[some] & np.uint64(width - 1)).any():
            raise Fault("alignment", f"a copy of {width} bytes from {address[some][0]:#x}")
        for byte in range(count):
            values[some, byte] = state.memory.load(stamp[some], address[some] + np.uint64(byte), 1)[:, 0]
    offset = threads.of(state.address(destination, 32))
    shared.store(threads.cta, threads.warp, offset, values)
    at = shared.place(threads.cta, offset, width)
    shared.pending.view(ELEMENT[width])[at] = np.ones(width, np.uint8).view(ELEMENT[width])[0]
    shared.has_pending = True
    everyone = np.arange(state.ctas * state.size).reshape(state.shape)
    copies.flying.append(
        _Copy(threads.of(everyone), threads.of(copies.committed), threads.cta, threads.warp, at, width)
    )


def _commit(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    copies = _copies(state)
    copies.committed = copies.committed + (1 if mask is None else mask)


def _wait(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    """``cp.async.wait_group N``: all but a thread's last N groups are done, and are its own writes from here on."""
    copies, shared = _copies(state), state.shared
    if instruction.operands:
        left = state.read(instruction.operands[0], "u32").astype(np.int64)
        done_below = (copies.committed - left).reshape(-1)
    else:
        done_below = copies.committed.reshape(-1) + 1  # wait_all: the group that is still open as well
    if mask is not None:
        done_below = np.where(mask.reshape(-1), done_below, -1)
    still = []
    for copy in copies.flying:
        done = copy.group < done_below[copy.thread]
        if done.any():
            over = copy.keep(done)
            shared.pending.view(ELEMENT[over.width])[over.at] = 0
            shared.mark(over.cta, over.warp, over.at, over.width)
        if not done.all():
            still.append(copy.keep(~done))
    copies.flying, shared.has_pending = still, bool(still)


# Warps.


def _barrier(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    if len(instruction.operands) > 1:
        count = state.read(instruction.operands[1], "u32").flat[0]
        if count != state.size:
            raise NotImplementedError(f"{instruction.opcode} of {count} of {state.size} threads")
    state.barrier(mask)


def _nothing(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    """Does nothing: it orders accesses within a warp, which are not checked for races, or is a promise."""


def _shuffle(mode: str) -> Handler:
    def handler(state: Machine, instruction: Instruction, mask: Array | None) -> None:
        destination, source, lane, clamp, _ = instruction.operands
        result, *found = parts(destination)
        shape = (state.ctas, state.warps, WARP)
        values = state.read(source, "b32").reshape(shape)
        b, c = (state.read(o, "u32").reshape(shape).astype(np.int64) for o in (lane, clamp))
        own = np.arange(WARP)
        segment, most = c >> 8 & 31, c & 31
        limit = (own & segment) | (most & ~segment)
        first = own & segment
        moves = {
            "idx": (first | (b & 31 & ~segment), lambda at: at <= limit),
            "bfly": (own ^ (b & 31), lambda at: at <= limit),
            "down": (own + (b & 31), lambda at: at <= limit),
            "up": (own - (b & 31), lambda at: at >= limit),
        }
        at, test = moves[mode]
        inside = test(at)
        at = np.where(inside, at, own)
        if mask is not None and not np.take_along_axis(mask.reshape(shape), at, -1)[mask.reshape(shape)].all():
            raise Fault("divergence", "a shuffle from a thread that takes no part")
        state.write(result, np.take_along_axis(values, at, -1).reshape(state.shape), mask)
        if found:
            state.write(found[0], inside.reshape(state.shape), mask)

    return handler


def _handlers() -> dict[str, Handler]:
    types = [f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)] + ["f32", "f64"]
    table: dict[str, Handler] = {}
    for kind in types:
        table[f"ld.param.{kind}"] = _parameter(kind)
        if kind[1:] != "8":
            table[f"mov.{kind}"] = _move(kind)
        for vector in ("", ".v2", ".v4"):
            for hint in ("", ".nc", ".L1::evict_first", ".L1::evict_last", ".L1::no_allocate"):
                table[f"ld.global{hint}{vector}.{kind}"] = _load("global", kind)
            table[f"st.global{vector}.{kind}"] = _store("global", kind)
            table[f"ld.shared{vector}.{kind}"] = _load("shared", kind)
            table[f"st.shared{vector}.{kind}"] = _store("shared", kind)
    table["mov.pred"] = _move("pred")
    table["prefetch.global.L2"] = _prefetch
    for cache in ("ca", "cg"):
        table[f"cp.async.{cache}.shared.global"] = _copy
    table["cp.async.commit_group"] = _commit
    table["cp.async.wait_group"] = table["cp.async.wait_all"] = _wait
    table["bar.sync"] = table["barrier.sync.aligned"] = _barrier
    table["bar.warp.sync"] = _nothing
    for mode in ("idx", "bfly", "up", "down"):
        table[f"shfl.sync.{mode}.b32"] = _shuffle(mode)
    return table


HANDLERS = _handlers()
"""From full opcode to handler."""
