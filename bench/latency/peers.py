"""Other people's programs on the layer's own weights: PyTorch's sparse formats, and libraries if installed."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fpe.kernels.semi_structured.backends import BACKENDS
from fpe.kernels.semi_structured.torch_sparse import ROWS, has_cusparselt

from .problems import AbsentError, Problem, dense_layer


def semi_structured(problem: Problem, bias: bool) -> nn.Module:
    """PyTorch's own 2:4 weight at its best: cuSPARSELt's algorithm searched where the build has it.

    The search needs what the layer will run with: rows padded as PyTorch pads them, and a result that comes out
    transposed, which newer versions always ask for and older ones are told to.
    """
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    reason = BACKENDS["torch"].why_not(problem.x, problem.wide.shape[0], problem.wide.shape[1])
    if reason:
        raise AbsentError(reason)
    SparseSemiStructuredTensor._FORCE_CUTLASS = not has_cusparselt()  # what PyTorch's own documentation has users set
    layer = dense_layer(problem.wide, bias)
    weight: Any = to_sparse_semi_structured(layer.weight.detach())
    if has_cusparselt():
        weight.fuse_transpose_cusparselt = True
        columns = pad(problem.x, (0, 0, 0, -problem.x.shape[0] % ROWS)).t()
        weight.alg_id_cusparselt = torch._cslt_sparse_mm_search(weight.packed, columns, transpose_result=True)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def bsr(problem: Problem, bias: bool) -> nn.Module:
    """PyTorch's block compressed rows."""
    block, (outputs, inputs) = problem.case.block, (problem.case.alpha * problem.case.n, problem.case.k)
    if outputs % block[0] or inputs % block[1]:
        raise AbsentError(f"its blocks of {block} must divide {outputs} x {inputs}")
    layer = dense_layer(problem.wide, bias)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_bsr(block), requires_grad=False)
    return layer


def blksprs(problem: Problem, bias: bool) -> nn.Module:
    """The block-sparse library of PyPI, forward alone: its tuner times every configuration in the first call."""
    if find_spec("blksprs") is None:
        raise AbsentError("blksprs is not installed")
    (bn, bk), m = problem.case.block, problem.case.m
    outputs, inputs = problem.wide.shape
    if bn != bk or m % bn or outputs % bn or inputs % bn:
        raise AbsentError(f"its blocks are square and divide {m}, {outputs} and {inputs}; got {bn} x {bk}")
    if bias:
        raise AbsentError("it has no bias")
    return _Blksprs(problem.wide, bn)


class _Blksprs(nn.Module):
    """``x @ weight.T`` by blksprs; activations are cut into blocks and put together again in each call."""

    def __init__(self, weight: Tensor, block: int) -> None:
        import blksprs as library

        super().__init__()
        self.library, self.block = library, block
        dense = weight.T.contiguous()[None]  # [1, K, outputs]
        self.layout = library.layouting.build_sparsity_layout(dense, block)
        self.values = library.ops.to_sparse(dense, self.layout, block).detach()
        self.caches: tuple[dict, dict, dict] = ({}, {}, {})

    def forward(self, x: Tensor) -> Tensor:
        """``x[M, K]`` to ``y[M, outputs]``."""
        ops, block = self.library.ops, self.block
        rows = x.shape[0] // block
        full_x = self.layout.new_ones(1, rows, self.layout.shape[1])
        full_y = self.layout.new_ones(1, rows, self.layout.shape[2])
        cut = ops.to_sparse(x[None], full_x, block, layout_cache=self.caches[0])
        made = ops.matmul(cut, full_x, self.values, self.layout, full_y, block, layout_cache=self.caches[1])
        return torch.Tensor(ops.to_dense(made, full_y, block, layout_cache=self.caches[2])[0])


class Masked(nn.Linear):
    """What people do today: a wide weight, a mask beside it, and their product in every forward.

    Args:
        weight: ``[outputs, inputs]``.
        kept: Which entries exist, of the same shape.
        bias: Whether there is one, which begins at zero.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, kept: Tensor, bias: bool) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias, weight.device, weight.dtype)
        self.weight.data.copy_(weight)
        self.register_buffer("mask", kept)
        if bias:
            self.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """``x @ (weight where kept).T + bias``."""
        return nn.functional.linear(x, self.wide_weight(), self.bias)

    def wide_weight(self) -> Tensor:
        """The weight where it exists, zero elsewhere."""
        return torch.where(self.mask, self.weight, self.weight.new_zeros(()))

    def kept(self) -> Tensor:
        """The mask."""
        return self.mask
