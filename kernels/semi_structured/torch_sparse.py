"""The semi-structured operations by PyTorch's own ``torch.sparse`` kernels: cuSPARSELt, or CUTLASS on Ampere.

Compressed forms are made from the given positions, once for each version of the values: for CUTLASS the values and the
metadata in its order, for cuSPARSELt the plain weight, of which it makes a form of its own. cuSPARSELt's algorithm is
searched once for each shape and dtype.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from ..dispatch import why_not_triton
from ..memo import constant_to_compile, once_per_version
from ..partition.interleaved import as_merge
from .derived import transposed_layout
from .eager import semi_structured_grad_eager, semi_structured_matmul_t_eager
from .fragments import pack_metadata
from .layout import SemiStructuredLayout

if TYPE_CHECKING:
    from .pack import Form

CUSPARSELT = (16, 16)
"""Outputs (all children's) and inputs must be multiples of these for cuSPARSELt."""
CUTLASS = (32, 64)
"""The same for CUTLASS."""
ROWS = 8
"""Rows of activations are padded to a multiple of this."""


def semi_structured_matmul_torch(
    x: Tensor, values: Tensor, layout: SemiStructuredLayout, bias: Tensor | None = None
) -> Tensor:
    """Forward on ``x[M, K]``; see :func:`fpe.kernels.semi_structured_matmul`."""
    weight = _compressed(values, layout.codes, layout.shape[1])
    return _multiply(x, weight, None if bias is None else bias.flatten()).unflatten(-1, layout.values_shape[:2])


def semi_structured_matmul_t_torch(dy: Tensor, values: Tensor, layout: SemiStructuredLayout) -> Tensor:
    """The gradient dX: with the transposed weight where that is 2:4 and its shape fits, else by a dense matmul."""
    n, k = layout.shape
    if layout.children == 1 or why_not_shape(dy, k, 2 * n):
        return semi_structured_matmul_t_eager(dy, values, layout)
    return _multiply(dy.transpose(1, 2).flatten(1), _compressed_transposed(values, layout.codes, k))


def semi_structured_grad_torch(dy: Tensor, x: Tensor, layout: SemiStructuredLayout) -> Tensor:
    """The gradient dW: a dense product, of which the stored places are taken."""
    return semi_structured_grad_eager(dy, x, layout)


@constant_to_compile
def has_cusparselt() -> bool:
    """Whether this build of PyTorch contains cuSPARSELt; that does not mean that there is a GPU."""
    return torch.backends.cusparselt.is_available()


def goes_to_cusparselt(operand: Tensor) -> bool:
    """Whether cuSPARSELt runs a call with this operand; CUTLASS's format is used otherwise."""
    return has_cusparselt() and _on_gpu(operand)


def why_not_shape(operand: Tensor, outputs: int, inputs: int) -> str | None:
    """Returns why ``torch.sparse`` cannot take a weight ``[outputs, inputs]``, or ``None`` if it can."""
    name, (rows, columns) = ("cuSPARSELt", CUSPARSELT) if goes_to_cusparselt(operand) else ("CUTLASS", CUTLASS)
    if not outputs or not inputs or outputs % rows or inputs % columns:
        return (
            f"{name} takes outputs (all children's) in multiples of {rows} and inputs in multiples of {columns}, got "
            f"{outputs} and {inputs}"
        )
    return None


def multiply_interleaved(
    x: Tensor, w: Tensor, alpha: int, layout: SemiStructuredLayout, bias: Tensor | None = None
) -> Tensor:
    """The product from which :func:`~fpe.kernels.partition.interleaved.as_merge` makes ``merge_matmul``."""
    return _multiply(x, _compressed_parent(w, alpha, layout.codes, layout.kept, layout.shape[1]), bias)


@once_per_version
def _compressed(values: Tensor, codes: Tensor, k: int) -> SparseSemiStructuredTensor:
    return to_sparse_semi_structured(values, SemiStructuredLayout((codes.shape[0], k), codes, None, values.shape[0]))


@once_per_version
def _compressed_transposed(values: Tensor, codes: Tensor, k: int) -> SparseSemiStructuredTensor:
    layout = transposed_layout(codes, k)
    if why_not_triton(values):
        plain, _ = SemiStructuredLayout((codes.shape[0], k), codes, None, 2).transposed(values)
        return to_sparse_semi_structured(plain, layout)
    from .pack import pack_transposed

    return _tensor(lambda form: pack_transposed(values, codes, k, form, layout.codes), layout, values)


@once_per_version
def _compressed_parent(w: Tensor, alpha: int, codes: Tensor, kept: Tensor | None, k: int) -> SparseSemiStructuredTensor:
    layout = SemiStructuredLayout((w.shape[0], k), codes, kept, 1)
    if why_not_triton(w):
        return to_sparse_semi_structured(layout.from_parent(w), layout)
    from .pack import pack_parent

    return _tensor(lambda form: pack_parent(w, alpha, kept, form, codes, k), layout, w)


def _multiply(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for a compressed ``weight``; the bias is added before the result is rounded."""
    m = x.shape[0]
    if not m:
        return x.new_empty(0, weight.shape[0])
    columns = pad(x, (0, 0, 0, -m % ROWS)).t()
    if isinstance(weight, SparseSemiStructuredTensorCUTLASS):
        assert weight.packed is not None and weight.meta is not None
        if bias is None:
            y = torch._sparse_semi_structured_mm(weight.packed, weight.meta, columns)
        else:
            y = torch._sparse_semi_structured_addmm(bias, weight.packed, weight.meta, columns)
        return y.t()[:m].contiguous()
    key = (*weight.shape, columns.shape[1], x.dtype, x.device, bias is None)
    algorithm = _ALGORITHMS.get(key)
    if algorithm is None:
        algorithm = _ALGORITHMS[key] = torch._cslt_sparse_mm_search(
            weight.packed, columns, bias=bias, transpose_result=True
        )
    y = torch._cslt_sparse_mm(weight.packed, columns, bias=bias, transpose_result=True, alg_id=algorithm)
    return y[:m].contiguous()


_ALGORITHMS: dict[tuple[Any, ...], int] = {}
"""Algorithms of cuSPARSELt by outputs, inputs, rows, dtype, device and bias or none, searched when first met."""


def _on_gpu(values: Tensor) -> bool:
    return values.is_cuda


# Conversions.


def to_sparse_semi_structured(values: Tensor, layout: SemiStructuredLayout) -> SparseSemiStructuredTensor:
    """PyTorch's own tensor of the same weight, all children's rows one after the other.

    Args:
        values: ``[children, N, 2 * quads]``, float16 or bfloat16, zero where there is no edge.
        layout: Their layout. ``children * N`` must be a multiple of 32 and ``K`` of 64; on a GPU, where PyTorch has
            cuSPARSELt, both of 16.

    Returns:
        A ``SparseSemiStructuredTensorCUSPARSELT`` where PyTorch has cuSPARSELt and the values are on a GPU, else a
        ``SparseSemiStructuredTensorCUTLASS``; ``[children * N, K]``.

    Raises:
        TypeError: The values are not 16-bit floats.
        ValueError: The shape does not fit.
    """
    if values.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"to_sparse_semi_structured: values must be float16 or bfloat16, got {values.dtype}")
    outputs, inputs = layout.children * layout.shape[0], layout.shape[1]
    reason = why_not_shape(values, outputs, inputs)
    if reason:
        raise ValueError(f"to_sparse_semi_structured: {reason}")
    if why_not_triton(values):
        forms = {"rows": values.flatten(0, 1).contiguous, "dense": layout.to_dense(values).flatten(0, 1).contiguous}
        return _tensor(lambda form: forms[form](), layout, values)
    from .pack import pack_values

    return _tensor(lambda form: pack_values(values, form, layout.codes, inputs), layout, values)


def _tensor(make: "Callable[[Form], Tensor]", layout: SemiStructuredLayout, like: Tensor) -> SparseSemiStructuredTensor:
    """PyTorch's own tensor from what makes the weight in a form: ``"dense"`` for cuSPARSELt, ``"rows"`` for CUTLASS."""
    outputs, inputs = layout.children * layout.shape[0], layout.shape[1]
    shape, rest = torch.Size((outputs, inputs)), (None, None, None)
    if goes_to_cusparselt(like):
        return SparseSemiStructuredTensorCUSPARSELT(shape, torch._cslt_compress(make("dense")), None, *rest)
    return SparseSemiStructuredTensorCUTLASS(
        shape, make("rows"), _cutlass_metadata(layout.codes, layout.children, inputs), *rest
    )


@once_per_version
def _cutlass_metadata(codes: Tensor, children: int, inputs: int) -> Tensor:
    """Codes of all children's rows in the order in which CUTLASS takes them."""
    layout = SemiStructuredLayout((codes.shape[0], inputs), codes, None, children)
    outputs, nibbles = children * codes.shape[0], layout.nibbles().flatten(0, 1)
    own = pack_metadata(nibbles[:, ::2] | (nibbles[:, 1::2] << 4), inputs // 4)[: outputs // 32, : inputs // 32]
    return own.transpose(0, 1).contiguous().view(torch.int16).view(outputs, inputs // 16)


def from_sparse_semi_structured(tensor: SparseSemiStructuredTensor) -> tuple[Tensor, SemiStructuredLayout]:
    """The values and layout (one child) of one of PyTorch's 2:4 tensors.

    Args:
        tensor: A ``SparseSemiStructuredTensor`` ``[N, K]``. cuSPARSELt does not tell where its values lie; of its
            tensors the entries that are not zero are taken.

    Returns:
        Values ``[1, N, 2 * quads]`` and their layout.

    Raises:
        TypeError: ``tensor`` is no such tensor.
    """
    if not isinstance(tensor, SparseSemiStructuredTensor):
        raise TypeError(
            f"from_sparse_semi_structured: tensor must be a SparseSemiStructuredTensor, got {type(tensor).__name__}"
        )
    outputs, inputs = tensor.shape
    if tensor.meta is None or tensor.packed is None:
        dense = tensor.to_dense()
        layout = SemiStructuredLayout.from_mask(dense != 0)
        return layout.from_dense(dense), layout
    chunks = tensor.meta.contiguous().view(inputs // 32, outputs // 32, 8, 2, 2, 2)  # instruction, tile, g, half, chunk
    codes = chunks.permute(1, 3, 5, 2, 0, 4).reshape(outputs, inputs // 16).contiguous().view(torch.uint8)
    return tensor.packed[None], SemiStructuredLayout((outputs, inputs), codes)


OPERATIONS = {
    "semi_structured_matmul": semi_structured_matmul_torch,
    "semi_structured_matmul_t": semi_structured_matmul_t_torch,
    "semi_structured_grad": semi_structured_grad_torch,
    "merge_matmul": as_merge(multiply_interleaved),
}
