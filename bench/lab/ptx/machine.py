"""The state of a launch and its execution.

All threads of all programs (CTAs) of a launch run together: a register is an array ``[ctas, threads]``. Where a branch
divides them, those that are at the smallest instruction run until the others are met again. So one order of the
warps is executed; that no other order matters is what the checks of :mod:`.memory` say.

A handler, ``handler(state, instruction, mask)``, does one instruction. ``mask`` is ``None`` where all threads take
part, else bool ``[ctas, threads]``, never empty. What it needs of the state:

- ``state.read(operand, kind)``: an operand as an array ``[ctas, threads]``, ``kind`` as in PTX: ``"u32"``, ``"s64"``,
  ``"f32"``, ``"b16"``, ``"pred"``. Constants are broadcast, a register of another width than ``kind`` is refused.
  Arrays that are read must not be written to; results are new arrays.
- ``state.write(operand, values, mask)``: any type of the register's width. ``None`` (``_``) takes nothing.
- ``state.address(operand, bits)``: an :class:`~.parse.Address` as uint64 ``[ctas, threads]``.
- ``state.threads(mask)``: the threads as one-dimensional arrays, as ``state.shared`` and ``state.memory`` want them.
- ``state.spread(values, mask)``: the way back, one-dimensional values of these threads to ``[ctas, threads]``.
- ``state.hold(registers, reason)`` and ``state.release(registers)``: registers that an asynchronous
  operation still uses; who touches them faults.
- ``state.extra``: a dictionary for what only some architectures have; functions in its list ``"at_end"`` look at the
  state when the launch is over.
- :class:`Blocked`, for a handler whose threads wait for others.

Mistakes of the kernel are a :class:`~.memory.Fault`. A module of handlers has a constant ``HANDLERS`` from full opcode
to handler; :mod:`.table` joins them for an architecture.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from .memory import Array, Fault, Global, Shared, Threads, stamps
from .parse import Address, Immediate, Instruction, Kernel, Operand, Register, Special, Symbol

WARP = 32
MOST_INSTRUCTIONS = 2_000_000
"""After so many a launch counts as endless."""

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
}
"""NumPy's types for those of PTX."""

STORED = {1: np.dtype(np.bool_), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
"""Types of registers by their declared bits."""

Handler = Callable[["Machine", Instruction, Array | None], None]


class Blocked(Fault):
    """What the threads of an instruction wait for has not come; a fault where no other thread can go on.

    A handler raises it before it changes anything: it is called again.
    """


class UnknownOpcode(NotImplementedError):  # noqa: N818 - it names what is not known
    """An instruction that nobody has written a handler for."""


class Machine:
    """A launch.

    Attributes:
        kernel: The code.
        ctas: Programs.
        size: Threads of a program; a multiple of 32.
        shared: Shared memory.
        memory: Global memory.
        barriers: ``[ctas]``: barriers that each program has passed.
        alive: bool ``[ctas, threads]``: threads that have not returned.
        extra: State of an architecture's own units.
        executed: How often each full opcode was executed, whatever the number of threads.
        visited: Of each instruction whether some thread executed it.
        watch: Called before every instruction, with the threads that have come to it, whatever its guard says.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        size: int,
        arguments: Iterable[int],
        memory: Global,
        shared_bytes: int,
        handlers: Mapping[str, Handler],
        watch: Handler | None = None,
    ) -> None:
        self.kernel, self.grid, self.size, self.memory, self.handlers = kernel, grid, size, memory, handlers
        self.watch = watch
        self.ctas = int(np.prod(grid))
        self.warps = size // WARP
        self.shape = (self.ctas, size)
        self.variables, after = {}, 0
        for name, bytes_ in kernel.shared.items():
            self.variables[name] = after
            after += -(-bytes_ // 16) * 16
        self.shared = Shared(self.ctas, self.warps, after + shared_bytes)
        self.parameters = dict(zip(kernel.parameters, arguments, strict=True))
        self.registers: dict[str, Array] = {}
        self.undefined: dict[str, Array] = {}
        self.held: dict[str, str] = {}
        self.barriers = np.zeros(self.ctas, np.int64)
        self.alive = np.ones(self.shape, bool)
        self.extra: dict[str, Any] = {}
        self.executed: Counter[str] = Counter()
        self.visited = np.zeros(len(kernel.instructions), bool)
        self._constants: dict[tuple[int | str, str], Array] = {}
        self.at = 0

    # What handlers use.

    def read(self, operand: Operand | None, kind: str) -> Array:
        """An operand as ``[ctas, threads]`` of a type of PTX; not to be written to.

        Raises:
            Fault: A register that not all of these threads have written, or that is still in use.
            TypeError: The operand is no such thing.
        """
        if type(operand) is Register:
            array = self.registers.get(operand.name)
            if array is None:
                raise Fault("uninitialised register", operand.name)
            if operand.name in self.undefined:
                missing = self.undefined[operand.name]
                if (missing if self._mask is None else missing & self._mask).any():
                    raise Fault("uninitialised register", f"{operand.name} in some threads")
            if self.held and operand.name in self.held:
                raise Fault("register in use", f"{operand.name} is read, but {self.held[operand.name]}")
            dtype = DTYPES[kind]
            if array.dtype == dtype:
                return array
            if array.dtype.itemsize != dtype.itemsize or (kind == "pred") != (operand.bits == 1):
                raise TypeError(f"{operand.name} has {operand.bits} bits, read as {kind}")
            return array.view(dtype)
        if type(operand) is Immediate:
            key: tuple[int | str, str] = (operand.bits, kind)
            if key not in self._constants:
                self._constants[key] = np.full(self.shape, _constant(operand, kind))
            return self._constants[key]
        if type(operand) is Symbol and operand.name in self.variables:
            return np.full(self.shape, self.variables[operand.name], DTYPES[kind])
        if type(operand) is Special:
            return self.special(operand.name).astype(DTYPES[kind])
        raise TypeError(f"expected a register or a constant, got {operand}")

    def write(self, operand: Operand | None, values: Array, mask: Array | None) -> None:
        """Sets a register in the threads of ``mask`` to ``[ctas, threads]`` of any type of its width.

        Raises:
            Fault: The register is still in use.
        """
        if operand is None:
            return
        if type(operand) is not Register:
            raise TypeError(f"expected a register, got {operand}")
        name, dtype = operand.name, STORED[operand.bits]
        if values.dtype != dtype:
            if values.dtype.itemsize != dtype.itemsize or operand.bits == 1:
                raise TypeError(f"{name} has {operand.bits} bits, written with {values.dtype}")
            values = values.view(dtype)
        if self.held and name in self.held:
            raise Fault("register in use", f"{name} is written, but {self.held[name]}")
        if mask is None:
            self.registers[name] = values
            if self.undefined:
                self.undefined.pop(name, None)
            return
        before = self.registers.get(name)
        if before is None:
            self.registers[name] = np.where(mask, values, dtype.type(0))
            self.undefined[name] = self.alive & ~mask
            return
        self.registers[name] = np.where(mask, values, before)
        if name in self.undefined:
            left = self.undefined[name] & ~mask
            self.undefined[name] = left
            if not left.any():
                del self.undefined[name]

    def address(self, operand: Operand, bits: int = 64) -> Array:
        """Addresses of an :class:`~.parse.Address`, uint64 ``[ctas, threads]``; shared ones have 32 bits."""
        if type(operand) is not Address:
            raise TypeError(f"expected an address, got {operand}")
        base = self.read(operand.base, f"u{operand.base.bits if type(operand.base) is Register else bits}")
        return base.astype(np.uint64) + np.uint64(operand.offset & 0xFFFFFFFFFFFFFFFF)

    def threads(self, mask: Array | None) -> Threads:
        """The threads of a mask as one-dimensional arrays."""
        if mask is None:
            return self._everybody
        cta, thread = np.nonzero(mask)
        return Threads(cta, thread // WARP, mask)

    def spread(self, values: Array, mask: Array | None) -> Array:
        """Values of the threads of a mask, ``[n]``, as ``[ctas, threads]``."""
        if mask is None:
            return values.reshape(self.shape)
        result = np.zeros(self.shape, values.dtype)
        result[mask] = values
        return result

    def stamps(self, threads: Threads) -> Array:
        """Returns the stamps of threads, as :meth:`Global.load` and :meth:`Global.store` take them."""
        return stamps(threads, self.barriers)

    def hold(self, registers: Iterable[Register], reason: str) -> None:
        """Marks registers that an asynchronous operation uses: reading or writing them is a fault."""
        self.held.update((register.name, reason) for register in registers)

    def release(self, registers: Iterable[Register]) -> None:
        """Ends :meth:`hold`."""
        for register in registers:
            self.held.pop(register.name, None)

    def passes(self, instruction: Instruction, here: Array | None) -> bool:
        """Whether an instruction's guard lets any thread through of those that have come to it."""
        if instruction.guard is None:
            return True
        mask = self._guarded(instruction, here)
        return mask is None or bool(mask.any())

    def outcome(self, instruction: Instruction, here: Array | None) -> list[Array]:
        """What an instruction that only writes registers would leave in them; nothing is changed.

        Args:
            instruction: Not necessarily the one whose turn it is.
            here: The threads that have come to it.

        Returns:
            Each register of the destination, ``[n]`` of the threads that its guard lets through.
        """
        before = self._mask
        mask = here if instruction.guard is None else self._guarded(instruction, here)
        taken: list[Array] = []
        if mask is None or mask.any():
            names = [register.name for register in instruction.destinations]
            held = [(plane, name, plane.get(name)) for plane in (self.registers, self.undefined) for name in names]
            self._mask = mask
            try:
                if instruction.opcode not in self.handlers:
                    raise UnknownOpcode(instruction.opcode)
                self.handlers[instruction.opcode](self, instruction, mask)
                taken = [self.registers[name][... if mask is None else mask] for name in names]
            finally:
                for plane, name, value in held:
                    plane.pop(name, None)
                    plane.update({} if value is None else {name: value})
        self._mask = before
        return taken

    def special(self, name: str) -> Array:
        """A special register, uint32 ``[ctas, threads]``.

        Raises:
            UnknownOpcode: It is not known.
        """
        key = (name, "special")
        if key not in self._constants:
            self._constants[key] = np.broadcast_to(self._special(name), self.shape).astype(np.uint32)
        return self._constants[key]

    def _special(self, name: str) -> Array:
        thread, cta = np.arange(self.size)[None, :], np.arange(self.ctas)[:, None]
        x, y, z = self.grid
        known = {
            "%tid.x": thread,
            "%tid.y": thread * 0,
            "%tid.z": thread * 0,
            "%laneid": thread % WARP,
            "%warpid": thread // WARP,
            "%ntid.x": np.array(self.size),
            "%ctaid.x": cta % x,
            "%ctaid.y": cta // x % y,
            "%ctaid.z": cta // (x * y),
            "%nctaid.x": np.array(x),
            "%nctaid.y": np.array(y),
            "%nctaid.z": np.array(z),
            "%cluster_ctarank": cta * 0,
        }
        if name not in known:
            raise UnknownOpcode(f"special register {name}")
        return known[name]

    @cached_property
    def _everybody(self) -> Threads:
        cta, thread = np.nonzero(np.ones(self.shape, bool))
        return Threads(cta, thread // WARP, None)

    # Execution.

    def run(self, limit: int = MOST_INSTRUCTIONS) -> None:
        """Runs the launch to its end.

        Raises:
            Fault: The kernel does what it must not, or does not end within ``limit`` instructions.
            UnknownOpcode: An instruction has no handler.
        """
        with np.errstate(all="ignore"):
            self._run(limit)
        for check in self.extra.get("at_end", ()):
            check(self)

    def _run(self, limit: int) -> None:
        code, handlers = self.kernel.instructions, self.handlers
        here: Array | None = None
        waiting: list[tuple[int, Array]] = []
        blocked: dict[int, Array] = {}
        moved = False
        for _ in range(limit):
            instruction = code[self.at]
            if self.watch is not None:
                self._mask = here
                self.watch(self, instruction, here)
            mask = here if instruction.guard is None else self._guarded(instruction, here)
            self.executed[instruction.opcode] += 1
            self.visited[self.at] |= mask is None or bool(mask.any())
            base = instruction.opcode.partition(".")[0]
            following = self.at + 1
            try:
                if base == "bra":
                    following, here = self._branch(instruction, mask, here, waiting)
                elif base in ("ret", "exit"):
                    here = self._return(mask, here)
                elif mask is None or mask.any():
                    self._mask = mask
                    handler = handlers.get(instruction.opcode)
                    if handler is None:
                        raise UnknownOpcode(instruction.opcode)
                    handler(self, instruction, mask)
                moved = True
            except Fault as fault:
                if not isinstance(fault, Blocked) or here is None or not (moved or self._free(waiting, blocked)):
                    fault.args = (f"{fault.args[0]}; {instruction.opcode} of {instruction.source}",)
                    raise
                blocked[self.at], following = here, self.at
            if here is not None and not here.any():
                if not waiting:
                    return
                following, here = waiting.pop()
            if waiting:
                assert here is not None
                if not self._free([(following, here), *waiting], blocked):
                    blocked, moved = {}, False  # something may have come since
                following, here = self._next(following, here, waiting, blocked)
            self.at = following
        raise Fault("no end", f"{limit} instructions and no end")

    _mask: Array | None = None

    def _guarded(self, instruction: Instruction, here: Array | None) -> Array | None:
        self._mask = here
        guard = self.read(instruction.guard, "pred")
        mask = ~guard if instruction.negated else guard
        if here is not None:
            return mask & here
        return None if mask.all() else mask

    def _branch(
        self, instruction: Instruction, mask: Array | None, here: Array | None, waiting: list[tuple[int, Array]]
    ) -> tuple[int, Array | None]:
        (target,) = instruction.operands
        assert isinstance(target, Symbol)
        to = self.kernel.labels[target.name]
        if mask is None or instruction.guard is None:
            return to, here
        stay = ~mask if here is None else here & ~mask
        if not stay.any():
            return to, here
        if mask.any():
            waiting.append((to, mask))
            return self.at + 1, stay
        return self.at + 1, here

    def _next(
        self, at: int, here: Array | None, waiting: list[tuple[int, Array]], blocked: dict[int, Array]
    ) -> tuple[int, Array | None]:
        """Returns the smallest instruction at which threads can go on, and these threads."""
        assert here is not None
        groups = [(at, here), *waiting]
        first = min(self._free(groups, blocked))
        joined = np.logical_or.reduce([mask for place, mask in groups if place == first])
        waiting[:] = [group for group in groups if group[0] != first]
        return first, None if joined.all() else joined

    def _free(self, groups: list[tuple[int, Array]], blocked: dict[int, Array]) -> set[int]:
        """Returns where the threads are that can go on, which are those that were not blocked there."""
        free = {place for place, _ in groups} - blocked.keys()
        for place, before in blocked.items():
            if any(place == other and (mask & ~before).any() for other, mask in groups):
                free.add(place)
        return free

    def _return(self, mask: Array | None, here: Array | None) -> Array:
        gone = self.alive if mask is None else mask
        left = self.alive & ~gone if here is None else here & ~gone
        self.alive = self.alive & ~gone
        return left

    def barrier(self, mask: Array | None) -> None:
        """A barrier of all threads of each program that takes part.

        Raises:
            Blocked: Some of a program's threads are elsewhere.
        """
        if mask is None:
            arrived: Array = np.ones(self.ctas, bool)
        else:
            arrived = np.asarray(mask.any(1))
            apart = arrived & (mask != self.alive).any(1)
            if apart.any():
                which = np.flatnonzero(apart)[0]
                raise Blocked("divergence", f"a barrier that not all threads of program {which} reach")
        self.barriers[arrived] += 1
        self.shared.barrier(arrived)


def _constant(operand: Immediate, kind: str) -> np.generic:
    dtype = DTYPES[kind]
    if kind == "pred":
        return np.bool_(operand.bits)
    bits = dtype.itemsize * 8
    if operand.floating and operand.floating != bits:
        raise TypeError(f"a constant of {operand.floating} bits, read as {kind}")
    return np.array(operand.bits & ((1 << bits) - 1), np.dtype(f"u{dtype.itemsize}")).view(dtype)[()]
