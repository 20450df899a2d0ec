"""Expanded pairs that run as one operation at inference: for layers so small that launching kernels costs the most."""

from torch import Tensor, nn

from fpe.kernels import expanded_mlp
from fpe.kernels.activations import check_activation

from .layers import MaskedLinear, MergeLinear, SplitLinear

ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}
SUCCESSORS = (nn.Linear, MaskedLinear, MergeLinear)


class ExpandedMLP(nn.Module):
    """An expanded layer, its activation and its successor: :func:`fpe.kernels.expanded_mlp` on their parameters.

    It owns the two layers and trains like them. It runs in one launch on a GPU if its numbers are float16 or bfloat16,
    no gradient is wanted and the hidden layer is small enough; otherwise as several operations.

    Args:
        first: The expanded layer.
        activation: ``"relu"``, ``"gelu"``, ``"silu"`` or ``None``.
        second: Its successor: dense, masked, or merged.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Raises:
        TypeError: ``first`` or ``second`` is a layer of another kind.
        ValueError: ``second`` does not take as many inputs as ``first`` has outputs, its number of children is another,
            or the activation is unknown.

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
        for name, layer, kinds in (("first", first, (SplitLinear,)), ("second", second, SUCCESSORS)):
            if not isinstance(layer, kinds):
                known = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"ExpandedMLP: {name} must be a {known}, got {type(layer).__name__}")
        check_activation("ExpandedMLP", activation)
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
    """Joins each expanded layer of an ``nn.Sequential`` with its activation and its successor; shares their parameters.

    Args:
        model: A ``SplitLinear``, an activation (ReLU, exact GELU, SiLU) and a dense, masked or merged layer are joined
            where they follow one another. Other modules stay as they are: nested ``nn.Sequential`` too, and layers that
            processes share (:mod:`fpe.parallel`).
        backend: The backend of the joined layers.

    Returns:
        A new ``nn.Sequential`` of the old modules; the model itself is not changed.

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
            and isinstance(second, SUCCESSORS)
            and type(second) in SUCCESSORS
        ):
            fused.append(ExpandedMLP(first, ACTIVATIONS[type(activation)], second, backend))
            modules = modules[3:]
        else:
            fused.append(modules.pop(0))
    return nn.Sequential(*fused).train(model.training)
