"""What the instructions compute, against Python's integers and fractions and against PyTorch's conversions."""

import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx_text import THREADS, run_on_words

SPECIAL = (0, 1, 2, 3, 31, 32, 33, 0x7F, 0x80, 0xFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF)


def words(seed: int) -> np.ndarray:
    """Sixty-four words: corners and random ones."""
    drawn = np.random.default_rng(seed).integers(0, 1 << 32, THREADS, dtype=np.uint32)
    drawn[: len(SPECIAL)] = np.roll(SPECIAL, seed)
    return drawn


def compute(instructions: str, *operands: np.ndarray) -> np.ndarray:
    """Runs instructions on operands in %r10, %r11, ... of each thread; the result is in %r30."""
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%rd3+{4 * THREADS * i}];\n" for i in range(len(operands)))
    return run_on_words(f"{loads}{instructions}\nst.global.b32 [%rd4], %r30;", np.concatenate(operands))


def signed(x: int, bits: int = 32) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bfe(a: int, position: int, length: int, sign: bool) -> int:
    """As the ISA's pseudocode says."""
    position, length = position & 0xFF, length & 0xFF
    if length == 0:
        return 0
    top = a >> min(position + length - 1, 31) & 1 if sign else 0
    bits = (a >> (position + i) & 1 if i < length and position + i < 32 else top for i in range(32))
    return sum(bit << i for i, bit in enumerate(bits))


def bfi(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 0xFF, length & 0xFF
    for i in range(length):
        if position + i < 32:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


def prmt(a: int, b: int, selector: int) -> int:
    both, result = a | b << 32, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 0xFF
        result |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << 8 * i
    return result


TWO: dict[str, Callable[[int, int], int]] = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "div.s32": lambda a, b: quotient(signed(a), signed(b)) if b else -1,
    "rem.s32": lambda a, b: signed(a) - quotient(signed(a), signed(b)) * signed(b) if b else signed(a),
    "div.u32": lambda a, b: a // b if b else -1,
    "rem.u32": lambda a, b: a % b if b else a,
}


@pytest.mark.parametrize("opcode", TWO)
def test_integers(opcode: str) -> None:
    a, b = words(1), words(6)
    b[40:] &= 31
    if opcode.startswith(("div", "rem")):
        # What a division by zero gives is nobody's to say.
        b[b == 0] = 7
        a, b = np.where((a == 0x80000000) & (b == 0xFFFFFFFF), 5, a).astype(np.uint32), b
    want = [TWO[opcode](int(x), int(y)) & 0xFFFFFFFF for x, y in zip(a, b, strict=True)]
    assert compute(f"{opcode} %r30, %r10, %r11;", a, b).tolist() == want


@pytest.mark.parametrize(
    ("instruction", "want"),
    (
        ("mad.lo.s32 %r30, %r10, %r11, %r12;", lambda a, b, c: a * b + c),
        ("bfe.u32 %r30, %r10, %r11, %r12;", lambda a, b, c: bfe(a, b, c, False)),
        ("bfe.s32 %r30, %r10, %r11, %r12;", lambda a, b, c: bfe(a, b, c, True)),
        ("bfi.b32 %r30, %r10, %r13, %r11, %r12;", lambda a, b, c: bfi(a, 0xCAFEF00D, b, c)),
        ("prmt.b32 %r30, %r10, %r11, %r12;", prmt),
        ("prmt.b32 %r30, %r10, 0, 0x7771U;", lambda a, b, c: prmt(a, 0, 0x7771)),
        ("lop3.b32 %r30, %r10, %r11, %r12, 0xCA;", lambda a, b, c: a & b | ~a & c),
        ("shf.l.wrap.b32 %r30, %r10, %r11, %r12;", lambda a, b, c: (a | b << 32) << (c & 31) >> 32),
        ("shf.r.wrap.b32 %r30, %r10, %r11, %r12;", lambda a, b, c: (a | b << 32) >> (c & 31)),
        ("shf.r.clamp.b32 %r30, %r10, %r11, %r12;", lambda a, b, c: (a | b << 32) >> min(c, 32)),
        (
            "setp.lt.s32 %p1, %r10, %r11; selp.b32 %r30, %r10, %r12, %p1;",
            lambda a, b, c: a if signed(a) < signed(b) else c,
        ),
        ("setp.hi.u32 %p1, %r10, %r11; selp.b32 %r30, 1, 0, %p1;", lambda a, b, c: a > b),
        ("mul.wide.s32 %rd9, %r10, %r11; mov.b64 {_, %r30}, %rd9;", lambda a, b, c: signed(a) * signed(b) >> 32),
        ("mul.wide.u32 %rd9, %r10, %r11; shr.u64 %rd9, %rd9, 20; cvt.u32.u64 %r30, %rd9;", lambda a, b, c: a * b >> 20),
        ("cvt.s64.s32 %rd9, %r10; shr.s64 %rd9, %rd9, 8; cvt.u32.u64 %r30, %rd9;", lambda a, b, c: signed(a) >> 8),
        (
            "cvt.u16.u32 %rs1, %r10; cvt.s16.s8 %rs2, %rs1; cvt.u32.u16 %r30, %rs2;",
            lambda a, b, c: signed(a, 8) & 0xFFFF,
        ),
        ("cvt.u16.u32 %rs1, %r10; mul.wide.u16 %r30, %rs1, %rs1;", lambda a, b, c: (a & 0xFFFF) ** 2),
        ("popc.b32 %r30, %r10;", lambda a, b, c: bin(a).count("1")),
    ),
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else "",
)
def test_bits(instruction: str, want: Callable[[int, int, int], int]) -> None:
    a, b, c = words(2), words(7), words(12)
    c[32:48] &= 31
    b[24:56] &= 31
    got = compute(f"mov.b32 %r13, 0xCAFEF00D;\n{instruction.replace('; ', ';' + chr(10))}", a, b, c)
    assert got.tolist() == [want(*map(int, x)) & 0xFFFFFFFF for x in zip(a, b, c, strict=True)]


# Floating point.


def floats(seed: int) -> np.ndarray:
    """Random bits: every exponent, subnormal numbers, infinities and NaN among them."""
    drawn = words(seed)
    drawn[48:] = np.random.default_rng(seed).normal(size=16).astype(np.float32).view(np.uint32)
    return drawn


def rounded(x: Fraction, bits: int = 24, least: int = -149) -> float:
    """The nearest number of so many bits, ties to even, that float32 can hold."""
    if x == 0:
        return 0.0
    exponent = max(len(bin(abs(x.numerator))) - len(bin(x.denominator)) - bits, least)
    while abs(x) / Fraction(2) ** exponent >= 1 << bits:
        exponent += 1
    return float(round(x / Fraction(2) ** exponent) * Fraction(2) ** exponent)  # round() takes ties to even


def as_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", int(bits)))[0]


@pytest.mark.parametrize("opcode", ("fma.rn.f32", "fma.rn.f32x2"))
def test_fma_rounds_once(opcode: str) -> None:
    """Random exponents close to each other, and sums a hair beside a tie that a rounding in float64 would lose."""
    random = np.random.default_rng(3)
    a, b, c = (
        (random.normal(size=THREADS) * 2.0 ** random.integers(-4, 4, THREADS)).astype(np.float32) for _ in range(3)
    )
    # 1 + 2**-24 is a tie between 1 and 1 + 2**-23; 2**-90 beside it decides, and is lost to 53 bits.
    a[:4] = [1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60, -(2.0**-60)]
    b[:4] = [1 + 2.0**-12, -1 - 2.0**-12, 2.0**-30, 2.0**-30]
    c[:4] = [2.0**-70, -(2.0**-70), 1.0, 1.0]
    c[4:8], a[4:8], b[4:8] = np.float32(2.0**24 + 2), [1, 3, -1, 5], np.float32(1 + 2.0**-23)
    single = "mov.b64 %rd10, {%r10, %r10}; mov.b64 %rd11, {%r11, %r11}; mov.b64 %rd12, {%r12, %r12}; "
    single += "fma.rn.f32x2 %rd9, %rd10, %rd11, %rd12; mov.b64 {_, %r30}, %rd9;"
    body = f"{opcode} %r30, %r10, %r11, %r12;" if opcode == "fma.rn.f32" else single.replace("; ", ";\n")
    got = compute(body, *(x.view(np.uint32) for x in (a, b, c))).view(np.float32)
    want = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c, strict=True)
    ]
    assert got.tolist() == want


def test_fma_against_a_double_rounding() -> None:
    """A case in which float64 in between gives another number: proves that the test above can fail."""
    a, b, c = np.float32(2.0**-60), np.float32(2.0**-30), np.float32(1 + 2.0**-23)
    halfway = [np.float32(1 + 2.0**-12), np.float32(1 + 2.0**-12)]
    twice = np.float32(np.float64(halfway[0]) * np.float64(halfway[1]) + np.float64(2.0**-70))
    exact = rounded(Fraction(float(halfway[0])) ** 2 + Fraction(2) ** -70)
    assert float(twice) != exact
    assert rounded(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))) == float(c)


@pytest.mark.parametrize("opcode", ("add.f32", "sub.f32", "mul.f32"))
def test_sums_and_products(opcode: str) -> None:
    a, b = floats(4), floats(9)
    got = compute(f"{opcode} %r30, %r10, %r11;", a, b).view(np.float32)
    operation = {"add.f32": Fraction.__add__, "sub.f32": Fraction.__sub__, "mul.f32": Fraction.__mul__}[opcode]
    for x, y, result in zip(map(as_float, a), map(as_float, b), got, strict=True):
        if np.isfinite(x) and np.isfinite(y) and np.isfinite(result):
            assert float(result) == rounded(operation(Fraction(x), Fraction(y)))


def test_flushing() -> None:
    tiny = np.array([1e-40, -1e-40, 2.0**-126, 3.0] * 16, np.float32)
    one = np.ones(THREADS, np.float32)
    got = compute("mul.ftz.f32 %r30, %r10, %r11;", tiny.view(np.uint32), one.view(np.uint32)).view(np.float32)
    assert got[:4].tolist() == [0.0, 0.0, 2.0**-126, 3.0] and np.signbit(got[1])
    got = compute("mul.f32 %r30, %r10, %r11;", tiny.view(np.uint32), one.view(np.uint32))
    assert (got == tiny.view(np.uint32)).all()


@pytest.mark.parametrize(("name", "dtype"), (("bf16", torch.bfloat16), ("f16", torch.float16)))
def test_conversions_are_pytorchs(name: str, dtype: torch.dtype) -> None:
    """Of random bits and of ties; NaN is the ISA's."""
    a, b = floats(5), floats(11)
    a[:8] = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x477FF000, 0x33000000, 0x33000001])

    def stored(bits: np.ndarray) -> np.ndarray:
        numbers = torch.from_numpy(bits.view(np.float32).copy())
        result = numbers.to(dtype).view(torch.uint16).numpy()
        return np.where(np.isnan(numbers.numpy()), 0x7FFF, result).astype(np.uint32)

    got = compute(f"cvt.rn.{name}x2.f32 %r30, %r10, %r11;", a, b)
    assert (got == (stored(a) << 16 | stored(b))).all()
    got = compute(f"cvt.rn.{name}.f32 %rs1, %r10;\nmov.b32 %r30, {{%rs1, %rs1}};", a)
    assert (got == stored(a) * 0x10001).all()
    back = compute(f"mov.b32 {{_, %rs1}}, %r10;\ncvt.f32.{name} %r30, %rs1;", b).view(np.float32)
    want = torch.from_numpy((b >> 16).astype(np.uint16)).view(dtype).float().numpy()
    assert np.array_equal(back, want, equal_nan=True)


def test_mixed_precision_is_read_by_its_whole_name() -> None:
    """``add.rn.f32.bf16`` adds a bfloat16 to a float32 in float32; it is no addition of bfloat16."""
    a, b = (np.random.default_rng(i).normal(size=THREADS).astype(np.float32) for i in (1, 2))
    got = compute("mov.b32 {_, %rs1}, %r10;\nadd.rn.f32.bf16 %r30, %rs1, %r11;", *(x.view(np.uint32) for x in (a, b)))
    short = (a.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    assert (got.view(np.float32) == short + b).all()


def test_comparisons_with_nan() -> None:
    a = np.array([1.0, np.nan, 2.0, np.nan] * 16, np.float32).view(np.uint32)
    b = np.array([2.0, 1.0, 1.0, np.nan] * 16, np.float32).view(np.uint32)
    expected = {"lt": (1, 0, 0, 0), "ltu": (1, 1, 0, 1), "ge": (0, 0, 1, 0), "geu": (0, 1, 1, 1), "ne": (1, 0, 1, 0)}
    for test, want in expected.items():
        got = compute(f"setp.{test}.f32 %p1, %r10, %r11;\nselp.b32 %r30, 1, 0, %p1;", a, b)
        assert got[:4].tolist() == list(want), test
    got = compute("max.f32 %r30, %r10, %r11;", a, b).view(np.float32)
    assert got[:3].tolist() == [2.0, 1.0, 2.0] and np.isnan(got[3])


def test_tf32_rounds_half_away() -> None:
    a = np.array([0x3F801000, 0x3F800FFF, 0xBF801000, 0x3F803000] * 16, np.uint32)
    assert compute("cvt.rna.tf32.f32 %r30, %r10;", a)[:4].tolist() == [0x3F802000, 0x3F800000, 0xBF802000, 0x3F804000]
