"""Barriers in shared memory, and the choice of one thread of a warp.

A barrier counts arrivals and completes a phase when as many have come as it was made for. Operations that work by
themselves arrive when they are done. Here they are done as late as can be: when somebody waits and nothing else
completes the phase.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .machine import WARP, Blocked, Handler, Machine
from .memory import Array, Fault
from .parse import Instruction, Vector

WIDTH = 8
"""Bytes of a barrier."""


@dataclass
class Barrier:
    """One barrier of one program.

    Attributes:
        count: Arrivals of a phase.
        left: Arrivals that the present phase lacks.
        phase: Phases completed.
        arriving: What will arrive, in its order: called when it does.
    """

    count: int
    left: int
    phase: int = 0
    arriving: list[Callable[[], None]] = field(default_factory=list)

    def complete(self, parity: int) -> bool:
        """Whether the last phase of a parity is complete; first everything that is due arrives."""
        while self.phase & 1 == parity and self.arriving:
            self.arriving.pop(0)()
            self.left -= 1
            if not self.left:
                self.phase, self.left = self.phase + 1, self.count
        return self.phase & 1 != parity


def barriers(state: Machine) -> dict[tuple[int, int], Barrier]:
    """The launch's barriers by program and address."""
    found: dict[tuple[int, int], Barrier] = state.extra.setdefault("mbarriers", {})
    return found


def barrier_of(state: Machine, cta: int, address: int) -> Barrier:
    """A barrier.

    Raises:
        Fault: There is none at this address.
    """
    found = barriers(state).get((cta, address))
    if found is None:
        raise Fault("mbarrier", f"there is none at {address:#x}")
    return found


def at_barriers(state: Machine, instruction: Instruction, place: int, mask: Array | None) -> Iterator[tuple[int, int]]:
    """Programs and addresses, each once, of the operand at ``place``, read as the threads of a mask read it."""
    threads = state.threads(mask)
    address = threads.of(state.address(instruction.operands[place], 32))
    state.shared.load(threads.cta, threads.warp, address, WIDTH)
    for cta, at in np.unique(np.stack([threads.cta, address.astype(np.int64)]), axis=1).T:
        yield int(cta), int(at)


def _write(state: Machine, instruction: Instruction, mask: Array | None) -> Iterator[tuple[int, int]]:
    """The barriers that threads make or end, one each, after the checks of an ordinary write."""
    threads = state.threads(mask)
    address = threads.of(state.address(instruction.operands[0], 32))
    state.shared.store(threads.cta, threads.warp, address, np.zeros((len(address), WIDTH), np.uint8))
    for cta, at in zip(threads.cta, address, strict=True):
        yield int(cta), int(at)


def _init(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    counts = state.read(instruction.operands[1], "u32")
    count = int(counts.flat[0])
    for key in _write(state, instruction, mask):
        if key in barriers(state):
            raise Fault("mbarrier", f"{key[1]:#x} is one already")
        barriers(state)[key] = Barrier(count, count)


def _inval(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    for cta, address in _write(state, instruction, mask):
        if barrier_of(state, cta, address).arriving:
            raise Fault("mbarrier", f"{address:#x} is ended, and an operation will arrive there")
        del barriers(state)[cta, address]


def _try_wait(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    destination, address, parity = instruction.operands
    parities, at = state.read(parity, "u32"), state.address(address, 32)
    result = np.zeros(state.shape, bool)
    for cta, where in at_barriers(state, instruction, 1, mask):
        waiting = (at[cta] == where) & (True if mask is None else mask[cta])
        for value in np.unique(parities[cta, waiting]):
            some = waiting & (parities[cta] == value)
            done = barrier_of(state, cta, where).complete(int(value))
            if not done:
                raise Blocked("mbarrier", f"threads wait at {where:#x} for a phase that nothing will complete")
            result[cta, some] = done
    state.write(destination, result, mask)


def _elect(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    """The first thread of each warp that takes part."""
    chosen, _ = instruction.operands
    assert isinstance(chosen, Vector)
    active = np.ones(state.shape, bool) if mask is None else mask
    first = active.reshape(state.ctas, -1, WARP).argmax(2)[:, :, None]
    lane = np.broadcast_to(first, (state.ctas, state.warps, WARP)).reshape(state.shape)
    state.write(chosen.parts[0], lane.astype(np.uint32), mask)
    state.write(chosen.parts[1], state.special("%laneid") == lane, mask)


HANDLERS: dict[str, Handler] = {
    "mbarrier.init.shared::cta.b64": _init,
    "mbarrier.inval.shared::cta.b64": _inval,
    "mbarrier.try_wait.parity.shared::cta.b64": _try_wait,
    "elect.sync": _elect,
}
