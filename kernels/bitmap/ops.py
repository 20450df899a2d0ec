"""The bitmap operations: their schemas, fakes and gradients. Each is the gradient of the other."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..library import define, implementation
from .backends import BACKENDS
from .existence import existing


def _save_unpack(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    values, *index, ctx.seed, _, _, ctx.backend = args
    ctx.save_for_backward(*index)
    ctx.nnz = values.shape[0]


def _unpack_backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    return pack_values(dw, *ctx.saved_tensors, ctx.seed, ctx.nnz, ctx.backend), *[None] * 7


def _run_unpack(
    values: Tensor,
    bits: Tensor | None,
    starts: Tensor | None,
    bases: Tensor | None,
    seed: Sequence[int] | None,
    n: int,
    k: int,
    backend: str,
) -> Tensor:
    kept = existing((bits, starts, bases), seed, (n, k), values.shape[0], False)
    return implementation(BACKENDS[backend].module, "unpack_values")(values, kept)


unpack_values = define(
    "unpack_values(Tensor values, Tensor? bits, Tensor? starts, Tensor? bases, int[]? seed, SymInt n, SymInt k, "
    "str backend) -> Tensor",
    _run_unpack,
    lambda values, bits, starts, bases, seed, n, k, backend: values.new_empty(n, k),
    _unpack_backward,
    _save_unpack,
    operands=1,
    by_rows=False,
)
"""``values[nnz] -> w[N, K]`` in stored order, zero where no entry exists.

Without a bitmap's tensors holes are of a ``seed``: the seed, and how many entries a row keeps.
"""


def _save_pack(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    w, *index, ctx.seed, _, ctx.backend = args
    ctx.save_for_backward(*index)
    ctx.sizes = w.shape


def _pack_backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    return unpack_values(dvalues, *ctx.saved_tensors, ctx.seed, *ctx.sizes, ctx.backend), *[None] * 6


def _run_pack(
    w: Tensor,
    bits: Tensor | None,
    starts: Tensor | None,
    bases: Tensor | None,
    seed: Sequence[int] | None,
    nnz: int,
    backend: str,
) -> Tensor:
    kept = existing((bits, starts, bases), seed, (w.shape[0], w.shape[1]), nnz, False)
    return implementation(BACKENDS[backend].module, "pack_values")(w, kept)


pack_values = define(
    "pack_values(Tensor w, Tensor? bits, Tensor? starts, Tensor? bases, int[]? seed, SymInt nnz, str backend) "
    "-> Tensor",
    _run_pack,
    lambda w, bits, starts, bases, seed, nnz, backend: w.new_empty(nnz),
    _pack_backward,
    _save_pack,
    operands=1,
    by_rows=False,
)
"""``w[N, K] -> values[nnz]`` in stored order; the arguments are those of :data:`unpack_values`."""
