"""``merge_matmul`` as a 2:4 matmul: two children of two inputs side by side, or four children of one, make a quad.

Whatever the labels are, an edge reads one child of its input, so that the weight that reads children side by side is
2:4 (four children: 1:4). Its codes follow from the labels alone, and with two children its values are the parent's in
their own order. The activations are laid side by side by a copy.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..activations import finish
from ..library import define
from ..memo import once_per_version
from ..semi_structured.layout import SemiStructuredLayout
from .labels import ROW_BYTES, PackedLabels

CHILDREN = (2, 4)


def as_merge(multiply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``merge_matmul`` on ``z[M, alpha, K]`` by a product with a 2:4 weight.

    Args:
        multiply: From activations ``[M, K * alpha]``, the weight ``w[N, K]`` of any strides, alpha (2 or 4), the layout
            of the weight that reads children side by side (without ``kept`` all of ``w`` are edges or zero), and a
            bias ``[N]`` or none, to ``y[M, N]``.
    """

    def merge_matmul(
        z: Tensor,
        w: Tensor,
        labels: Tensor | PackedLabels,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        table, transposed = (labels.planes, labels.transposed) if isinstance(labels, PackedLabels) else (labels, False)
        layout = _layout(table, *w.shape, z.shape[1], transposed)
        return finish(multiply(z.transpose(1, 2).flatten(1), w, z.shape[1], layout, bias), activation)

    return merge_matmul


@once_per_version
def _layout(labels: Tensor, n: int, k: int, alpha: int, transposed: bool) -> SemiStructuredLayout:
    """The layout of the weight that reads children side by side; without ``kept`` where every value is an edge's."""
    holes = labels.dim() == 2  # a plain table may have some: to know, its values would have to be read
    if labels.dim() == 3:
        packed = PackedLabels(labels, (k, n) if transposed else (n, k), alpha, transposed)
        labels, holes = packed.unpack(), packed.has_holes
    layout = SemiStructuredLayout.interleaved(labels, alpha)
    return layout if holes or alpha == 4 else layout._replace(kept=None)


@once_per_version
def _quad_codes(planes: Tensor, k: int) -> Tensor:
    # Group, step s, byte t, half h: bit 2 s + h of the bytes 4 t .. 4 t + 3, which are inputs 0, 2, 1, 3 of a quad.
    octets = planes[0].view(planes.shape[1], -1, 1, ROW_BYTES // 4, 4, 1)
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device).view(4, 1, 1, 2)
    zero, two, one, three = ((octets >> shifts) & 1).unbind(-2)  # [n, groups, s, t, h]: 1 where the second child owns
    first = (zero & (one ^ 1)) | ((zero & one) << 1)  # the first child's first input: 0, else 1, else 2
    second = (three ^ 1) | (three & two) | (((three & two) ^ 1) << 1)  # its second: 3, else 2, else 1
    codes = first | (second << 2)
    return (codes[..., 0] | (codes[..., 1] << 4)).flatten(1)[:, : -(-k // 8)].contiguous()


quad_codes = define(
    "quad_codes(Tensor planes, SymInt k) -> Tensor",
    _quad_codes,
    lambda planes, k: planes.new_empty(planes.shape[1], -(-k // 8)),
    composed=_quad_codes,
    operands=0,
    by_rows=False,
)
"""``codes`` of a :class:`SemiStructuredLayout` from the planes of two children's labels, once for each version of them.

Each child has two of every four inputs, and ``K`` is whole quads.
"""
