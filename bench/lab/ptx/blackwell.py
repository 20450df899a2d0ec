"""What sm_100 adds: tensor memory, and ``tcgen05`` that multiplies into it.

Tensor memory has 128 lanes of 512 columns of 32 bits; a warp reaches the 32 lanes of its number modulo 4. Products
(``mma``) and what warps load and store are asynchronous: a product is done when a barrier that it was committed to has
completed its phase, loads and stores with ``tcgen05.wait``. :mod:`.hopper` says what the modes do with a kernel that
does not wait; in mode ``"refuse"`` these fault:

- cells, shared memory or registers touched while a product, load or store uses them;
- cells that a warp stored, or has loaded, and a product takes with no barrier of the program between;
- cells that are not allocated, or that nobody has written.

The ISA wants ``tcgen05.fence`` beside such a barrier. Triton 3.7 emits none, and none is asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .descriptors import (
    TMEM_COLUMNS,
    TMEM_LANES,
    Product,
    tcgen05_matrix,
    tcgen05_product,
    tmem_lanes,
    tmem_places,
)
from .hopper import FLOATS, ITEMSIZES, STMATRIX, SharedOperand, fence_proxy, mode
from .machine import Handler, Machine
from .matrix import Warps, whole_warps
from .mbarrier import HANDLERS as BARRIERS
from .mbarrier import at_barriers, barrier_of
from .memory import ELEMENT, Array, Fault
from .movement import parts
from .parse import Address, Immediate, Instruction, Operand, Register

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
    """

    warps: Array
    cells: Array
    cta: Array
    warp: Array
    registers: tuple[Operand | None, ...] = ()
    values: Array | None = None


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
        products: Not yet committed.
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
    products: list["Multiplication"] = field(default_factory=list)

    @classmethod
    def of(cls, state: Machine) -> "Memory":
        """The launch's."""
        if "tmem" not in state.extra:
            size = state.ctas * TMEM_LANES * TMEM_COLUMNS
            planes = (np.zeros(size, np.uint8) for _ in range(5))
            owner, closed = np.zeros((state.ctas, TMEM_COLUMNS), np.int64), np.zeros(state.ctas, bool)
            stamps = (np.zeros(size, np.int32) for _ in range(2))
            state.extra["tmem"] = cls(np.zeros(size, np.uint32), owner, closed, *planes, *stamps)
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


def _stamp(state: Machine, cta: Array, warp: Array) -> Array:
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
    own = (_stamp(state, warps.cta, warps.warp))[:, None, None]
    if ((stored // WHO == own // WHO) & (stored != own)).any():
        raise Fault("race", "tensor memory is read that another warp has stored since the last barrier")
    running = np.zeros((state.ctas, state.warps), bool)
    running[warps.cta, warps.warp] = True
    registers = parts(destination)
    load = Access(running, cells, warps.cta, warps.warp, registers, memory.data[cells])
    memory.loads.append(load)
    if mode(state) != "late":
        warps.write(state, destination, load.values)
    if mode(state) == "refuse":
        memory.loading[cells] = 1
        state.hold(_names(registers), f"{instruction.opcode} of {instruction.source} is not waited for")


def _names(registers: Iterable[Operand | None]) -> list[Register]:
    return [register for register in registers if isinstance(register, Register)]


def _bits(constants: list[Operand]) -> int:
    return constants[0].bits if constants and isinstance(constants[0], Immediate) else 0


def _finished(state: Machine, running: list[Access], mask: Array | None) -> list[tuple[Access, Array]]:
    """What ends with a wait of some warps: accesses, and which of their warps; none of them runs any more."""
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
        memory.loaded[load.cells[rows]] = _stamp(state, load.cta[rows], load.warp[rows])[:, None, None]
        assert load.values is not None
        if mode(state) == "late":
            cta, warp = load.cta[rows], load.warp[rows]
            lanes = np.zeros((state.ctas, state.warps, QUARTER), bool)
            lanes[cta, warp] = True
            some = Warps(cta, warp, lanes.reshape(state.shape))
            for i, register in enumerate(load.registers):
                some.write(state, register, load.values[rows][..., i : i + 1])  # type: ignore[arg-type]
        used = {register.name for other in memory.loads for register in _names(other.registers)}
        state.release(register for register in _names(load.registers) if register.name not in used)


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
        memory.stored[store.cells[rows]] = _stamp(state, store.cta[rows], store.warp[rows])[:, None, None]


# Products.


@dataclass
class Multiplication:
    """One ``tcgen05.mma``, in all programs that issued it together.

    Attributes:
        product: Its instruction descriptor.
        k: Length of its reduction.
        ctas: Numbers ``[n]`` of the programs.
        threads: The thread of each that issued it.
        committed: bool ``[n]``.
        d: Cells of the accumulator, ``[n, m, columns]``.
        a: Operand A: cells ``[n, m, words]``, or a matrix in shared memory.
        b: Operand B.
        add: bool ``[n]``: whether the accumulator is added.
    """

    product: Product
    k: int
    ctas: Array
    threads: Array
    committed: Array
    d: Array
    a: Array | SharedOperand
    b: SharedOperand
    add: Array

    def multiply(self, memory: Memory, state: Machine, rows: Array) -> None:
        """Does it in some of its programs with the operands as they are now: exact sums, rounded once."""
        if isinstance(self.a, SharedOperand):
            a = self.a.values(state, rows)
        else:
            elements = memory.data[self.a[rows]].view(ELEMENT[ITEMSIZES[self.product.a]])
            a = FLOATS[self.product.a](elements)
        result = a.astype(np.float64) @ self.b.values(state, rows).swapaxes(1, 2)
        before = memory.data[self.d[rows]].view(np.float32)
        result += np.where(self.add[rows][:, None, None], before, np.float32(0))
        memory.data[self.d[rows]] = result.astype(np.float32).view(np.uint32)
        memory.written[self.d[rows]] = 1

    def use(self, memory: Memory, state: Machine, rows: Array, change: int) -> None:
        """Counts it, in some of its programs, as a user of its operands: up (1) or down (-1)."""
        step = np.uint8(change & 0xFF)
        memory.writing[self.d[rows]] += step
        self.b.lock(state, rows, change)
        if isinstance(self.a, SharedOperand):
            self.a.lock(state, rows, change)
        else:
            memory.reading[self.a[rows]] += step

    def finish(self, memory: Memory, state: Machine, row: int) -> None:
        """A barrier that it was committed to completes."""
        rows = np.array([row])
        if mode(state) == "late":
            self.multiply(memory, state, rows)
        if mode(state) == "refuse":
            self.use(memory, state, rows, -1)


def _mma(state: Machine, instruction: Instruction, mask: Array | None, kind: str) -> None:
    d, a, b, what, add = instruction.operands
    memory = Memory.of(state)
    chosen = np.ones(state.shape, bool) if mask is None else mask
    if (chosen.sum(1) > 1).any():
        raise Fault("divergence", f"{instruction.opcode} by several threads of a program")
    ctas, threads = np.nonzero(chosen)
    descriptors = state.read(what, "u32")[ctas, threads]
    for descriptor in np.unique(descriptors):
        some = descriptors == descriptor
        cta, thread = ctas[some], threads[some]
        product = tcgen05_product(int(descriptor), kind)
        itemsize = ITEMSIZES[product.a]
        k = 32 // itemsize
        read = partial(SharedOperand.find, state, cta, read=tcgen05_matrix)
        lanes, warp = tmem_lanes(product.m), thread // QUARTER
        cells = partial(_operand_cells, state, memory, cta, thread, lanes)
        operand: Array | SharedOperand
        if isinstance(a, Address):
            operand = cells(a, k * itemsize // 4)
            memory.check(operand, "multiplied", storing=RUNNING["storing"], writing=PRODUCTS["writing"])
            memory.check_written(operand)
            _check_ordered(state, memory, operand, cta, warp, "stored")
        else:
            left = state.read(a, "u64")[cta, thread]
            operand = read(descriptors=left, shape=(product.m, k), kind=product.a, mn_major=product.a_mn_major)
        right = state.read(b, "u64")[cta, thread]
        multiplication = Multiplication(
            product,
            k,
            cta,
            thread,
            np.zeros(len(cta), bool),
            cells(d, product.n),
            operand,
            read(descriptors=right, shape=(product.n, k), kind=product.b, mn_major=product.b_mn_major),
            state.read(add, "pred")[cta, thread],
        )
        memory.check(multiplication.d, "accumulated", reading=PRODUCTS["reading"], **RUNNING)
        if mode(state) != "late":
            memory.check_written(multiplication.d[multiplication.add])
        for plane in ("stored", "loaded"):
            _check_ordered(state, memory, multiplication.d, cta, warp, plane)
        memory.products.append(multiplication)
        if mode(state) != "late":
            multiplication.multiply(memory, state, np.arange(len(cta)))
        if mode(state) == "refuse":
            multiplication.use(memory, state, np.arange(len(cta)), 1)


def _operand_cells(
    state: Machine, memory: Memory, cta: Array, thread: Array, lanes: Array, address: Operand, columns: int
) -> Array:
    """The cells of a matrix, ``[n, rows, columns]``."""
    first = state.address(address, 32)[cta, thread].astype(np.int64)[:, None, None]
    return memory.cells(cta[:, None, None], (first >> 16) + lanes[:, None], (first & 0xFFFF) + np.arange(columns))


def _check_ordered(state: Machine, memory: Memory, cells: Array, cta: Array, warp: Array, plane: str) -> None:
    """Faults where another warp has loaded or stored a cell since the program's last barrier."""
    stamps, own = getattr(memory, plane)[cells], _stamp(state, cta, warp)[:, None, None]
    if ((stamps // WHO == own // WHO) & (stamps != own)).any():
        raise Fault("race", f"a product takes tensor memory that another warp has {plane} since the last barrier")


def _commit(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    """All that a thread has issued arrives at its barrier, once, when all of it is done."""
    memory = Memory.of(state)
    chosen = np.ones(state.shape, bool) if mask is None else mask
    for cta, address in at_barriers(state, instruction, 0, mask):
        done = []
        for multiplication in memory.products:
            now = (multiplication.ctas == cta) & chosen[cta, multiplication.threads] & ~multiplication.committed
            multiplication.committed |= now
            done += [partial(multiplication.finish, memory, state, int(row)) for row in np.flatnonzero(now)]
        barrier_of(state, cta, address).arriving.append(partial(_arrive, done))
    memory.products = [product for product in memory.products if not product.committed.all()]


def _arrive(done: list[Any]) -> None:
    for finish in done:
        finish()


def _accesses() -> dict[str, Handler]:
    handlers: dict[str, Handler] = {}
    for shape in ("32x32b", "16x32bx2"):
        for count in (1, 2, 4, 8, 16, 32, 64, 128):
            handlers[f"tcgen05.ld.sync.aligned.{shape}.x{count}.b32"] = partial(_load, shape=shape, count=count)
            handlers[f"tcgen05.st.sync.aligned.{shape}.x{count}.b32"] = partial(_store, shape=shape, count=count)
    return handlers


HANDLERS: dict[str, Handler] = {
    **BARRIERS,
    **STMATRIX,
    **_accesses(),
    "fence.proxy.async.shared::cta": fence_proxy,
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32": _allocate,
    "tcgen05.dealloc.cta_group::1.sync.aligned.b32": _deallocate,
    "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned": _relinquish,
    "tcgen05.wait::ld.sync.aligned": _wait_load,
    "tcgen05.wait::st.sync.aligned": _wait_store,
    "tcgen05.mma.cta_group::1.kind::f16": partial(_mma, kind="f16"),
    "tcgen05.mma.cta_group::1.kind::tf32": partial(_mma, kind="tf32"),
    "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64": _commit,
}
