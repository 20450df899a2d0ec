"""The partition kernels: through shared memory, and for few rows from memory to the tensor cores directly."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ...kernels.partition import gluon as direct
from ...kernels.partition import triton as kernels
from ...kernels.partition.backends import MERGE, SPLIT
from ...kernels.partition.config import COLUMNS, GROUP
from ...kernels.partition.labels import PackedLabels, digits, row_bytes
from . import contract
from .contract import SHAPE, Kernel, Row, as_meant

ISSUE_SLOTS = 14
"""Instructions that an H200's lanes can issue while a 16-bit weight arrives at 4.8 TB/s (132 x 128 lanes, 1.98 GHz)."""


def _step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    rows = given["BLOCK_M" if given["TURNED"] else "BLOCK_K" if given["TRANSPOSED"] else "BLOCK_N"]
    return given["BLOCK_N"] * given["BLOCK_K"] * size, rows


def _rows_step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["BLOCK_N"] * GROUP * given["WARPS_IN"] * size, 16


def _columns_step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    return given["UNROLL"] * 16 * given["num_warps"] * COLUMNS * size, 16


def _outer_step(given: Mapping[str, Any], size: int) -> tuple[int, int]:
    left = given["BLOCK_N"] * (given["ALPHA"] if given["CHILDREN_LEFT"] else 1)
    right = given["BLOCK_K"] * (1 if given["CHILDREN_LEFT"] else given["ALPHA"])
    return given["BLOCK_M"] * (left + right) * size, given["BLOCK_N"]


def _check_direct(row: Row) -> list[str]:
    complaints = as_meant(row)
    if row["tile"].startswith(("8", "16")) and row["instructions_per_weight"] > ISSUE_SLOTS:
        spent = row["instructions_per_weight"]
        complaints.append(f"{spent} instructions a weight: unpacking would outlast the memory")
    if row["loop_shared"]:
        complaints.append(f"{row['loop_shared']} instructions on shared memory in a loop that needs none")
    return complaints


_ROWS, _COLUMNS = ("gl.load(upper_ptrs", "gl.load(lower_ptrs"), ("gl.load(words_at",)
KERNELS = (
    Kernel(kernels._partition_multiply, ("tl.load(words_at",), _step),
    Kernel(direct.multiply_rows, _ROWS, _rows_step, check=_check_direct, loads=direct._group),
    Kernel(direct.multiply_columns, _COLUMNS, _columns_step, check=_check_direct, loads=direct._rows),
    Kernel(kernels._partition_outer, ("tl.load(left_at", "tl.load(right_at"), _outer_step),
)
LAUNCHERS = (kernels,)
BACKENDS = (SPLIT, MERGE)
OPERATIONS = ("split", "merge", "grad", "split_t", "merge_t", "grad_t")
"""On the weight as it is stored, and on its transpose: forward, dX and dW of both layers of a pair."""


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of a partition operation."""

    op: str
    dtype: str
    m: int
    alpha: int
    activation: str | None = None
    shape: tuple[int, int] = SHAPE

    def launch(self) -> object:
        """See :class:`.contract.Case`."""
        (n, k), alpha, m = self.shape, self.alpha, self.m
        planes = torch.empty(digits(alpha), n, row_bytes(k), dtype=torch.uint8, device="meta")
        labels, w = PackedLabels(planes, self.shape, alpha), self.empty(n, k)
        if self.op.endswith("_t"):
            labels, w, (n, k) = labels.T, w.T, (k, n)
        if self.op.startswith("split"):
            bias = self.empty(alpha, n) if self.activation else None
            return kernels.split_matmul_triton(self.empty(m, k), w, labels, alpha, bias, self.activation)
        if self.op.startswith("merge"):
            bias = self.empty(n) if self.activation else None
            return kernels.merge_matmul_triton(self.empty(m, alpha, k), w, labels, bias, self.activation)
        return kernels.partition_grad_triton(self.empty(m, alpha, n), self.empty(m, k), labels)


CASES = (
    *(Case(op, "bf16", m, alpha) for op, alpha, m in product(OPERATIONS, (2, 3, 4, 8), (16, 32, 64, 1024, 8192))),
    *(Case(op, t, m, 2) for op, t, m in product(OPERATIONS, ("fp16", "fp32", "tf32"), (16, 64, 8192))),
    *(Case(op, "bf16", m, 2, "gelu") for op, m in product(("split", "merge"), (16, 64, 8192))),
)
QUICK = (
    Case("split", "bf16", 16, 2),
    Case("merge_t", "bf16", 16, 2),
    Case("split_t", "fp16", 64, 4),
    Case("merge", "bf16", 1024, 2),
    Case("grad", "bf16", 1024, 2),
)
