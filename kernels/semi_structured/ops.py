"""The semi-structured operations on 2-D activations: their schemas, fakes and gradients, operations of the family."""

from typing import Any

from torch import Tensor

from ..library import define, implementation, save_operands
from .backends import BACKENDS, fastest
from .layout import SemiStructuredLayout


def _layout(codes: Tensor, k: int, children: int) -> SemiStructuredLayout:
    return SemiStructuredLayout((codes.shape[0], k), codes, None, children)


def _run(
    op: str,
    backend: str,
    constant: bool,
    first: Tensor,
    second: Tensor,
    layout: SemiStructuredLayout,
    *bias: Tensor | None,
) -> Tensor:
    """Runs an operation; ``"auto"`` takes the backend that is fastest for so many rows."""
    if backend == "auto":
        backend = fastest(op, first, layout, constant)
    return implementation(BACKENDS[backend].module, op)(first, second, layout, *bias)


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    save_operands(ctx, args, [args[2]])
    ctx.k = args[1].shape[1] if len(args) == 4 else args[-3]


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, x, codes = ctx.saved_tensors
    dx = None if values is None else semi_structured_matmul_t(dy, values, codes, ctx.k, False, ctx.backend)
    dvalues = None if x is None else semi_structured_grad(dy, x, codes, ctx.backend)
    return dx, dvalues, None, dy.sum(0) if ctx.needs_input_grad[3] else None, None, None, None


semi_structured_matmul = define(
    "semi_structured_matmul(Tensor x, Tensor values, Tensor codes, Tensor? bias, SymInt k, bool constant, "
    "str backend) -> Tensor",
    lambda x, values, codes, bias, k, constant, backend: _run(
        "semi_structured_matmul", backend, constant, x, values, _layout(codes, k, values.shape[0]), bias
    ),
    lambda x, values, *rest: x.new_empty(x.shape[0], *values.shape[:2]),
    _matmul_backward,
    _save,
)
"""``x[M, K], values[children, N, 2 * quads] -> y[M, children, N]``."""


def _matmul_t_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    values, dy, codes = ctx.saved_tensors
    ddy = None if values is None else semi_structured_matmul(g, values, codes, None, ctx.k, False, ctx.backend)
    dvalues = None if dy is None else semi_structured_grad(dy, g, codes, ctx.backend)
    return ddy, dvalues, None, None, None, None


semi_structured_matmul_t = define(
    "semi_structured_matmul_t(Tensor dy, Tensor values, Tensor codes, SymInt k, bool constant, str backend) -> Tensor",
    lambda dy, values, codes, k, constant, backend: _run(
        "semi_structured_matmul_t", backend, constant, dy, values, _layout(codes, k, values.shape[0])
    ),
    lambda dy, values, codes, k, constant, backend: dy.new_empty(dy.shape[0], k),
    _matmul_t_backward,
    _save,
)
"""``dy[M, children, N], values[children, N, 2 * quads] -> dx[M, K]``."""


def _grad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, codes = ctx.saved_tensors
    ddy = None if x is None else semi_structured_matmul(x, g, codes, None, ctx.k, False, ctx.backend)
    dx = None if dy is None else semi_structured_matmul_t(dy, g, codes, ctx.k, False, ctx.backend)
    return ddy, dx, None, None


semi_structured_grad = define(
    "semi_structured_grad(Tensor dy, Tensor x, Tensor codes, str backend) -> Tensor",
    lambda dy, x, codes, backend: _run(
        "semi_structured_grad", backend, True, dy, x, _layout(codes, x.shape[1], dy.shape[1])
    ),
    lambda dy, x, codes, backend: x.new_empty(dy.shape[1], codes.shape[0], (x.shape[1] + 3) // 4 * 2),
    _grad_backward,
    _save,
    by_rows=False,
)
"""``dy[M, children, N], x[M, K] -> dvalues[children, N, 2 * quads]``."""


def _save_of_compress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.k, ctx.children, ctx.backend = inputs[0].shape[-1], output.shape[0], inputs[-1]


def _compress_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return semi_structured_expand(g, *ctx.saved_tensors, ctx.k, ctx.backend), None, None, None


semi_structured_compress = define(
    "semi_structured_compress(Tensor w, Tensor codes, SymInt children, str backend) -> Tensor",
    lambda w, codes, children, backend: implementation(BACKENDS[backend].module, "semi_structured_compress")(
        w, _layout(codes, w.shape[1], children)
    ),
    lambda w, codes, children, backend: w.new_empty(children, w.shape[0], (w.shape[1] + 3) // 4 * 2),
    _compress_backward,
    _save_of_compress,
    operands=1,
    by_rows=False,
)
"""``w[N, K] -> values[children, N, 2 * quads]``."""


def _save_of_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.children, ctx.backend = inputs[0].shape[0], inputs[-1]


def _expand_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return semi_structured_compress(g, *ctx.saved_tensors, ctx.children, ctx.backend), None, None, None


semi_structured_expand = define(
    "semi_structured_expand(Tensor values, Tensor codes, SymInt k, str backend) -> Tensor",
    lambda values, codes, k, backend: implementation(BACKENDS[backend].module, "semi_structured_expand")(
        values, _layout(codes, k, values.shape[0])
    ),
    lambda values, codes, k, backend: values.new_empty(values.shape[1], k),
    _expand_backward,
    _save_of_expand,
    operands=1,
    by_rows=False,
)
"""``values[children, N, 2 * quads] -> w[N, K]``, the children's sum."""
