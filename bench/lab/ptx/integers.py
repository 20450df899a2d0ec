"""Integers, bits and predicates: what their instructions do."""

import operator
from collections.abc import Callable

import numpy as np

from .machine import DTYPES, Handler, Machine
from .memory import Array
from .parse import Immediate, Instruction, Operand, Register

SIGNED, UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")
INTEGERS = (*SIGNED, *UNSIGNED)
BITS = ("b16", "b32", "b64")


def element_wise(result: str, sources: str, function: Callable[..., Array]) -> Handler:
    """A handler that computes each thread's result from its operands.

    Args:
        result: Type of the result, as ``"s32"``.
        sources: Types of the operands, separated by spaces.
        function: On arrays of those types.
    """
    kinds, dtype = sources.split(), DTYPES[result]

    def handler(state: Machine, instruction: Instruction, mask: Array | None) -> None:
        destination, *operands = instruction.operands
        values = function(*(state.read(o, kind) for o, kind in zip(operands, kinds, strict=True)))
        state.write(destination, values.astype(dtype, copy=False), mask)

    return handler


def narrowed(state: Machine, operand: Operand | None, kind: str) -> Array:
    """The low bits of a register that may be wider than the type."""
    dtype = DTYPES[kind]
    if isinstance(operand, Register) and operand.bits > dtype.itemsize * 8:
        return state.read(operand, f"u{operand.bits}").astype(np.dtype(f"u{dtype.itemsize}")).view(dtype)
    return state.read(operand, kind)


def widened(state: Machine, operand: Operand | None, values: Array, mask: Array | None) -> None:
    """Writes to a register that may be wider than the type: signed values keep their sign."""
    if isinstance(operand, Register) and operand.bits > values.dtype.itemsize * 8:
        kind = "i" if values.dtype.kind == "i" else "u"
        values = values.view(f"{kind}{values.dtype.itemsize}").astype(f"{kind}{operand.bits // 8}")
    state.write(operand, values, mask)


def _convert(result: str, source: str) -> Handler:
    def handler(state: Machine, instruction: Instruction, mask: Array | None) -> None:
        destination, operand = instruction.operands
        widened(state, destination, narrowed(state, operand, source).astype(DTYPES[result]), mask)

    return handler


def _double(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def _wide(kind: str) -> Callable[[Array, Array], Array]:
    dtype = DTYPES[_double(kind)]
    return lambda a, b: a.astype(dtype) * b.astype(dtype)


def _high(kind: str) -> Callable[[Array, Array], Array]:
    bits = int(kind[1:])
    product = _wide(kind)
    return lambda a, b: product(a, b) >> bits


def _quotient(a: Array, b: Array) -> Array:
    """Division that rounds to zero; PTX does not say what a division by zero gives: all ones here."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    down = a // safe
    remainder = a - down * safe
    toward_zero = down + ((remainder != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), toward_zero)


def _left(a: Array, amount: Array) -> Array:
    bits = a.dtype.itemsize * 8
    moved = a << np.minimum(amount, bits - 1).astype(a.dtype)
    return np.where(amount < bits, moved, a.dtype.type(0))


def _right(a: Array, amount: Array) -> Array:
    bits = a.dtype.itemsize * 8
    if a.dtype.kind == "i":
        return a >> np.minimum(amount, bits - 1).astype(a.dtype)
    return np.where(amount < bits, a >> np.minimum(amount, bits - 1).astype(a.dtype), a.dtype.type(0))


def _extract(kind: str) -> Callable[[Array, Array, Array], Array]:
    bits, signed = int(kind[1:]), kind[0] == "s"

    def function(a: Array, position: Array, length: Array) -> Array:
        position, length = (np.minimum(x & 0xFF, bits) for x in (position, length))
        raw = a.view(f"u{bits // 8}")
        field = _right(raw, position) & (_left(raw.dtype.type(1), length) - raw.dtype.type(1))
        if not signed:
            return np.where(length == 0, raw.dtype.type(0), field)
        # The sign is the field's top bit, or the register's where the field reaches over its end.
        top = np.minimum(position + length - 1, bits - 1)
        sign = (_right(raw, top) & raw.dtype.type(1)).astype(bool)
        fill = np.where(sign, ~(_left(raw.dtype.type(1), np.minimum(length, bits - position)) - raw.dtype.type(1)), 0)
        return np.where(length == 0, raw.dtype.type(0), field | fill.astype(raw.dtype)).view(a.dtype)

    return function


def _insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    bits = a.dtype.itemsize * 8
    position, length = position & 0xFF, np.minimum(length & 0xFF, bits)
    field = _left(_left(a.dtype.type(1), length) - a.dtype.type(1), position)
    return (b & ~field) | (_left(a, position) & field)


def _permute(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    """``prmt``: each byte of the result is one of the operands' eight, or that one's sign."""
    destination, a, b, selector = instruction.operands
    nibbles = (state.read(selector, "u32")[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 0xF
    # The compiler leaves an operand undefined of which no byte is taken.
    taken = [not isinstance(selector, Immediate) or bool(((nibbles & 7) // 4 == i).any()) for i in (0, 1)]
    words = [
        state.read(o, "b32") if some else np.zeros(state.shape, np.uint32)
        for o, some in zip((a, b), taken, strict=True)
    ]
    both = np.stack(words, -1).view(np.uint8)  # [..., 8]
    chosen = np.take_along_axis(both, (nibbles & 7).astype(np.intp), -1)
    signs = np.where(chosen & 0x80, np.uint8(0xFF), np.uint8(0))
    result = np.ascontiguousarray(np.where(nibbles & 8, signs, chosen)).view(np.uint32)[..., 0]
    state.write(destination, result, mask)


def _lookup(state: Machine, instruction: Instruction, mask: Array | None) -> None:
    """``lop3``: a function of three bits by its table."""
    destination, *sources, last = instruction.operands
    a, b, c = (state.read(source, "b32") for source in sources)
    table = int(state.read(last, "u32").flat[0])
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    state.write(destination, result, mask)


def _choose(a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, a, b)


def _funnel(left: bool, wrap: bool) -> Callable[[Array, Array, Array], Array]:
    def function(low: Array, high: Array, amount: Array) -> Array:
        amount = (amount & 31 if wrap else np.minimum(amount, 32)).astype(np.uint64)
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        moved = (both << amount) >> np.uint64(32) if left else both >> amount
        return moved.astype(np.uint32)

    return function


def _multiply_add(kind: str) -> Callable[[Array, Array, Array], Array]:
    product = _wide(kind)
    return lambda a, b, c: product(a, b) + c


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
LOGIC: dict[str, Callable[[Array, Array], Array]] = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def comparisons(kinds: tuple[str, ...], tests: dict[str, Callable[[Array, Array], Array]]) -> dict[str, Handler]:
    """``setp`` of some types, alone and joined with another predicate."""
    handlers = {}
    for kind in kinds:
        for name, test in tests.items():
            handlers[f"setp.{name}.{kind}"] = element_wise("pred", f"{kind} {kind}", test)
            for word, join in LOGIC.items():
                handlers[f"setp.{name}.{word}.{kind}"] = element_wise(
                    "pred",
                    f"{kind} {kind} pred",
                    lambda a, b, c, test=test, join=join: join(test(a, b), c),
                )
    return handlers


def _handlers() -> dict[str, Handler]:
    table = comparisons((*INTEGERS, *UNSIGNED), COMPARE)
    table |= comparisons(BITS, {name: COMPARE[name] for name in ("eq", "ne")})
    table |= comparisons(UNSIGNED, {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge})
    for kind in INTEGERS:
        pair, triple = f"{kind} {kind}", f"{kind} {kind} {kind}"
        table[f"add.{kind}"] = element_wise(kind, pair, operator.add)
        table[f"sub.{kind}"] = element_wise(kind, pair, operator.sub)
        table[f"mul.lo.{kind}"] = element_wise(kind, pair, operator.mul)
        table[f"mad.lo.{kind}"] = element_wise(kind, triple, lambda a, b, c: a * b + c)
        table[f"min.{kind}"] = element_wise(kind, pair, np.minimum)
        table[f"max.{kind}"] = element_wise(kind, pair, np.maximum)
        table[f"div.{kind}"] = element_wise(kind, pair, _quotient)
        table[f"rem.{kind}"] = element_wise(kind, pair, lambda a, b: a - _quotient(a, b) * b)
        table[f"shr.{kind}"] = element_wise(kind, f"{kind} u32", _right)
        if kind[1:] != "64":
            table[f"mul.wide.{kind}"] = element_wise(_double(kind), pair, _wide(kind))
            table[f"mul.hi.{kind}"] = element_wise(kind, pair, _high(kind))
            wide = _double(kind)
            table[f"mad.wide.{kind}"] = element_wise(wide, f"{kind} {kind} {wide}", _multiply_add(kind))
        if kind[1:] != "16":
            table[f"bfe.{kind}"] = element_wise(kind, f"{kind} u32 u32", _extract(kind))
    for kind in SIGNED:
        table[f"neg.{kind}"] = element_wise(kind, kind, operator.neg)
        table[f"abs.{kind}"] = element_wise(kind, kind, np.abs)
    for kind in (*BITS, "pred"):
        for word, join in LOGIC.items():
            table[f"{word}.{kind}"] = element_wise(kind, f"{kind} {kind}", join)
        table[f"not.{kind}"] = element_wise(kind, kind, operator.invert)
    for kind in BITS:
        table[f"shl.{kind}"] = element_wise(kind, f"{kind} u32", _left)
        table[f"shr.{kind}"] = element_wise(kind, f"{kind} u32", _right)
        if kind != "b16":
            table[f"bfi.{kind}"] = element_wise(kind, f"{kind} {kind} u32 u32", _insert)
    for kind in (*INTEGERS, *BITS, "f32", "f64"):
        table[f"selp.{kind}"] = element_wise(kind, f"{kind} {kind} pred", _choose)
    small = tuple(f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64))
    for result in small:
        for source in small:
            table[f"cvt.{result}.{source}"] = _convert(result, source)
    for side in "lr":
        for mode in ("wrap", "clamp"):
            table[f"shf.{side}.{mode}.b32"] = element_wise("b32", "b32 b32 u32", _funnel(side == "l", mode == "wrap"))
    table["prmt.b32"] = _permute
    table["lop3.b32"] = _lookup
    table["popc.b32"] = element_wise("u32", "b32", lambda a: _count(a, np.add))
    return table


def _count(a: Array, add: np.ufunc) -> Array:
    return add.reduce(np.unpackbits(np.ascontiguousarray(a)[..., None].view(np.uint8), axis=-1), -1, dtype=np.uint32)


HANDLERS = _handlers()
"""From full opcode to handler."""
