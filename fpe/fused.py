"""Expanded pairs that run as one operation at inference: for layers so small that launches cost the most."""

from torch import Tensor, nn

from fpe.kernels import expanded_mlp

from .layers import MaskedLinear, MergeLinear, SplitLinear

ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}


class ExpandedMLP(nn.Module):
    """An expanded layer, its activation and its successor: :func:`fpe.kernels.expanded_mlp` on their parameters.

    It owns the two layers and trains like them. It runs in one launch only without gradients, and only if the hidden
    layer is small enough.

    Args:
        first: The expanded layer.
        activation: ``"relu"``, ``"gelu"``, ``"silu"`` or none.
        second: Its successor: dense, masked, or merged.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Raises:
        ValueError: The layers' sizes do not follow each other.

    Example:
        >>> first = fpe.SplitLinear(fpe.Partition.random(8, 16, 2))
        >>> fpe.ExpandedMLP(first, "relu", nn.Linear(16, 4))(torch.ones(3, 16)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        first: SplitLinear,
        activation: str | None,
        second: nn.Linear | MaskedLinear | MergeLinear,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if second.in_features != first.out_features or getattr(second, "alpha", first.alpha) != first.alpha:
            raise ValueError(
                f"ExpandedMLP: second must take the {first.out_features} children of first (alpha = {first.alpha}), "
                f"got {second}"
            )
        self.first, self.activation, self.second, self.backend = first, activation, second, backend

    def forward(self, x: Tensor) -> Tensor:
        """``second(activation(first(x)))``."""
        first, second = self.first, self.second
        merged = second if isinstance(second, MergeLinear) else None
        return expanded_mlp(
            x,
            first.matrix(),
            first.packed,
            second.weight if merged is None else merged.matrix(),
            None if merged is None else merged.packed,
            alpha=first.alpha,
            bias1=None if first.bias is None else first.bias.view(first.alpha, -1),
            bias2=second.bias,
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation!r}"


def fuse(model: nn.Sequential, backend: str = "auto") -> nn.Sequential:
    """Joins every expanded layer of a chain with its activation and its successor; shares their parameters.

    Args:
        model: A chain of modules. It joins a ``SplitLinear``, an activation (ReLU, exact GELU, SiLU) and a dense,
            masked or merged layer in a row; other modules, and layers that processes share (:mod:`fpe.parallel`), stay.
        backend: The backend of the joined layers.

    Returns:
        A new chain of the old modules; the model itself is not changed.

    Raises:
        TypeError: ``model`` is not an ``nn.Sequential``.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> fused = fpe.fuse(fpe.expand(model, resparsify="partition"))
        >>> type(fused[0]).__name__
        'ExpandedMLP'
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"fuse: model must be an nn.Sequential, got {type(model).__name__}")
    modules: list[nn.Module] = list(model)
    fused: list[nn.Module] = []
    while modules:
        first, activation, second = (*modules[:3], None, None)[:3]
        exact = getattr(activation, "approximate", "none") == "none" and type(activation) in ACTIVATIONS
        if (
            isinstance(first, SplitLinear)
            and first.share is None
            and exact
            and isinstance(second, (nn.Linear, MaskedLinear, MergeLinear))
            and type(second) in (nn.Linear, MaskedLinear, MergeLinear)
        ):
            fused.append(ExpandedMLP(first, ACTIVATIONS[type(activation)], second, backend))
            modules = modules[3:]
        else:
            fused.append(modules.pop(0))
    return nn.Sequential(*fused).train(model.training)
