"""The bitmap operations: their schemas, fakes and gradients. Each is the gradient of the other."""

from typing import Any

from torch import Tensor

from ..library import define, implementation
from .backends import BACKENDS
from .layout import Bitmap


def _save_unpack(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    values, *index, _, ctx.backend = args
    ctx.save_for_backward(*index)
    ctx.nnz = values.shape[0]


def _unpack_backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    return pack_values(dw, *ctx.saved_tensors, ctx.nnz, ctx.backend), *[None] * 5


def _run_unpack(values: Tensor, bits: Tensor, starts: Tensor, bases: Tensor, k: int, backend: str) -> Tensor:
    kept = Bitmap(bits, starts, bases, (bits.shape[0], k), values.shape[0])
    return implementation(BACKENDS[backend].module, "unpack_values")(values, kept)


unpack_values = define(
    "unpack_values(Tensor values, Tensor bits, Tensor starts, Tensor bases, SymInt k, str backend) -> Tensor",
    _run_unpack,
    lambda values, bits, starts, bases, k, backend: values.new_empty(bits.shape[0], k),
    _unpack_backward,
    _save_unpack,
    operands=1,
    by_rows=False,
)
"""``values[nnz] -> w[N, K]`` in stored order, zero where no bit is set."""


def _save_pack(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    w, *index, _, ctx.backend = args
    ctx.save_for_backward(*index)
    ctx.k = w.shape[1]


def _pack_backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    return unpack_values(dvalues, *ctx.saved_tensors, ctx.k, ctx.backend), *[None] * 5


def _run_pack(w: Tensor, bits: Tensor, starts: Tensor, bases: Tensor, nnz: int, backend: str) -> Tensor:
    kept = Bitmap(bits, starts, bases, (w.shape[0], w.shape[1]), nnz)
    return implementation(BACKENDS[backend].module, "pack_values")(w, kept)


pack_values = define(
    "pack_values(Tensor w, Tensor bits, Tensor starts, Tensor bases, SymInt nnz, str backend) -> Tensor",
    _run_pack,
    lambda w, bits, starts, bases, nnz, backend: w.new_empty(nnz),
    _pack_backward,
    _save_pack,
    operands=1,
    by_rows=False,
)
"""``w[N, K] -> values[nnz]`` in stored order."""
