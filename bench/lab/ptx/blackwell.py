"""What sm_100 adds: products in tensor memory (``tcgen05.mma``), committed to barriers.

A product works by itself until a barrier that it was committed to has completed its phase. :mod:`.hopper` says what the
modes do with a kernel that does not wait for it. In mode ``"refuse"`` it faults to touch cells or shared memory that
a product uses. In every mode it is a fault if a product takes cells that another warp has stored or loaded with no
barrier of the program between. The ISA wants ``tcgen05.fence`` beside such a barrier; Triton 3.7 emits none, and
this check does not ask for it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .descriptors import Product, tcgen05_matrix, tcgen05_product, tmem_lanes
from .hopper import FLOATS, ITEMSIZES, STMATRIX, SharedOperand, fence_proxy, mode
from .machine import WARP, Handler, Machine
from .mbarrier import HANDLERS as BARRIERS
from .mbarrier import at_barriers, barrier_of
from .memory import ELEMENT, Array, Fault
from .parse import Address, Instruction, Operand
from .tensor_memory import HANDLERS as MEMORY
from .tensor_memory import PRODUCTS, RUNNING, WHO, Memory, stamp


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
        """Multiplies in some of its programs with the operands as they are now; sums are exact and rounded once."""
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
        """Adds 1 or -1 to the number of products that use each operand, in some of its programs."""
        step = np.uint8(change & 0xFF)
        memory.writing[self.d[rows]] += step
        self.b.lock(state, rows, change)
        if isinstance(self.a, SharedOperand):
            self.a.lock(state, rows, change)
        else:
            memory.reading[self.a[rows]] += step

    def finish(self, memory: Memory, state: Machine, row: int) -> None:
        """Ends it, because a barrier that it was committed to completes."""
        rows = np.array([row])
        if mode(state) == "late":
            self.multiply(memory, state, rows)
        if mode(state) == "refuse":
            self.use(memory, state, rows, -1)


def _issued(state: Machine) -> list[Multiplication]:
    """The products that are not committed yet, in the order in which they were issued."""
    found: list[Multiplication] = state.extra.setdefault("tcgen05", [])
    return found


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
        try:
            product = tcgen05_product(int(descriptor), kind)
        except ValueError as wrong:
            raise Fault("descriptor", str(wrong)) from wrong
        itemsize = ITEMSIZES[product.a]
        k = 32 // itemsize
        read = partial(SharedOperand.find, state, cta, read=tcgen05_matrix)
        lanes, warp = tmem_lanes(product.m), thread // WARP
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
        _issued(state).append(multiplication)
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
    stamps, own = getattr(memory, plane)[cells], stamp(state, cta, warp)[:, None, None]
    if ((stamps // WHO == own // WHO) & (stamps != own)).any():
        raise Fault("race", f"a product takes tensor memory that another warp has {plane} since the last barrier")


def _commit(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    """Lets everything that a thread has issued arrive at its barrier, once, when all of it is done."""
    memory = Memory.of(state)
    chosen = np.ones(state.shape, bool) if mask is None else mask
    for cta, address in at_barriers(state, instruction, 0, mask):
        done = []
        for multiplication in _issued(state):
            now = (multiplication.ctas == cta) & chosen[cta, multiplication.threads] & ~multiplication.committed
            multiplication.committed |= now
            done += [partial(multiplication.finish, memory, state, int(row)) for row in np.flatnonzero(now)]
        barrier_of(state, cta, address).arriving.append(partial(_arrive, done))
    state.extra["tcgen05"] = [product for product in _issued(state) if not product.committed.all()]


def _arrive(done: list[Any]) -> None:
    for finish in done:
        finish()


HANDLERS: dict[str, Handler] = {
    **BARRIERS,
    **STMATRIX,
    **MEMORY,
    "fence.proxy.async.shared::cta": fence_proxy,
    "tcgen05.mma.cta_group::1.kind::f16": partial(_mma, kind="f16"),
    "tcgen05.mma.cta_group::1.kind::tf32": partial(_mma, kind="tf32"),
    "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64": _commit,
}
