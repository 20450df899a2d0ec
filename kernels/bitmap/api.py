"""Public bitmap operations: checks and choice of backend."""

from torch import Tensor

from ..checks import check_tensor
from ..dispatch import choose_backend
from . import ops
from .backends import BACKENDS
from .existence import Kept, check_kept, index_of, seed_of


def unpack_values(values: Tensor, kept: Kept, *, backend: str = "auto") -> Tensor:
    """Writes packed values to their places: returns the weight, zero where no entry exists.

    Gradient: ``dvalues = pack_values(dw, kept)``.

    Args:
        values: ``[nnz]``, float16, bfloat16, float32 or float64.
        kept: Which entries exist: :class:`Bitmap` or :class:`SeededHoles`.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        ``w[N, K]`` in the dtype of ``values``; contiguous by columns where ``kept`` is transposed.

    Raises:
        TypeError: ``values`` is not a tensor or has the wrong dtype, or ``kept`` is neither.
        ValueError: Sizes, devices or ``backend`` do not fit.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "unpack_values"
    check_tensor(op, "values", values, (None,))
    check_kept(op, kept, values)
    check_tensor(op, "values", values, (kept.nnz,))
    chosen = choose_backend(op, backend, values, BACKENDS)
    w = ops.unpack_values(values, *index_of(kept), seed_of(kept), *kept.shape, chosen)
    return w.T if kept.transposed else w


def pack_values(w: Tensor, kept: Kept, *, backend: str = "auto") -> Tensor:
    """Takes the values at the kept places of a weight, in order.

    Gradient: ``dw = unpack_values(dvalues, kept)``.

    Args:
        w: ``[N, K]``, float16, bfloat16, float32 or float64. Entries that do not exist are ignored.
        kept: Which entries exist: :class:`Bitmap` or :class:`SeededHoles`.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        ``values[nnz]`` in the dtype of ``w``.

    Raises:
        TypeError: ``w`` is not a tensor or has the wrong dtype, or ``kept`` is neither.
        ValueError: Sizes, devices or ``backend`` do not fit.
        UnsupportedError: The backend that is asked for by name cannot run this call; a ``ValueError``.
    """
    op = "pack_values"
    check_tensor(op, "w", w, (None, None))
    check_kept(op, kept, w)
    check_tensor(op, "w", w, kept.sizes)
    chosen = choose_backend(op, backend, w, BACKENDS)
    stored = w.T if kept.transposed else w
    return ops.pack_values(stored, *index_of(kept), seed_of(kept), kept.nnz, chosen)
