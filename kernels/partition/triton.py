"""The partition operations on the GPU: which kernel is launched, and on which operands.

Few rows of 16-bit activations go to the kernels of :mod:`fpe.kernels.partition.gluon`, all others to those of
:mod:`fpe.kernels.partition.tiles`. All may split the reduction over programs for occupancy; the partial sums then meet
in one reduction, in a fixed order, so that results do not change between runs.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bitmap.existence import Kept
from ..bitmap.holes import SeededHoles
from ..bitmap.layout import BASE, NARROW, RUN, WORD, Bitmap
from ..bitmap.triton import AS_BITS
from ..device import device_of, interpreting, stored_dtype
from ..epilogue import aligned_pairs, launch_options, launch_reduce, rows_contiguous
from ..tables import choose
from . import tiles
from .config import Config, Problem, columns_of, in_pairs, warps_of
from .eager import Labels, stored_like, table
from .labels import PackedLabels, digits, pack_planes, row_bytes
from .seeded import SeededLabels


def split_matmul_triton(
    x: Tensor,
    w: Tensor,
    labels: Labels | None,
    alpha: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    config: Config | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Forward on ``x[M, K]``; see :func:`fpe.kernels.split_matmul`.

    ``config`` overrides the chosen one. Beside ``kept`` labels are packed, of a seed, or none with one child.
    """
    x = rows_contiguous(x)
    with torch.cuda.device_of(x):
        return _launch_multiply(x, x.stride(0), 0, w, labels, alpha, False, bias, activation, config, kept)


def merge_matmul_triton(
    z: Tensor,
    w: Tensor,
    labels: Labels | None,
    bias: Tensor | None = None,
    activation: str | None = None,
    config: Config | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Forward on ``z[M, alpha, K]``: see :func:`fpe.kernels.merge_matmul`, and the split's launcher for the rest."""
    z, alpha = rows_contiguous(z), z.shape[1]
    with torch.cuda.device_of(z):
        return _launch_multiply(z, z.stride(0), z.stride(1), w, labels, alpha, True, bias, activation, config, kept)


def partition_grad_triton(
    dy: Tensor, x: Tensor, labels: Labels | None, config: Config | None = None, kept: Kept | None = None
) -> Tensor:
    """The gradient dW: see :func:`fpe.kernels.partition_grad`, and the split's launcher for the rest."""
    dy, x = rows_contiguous(dy), rows_contiguous(x)
    with torch.cuda.device_of(x):
        return _launch_outer(dy, x, labels, config, kept)


TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Types of Triton for those of PyTorch that the kernels take."""


class StoredWeight(NamedTuple):
    """A weight as the kernels read it, and its labels.

    Attributes:
        words: The weight in stored order as integers of 16 or 32 bits, ``[N, K / per_word]``; with ``kept`` its kept
            values ``[nnz]``, an integer each.
        per_word: Weights in one of these integers, 1 or 2.
        planes: The labels' planes in 32-bit words, int32 ``[P, N, words]``; none for labels of a seed, and for one
            child beside ``kept``.
        key: :attr:`SeededLabels.key` of labels of a seed, else 0.
        shape: As it is stored.
        transposed: Whether it is stored as its transpose.
        kept: Which entries exist, where only they are stored.
    """

    words: Tensor
    per_word: int
    planes: Tensor | None
    key: int
    shape: tuple[int, int]
    transposed: bool
    kept: Kept | None = None


def stored_weight(w: Tensor, labels: Labels, alpha: int, keep_order: bool = False) -> StoredWeight:
    """A weight and its labels as the kernels read them.

    Args:
        w: ``[N, K]``.
        labels: Packed, of a seed, or a plain table, which is packed here and whose holes are cleared from a copy of the
            weight.
        alpha: Children.
        keep_order: Whether labels of the transpose are packed again instead of read as they are stored.
    """
    if keep_order and not isinstance(labels, Tensor) and labels.transposed:
        labels = table(labels, w.device)
    if isinstance(labels, Tensor):
        w = torch.where(labels < alpha, w, w.new_zeros(()))
        labels = _packed(labels, alpha)
    stored = rows_contiguous(w.T if labels.transposed else w)
    n, k = stored.shape
    words, per_word = as_words(stored)
    planes, key = _planes_and_key(labels)
    return StoredWeight(words, per_word, planes, key, (n, k), labels.transposed)


def as_words(stored: Tensor) -> tuple[Tensor, int]:
    """Rows of a weight as integers, and the weights in each: two of 16 bits where every row begins at a 32-bit word."""
    if stored.dtype == torch.float32:
        return stored.view(torch.int32), 1
    k = stored.shape[1]
    if k and k % 2 == 0 and stored.stride(0) % 2 == 0 and stored.storage_offset() % 2 == 0:
        return stored.view(torch.int32), 2
    return stored.view(torch.int16), 1


def planes_strides(planes: Tensor | None) -> tuple[int, int]:
    """From plane to plane, and from row to row."""
    return (0, 0) if planes is None else (planes.stride(0), planes.stride(1))


def kept_weight(values: Tensor, labels: PackedLabels | SeededLabels | None, kept: Kept) -> StoredWeight:
    """Kept values, their bitmap and their labels as the kernels read them."""
    words = values.contiguous().view(AS_BITS[values.element_size()])
    planes, key = _planes_and_key(labels)
    return StoredWeight(words, 1, planes, key, kept.shape, kept.transposed, kept)


def _planes_and_key(labels: PackedLabels | SeededLabels | None) -> tuple[Tensor | None, int]:
    """Returns the words of a table, or the key of labels of a seed; an only child has neither."""
    if isinstance(labels, SeededLabels):
        return None, labels.key
    return (None if labels is None else labels.words), 0


def _by_lines(weight: StoredWeight) -> bool:
    """Whether a direct kernel can read kept values: along rows, 16 bytes at a time, fewer than 2^31 of them."""
    bitmap, aligned = isinstance(weight.kept, Bitmap), weight.words.data_ptr() % 16 == 0
    return bitmap and aligned and not weight.transposed and len(weight.words) < NARROW


def _packed(labels: Tensor, alpha: int) -> PackedLabels:
    """Packs a plain table without looking for holes, which would wait for the device."""
    return PackedLabels(pack_planes(labels, alpha), (labels.shape[0], labels.shape[1]), alpha)


def _launch_multiply(
    x: Tensor,
    stride_xm: int,
    stride_xa: int,
    w: Tensor,
    labels: Labels | None,
    alpha: int,
    merge: bool,
    bias: Tensor | None,
    activation: str | None,
    config: Config | None,
    kept: Kept | None,
) -> Tensor:
    m, outputs = x.shape[0], w.shape[0] if kept is None else kept.sizes[0]
    shape = (m, outputs) if merge else (m, alpha, outputs)
    result = x.new_empty(shape, dtype=stored_dtype(x))
    if not result.numel():
        return result.to(x.dtype)
    if kept is None:
        assert labels is not None
        weight = stored_weight(w, labels, alpha)
    else:
        assert not isinstance(labels, Tensor)
        weight = kept_weight(w, labels, kept)
    (n, k), bias = weight.shape, None if bias is None else bias.contiguous()
    op = "merge_matmul" if merge else "split_matmul"
    device = device_of(x)
    pairs = x.element_size() == 2 and not interpreting()
    pairs = pairs and (weight.per_word == 2 and n * k < 2**32 if kept is None else _by_lines(weight))
    seeded = isinstance(labels, SeededLabels)
    problem = Problem(op, m, n, k, weight.transposed, alpha, x.element_size(), pairs, _share(kept), seeded)
    config = config or choose(problem, device)
    out = result if config.split == 1 else x.new_empty((config.split, *shape), dtype=torch.float32)
    if config.direct:
        _launch_direct(x, weight, out, bias, activation, merge, alpha, config)
        if config.split > 1:
            launch_reduce(out, result, bias, activation)
        return result
    programs = triton.cdiv(k, config.block_k) if weight.transposed else triton.cdiv(n, config.block_n)
    tiles._partition_multiply[(triton.cdiv(m, config.block_m) * programs, config.split)](
        x,
        weight.words,
        weight.planes,
        *_index(weight.kept),
        bias,
        out,
        M=m,
        N=n,
        K=k,
        SIZE_WORDS=row_bytes(k) // 4,
        KEY=weight.key,
        NNZ=0 if kept is None else kept.nnz,
        stride_xm=stride_xm,
        stride_xa=stride_xa,
        stride_wn=weight.words.stride(0),
        stride_pp=planes_strides(weight.planes)[0],
        stride_pn=planes_strides(weight.planes)[1],
        SEEDED=weight.planes is None,
        stride_os=result.numel(),
        stride_om=result.stride(0),
        stride_oa=outputs,
        DTYPE=TYPES[x.dtype],
        PER_WORD=2 if in_pairs(problem, config) and isinstance(kept, Bitmap) else weight.per_word,
        MERGE=merge,
        TRANSPOSED=weight.transposed,
        TURNED=device.computed_right,
        GROUP=config.group,
        EVEN=n % config.block_n == 0 and k % config.block_k == 0,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        **_shared_options(config, alpha, x, kept),
    )
    if config.split > 1:
        launch_reduce(out, result, bias, activation)
    return result.to(x.dtype)


REGISTERS = 168
"""Registers of a thread, where so many suffice: three programs of four warps then fit a multiprocessor."""


def turns_ahead(alpha: int, block_m: int, loads: int, merges: bool = False) -> int:
    """How many turns of the loop ahead L2 is asked for weights; 0 where enough loads are in flight without it.

    The sums of more children or rows leave registers for fewer loads, and for fewer programs on a multiprocessor.

    Args:
        alpha: Children.
        block_m: Rows of activations of a program.
        loads: How many loads of 16 bytes of the weight a lane makes in a turn.
        merges: Whether it is a merge on the transpose, where four children and 32 rows leave no register for it.
    """
    if merges and alpha == 4 and block_m > 16:
        return 0
    return max(16 // loads, 1) if alpha > 2 or block_m > 16 else 0


def _launch_direct(
    x: Tensor,
    weight: StoredWeight,
    out: Tensor,
    bias: Tensor | None,
    activation: str | None,
    merge: bool,
    alpha: int,
    config: Config,
) -> None:
    """Multiplies few rows into ``out``, or into its parts where the reduction is split.

    Args:
        x: ``[M, K]``, or ``[M, alpha, K]`` of a merge: 16-bit activations, contiguous along the last dimension.
        weight: The weight in pairs, and its labels.
        out: Contiguous; ``[split, ...]`` float32 where the reduction is split.
        bias: Contiguous, or none.
        activation: As :func:`fpe.kernels.split_matmul` takes it.
        merge: Whether ``x`` has children.
        alpha: Children.
        config: A direct one.
    """
    from .gluon import multiply_rows
    from .gluon_kept import multiply_kept_rows
    from .gluon_transposed import multiply_columns

    words, labels, (n, k), transposed, kept = weight.words, weight.planes, weight.shape, weight.transposed, weight.kept
    m, size_in, size_out = x.shape[0], (n if transposed else k), (k if transposed else n)
    step = config.block_n if transposed else config.block_k
    steps = -(-size_in // step)
    pairs = aligned_pairs(x, steps * step if transposed else -(-k // 8) * 8)
    sums = 1 if merge else alpha
    warps_in, warps_out = warps_of(config, transposed, sums)
    unroll = config.block_n // (16 * warps_in)  # of a transposed one
    each = columns_of(config.block_m, sums) // 8  # a lane's
    loads = unroll * each // 2 if transposed else 8
    pitch = -(-k // WORD) if kept is not None else words.stride(0)
    unit = 4 if pitch % 4 == 0 else 1
    most = 2 if transposed or kept is not None else 4 if merge else 8  # children whose sums leave room for the loads
    common: dict[str, Any] = {
        "stride_xm": pairs.stride(0) // 4,
        "stride_xa": pairs.stride(1) // 4 if merge else 0,
        "KEY": weight.key,
        "stride_pp": 0 if labels is None else labels.stride(0),
        "stride_pn": 0 if labels is None else labels.stride(1),
        "stride_os": m * sums * size_out,
        "stride_om": sums * size_out,
        "stride_oa": size_out,
        "ALPHA": alpha,
        "DIGITS": _digits(alpha, kept),
        "SEEDED": labels is None and alpha > 1,
        "MERGE": merge,
        "WARPS_IN": warps_in,
        "WARPS_OUT": warps_out,
        "BLOCK_M": config.block_m,
        "SPLIT": config.split,
        "UNIT": unit,
        "WHOLE": size_in % step == 0,
        "KIND": "bf16" if x.dtype == torch.bfloat16 else "f16",
        "ACTIVATION": activation if config.split == 1 else None,
        "HAS_BIAS": bias is not None and config.split == 1,
        "num_warps": config.num_warps,
        "maxnreg": REGISTERS if config.block_m <= 16 and alpha <= most else 255,
    }
    grid = -(-m // config.block_m) * -(-size_out // (config.block_k if transposed else config.block_n)), config.split
    shape = {"M": m, "N": n}
    if kept is not None:
        tensors = (pairs, words, *_index(kept), labels, bias, out)
        index = {"K": k, "WORDS": pitch, "NNZ": kept.nnz, "stride_bn": pitch // unit}
        multiply_kept_rows[grid](*tensors, **shape, **index, STEPS_K=steps, BLOCK_N=config.block_n, **common)
        return
    tensors = (pairs, words, labels, bias, out)
    common |= {"stride_wn": pitch // unit, "AHEAD": turns_ahead(alpha, config.block_m, loads, merge and transposed)}
    if transposed:
        columns = {"K": k, "STEPS_N": steps, "UNROLL": unroll, "EACH": each, "WHOLE_COLUMNS": k % 8 == 0}
        pitch = common["stride_pn"] if each == 4 else 0  # a constant of the kernel where it saves the most
        multiply_columns[grid](*tensors, **shape, **columns, PITCH=pitch, **common)
    else:
        multiply_rows[grid](*tensors, **shape, SIZE_WORDS=k // 2, STEPS_K=steps, BLOCK_N=config.block_n, **common)


def _launch_outer(dy: Tensor, x: Tensor, labels: Labels | None, config: Config | None, kept: Kept | None) -> Tensor:
    m, alpha = dy.shape[:2]
    packed = _packed(labels, alpha) if isinstance(labels, Tensor) else labels
    stored = packed if kept is None else kept
    assert stored is not None
    (n, k), transposed = stored.shape, stored.transposed
    shape = (n, k) if kept is None else (kept.nnz,)
    result = x.new_empty(shape, dtype=stored_dtype(x))
    if not result.numel():
        result = result.to(x.dtype)
        return result if labels is None or kept is not None else stored_like(labels, result.T if transposed else result)
    left, right = (x, dy) if transposed else (dy, x)
    planes, key = _planes_and_key(packed)
    config = config or choose(
        Problem("partition_grad", m, n, k, transposed, alpha, x.element_size(), kept=_share(kept)), device_of(x)
    )
    out = result if config.split == 1 else x.new_empty((config.split, *shape), dtype=torch.float32)
    tiles._partition_outer[(triton.cdiv(n, config.block_n) * triton.cdiv(k, config.block_k), config.split)](
        left,
        right,
        planes,
        *_index(kept),
        out,
        M=m,
        N=n,
        K=k,
        SIZE_WORDS=row_bytes(k) // 4,
        KEY=key,
        stride_lm=left.stride(0),
        stride_la=0 if transposed else left.stride(1),
        stride_rm=right.stride(0),
        stride_ra=right.stride(1) if transposed else 0,
        stride_pp=planes_strides(planes)[0],
        stride_pn=planes_strides(planes)[1],
        stride_os=result.numel(),
        SEEDED=planes is None,
        HOLES=packed is not None and packed.has_holes,
        CHILDREN_LEFT=not transposed,
        FENCED=device_of(x).sets_fence,
        GROUP=config.group,
        EVEN=n % config.block_n == 0 and k % config.block_k == 0,
        **_shared_options(config, alpha, x, kept),
    )
    if config.split > 1:
        launch_reduce(out, result)
    result = result.to(x.dtype)
    return result.T if transposed and kept is None else result


def _share(kept: Kept | None) -> float | None:
    """Returns the share of the entries that exist, in hundredths; each has a configuration of its own."""
    return None if kept is None else round(kept.nnz / max(kept.shape[0] * kept.shape[1], 1), 2)


def _digits(alpha: int, kept: Kept | None) -> int:
    """Planes of labels; none of an only child beside ``kept``."""
    return 0 if kept is not None and alpha == 1 else digits(alpha)


def _index(kept: Kept | None) -> tuple[Tensor | None, ...]:
    """Returns the index that says where kept values are."""
    return tuple(t.contiguous() for t in kept.tensors) if isinstance(kept, Bitmap) else (None, None, None)


def _shared_options(config: Config, alpha: int, operand: Tensor, kept: Kept | None) -> dict[str, Any]:
    """Returns the launch options of both kernels."""
    return {
        "ALPHA": alpha,
        "DIGITS": _digits(alpha, kept),
        "KEPT": kept is not None,
        "MADE": isinstance(kept, SeededHoles),
        "KEPT_KEY": kept.key if isinstance(kept, SeededHoles) else 0,
        "PER_ROW": kept.per_row if isinstance(kept, SeededHoles) else 0,
        "RUN": RUN,
        "BASE": BASE,
        "WORD": WORD,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        **launch_options(config, operand),
    }


OPERATIONS = {
    "split_matmul": split_matmul_triton,
    "merge_matmul": merge_matmul_triton,
    "partition_grad": partition_grad_triton,
}
