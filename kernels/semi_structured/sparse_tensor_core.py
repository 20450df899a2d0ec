"""The semi-structured operations on sparse tensor cores: launcher, dX through the transposed weight, self-check."""

import warnings
from collections.abc import Callable
from functools import cache
from math import ceil

import torch
from torch import Tensor

from ..activations import finish
from ..device import device_of
from ..memo import constant_to_compile, once_per_version
from ..partition.eager import split_matmul_eager
from ..partition.interleaved import as_merge
from ..partition.seeded import SeededLabels
from ..tables import choose
from .config import STEP, SparseConfig, SparseProblem
from .derived import metadata, transposed_layout
from .eager import semi_structured_matmul_eager
from .fragments import TILE_ROWS, Fragments, pack_seeded, pack_weights
from .layout import SemiStructuredLayout
from .pack import pack_parent, pack_transposed, pack_values
from .triton import semi_structured_grad_triton, semi_structured_matmul_t_triton


def semi_structured_matmul_sparse_tensor_core(
    x: Tensor,
    values: Tensor,
    layout: SemiStructuredLayout,
    bias: Tensor | None = None,
    config: SparseConfig | None = None,
) -> Tensor:
    """Forward on ``x[M, K]``; see :func:`fpe.kernels.semi_structured_matmul`. ``config`` overrides the chosen one."""
    return _multiply(x, _packed(values, layout.codes), layout.shape[0], bias, config)


def semi_structured_matmul_t_sparse_tensor_core(
    dy: Tensor, values: Tensor, layout: SemiStructuredLayout, config: SparseConfig | None = None
) -> Tensor:
    """The gradient dX on ``dy[M, children, N]``; see :func:`fpe.kernels.semi_structured_matmul_t`.

    With one child the transposed weight is not 2:4: dense tensor cores serve.
    """
    if layout.children == 1:
        return semi_structured_matmul_t_triton(dy, values, layout)
    fragments = _packed_transposed(values, layout.codes, layout.shape[1])
    return _multiply(dy.transpose(1, 2).flatten(1), fragments, layout.shape[1], None, config)[:, 0]


def semi_structured_grad_sparse_tensor_core(dy: Tensor, x: Tensor, layout: SemiStructuredLayout) -> Tensor:
    """The gradient dW, a product of two dense operands: on dense tensor cores."""
    return semi_structured_grad_triton(dy, x, layout)


def multiply_interleaved(
    x: Tensor, w: Tensor, alpha: int, layout: SemiStructuredLayout, bias: Tensor | None = None
) -> Tensor:
    """The product from which :func:`~fpe.kernels.partition.interleaved.as_merge` makes ``merge_matmul``."""
    fragments = _packed_parent(w, alpha, layout.codes, layout.kept, layout.quads)
    return _multiply(x, fragments, w.shape[0], bias, None)[:, 0]


def split_matmul_seeded(
    x: Tensor,
    w: Tensor,
    labels: SeededLabels,
    alpha: int = 2,
    bias: Tensor | None = None,
    activation: str | None = None,
    config: SparseConfig | None = None,
) -> Tensor:
    """``split_matmul`` on ``x[M, K]`` with two children of a seed, whose metadata the kernel computes."""
    fragments = Fragments(_packed_seeded(w, labels), None)
    return finish(_multiply(x, fragments, w.shape[0], bias, config, labels.key), activation)


@once_per_version
def _packed_seeded(w: Tensor, labels: SeededLabels) -> Tensor:
    return pack_seeded(w, labels)


@once_per_version
def _packed(values: Tensor, codes: Tensor) -> Fragments:
    return Fragments(pack_values(values, "fragments"), metadata(codes, values.shape[2] // 2))


@once_per_version
def _packed_transposed(values: Tensor, codes: Tensor, k: int) -> Fragments:
    layout = transposed_layout(codes, k)
    return Fragments(pack_transposed(values, codes, k, "fragments"), metadata(layout.codes, layout.quads))


@once_per_version
def _packed_parent(w: Tensor, alpha: int, codes: Tensor, kept: Tensor | None, quads: int) -> Fragments:
    return Fragments(pack_parent(w, alpha, kept, "fragments"), metadata(codes, quads))


def _multiply(
    x: Tensor, fragments: Fragments, n: int, bias: Tensor | None, config: SparseConfig | None, key: int = 0
) -> Tensor:
    """The product ``[M, children, N]`` with fragments; without metadata they are of the seed that has this ``key``."""
    from ..epilogue import aligned_pairs, summed
    from .gluon import multiply

    m, children = x.shape[0], fragments.weights.shape[0]
    steps = fragments.weights.shape[2] // 2
    config = config or choose(SparseProblem(m, n, steps * STEP, children), device_of(x))
    # The second kernel adds the bias before anything is rounded: with a bias the first one stores float32.
    whole = config.split == 1 and bias is None
    out = x.new_empty((config.split, m, children, n), dtype=x.dtype if whole else torch.float32)
    with torch.cuda.device_of(x):
        if out.numel():
            pairs = aligned_pairs(x, steps * STEP)
            multiply[(ceil(m / config.block_m) * ceil(n / TILE_ROWS), config.split)](
                pairs,
                fragments.weights,
                fragments.metadata,
                out,
                M=m,
                N=n,
                STEPS=steps,
                KEY=key,
                stride_xm=pairs.stride(0),
                stride_os=out.stride(0),
                plane=fragments.weights.stride(0),
                CHILDREN=children,
                BLOCK_M=config.block_m,
                SPLIT=config.split,
                GROUP=config.group,
                STAGES=config.num_stages,
                DTYPE="bf16" if x.dtype == torch.bfloat16 else "f16",
                SEEDED=fragments.metadata is None,
                num_warps=config.num_warps,
                maxnreg=255,  # left to itself the assembler stops at 64 and spills a few bytes
            )
        return summed(out, x, bias)


# The self-check.

Run = Callable[[Tensor, Tensor, SemiStructuredLayout], Tensor]


@constant_to_compile
def is_sound(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether sparse tensor cores compute what the eager twin does on this device: tried once in a process.

    Where they do not, a warning says so, and ``"auto"`` goes on without them. ``torch.compile`` calls this and does not
    trace it.
    """
    return _is_sound(device, dtype)


@cache
def _is_sound(device: torch.device, dtype: torch.dtype) -> bool:
    complaint = self_check(semi_structured_matmul_sparse_tensor_core, device, dtype)
    if complaint:
        warnings.warn(
            f"fpe.kernels: the sparse tensor core kernels are disabled for {dtype} on {device}: {complaint}",
            stacklevel=2,
        )
    return complaint is None


def self_check(run: Run, device: torch.device, dtype: torch.dtype) -> str | None:
    """Compares a forward, and what packs for it, with the eager twins on small integers, where both are exact.

    Args:
        run: The forward, from activations, values and their layout.
        device: Where it runs.
        dtype: Type of the operands, float16 or bfloat16.

    Returns:
        What is wrong, or ``None`` if nothing is.
    """
    generator = torch.Generator().manual_seed(0)
    n, k, m = 136, 200, 11
    owner = torch.rand(n, k // 4, 4, generator=generator).argsort(-1).flatten(1) < 2
    weight = torch.randint(-3, 4, (n, k), generator=generator)
    x = torch.randint(-3, 4, (m, k), generator=generator).to(device, dtype)
    for layout in (
        SemiStructuredLayout.from_mask(owner.to(device)),
        SemiStructuredLayout.from_labels(owner.to(device, torch.uint8)),
    ):
        values = layout.from_dense(weight.to(device, dtype))
        try:
            got = run(x, values, layout)
            misplaced = _misplaced(values, layout)
        except Exception as error:  # a compiler's or a driver's: whatever it is, the kernel is of no use here
            return f"{type(error).__name__}: {error}"
        want = semi_structured_matmul_eager(x.double(), values.double(), layout)
        wrong = int((got.double() != want).sum())
        if wrong:
            return f"{wrong} of {want.numel()} results differ from the eager twin's, {layout.children} children"
        if misplaced:
            return f"{misplaced} are packed otherwise than by the eager packing"
    return _wrong_of_seed(x, weight.to(device, dtype))


def _wrong_of_seed(x: Tensor, w: Tensor) -> str | None:
    """What is wrong with the product of a weight that two children of a seed share."""
    labels = SeededLabels(7, (w.shape[0], w.shape[1]), 2)
    try:
        got = split_matmul_seeded(x, w, labels)
    except Exception as error:  # as above
        return f"{type(error).__name__}: {error}, with labels of a seed"
    want = split_matmul_eager(x.double(), w.double(), labels, 2)
    wrong = int((got.double() != want).sum())
    return f"{wrong} of {want.numel()} results differ from the eager twin's, with labels of a seed" if wrong else None


def _misplaced(values: Tensor, layout: SemiStructuredLayout) -> str | None:
    """Returns where a device's packing differs from the eager packing, or ``None`` if all bits are the same."""
    parent = values[0]
    packed = {
        "values": (pack_values(values, "fragments"), values),
        "a parent's rows": (pack_parent(parent, 2, None, "fragments"), parent[None]),
        "a parent's columns": (pack_parent(parent.T, 2, None, "fragments"), parent.T[None]),
    }
    if layout.children == 2:
        turned = pack_transposed(values, layout.codes, layout.shape[1], "fragments")
        packed["values seen from their outputs"] = turned, layout.transposed(values)[0]
    return next((name for name, (ours, plain) in packed.items() if not torch.equal(ours, pack_weights(plain))), None)


OPERATIONS = {
    "semi_structured_matmul": semi_structured_matmul_sparse_tensor_core,
    "semi_structured_matmul_t": semi_structured_matmul_t_sparse_tensor_core,
    "semi_structured_grad": semi_structured_grad_sparse_tensor_core,
    "merge_matmul": as_merge(multiply_interleaved),
    "split_matmul": split_matmul_seeded,
}
