"""The kernel of an expanded MLP in one launch."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ...kernels.mlp import triton as kernels
from ...kernels.mlp.backends import BACKENDS as _BACKENDS
from ...kernels.partition.labels import PackedLabels, digits, row_bytes
from . import contract
from .contract import SHAPE, Kernel


def _step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["BLOCK_H"] * given["BLOCK_K"] * size, given["BLOCK_M" if given["TURNED"] else "BLOCK_H"]


KERNELS = (Kernel(kernels._expanded_mlp, ("tl.load(words_at",), _step),)
LAUNCHERS = (kernels,)
BACKENDS = (_BACKENDS,)
SIZES = (64, 512, 1000)
"""Parents, inputs and outputs."""


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of the fused MLP, of ``SIZES``."""

    op: str
    dtype: str
    m: int
    alpha: int
    activation: str | None = None
    shape: tuple[int, int] = SHAPE

    def launch(self) -> object:
        """See :class:`.contract.Case`."""
        (h, k, n), alpha, empty = SIZES, self.alpha, self.empty
        planes = torch.empty(digits(alpha), h, row_bytes(k), dtype=torch.uint8, device="meta")
        x, w1, w2, bias1, bias2 = empty(self.m, k), empty(h, k), empty(n, alpha * h), empty(alpha, h), empty(n)
        labels = PackedLabels(planes, (h, k), alpha)
        return kernels.expanded_mlp_triton(x, w1, labels, w2, None, alpha, bias1, bias2, self.activation)


CASES = tuple(Case("mlp", t, m, alpha, "relu") for t, m, alpha in product(("bf16", "fp16"), (1, 64), (2, 4, 8)))
QUICK = (Case("mlp", "bf16", 1, 2, "relu"),)
