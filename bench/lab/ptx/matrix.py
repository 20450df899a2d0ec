"""Matrices in registers: ``ldmatrix``, ``mma.sync`` and ``mma.sp``.

A tensor core does not say how it adds up: here products and sums are exact in float64 and rounded once to float32,
which is the same wherever all partial sums are representable, as those of small integers are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import fragments
from .floats import from_bfloat16, from_half, from_tf32
from .machine import WARP, Handler, Machine
from .memory import Array, Fault
from .movement import parts
from .parse import Immediate, Instruction, Operand


@dataclass(frozen=True)
class Warps:
    """The warps that take part in an instruction of whole warps.

    Attributes:
        cta: Number of each one's program, ``[n]``.
        warp: Number of each one within its program, ``[n]``.
        mask: As of the handler.
    """

    cta: Array
    warp: Array
    mask: Array | None

    def values(self, state: Machine, operand: Operand | None) -> Array:
        """A vector of 32-bit registers, uint32 ``[n, 32, registers]``."""
        shape = (state.ctas, state.warps, WARP)
        return np.stack([state.read(p, "b32").reshape(shape)[self.cta, self.warp] for p in parts(operand)], -1)

    def write(self, state: Machine, operand: Operand | None, values: Array) -> None:
        """Writes such a vector; ``values`` are of any type of 32 bits."""
        whole = np.zeros((state.ctas, state.warps, WARP), values.dtype)
        for i, register in enumerate(parts(operand)):
            whole = np.zeros_like(whole)
            whole[self.cta, self.warp] = values[..., i]
            state.write(register, whole.reshape(state.shape), self.mask)


def whole_warps(state: Machine, mask: Array | None) -> Warps:
    """The warps of a mask.

    Raises:
        Fault: Of a warp only some threads take part.
    """
    active: Array = np.ones((state.ctas, state.warps), bool)
    if mask is not None:
        lanes = mask.reshape(state.ctas, state.warps, WARP)
        active = np.asarray(lanes.any(-1))
        if (active != lanes.all(-1)).any():
            raise Fault("divergence", "an instruction of whole warps, and only some threads of one take part")
    cta, warp = np.nonzero(active)
    return Warps(cta, warp, mask)


def _load_matrices(count: int, transposed: bool) -> Handler:
    giver, column = fragments.ldmatrix(count, transposed)

    def handler(state: Machine, instruction: Instruction, mask: Array | None) -> None:
        destination, source = instruction.operands
        warps, rows = whole_warps(state, mask), 8 * count
        addresses = state.address(source, 32).reshape(state.ctas, state.warps, WARP)[warps.cta, warps.warp, :rows]
        raw = state.shared.load(np.repeat(warps.cta, rows), np.repeat(warps.warp, rows), addresses.reshape(-1), 16)
        elements = raw.view(np.uint16).reshape(-1, rows, 8)[:, giver, column]  # [warps, 32, 2 * count]
        warps.write(state, destination, np.ascontiguousarray(elements).view(np.uint32))

    return handler


def _elements(registers: Array, itemsize: int) -> Array:
    return np.ascontiguousarray(registers).view(f"u{itemsize}")


def _matrix(elements: Array, places: fragments.Places, shape: tuple[int, int]) -> Array:
    """The matrices ``[warps, *shape]`` whose fragments are ``elements[warps, 32, n]``."""
    rows, columns = places
    result = np.zeros((len(elements), *shape), elements.dtype)
    result[:, rows, columns] = elements
    return result


def _accumulated(a: Array, b: Array, c: Array) -> Array:
    """``a @ b + c``, exact for small integers, else rounded by float64 and then by float32."""
    return (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)


def _finish(state: Machine, warps: Warps, destination: Operand, a: Array, b: Array, c: Operand) -> None:
    rows, columns = fragments.mma_c(16, 8)
    before = _matrix(warps.values(state, c).view(np.float32), (rows, columns), (16, 8))
    warps.write(state, destination, _accumulated(a, b, before)[:, rows, columns])


def _multiply(k: int, itemsize: int, value: Callable[[Array], Array]) -> Handler:
    places_a, places_b = fragments.mma_a(16, k, itemsize), fragments.mma_b(k, 8, itemsize)

    def handler(state: Machine, instruction: Instruction, mask: Array | None) -> None:
        destination, a, b, c = instruction.operands
        warps = whole_warps(state, mask)
        left = _matrix(_elements(warps.values(state, a), itemsize), places_a, (16, k))
        right = _matrix(_elements(warps.values(state, b), itemsize), places_b, (k, 8))
        _finish(state, warps, destination, value(left), value(right), c)

    return handler


def _multiply_sparse(k: int, value: Callable[[Array], Array]) -> Handler:
    places_a, places_b = fragments.mma_a(16, k // 2, 2), fragments.mma_b(k, 8, 2)

    def handler(state: Machine, instruction: Instruction, mask: Array | None) -> None:
        destination, a, b, c, metadata, selector = instruction.operands
        assert isinstance(selector, Immediate)
        warps = whole_warps(state, mask)
        kept = _matrix(_elements(warps.values(state, a), 2), places_a, (16, k // 2))
        right = _matrix(_elements(warps.values(state, b), 2), places_b, (k, 8))
        lanes, bits = fragments.mma_sp_metadata(k, selector.bits)
        words = warps.values(state, metadata)[:, lanes, 0] >> bits.astype(np.uint32)  # [warps, 16, k / 4]
        first, second = words & 3, words >> 2 & 3
        if (first >= second).any():
            raise Fault("metadata", "the places of two values are not in order, as ordered_metadata wants them")
        left = np.zeros((len(kept), 16, k // 4, 4), np.uint16)
        for place, values in ((first, kept[:, :, ::2]), (second, kept[:, :, 1::2])):
            np.put_along_axis(left, place[..., None].astype(np.intp), values[..., None], -1)
        _finish(state, warps, destination, value(left.reshape(-1, 16, k)), value(right), c)

    return handler


def _handlers() -> dict[str, Handler]:
    table = {
        f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16": _load_matrices(count, trans)
        for count in (1, 2, 4)
        for trans in (False, True)
    }
    for name, value in (("bf16", from_bfloat16), ("f16", from_half)):
        types = f"row.col.f32.{name}.{name}.f32"
        for k in (8, 16):
            table[f"mma.sync.aligned.m16n8k{k}.{types}"] = _multiply(k, 2, value)
        for k in (16, 32):
            table[f"mma.sp::ordered_metadata.sync.aligned.m16n8k{k}.{types}"] = _multiply_sparse(k, value)
    for k in (4, 8):
        table[f"mma.sync.aligned.m16n8k{k}.row.col.f32.tf32.tf32.f32"] = _multiply(k, 4, from_tf32)
    return table


HANDLERS = _handlers()
"""From full opcode to handler."""
