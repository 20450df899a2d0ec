"""The partition kernels: through shared memory, and for few rows from memory to the tensor cores directly."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...kernels.partition import eager as twins
from ...kernels.partition import gluon as direct
from ...kernels.partition import triton as kernels
from ...kernels.partition.backends import MERGE, SPLIT
from ...kernels.partition.config import COLUMNS, GROUP
from ...kernels.partition.labels import PackedLabels
from . import contract
from .contract import SHAPE, Draw, Kernel, Meta, Problem, Row, as_meant, ending, laid

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


def operands(case: Any, draw: Draw) -> Problem:
    """See :class:`.contract.Family`."""
    (n, k), alpha, m, lying = case.shape, case.alpha, case.m, case.lying
    plain = draw.labels(n, k)
    w = draw(n, k, lying="plain" if lying == "broadcast" else lying)
    if case.holes:
        w = laid(torch.where(plain < alpha, w, 0), (n, k), "plain" if lying == "broadcast" else lying)
    labels: Tensor | PackedLabels = draw.packed(plain) if case.packed else plain
    op = case.op.removesuffix("_t")
    if op != case.op:
        w, labels, (n, k) = w.T, labels.T, (k, n)
    if op == "grad":
        return Problem(
            (draw(m, alpha, n, lying=lying, most=draw.rest), draw(m, k, lying=lying)),
            lambda dy, x: kernels.partition_grad_triton(dy, x, labels),
            lambda dy, x: twins.partition_grad_eager(dy, x, labels),
            lambda y: y,
            m,
        )
    if op == "split":
        bias = draw(alpha, n) if case.bias else None
        return Problem(
            (draw(m, k, lying=lying, most=draw.rest), w),
            lambda x, w: kernels.split_matmul_triton(x, w, labels, alpha, bias, case.activation),
            lambda x, w: twins.split_matmul_eager(x, w, labels, alpha),
            ending(case, bias),
            k,
        )
    bias = draw(n) if case.bias else None
    return Problem(
        (draw(m, alpha, k, lying=lying, most=draw.rest), w),
        lambda z, w: kernels.merge_matmul_triton(z, w, labels, bias, case.activation),
        lambda z, w: twins.merge_matmul_eager(z, w, labels),
        ending(case, bias),
        k,
    )


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of a partition operation."""

    op: str
    dtype: str
    m: int
    alpha: int
    activation: str | None = None
    shape: tuple[int, int] = SHAPE

    def posed(self) -> Problem:
        """See :class:`.contract.Case`."""
        return operands(self, Meta(self))


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
