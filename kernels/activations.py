"""Functions that a forward may apply to its result."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import gelu, relu, silu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu, "silu": silu}
"""By the name under which an operation takes them."""


def check_activation(op: str, activation: object) -> None:
    """Raises ``ValueError`` unless ``activation`` is a name in ``ACTIVATIONS`` or ``None``."""
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")


def finish(y: Tensor, activation: str | None) -> Tensor:
    """``activation(y)``, contiguous."""
    return (ACTIVATIONS[activation](y) if activation else y).contiguous()
