"""Tensor memory: its cells, who may have them, and the loads and stores of warps.

128 lanes of 512 columns of 32 bits; a warp reaches the 32 lanes of its number modulo 4. Loads and stores are done when
the warp has waited (``tcgen05.wait``). It faults to touch registers that are being loaded (in mode ``"refuse"`` of
:mod:`.hopper`), or cells that something still uses, that are not allocated, or that nobody has written.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from .descriptors import TMEM_COLUMNS, TMEM_LANES, tmem_places
from .hopper import mode
from .machine import Handler, Machine
from .matrix import Warps, whole_warps
from .memory import Array, Fault
from .movement import HANDLERS as MOVES
from .movement import parts
from .parse import Immediate, Instruction, Operand, Register

QUARTER = 32
"""Lanes of tensor memory that a warp reaches."""
WHO = 256
"""More than a program's warps: a stamp is ``barriers passed * WHO + warp + 1``."""


@dataclass
class Access:
    """A load or store of some warps that they have not waited for.

    Attributes:
        warps: bool ``[ctas, warps]``: for which it still runs.
        cells: ``[n, 32, registers]``: indices into tensor memory.
        cta: Of each of the ``n`` warps.
        warp: Likewise.
        registers: A load's.
        values: What a load reads, ``[n, 32, registers]``.
        copies: Registers that a ``mov`` has made of a load's.
    """

    warps: Array
    cells: Array
    cta: Array
    warp: Array
    registers: tuple[Operand | None, ...] = ()
    values: Array | None = None
    copies: list[Register] = field(default_factory=list)

    @property
    def held(self) -> list[Register]:
        """The registers that nobody may touch."""
        return [register for register in self.registers if isinstance(register, Register)] + self.copies


@dataclass
class Memory:
    """Tensor memory of all programs. Planes are flat, see :meth:`cells`.

    Attributes:
        data: uint32, the cells.
        owner: ``[ctas, columns]``: number of the allocation, 0 where there is none.
        closed: bool ``[ctas]``: gave up the right to allocate.
        written: Whether anybody has written a cell.
        storing: 1 where a store runs.
        loading: 1 where a load runs.
        reading: Products that read a cell.
        writing: Products that write it.
        stored: Stamp of the last finished store, 0 if none.
        loaded: Stamp of the last finished load.
        loads: Running.
        stores: Running.
    """

    data: Array
    owner: Array
    closed: Array
    written: Array
    storing: Array
    loading: Array
    reading: Array
    writing: Array
    stored: Array
    loaded: Array
    loads: list[Access] = field(default_factory=list)
    stores: list[Access] = field(default_factory=list)

    @classmethod
    def of(cls, state: Machine) -> "Memory":
        """Returns the tensor memory of a launch."""
        if "tmem" not in state.extra:
            size = state.ctas * TMEM_LANES * TMEM_COLUMNS
            owner, closed = np.zeros((state.ctas, TMEM_COLUMNS), np.int64), np.zeros(state.ctas, bool)
            written, storing, loading, reading, writing = np.zeros((5, size), np.uint8)
            stored, loaded = np.zeros((2, size), np.int32)
            planes = written, storing, loading, reading, writing, stored, loaded
            state.extra.setdefault("at_end", []).append(_all_given_back)
            state.extra["tmem"] = cls(np.zeros(size, np.uint32), owner, closed, *planes)
        found: Memory = state.extra["tmem"]
        return found

    def cells(self, cta: Array, lane: Array, column: Array) -> Array:
        """Indices of cells; the arrays have a common shape.

        Raises:
            Fault: Not allocated.
        """
        cta, lane, column = np.broadcast_arrays(cta, lane, column)
        outside = (lane >= TMEM_LANES) | (column >= TMEM_COLUMNS)
        if outside.any() or not self.owner[cta, column].all():
            raise Fault("tensor memory", f"columns {column.min()} to {column.max()} are not all allocated")
        return (cta * TMEM_LANES + lane) * TMEM_COLUMNS + column

    def check(self, cells: Array, verb: str, **planes: str) -> None:
        """Faults where a plane is not 0.

        Args:
            cells: Which cells.
            verb: What is done to them, in words.
            planes: For the names of planes what they mean, in words.
        """
        for name, meaning in planes.items():
            if getattr(self, name)[cells].any():
                raise Fault("tensor memory", f"a cell is {verb} while {meaning}")

    def check_written(self, cells: Array) -> None:
        """Faults where nobody has written."""
        if not self.written[cells].all():
            raise Fault("tensor memory", "a cell is read that nobody has written")


def stamp(state: Machine, cta: Array, warp: Array) -> Array:
    """Returns which warp it is and how many barriers its program has passed."""
    return ((state.barriers[cta] + 1) * WHO + warp + 1).astype(np.int32)


# Allocation.


def _allocate(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    target, columns = instruction.operands
    assert isinstance(columns, Immediate)
    memory, warps, count = Memory.of(state), whole_warps(state, mask), columns.bits
    if count not in (32, 64, 128, 256, 512):
        raise Fault("tensor memory", f"{count} columns are asked for: no power of 2 from 32 to 512")
    starts = []
    for cta in warps.cta:
        free = np.lib.stride_tricks.sliding_window_view(memory.owner[cta] == 0, count).all(1)
        if memory.closed[cta] or not free.any():
            raise Fault("tensor memory", f"{count} columns are asked for, and can never be had")
        starts.append(int(free.argmax()))
        memory.owner[cta, starts[-1] : starts[-1] + count] = starts[-1] + 1
    address = state.address(target, 32).reshape(state.ctas, state.warps, -1)[warps.cta, warps.warp, 0]
    state.shared.store(warps.cta, warps.warp, address, np.array(starts, np.uint32)[:, None].view(np.uint8))


def _deallocate(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    address, columns = instruction.operands
    assert isinstance(columns, Immediate)
    memory, warps = Memory.of(state), whole_warps(state, mask)
    starts = warps.values(state, address)[:, 0, 0]
    for cta, start in zip(warps.cta, starts.astype(np.int64), strict=True):
        if (memory.owner[cta] == start + 1).sum() != columns.bits:
            raise Fault(
                "tensor memory", f"{columns.bits} columns at {start:#x} are given back, and were not allocated so"
            )
        memory.owner[cta, memory.owner[cta] == start + 1] = 0


def _relinquish(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    Memory.of(state).closed[whole_warps(state, mask).cta] = True


def _all_given_back(state: Machine) -> None:
    """Faults if columns are not given back, because the next program on the multiprocessor would wait forever."""
    owner = Memory.of(state).owner
    if owner.any():
        raise Fault(
            "tensor memory", f"program {np.flatnonzero(owner.any(1))[0]} ends and has not given back all columns"
        )


# Loads and stores.


def _warp_cells(state: Machine, warps: Warps, address: Operand, shape: str, count: int, split: int) -> Array:
    """The cells of each warp's registers, ``[n, 32, registers]``."""
    addresses = state.address(address, 32).reshape(state.ctas, state.warps, -1)[warps.cta, warps.warp]
    if (addresses != addresses[:, :1]).any():
        raise Fault("divergence", "an address of tensor memory differs between the threads of a warp")
    lane, column = addresses[:, 0].astype(np.int64) >> 16, addresses[:, 0].astype(np.int64) & 0xFFFF
    halves = (0, 16) if shape.startswith("16x") else (0,)
    if not np.isin(lane - warps.warp % 4 * QUARTER, halves).all():
        raise Fault("tensor memory", f"lane {lane[0]} is not where warp {warps.warp[0]} may begin")
    lanes, columns = tmem_places(shape, count, split)
    return Memory.of(state).cells(
        warps.cta[:, None, None], lane[:, None, None] + lanes, column[:, None, None] + columns
    )


RUNNING = {"storing": "a store to it is not waited for", "loading": "a load of it is not waited for"}
PRODUCTS = {"reading": "a product reads it", "writing": "a product writes it, whose barrier nobody has waited for"}


def _load(state: Machine, instruction: Instruction, mask: Array | None, shape: str, count: int) -> None:
    destination, address, *split = instruction.operands
    memory, warps = Memory.of(state), whole_warps(state, mask)
    cells = _warp_cells(state, warps, address, shape, count, _bits(split))
    memory.check(cells, "read", storing=RUNNING["storing"], writing=PRODUCTS["writing"])
    memory.check_written(cells)
    stored = memory.stored[cells]
    own = (stamp(state, warps.cta, warps.warp))[:, None, None]
    if ((stored // WHO == own // WHO) & (stored != own)).any():
        raise Fault("race", "tensor memory is read that another warp has stored since the last barrier")
    running = np.zeros((state.ctas, state.warps), bool)
    running[warps.cta, warps.warp] = True
    registers = parts(destination)
    values = memory.data[cells]
    load = Access(running, cells, warps.cta, warps.warp, registers, values)
    memory.loads.append(load)
    if mode(state) != "late":
        warps.write(state, destination, values)
    if mode(state) == "refuse":
        memory.loading[cells] = 1
        state.hold(load.held, f"{instruction.opcode} of {instruction.source} is not waited for")


def _move(state: Machine, instruction: Instruction, mask: Array | None, plain: Handler) -> None:
    """``mov``: a copy of a register that is being loaded is loaded as well.

    LLVM puts copies between a load and its wait. The assembler keeps both in one register, so that no instruction is
    left of them; what uses the copy has to come after the wait.
    """
    destination, source = instruction.operands
    names = {register.name for register in parts(source) if isinstance(register, Register)} & state.held.keys()
    if not names:
        plain(state, instruction, mask)
        return
    held = {name: state.held.pop(name) for name in names}
    plain(state, instruction, mask)
    state.held.update(held)
    copies = [register for register in parts(destination) if isinstance(register, Register)]
    for load in Memory.of(state).loads:
        if names & {register.name for register in load.held}:
            load.copies += copies
            state.hold(copies, f"is a copy: {held[min(names)]}")


def _bits(constants: list[Operand]) -> int:
    return constants[0].bits if constants and isinstance(constants[0], Immediate) else 0


def _finished(state: Machine, running: list[Access], mask: Array | None) -> list[tuple[Access, Array]]:
    """Ends the accesses that some warps have waited for, and returns each with its warps."""
    warps = whole_warps(state, mask)
    waiting = np.zeros((state.ctas, state.warps), bool)
    waiting[warps.cta, warps.warp] = True
    over = []
    for access in running:
        done = (access.warps & waiting)[access.cta, access.warp]
        if done.any():
            over.append((access, np.flatnonzero(done)))
            access.warps &= ~waiting
    running[:] = [access for access in running if access.warps.any()]
    return over


def _wait_load(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    memory = Memory.of(state)
    for load, rows in _finished(state, memory.loads, mask):
        memory.loading[load.cells[rows]] = 0
        memory.loaded[load.cells[rows]] = stamp(state, load.cta[rows], load.warp[rows])[:, None, None]
        assert load.values is not None
        if mode(state) == "late":
            cta, warp = load.cta[rows], load.warp[rows]
            lanes = np.zeros((state.ctas, state.warps, QUARTER), bool)
            lanes[cta, warp] = True
            some = Warps(cta, warp, lanes.reshape(state.shape))
            for i, register in enumerate(load.registers):
                some.write(state, register, load.values[rows][..., i : i + 1])
        used = {register.name for other in memory.loads for register in other.held}
        state.release(register for register in load.held if register.name not in used)


def _store(state: Machine, instruction: Instruction, mask: Array | None, shape: str, count: int) -> None:
    address, *split, source = instruction.operands
    memory, warps = Memory.of(state), whole_warps(state, mask)
    cells = _warp_cells(state, warps, address, shape, count, _bits(split))
    memory.check(cells, "stored", loading=RUNNING["loading"], **PRODUCTS)
    memory.data[cells] = warps.values(state, source)
    memory.written[cells] = memory.storing[cells] = 1
    running = np.zeros((state.ctas, state.warps), bool)
    running[warps.cta, warps.warp] = True
    memory.stores.append(Access(running, cells, warps.cta, warps.warp))


def _wait_store(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    memory = Memory.of(state)
    for store, rows in _finished(state, memory.stores, mask):
        memory.storing[store.cells[rows]] = 0
        memory.stored[store.cells[rows]] = stamp(state, store.cta[rows], store.warp[rows])[:, None, None]


def _accesses() -> dict[str, Handler]:
    handlers: dict[str, Handler] = {}
    for shape in ("32x32b", "16x32bx2"):
        for count in (1, 2, 4, 8, 16, 32, 64, 128):
            handlers[f"tcgen05.ld.sync.aligned.{shape}.x{count}.b32"] = partial(_load, shape=shape, count=count)
            handlers[f"tcgen05.st.sync.aligned.{shape}.x{count}.b32"] = partial(_store, shape=shape, count=count)
    return handlers


HANDLERS: dict[str, Handler] = {
    **_accesses(),
    **{f"mov.b{bits}": partial(_move, plain=MOVES[f"mov.b{bits}"]) for bits in (32, 64)},
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32": _allocate,
    "tcgen05.dealloc.cta_group::1.sync.aligned.b32": _deallocate,
    "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned": _relinquish,
    "tcgen05.wait::ld.sync.aligned": _wait_load,
    "tcgen05.wait::st.sync.aligned": _wait_store,
}
