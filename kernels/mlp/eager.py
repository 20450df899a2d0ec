"""The expanded MLP in plain PyTorch: its definition, in any floating dtype."""

from torch import Tensor
from torch.nn.functional import linear

from ..partition.eager import Labels, merge_matmul_eager, split_matmul_eager


def expanded_mlp_eager(
    x: Tensor,
    w1: Tensor,
    labels1: Labels,
    w2: Tensor,
    labels2: Labels | None,
    alpha: int,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str | None = "relu",
) -> Tensor:
    """Eager twin of :func:`fpe.kernels.expanded_mlp` on ``x[M, K]``: returns ``y[M, N]``."""
    hidden = split_matmul_eager(x, w1, labels1, alpha, bias1, activation)  # [M, alpha, H]
    if labels2 is None:
        return linear(hidden.flatten(1), w2, bias2)
    return merge_matmul_eager(hidden, w2, labels2, bias2)


OPERATIONS = {
    "expanded_mlp": expanded_mlp_eager,
}
