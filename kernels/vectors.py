"""Vector instructions for the kernels that Numba compiles: what it does not make of a loop over bits by itself.

Numba keeps binaries for as long as the file of a kernel is unchanged, and does not see this one. So the files of the
kernels have a ``STAMP`` of what they are compiled from, and a test says what it must be.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.np import arrayobj

LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""Numbers in a vector."""
I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
WORDS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


class Emit:
    """Writes vector instructions into a function that Numba compiles.

    Args:
        context: Numba's.
        b: The builder of instructions.
        signature: Of the intrinsic.
        args: Its arguments' values.
    """

    def __init__(self, context: Any, b: Any, signature: Any, args: Any) -> None:
        self.context, self.b, self.signature, self.args = context, b, signature, args

    def at(self, array: int, place: Any, kind: Any) -> Any:
        """A pointer to a vector, from the number of an argument that is a flat array and a place in it."""
        made = arrayobj.make_array(self.signature.args[array])(self.context, self.b, self.args[array])
        return self.b.bitcast(self.b.gep(made.data, [place]), kind.as_pointer())

    def plus(self, start: Any, *terms: tuple[Any, int]) -> Any:
        """``start`` and integers times constants."""
        for value, times in terms:
            start = self.b.add(start, self.b.mul(value, I64(times)))
        return start

    def load(self, array: int, place: Any) -> Any:
        """Float32 numbers."""
        return self.b.load(self.at(array, place, FLOATS), align=4)

    def fetch(self, array: int, place: Any) -> None:
        """Calls what lies at a place from memory."""
        self._call("llvm.prefetch.p0", ir.VoidType(), self.at(array, place, ir.IntType(8)), *map(I32, (0, 3, 1)))

    def weights(self, array: int, place: Any, ahead: Any, exists: Any = None) -> Any:
        """Weights of any type as float32; what lies ``ahead`` of them is called from memory.

        Args:
            array: The number of the argument that holds them.
            place: Of the first.
            ahead: What is called from memory, from there.
            exists: An integer of as many bits as there are lanes: weights are read one after the other into those whose
                bit is set, and the others are zero. None reads into all. For sixteen lanes see :meth:`expanded`.
        """
        b, dtype = self.b, self.signature.args[array].dtype
        self.fetch(array, b.add(place, ahead))
        named, element, size = ("f32", F32, 4) if dtype == types.float32 else ("i16", ir.IntType(16), 2)
        kind = ir.VectorType(element, LANES)
        if exists is None:
            raw = b.load(self.at(array, place, kind), align=size)
        else:
            zeros, name = ir.Constant(kind, None), f"llvm.masked.expandload.v{LANES}{named}"
            raw = self._call(name, kind, self.at(array, place, element), self.lanes(exists), zeros)
        if dtype == types.int16:  # the bits of float16, see AS_INTEGERS
            raw = b.fpext(b.bitcast(raw, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
        elif dtype != types.float32:
            raw = b.bitcast(b.shl(b.zext(raw, WORDS), ir.Constant(WORDS, [16] * LANES)), FLOATS)
        return raw

    def expanded(self, vector: Any, word: Any, bit: int) -> Any:
        """The first of sixteen numbers, one after the other in the lanes whose bits of a word are set; others are zero.

        An instruction that expands takes several times as long as one that permutes by the bits counted below a lane.

        Args:
            vector: The numbers.
            word: 32 bits.
            bit: The first lane's.
        """
        b, ones = self.b, [1 << bit + lane for lane in range(LANES)]
        words = self.splat(word, WORDS)
        below = b.and_(words, ir.Constant(WORDS, [one - (1 << bit) for one in ones]))
        order = self._call(f"llvm.ctpop.v{LANES}i32", WORDS, below)
        has = b.icmp_unsigned("!=", b.and_(words, ir.Constant(WORDS, ones)), ir.Constant(WORDS, [0] * LANES))
        moved = self._call("llvm.x86.avx512.permvar.sf.512", FLOATS, vector, order)
        return b.select(has, moved, ir.Constant(FLOATS, [0.0] * LANES))

    def lanes(self, bits: Any) -> Any:
        """A mask of vectors from an integer of as many bits."""
        return self.b.bitcast(bits, ir.VectorType(ir.IntType(1), LANES))

    def _call(self, name: str, result: Any, *args: Any) -> Any:
        """Calls one of LLVM's intrinsic functions."""
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), args)

    def multiply_add(self, a: Any, b: Any, c: Any, mask: Any = None) -> Any:
        """``a * b + c`` where a mask says so, else ``c``: one instruction where there are masks of sixteen lanes.

        With fewer lanes ``a`` is zero there, which is made once for all that it is multiplied by.
        """
        if mask is not None and LANES < 16:
            a, mask = self.b.select(mask, a, ir.Constant(FLOATS, [0.0] * LANES)), None
        made = self.b.fadd(self.b.fmul(a, b, flags=("contract",)), c, flags=("contract",))
        return made if mask is None else self.b.select(mask, made, c)

    def splat(self, scalar: Any, kind: Any = FLOATS) -> Any:
        """A vector of one number."""
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count))

    def sums(self, count: int) -> list[Any]:
        """Vectors of zeros that are added to in registers."""
        vectors = [cgutils.alloca_once(self.b, FLOATS) for _ in range(count)]
        for vector in vectors:
            self.b.store(ir.Constant(FLOATS, [0.0] * LANES), vector)
        return vectors

    def add_total(self, array: int, place: Any, vectors: list[Any]) -> None:
        """Adds the numbers of all vectors to a number of an array."""
        b = self.b
        kind = ir.FunctionType(F32, [F32, FLOATS])
        total = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        vector = b.load(vectors[0])
        for more in vectors[1:]:
            vector = b.fadd(vector, b.load(more))
        to = self.at(array, place, F32)
        b.store(b.call(total, [b.load(to), vector], fastmath=("reassoc",)), to)
