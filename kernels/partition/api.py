"""Public partition operations: checks, leading batch dimensions, autocast, choice of backend."""

from collections.abc import Container
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import check_activation
from ..bitmap.existence import Kept, check_kept, index_of
from ..bitmap.holes import SeededHoles
from ..bitmap.layout import Bitmap, check_bitmap
from ..checks import as_rows, autocast, check_tensor
from ..dispatch import UnsupportedError, choose_backend, stays
from . import kept as packed
from . import ops
from .backends import MERGE, SPLIT, SPLIT_OF_SEED
from .eager import Labels
from .labels import PackedLabels, check_alpha, digits, row_bytes
from .seeded import SeededLabels


def split_matmul(
    x: Tensor,
    w: Tensor,
    labels: Labels | None,
    alpha: int,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    kept: Kept | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiplies ``x`` by each child's share of the parent's weights: the forward of an expanded layer.

    ``y[m, a, n] = activation(sum_k x[m, k] * w[n, k] * (labels[n, k] == a) + bias[a, n])``

    The activation joins the matmul's epilogue where no gradient is wanted; otherwise it runs after it, because its
    gradient needs its input.

    Gradients: ``dx = merge_matmul(dy, w.T, labels.T)`` and ``dw = partition_grad(dy, x, labels)``.

    Args:
        x: Activations ``[..., K]``, float16, bfloat16, float32 or float64.
        w: The parent's weight ``[N, K]``, same dtype and device; with ``kept`` its kept values ``[nnz]``.
        labels: Which child owns each edge, :class:`PackedLabels`, :class:`SeededLabels` or uint8 ``[N, K]``, where a
            label not below ``alpha`` (``HOLE`` by convention) means that no child does. With packed labels the weight
            must be zero at such edges. The Triton kernels read packed labels and compute those of a seed; a plain table
            is packed in every call. With ``kept`` and one child, none are needed.
        alpha: Children per parent, 1 to 254; at most 8 in the Triton and CPU kernels.
        bias: ``[alpha, N]``, or none.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"silu"`` or none.
        kept: Which entries of the weight exist, if only its kept values are stored (:func:`pack_values`). It must be
            transposed where the labels are. Packed labels then have no holes, because the bitmap says what exists. With
            :class:`SeededLabels` of a whole weight it may be :class:`SeededHoles` of the same seed. The gradient has
            the shape of the values.
        backend: ``"auto"``, ``"triton"``, ``"cpu"``, ``"eager"``; or, without ``kept``, with two children of a seed and
            16-bit floats, ``"sparse_tensor_core"``, which multiplies by a 2:4 weight and computes its metadata from the
            seed. Its gradients run as with ``"auto"``.

    Returns:
        ``y[..., alpha, N]`` in the dtype of ``x``.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype.
        ValueError: Shapes, devices, ``alpha``, ``activation`` or ``backend`` do not fit, or the labels are made for
            another weight, orientation or ``alpha``.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    return _split("split_matmul", "w", x, w, labels, alpha, bias, activation, kept, backend)


def _split(
    op: str,
    name: str,
    x: Tensor,
    w: Tensor,
    labels: Labels | None,
    alpha: int,
    bias: Tensor | None,
    activation: str | None,
    kept: Kept | None,
    backend: str,
) -> Tensor:
    """:func:`split_matmul`, under the name of an operation and of its weight."""
    n, k = _check_weight(op, w, kept, name)
    check_tensor(op, "x", x, (k,), batched=True, on=w)
    check_alpha(op, alpha)
    table, seed, transposed = _check_owners(op, labels, (n, k), alpha, w, kept)
    bias = _check_epilogue(op, bias, (alpha, n), activation, w)
    x, w = autocast(x, w)
    check_tensor(op, "x", x, (k,), batched=True, like=w)
    backends = SPLIT_OF_SEED if isinstance(labels, SeededLabels) and kept is None else SPLIT
    asked = by_labels(op, backend, labels, backends=backends)
    chosen = choose_backend(op, asked, w, backends, alpha, transposed, by_cost=True)
    if kept is not None:
        y = packed.kept_split(
            as_rows(x, 1), w, *index_of(kept), table, seed, bias, activation, alpha, n, transposed, chosen
        )
    else:
        y = ops.split_matmul(as_rows(x, 1), w, table, seed, bias, activation, alpha, transposed, chosen)
    return y.view(*x.shape[:-1], alpha, n)


def merge_matmul(
    z: Tensor,
    w: Tensor,
    labels: Labels | None,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    kept: Kept | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiplies each parent edge by the child that owns it: the forward of the layer after a split.

    ``y[m, n] = activation(sum_k z[m, labels[n, k], k] * w[n, k] + bias[n])``

    The activation joins the matmul's epilogue where no gradient is wanted; otherwise it runs after it.

    Gradients: ``dz = split_matmul(dy, w.T, labels.T, alpha)`` and
    ``dw = partition_grad(z, dy, labels.T).T``.

    Args:
        z: Children's activations ``[..., alpha, K]``, float16, bfloat16, float32 or float64.
        w: The parent's weight ``[N, K]``, same dtype and device; with ``kept`` its kept values ``[nnz]``.
        labels: Which child's activation each edge reads, as :func:`split_matmul` takes them, where a label not
            below ``alpha`` (``HOLE`` by convention) contributes nothing.
        bias: ``[N]``, or none.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"silu"`` or none.
        kept: As in :func:`split_matmul`.
        backend: ``"auto"``, ``"triton"``, ``"cpu"``, ``"eager"``; or, with 2 or 4 children, labels in a table and
            16-bit floats, ``"sparse_tensor_core"`` or ``"torch"``, which multiply by a 2:4 weight
            (:mod:`.interleaved`). Their gradients run as with ``"auto"``.

    Returns:
        ``y[..., N]`` in the dtype of ``z``.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype.
        ValueError: Shapes, devices, alpha (``z.shape[-2]``, 1 to 254; at most 8 in the Triton and CPU kernels),
            ``activation`` or ``backend`` do not fit, or the labels are made for another weight, orientation or alpha.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "merge_matmul"
    n, k = _check_weight(op, w, kept)
    check_tensor(op, "z", z, (None, k), batched=True, on=w)
    alpha = z.shape[-2]
    check_alpha(op, alpha)
    table, seed, transposed = _check_owners(op, labels, (n, k), alpha, w, kept)
    bias = _check_epilogue(op, bias, (n,), activation, w)
    given = w
    z, w = autocast(z, w)
    check_tensor(op, "z", z, (None, k), batched=True, like=w)
    chosen = choose_backend(op, by_labels(op, backend, labels), w, MERGE, alpha, (n, k), by_cost=True)
    if kept is not None:
        y = packed.kept_merge(as_rows(z, 2), w, *index_of(kept), table, seed, bias, activation, n, transposed, chosen)
    else:
        constant = stays(given, w)
        y = ops.merge_matmul(as_rows(z, 2), w, table, seed, bias, activation, constant, transposed, chosen)
    return y.view(*z.shape[:-2], n)


def partition_grad(
    dy: Tensor, x: Tensor, labels: Labels | None, *, kept: Kept | None = None, backend: str = "auto"
) -> Tensor:
    """Weight gradient of both partition matmuls, at the parent's size; zero where nobody owns the edge.

    ``dw[n, k] = sum_m dy[m, labels[n, k], n] * x[m, k]``

    Gradients: ``ddy = split_matmul(x, g, labels, alpha)`` and ``dx = merge_matmul(dy, g.T, labels.T)``
    for an incoming ``g[N, K]``.

    Args:
        dy: Gradient of the children ``[..., alpha, N]``, float16, bfloat16, float32 or float64.
        x: Activations ``[..., K]`` with the same leading dimensions, dtype and device.
        labels: :class:`PackedLabels`, :class:`SeededLabels` or uint8 ``[N, K]``; with ``kept`` and one child, none are
            needed.
        kept: As in :func:`split_matmul`.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` (PyTorch's own matmul) or ``"eager"``.

    Returns:
        ``dw[N, K]`` in the dtype of ``x``; contiguous by columns where packed or seeded labels are transposed. With
        ``kept`` its kept values ``[nnz]``.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype.
        ValueError: Shapes, devices, alpha (``dy.shape[-2]``, 1 to 254; at most 8 in the Triton and CPU kernels) or
            ``backend`` do not fit, or the labels are made for another weight, orientation or alpha.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "partition_grad"
    if kept is not None:
        check_kept(op, kept)
        n, k = kept.sizes
    elif isinstance(labels, (PackedLabels, SeededLabels)):
        n, k = labels.sizes
    else:
        check_tensor(op, "labels", labels, (None, None), dtype=torch.uint8)
        assert labels is not None
        n, k = labels.shape
    check_tensor(op, "x", x, (k,), batched=True)
    check_tensor(op, "dy", dy, (*x.shape[:-1], None, n), on=x)
    dy, x = autocast(dy, x)
    check_tensor(op, "dy", dy, (*x.shape[:-1], None, n), like=x)
    alpha = dy.shape[-2]
    check_alpha(op, alpha)
    table, seed, transposed = _check_owners(op, labels, (n, k), alpha, x, kept)
    chosen = choose_backend(op, by_labels(op, backend, labels), x, SPLIT, alpha, by_cost=True)
    if kept is not None:
        return packed.kept_grad(
            as_rows(dy, 2), as_rows(x, 1), *index_of(kept), table, seed, kept.nnz, transposed, chosen
        )
    return ops.partition_grad(as_rows(dy, 2), as_rows(x, 1), table, seed, transposed, chosen)


class Given(NamedTuple):
    """Labels as the operations take them: a table, or a seed and where the weight begins.

    Attributes:
        table: uint8, plain ``[N, K]`` or planes of bits ``[P, N, bytes]``; none for labels of a seed and for one child.
        seed: The seed, and the row and column at which the weight begins; with holes of the seed also how many entries
            a row keeps. Empty where no seed is used.
        transposed: Whether they are those of the transposed weight.
    """

    table: Tensor | None
    seed: list[int]
    transposed: bool


def masked_matmul(
    x: Tensor,
    values: Tensor,
    kept: Bitmap,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Multiplies by a weight with any mask: :func:`split_matmul` with one child.

    ``y = activation(x @ W.T + bias)``, ``W = unpack_values(values, kept)``

    Gradients: ``dx = masked_matmul(dy, values, kept.T)`` and ``dvalues`` is :func:`partition_grad` with one child.

    Args:
        x: Activations ``[..., K]``, float16, bfloat16, float32 or float64.
        values: The kept values of ``W[N, K]``, ``[nnz]``, same dtype and device.
        kept: Which entries exist. Rows and columns may be empty.
        bias: ``[N]``, or none.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"silu"`` or none.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"eager"``.

    Returns:
        ``y[..., N]`` in the dtype of ``x``.

    Raises:
        TypeError: An operand is not a tensor or has the wrong dtype.
        ValueError: Shapes, devices, ``activation`` or ``backend`` do not fit.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "masked_matmul"
    check_tensor(op, "values", values, (None,))
    check_bitmap(op, kept, values)
    if bias is not None:
        check_tensor(op, "bias", bias, (kept.sizes[0],), like=values)
        bias = bias.unsqueeze(0)
    return _split(op, "values", x, values, None, 1, bias, activation, kept, backend).squeeze(-2)


def _check_weight(op: str, w: Tensor, kept: Kept | None, name: str = "w") -> tuple[int, int]:
    """The sizes of a weight, or of the one whose kept values ``w`` are."""
    if kept is None:
        check_tensor(op, name, w, (None, None))
        return w.shape[0], w.shape[1]
    check_kept(op, kept)
    check_tensor(op, name, w, (kept.nnz,))
    return kept.sizes


def _check_owners(op: str, labels: object, shape: tuple[int, int], alpha: int, on: Tensor, kept: Kept | None) -> Given:
    """Returns what :func:`check_labels` does; with ``kept``, both have the orientation in which it is stored."""
    if kept is None:
        return check_labels(op, labels, shape, alpha, on)
    check_kept(op, kept, on)
    if isinstance(kept, SeededHoles) and not (
        isinstance(labels, SeededLabels) and (labels.seed, labels.offsets) == (kept.seed, (0, 0))
    ):
        raise ValueError(f"{op}: holes of seed {kept.seed} go with labels of that seed for the whole weight")
    if labels is None:
        if alpha != 1:
            raise ValueError(f"{op}: labels must say which of {alpha} children owns each edge, got None")
        return Given(None, [], kept.transposed)
    given = check_labels(op, labels, shape, alpha, on)
    if isinstance(labels, Tensor):
        return Given(labels.T if kept.transposed else labels, [], kept.transposed)
    assert isinstance(labels, (PackedLabels, SeededLabels))
    if labels.has_holes:
        raise ValueError(f"{op}: labels must be packed without holes beside kept, which says what exists")
    if given.transposed != kept.transposed:
        raise ValueError(
            f"{op}: labels and kept must be stored in one orientation, got transposed = {given.transposed} and "
            f"{kept.transposed}"
        )
    if isinstance(kept, SeededHoles):
        return given._replace(seed=[*given.seed, kept.per_row])
    return given


def check_labels(
    op: str, labels: object, shape: tuple[int, int], alpha: int, on: Tensor, name: str = "labels"
) -> Given:
    """What an operation takes of the labels of a weight of some shape."""
    if not isinstance(labels, (PackedLabels, SeededLabels)):
        check_tensor(op, name, labels, shape, dtype=torch.uint8, on=on, is_index=True)
        assert isinstance(labels, Tensor)
        return Given(labels, [], False)
    made = "packed" if isinstance(labels, PackedLabels) else "made"
    if labels.alpha != alpha:
        raise ValueError(f"{op}: {name} must be {made} for alpha = {alpha}, got labels of alpha = {labels.alpha}")
    meant = shape[::-1] if labels.transposed else shape
    if tuple(labels.shape) != tuple(meant):
        hint = f" (they fit the transposed weight: use {name}.T)" if tuple(labels.shape) == tuple(meant[::-1]) else ""
        raise ValueError(f"{op}: {name} must be {made} for a weight {list(shape)}, got {list(labels.sizes)}{hint}")
    if isinstance(labels, SeededLabels):
        labels.check(op, name)
        return Given(None, [labels.seed, *labels.offsets], labels.transposed)
    wanted = (digits(alpha) + labels.has_holes, meant[0], row_bytes(meant[1]))
    check_tensor(op, f"{name}.planes", labels.planes, wanted, dtype=torch.uint8, on=on, is_index=True)
    return Given(labels.planes, [], labels.transposed)


def by_labels(op: str, backend: str, *several: Labels | None, backends: Container[str] = SPLIT) -> str:
    """The backend that is asked for; ``"eager"`` instead of ``"auto"`` where no kernel takes the labels.

    Args:
        op: Name of the operation, for the message.
        backend: As the caller gave it.
        several: The labels of the call.
        backends: Those that take labels of a seed.

    Raises:
        UnsupportedError: The backend that is asked for by name cannot run with such labels.
    """
    for labels in several:
        if isinstance(labels, SeededLabels) and backend != "eager":
            able = backend == "auto" or backend in backends
            reason = labels.why_no_kernel if able else "it takes labels in a table, not a seed"
            if reason and backend in MERGE:
                raise UnsupportedError(f"{op}: backend {backend!r} cannot run here: {reason}")
            backend = "eager" if reason and backend == "auto" else backend
    return backend


def _check_epilogue(
    op: str, bias: Tensor | None, shape: tuple[int, ...], activation: str | None, w: Tensor
) -> Tensor | None:
    check_activation(op, activation)
    if bias is None:
        return None
    check_tensor(op, "bias", bias, shape, like=w)
    return autocast(bias)[0]
