"""Functions that a forward may apply to its result."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu, "silu": silu}
"""By the name under which an operation takes them."""


def check_activation(op: str, activation: object) -> None:
    """Raises unless ``activation`` is a name in ``ACTIVATIONS`` or none."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")


def placed(activation: str | None, *operands: Tensor | None) -> tuple[str | None, str | None]:
    """Where an activation runs: ``(in the matmul's epilogue, after it)``; its gradient needs what it is applied to."""
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    return (None, activation) if trains else (activation, None)


def finish(y: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """``activation(y + bias)``, contiguous."""
    if bias is not None:
        y = y + bias
    return (ACTIVATIONS[activation](y) if activation else y).contiguous()
