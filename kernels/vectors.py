"""Vector instructions for the kernels that Numba compiles: what it does not make of a loop over bits by itself.

Numba keeps binaries for as long as the file of a kernel is unchanged, and does not see this one: after a change here,
touch ``partition/cpu.py`` and ``block/cpu.py``.
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

    def weights(self, array: int, place: Any, ahead: Any, exists: Any = None) -> Any:
        """Weights of any type as float32; what lies ``ahead`` of them is called from memory.

        With a mask ``exists`` they are read one after the other into the lanes where it is true; the others are zero.
        """
        b, dtype = self.b, self.signature.args[array].dtype
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        fetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        b.call(fetch, [self.at(array, b.add(place, ahead), ir.IntType(8)), I32(0), I32(3), I32(1)])
        kind = F32 if dtype == types.float32 else ir.IntType(16)
        raw = self._taken(array, place, ir.VectorType(kind, LANES), exists)
        if dtype == types.float32:
            return raw
        if dtype == types.int16:  # the bits of float16, see AS_INTEGERS
            return b.fpext(b.bitcast(raw, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
        return b.bitcast(b.shl(b.zext(raw, WORDS), ir.Constant(WORDS, [16] * LANES)), FLOATS)

    def _taken(self, array: int, place: Any, kind: Any, exists: Any) -> Any:
        """A vector of a type from an array, or as many of its numbers as exist, in their lanes."""
        named, size = ("f32", 4) if kind.element == F32 else ("i16", 2)
        if exists is None:
            return self.b.load(self.at(array, place, kind), align=size)
        takes = ir.FunctionType(kind, [kind.element.as_pointer(), exists.type, kind])
        expand = cgutils.get_or_insert_function(self.b.module, takes, f"llvm.masked.expandload.v{LANES}{named}")
        return self.b.call(expand, [self.at(array, place, kind.element), exists, ir.Constant(kind, None)])

    def shares(self, vector: Any, masks: list[Any]) -> list[Any]:
        """A vector of weights as each child has it, zero elsewhere."""
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        return [vector if mask is None else self.b.select(mask, vector, zero) for mask in masks]

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c``, in one instruction where there is one."""
        return self.b.fadd(self.b.fmul(a, b, flags=("contract",)), c, flags=("contract",))

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
