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

    def weights(self, array: int, place: Any, ahead: Any, exists: Any = None) -> Any:
        """Weights of any type as float32; what lies ``ahead`` of them is called from memory.

        Args:
            array: The number of the argument that holds them.
            place: Of the first.
            ahead: What is called from memory, from there.
            exists: An integer of as many bits as there are lanes: weights are read one after the other into those whose
                bit is set, and the others are zero. None reads into all.
        """
        b, dtype = self.b, self.signature.args[array].dtype
        byte = ir.IntType(8).as_pointer()
        self._call(
            "llvm.prefetch.p0", ir.VoidType(), self.at(array, b.add(place, ahead), byte.pointee), *map(I32, (0, 3, 1))
        )
        named, element, size = ("f32", F32, 4) if dtype == types.float32 else ("i16", ir.IntType(16), 2)
        kind, expands = ir.VectorType(element, LANES), exists is not None and LANES == 16
        if exists is None:
            raw = b.load(self.at(array, place, kind), align=size)
        else:
            # From memory AVX-512 expands at half the speed at which it does from a register, here as many as there are.
            mask, zeros, load = self.lanes(exists), ir.Constant(kind, None), "expandload"
            at = [self.at(array, place, element)]
            if expands:
                count = b.sub(b.shl(I32(1), b.zext(b.ctpop(exists), I32)), I32(1))
                mask, load = self.lanes(b.trunc(count, exists.type)), "load"
                at = [self.at(array, place, kind), I32(size)]
            name = f"llvm.masked.{load}.v{LANES}{named}" + (".p0" if expands else "")
            raw = self._call(name, kind, *at, mask, zeros)
        if dtype == types.int16:  # the bits of float16, see AS_INTEGERS
            raw = b.fpext(b.bitcast(raw, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
        elif dtype != types.float32:
            raw = b.bitcast(b.shl(b.zext(raw, WORDS), ir.Constant(WORDS, [16] * LANES)), FLOATS)
        if expands:
            name = "llvm.x86.avx512.mask.expand.v16f32"
            raw = self._call(name, FLOATS, raw, ir.Constant(FLOATS, None), self.lanes(exists))
        return raw

    def lanes(self, bits: Any) -> Any:
        """A mask of vectors from an integer of as many bits."""
        return self.b.bitcast(bits, ir.VectorType(ir.IntType(1), LANES))

    def _call(self, name: str, result: Any, *args: Any) -> Any:
        """Calls one of LLVM's intrinsic functions."""
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), args)

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
