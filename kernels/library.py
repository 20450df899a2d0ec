"""How an operation is registered with PyTorch: shapes, reverse and forward gradients, and batching, by the dispatcher.

Every operation here is linear in each of its operands; some add a bias and apply an activation after it. So one rule
serves the tangents of all of them, and an operation needs to bring only its reverse gradient.

``torch.library.register_autograd`` makes a ``torch.autograd.Function`` that refuses ``torch.func`` and drops tangents.
The kernels registered here run at one level of transforms at a time, as those of PyTorch's own operations do: the
dispatcher passes the call to each level in turn.

Operations are defined on a ``Library``, not by ``custom_op``: its Python wrapper costs 80 microseconds more for each
call, which is more than a small matmul takes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    get_single_level_autograd_function_allowed,
    set_single_level_autograd_function_allowed,
)
from torch.autograd import forward_ad

from .activations import ACTIVATIONS

LIBRARY = torch.library.Library("fpe", "DEF")

Run = Callable[..., Tensor]


def implementation(module: str, op: str) -> Run:
    """The function that runs an operation: the entry of ``OPERATIONS`` in a module here, as ``"partition.triton"``.

    The module is imported when one of its operations first runs, so that Triton is not imported before it is needed.
    """
    return _operations(module)[op]


@cache
def _operations(module: str) -> Mapping[str, Run]:
    return import_module(f".{module}", __package__).OPERATIONS


def save_operands(ctx: Any, args: tuple[Any, ...], index: Sequence[Tensor]) -> None:
    """Saves for the backward pass: the operands that gradients need, and the tensors that say where weights are.

    The gradient of one operand needs the other. So each is saved only if a gradient of the other is wanted.

    Args:
        ctx: A context; ``ctx.backend`` is set to the operation's last argument.
        args: The operation's arguments.
        index: Tensors that have no gradient: labels, rows of blocks.
    """
    first, second, *_ = args
    wants_first, wants_second = ctx.needs_input_grad[:2]
    ctx.save_for_backward(second if wants_first else None, first if wants_second else None, *index)
    ctx.backend = args[-1]


def define(
    schema: str,
    run: Run,
    fake: Run,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    save: Callable[[Any, tuple[Any, ...], Tensor], None] | None = None,
    *,
    operands: int = 2,
    by_rows: bool = True,
    tangent_of_second: Callable[..., Tensor] | None = None,
    composed: Run | None = None,
) -> Run:
    """Registers an operation and returns it.

    Args:
        schema: Its signature. The operands come first; ``bias`` and ``activation`` are recognised by their names.
        run: Computes the result, from plain tensors.
        fake: Makes an empty tensor of the result's shape, from fake tensors.
        backward: Computes a gradient or ``None`` for each argument, from a context and the result's gradient, for
            ``activation=None``.
        save: Puts what ``backward`` needs on the context. It takes the context, the arguments and the result.
        operands: In how many of its first arguments it is linear.
        by_rows: Whether each row of the result depends on one row of the first operand alone. Then ``torch.vmap`` over
            that operand only means more rows.
        tangent_of_second: Sets the entries of the second operand's tangent to zero that the operation does not expect,
            from the tangent and the arguments.
        composed: The same function made of other operations, for an operation that has no gradient of its own.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fpe::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.fpe, name).default
    if composed is None:
        assert backward is not None and save is not None
        composed = _differentiated(op, _node(op, name, backward, save), operands, tangent_of_second)
    LIBRARY.impl(name, _where_wanted(op, composed), "Autograd")
    torch.library.register_vmap(f"fpe::{name}", _batched(op, by_rows), lib=LIBRARY)
    return op


def _where_wanted(op: Run, differentiated: Run) -> Run:
    """Returns an operation's autograd kernel, which only runs the operation if no gradient or tangent is wanted."""

    def autograd(*args: Any) -> Tensor:
        if torch.is_grad_enabled() and any(t.requires_grad for t in args if isinstance(t, Tensor)):
            return differentiated(*args)
        if _in_forward_mode() and any(_tangent(t) is not None for t in args):
            return differentiated(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return autograd


def _in_forward_mode() -> bool:
    """Whether a tensor may have a tangent: to ask one takes longer than to know that none has."""
    return forward_ad._current_level >= 0


def _tangent(value: object) -> Tensor | None:
    differentiable = isinstance(value, Tensor) and value.is_floating_point()
    return forward_ad.unpack_dual(value).tangent if differentiable else None


def _differentiated(
    op: Run, node: "type[_Node]", operands: int, tangent_of_second: Callable[..., Tensor] | None
) -> Run:
    """The operation where a gradient or a tangent is wanted."""
    names = [argument.name for argument in op._schema.arguments]  # type: ignore[attr-defined]
    bias, activation = (names.index(n) if n in names else None for n in ("bias", "activation"))

    def differentiated(*args: Any) -> Tensor:
        if activation is not None and args[activation] is not None:  # its gradient needs what it is applied to
            return ACTIVATIONS[args[activation]](op(*_replaced(args, activation, None)))
        primals, tangents = args, {}
        linear = (*range(operands), *([] if bias is None or args[bias] is None else [bias]))
        for i in linear if _in_forward_mode() else ():
            primal, tangent = forward_ad.unpack_dual(args[i])
            if tangent is not None:
                primals, tangents[i] = _replaced(primals, i, primal), tangent
        if not tangents:
            return node.apply(*args)
        y = op(*primals)
        return forward_ad.make_dual(y, sum(_term(y, primals, i, tangent) for i, tangent in tangents.items()))

    def _term(y: Tensor, primals: tuple[Any, ...], i: int, tangent: Tensor) -> Tensor:
        """What the tangent of one argument adds to that of the result."""
        if i == bias:
            return tangent.expand_as(y)
        if i == 1 and tangent_of_second is not None:
            tangent = tangent_of_second(tangent, *primals)
        parts = _replaced(primals, i, tangent)
        return op(*(parts if bias is None else _replaced(parts, bias, None)))

    return differentiated


def _replaced(args: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*args[:at], value, *args[at + 1 :])


class _Node(torch.autograd.Function):
    """A node of the graph of one level of transforms."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Bypasses ``Function.apply``, which would give a call inside a transform to all levels at once."""
        before = get_single_level_autograd_function_allowed()
        set_single_level_autograd_function_allowed(True)
        try:
            return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
        finally:
            set_single_level_autograd_function_allowed(before)


def _node(op: Run, name: str, backward: Callable[..., Any], save: Callable[..., None]) -> type[_Node]:
    def forward(ctx: Any, *args: Any) -> Tensor:
        # ``apply`` has switched gradients off, but the outer levels still want them.
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            result = op(*args)
        save(ctx, args, result)
        return result

    title = "".join(word.capitalize() for word in name.split("_"))
    return type(title, (_Node,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def _batched(op: Run, by_rows: bool) -> Callable[..., tuple[Tensor, int]]:
    """A rule of ``torch.vmap``: a batch of rows is more rows; all else runs once for each entry of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        in_dims = tuple(None if isinstance(dim, list) else dim for dim in in_dims)  # of a list of numbers
        if by_rows and all(dim is None for dim in in_dims[1:]):
            rows = args[0].movedim(in_dims[0], 0)
            y = op(rows.flatten(0, 1), *args[1:])
            return y.unflatten(0, rows.shape[:2]), 0
        pairs = tuple(zip(args, in_dims, strict=True))
        if not info.batch_size:  # a call whose result is dropped shows the shape
            y = op(*(a if dim is None else a.new_zeros(a.shape[:dim] + a.shape[dim + 1 :]) for a, dim in pairs))
            return y.new_empty(0, *y.shape), 0
        each = [op(*(a if dim is None else a.select(dim, i) for a, dim in pairs)) for i in range(info.batch_size)]
        return torch.stack(each), 0

    return rule
