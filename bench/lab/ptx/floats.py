"""Floating point: what its instructions do, with their rounding.

Addition, multiplication and conversions round as PTX says. ``fma`` rounds once. Instructions that PTX leaves a few
units of error (``ex2.approx``, ``rcp.approx``, ``div.full``, ...) are computed in float64 and rounded once here: their
device has its own last bits. ``add`` and ``mul`` without ``.rn`` may be joined by the assembler; here they never are.
"""

import operator
from collections.abc import Callable

import numpy as np

from .integers import COMPARE, comparisons, element_wise
from .machine import Handler
from .memory import Array

TINY = np.float32(2.0**-126)


def bfloat16(x: Array) -> Array:
    """float32 to the bits of bfloat16, rounded to nearest, ties to even; NaN is 0x7FFF."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def half(x: Array) -> Array:
    """float32 to the bits of float16, rounded to nearest, ties to even; NaN is 0x7FFF."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def from_bfloat16(bits: Array) -> Array:
    """The bits of bfloat16 (uint16) as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_half(bits: Array) -> Array:
    """The bits of float16 (uint16) as float32, exactly."""
    return bits.view(np.float16).astype(np.float32)


def from_tf32(bits: Array) -> Array:
    """Returns what a tensor core reads of 32 bits as TF32, which ignores the low 13."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there, so that the second rounding, to float32, is right:
    53 bits are more than 24 + 2.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    if (lost != 0).any():
        even = (total.view(np.int64) & 1) == 0
        nudge = (lost != 0) & even & np.isfinite(total)
        toward = np.where(lost > 0, np.inf, -np.inf)
        total = np.where(nudge, np.nextafter(total, toward), total)
    return total.astype(np.float32)


def _flush(x: Array) -> Array:
    """Replaces subnormal numbers by zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def _flushed(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands: _flush(function(*map(_flush, operands)))


def _exactly(function: Callable[..., Array]) -> Callable[..., Array]:
    """Returns a function that computes in float64 and rounds once."""
    return lambda *operands: function(*(x.astype(np.float64) for x in operands)).astype(np.float32)


def _halves(function: Callable[..., Array], unpack: Callable[[Array], Array]) -> Callable[..., Array]:
    """Returns a function that works on both halves of a register: of 64 bits or of 32."""

    def both(*operands: Array) -> Array:
        width = operands[0].dtype.itemsize // 2
        parts = [np.ascontiguousarray(x)[..., None].view(f"u{width}") for x in operands]
        result = function(*map(unpack, parts))
        return np.ascontiguousarray(result).view(operands[0].dtype)[..., 0]

    return both


def _pack(function: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Returns a function that puts two results of 16 bits into a register, the first into the upper half."""
    return lambda high, low: (function(high).astype(np.uint32) << 16) | function(low)


def _tf32(x: Array) -> Array:
    """Rounds to the nearest TF32, ties away from zero; the low 13 bits become zero."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def _to_integer(dtype: str) -> Callable[[Array], Array]:
    limits = np.iinfo(dtype)

    def function(x: Array) -> Array:
        whole = np.clip(np.trunc(x.astype(np.float64)), limits.min, limits.max)
        return np.where(np.isnan(x), 0, whole).astype(dtype)

    return function


def _handlers() -> dict[str, Handler]:
    def unordered(test: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
        return lambda a, b: test(a, b) | np.isnan(a) | np.isnan(b)

    def ordered(test: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
        return lambda a, b: test(a, b) & ~np.isnan(a) & ~np.isnan(b)

    tests = {name: ordered(test) for name, test in COMPARE.items()}
    tests |= {f"{name}u": unordered(test) for name, test in COMPARE.items()}
    tests["num"], tests["nan"] = (
        lambda a, b: ~(np.isnan(a) | np.isnan(b)),
        lambda a, b: np.isnan(a) | np.isnan(b),
    )
    table = comparisons(("f32",), tests)
    one, two, three = "f32", "f32 f32", "f32 f32 f32"
    arithmetic: dict[str, tuple[str, Callable[..., Array]]] = {
        "add": (two, operator.add),
        "sub": (two, operator.sub),
        "mul": (two, operator.mul),
        "add.rn": (two, operator.add),
        "sub.rn": (two, operator.sub),
        "mul.rn": (two, operator.mul),
        "fma.rn": (three, fma),
        "min": (two, np.fmin),
        "max": (two, np.fmax),
        "div.rn": (two, operator.truediv),
        "div.full": (two, operator.truediv),
        "neg": (one, operator.neg),
        "abs": (one, np.abs),
        "ex2.approx": (one, _exactly(np.exp2)),
        "lg2.approx": (one, _exactly(np.log2)),
        "rcp.approx": (one, _exactly(lambda x: 1 / x)),
        "rcp.rn": (one, _exactly(lambda x: 1 / x)),
        "sqrt.approx": (one, np.sqrt),
        "sqrt.rn": (one, np.sqrt),
        "rsqrt.approx": (one, _exactly(lambda x: 1 / np.sqrt(x))),
        "tanh.approx": (one, _exactly(np.tanh)),
    }
    for name, (kinds, function) in arithmetic.items():
        table[f"{name}.f32"] = element_wise("f32", kinds, function)
        table[f"{name}.ftz.f32"] = element_wise("f32", kinds, _flushed(function))
        if name in ("add", "sub", "mul", "add.rn", "sub.rn", "mul.rn", "fma.rn"):
            pairs = " ".join(["b64"] * len(kinds.split()))
            table[f"{name}.f32x2"] = element_wise("b64", pairs, _halves(function, lambda x: x.view(np.float32)))
    table["max.NaN.f32"] = element_wise("f32", two, np.maximum)
    table["min.NaN.f32"] = element_wise("f32", two, np.minimum)
    table["copysign.f32"] = element_wise("f32", two, lambda sign, x: np.copysign(x, sign))
    for name, pack, unpack in (("bf16", bfloat16, from_bfloat16), ("f16", half, from_half)):
        table[f"cvt.rn.{name}.f32"] = element_wise("b16", "f32", pack)
        table[f"cvt.rn.{name}x2.f32"] = element_wise("b32", two, _pack(pack))
        table[f"cvt.f32.{name}"] = element_wise("f32", "b16", unpack)
        # Mixed precision: a 16-bit operand, added to or subtracted from a float32 without being rounded before.
        table[f"add.rn.f32.{name}"] = element_wise("f32", "b16 f32", lambda a, c, unpack=unpack: unpack(a) + c)
        table[f"add.f32.{name}"] = table[f"add.rn.f32.{name}"]
        table[f"fma.rn.f32.{name}"] = element_wise(
            "f32", "b16 b16 f32", lambda a, b, c, unpack=unpack: fma(unpack(a), unpack(b), c)
        )
        for word in ("neg", "abs"):
            change = operator.neg if word == "neg" else np.abs
            table[f"{word}.{name}"] = element_wise(
                "b16", "b16", lambda a, pack=pack, unpack=unpack, change=change: pack(change(unpack(a)))
            )
    table["cvt.rna.tf32.f32"] = element_wise("b32", "f32", _tf32)
    for kind, dtype in (("s32", "i4"), ("u32", "u4"), ("s64", "i8"), ("u64", "u8")):
        table[f"cvt.rn.f32.{kind}"] = element_wise("f32", kind, lambda x: x.astype(np.float32))
        table[f"cvt.rzi.{kind}.f32"] = element_wise(kind, "f32", _to_integer(dtype))
    return table


HANDLERS = _handlers()
"""From full opcode to handler."""
