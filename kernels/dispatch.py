"""Which implementation runs an operation: a pure choice, never a silent fallback.

:func:`choose_backend` says what can run, when an operation is called. Where labels follow no blocks two implementations
can: the packed kernels and a dense matmul of the masked weight. Which is faster depends on the batch, so
:func:`ranked` decides when the operation runs, by the cost model that ``fpe explain`` prints.
"""

import json
from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec

import torch
from torch import Tensor

from .device import arch_of, fences_copies, interpreting
from .model import PUBLISHED, Roof, candidates, roof_named
from .tables import file_name

BACKENDS = ("auto", "triton", "eager")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_ARCH = 80


class UnsupportedError(ValueError):
    """A backend that was insisted on does not take this call: its device, dtype, sizes or structure; it says why."""


def choose_backend(
    op: str,
    backend: str,
    operand: Tensor,
    limit: str | None = None,
    by_cost: bool = False,
    more: tuple[str, ...] = (),
) -> str:
    """Resolves a requested backend to one that can run.

    Args:
        op: Name of the operation, for the message.
        backend: ``"auto"`` takes Triton where it can run on the GPU, else the eager twin; ``"triton"`` insists;
            ``"eager"`` is the twin.
        operand: A tensor of the call: its device and dtype decide.
        limit: What of the call the operation's kernels do not take, in words; ``None`` where they take it.
        more: What else the message names where no such backend exists.
        by_cost: Whether ``"auto"`` stays open where both can run, to be decided by :func:`ranked`.

    Raises:
        ValueError: No such backend exists.
        UnsupportedError: The one insisted on cannot run this call; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join((*BACKENDS, *more))}, got {backend!r}")
    if backend == "eager" or (backend == "auto" and not operand.is_cuda):
        return "eager"
    reason = why_not_triton(operand, limit)
    if reason and backend == "triton":
        raise UnsupportedError(f"{op}: backend 'triton' cannot run here: {reason}")
    if reason:
        return "eager"
    return "auto" if by_cost and backend == "auto" else "triton"


CONSTANT = "auto, constant"
"""What ``"auto"`` is called inside where the weights stay from call to call, and compressed forms of them are kept."""


def for_weights(chosen: str, given: Tensor, used: Tensor) -> str:
    """A resolved backend, with a choice that is open marked where the weights stay from call to call.

    They do where no gradient of them is wanted and the operation takes them as they were given: what was cast or masked
    is a new tensor in every call.
    """
    trains = torch.is_grad_enabled() and given.requires_grad
    return CONSTANT if chosen == "auto" and used is given and not trains else chosen


IMPLEMENTATIONS = {
    "packed labels": "triton",
    "masked dense": "eager",
    "sparse tensor cores": "sparse_tensor_core",
    "torch.sparse": "torch",
}
"""Backends by their names in the cost model."""


def ranked(
    op: str,
    m: int,
    n: int,
    k: int,
    alpha: int,
    dtype: str,
    roof: Roof,
    structure: str = "random",
    constant: bool = True,
) -> tuple[str, ...]:
    """The backends of an operation, the one that is predicted to be fastest first; those after ``"eager"`` left out.

    Args:
        op: ``"split_matmul"``, ``"merge_matmul"`` or ``"partition_grad"``.
        m: Rows of activations.
        n: Rows of the weight that the operation is given.
        k: Its columns.
        alpha: Children.
        dtype: As the cost model names it: ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"fp32"``.
        roof: Of the device.
        structure: As the cost model names it.
        constant: Whether the weights stay from call to call.
    """
    if min(m, n, k) < 1:
        return ("eager",)
    every = candidates(op, structure, m, n, k, alpha, dtype, roof, constant=constant)
    found = [c for c in every if not c.reason_not]
    names = [IMPLEMENTATIONS[c.name] for c in sorted(found, key=lambda c: c.seconds) if c.name in IMPLEMENTATIONS]
    return tuple(names[: names.index("eager") + 1])


def ranked_here(
    op: str, m: int, n: int, k: int, alpha: int, operand: Tensor, structure: str = "random", constant: bool = True
) -> tuple[str, ...]:
    """:func:`ranked` on the device and in the type of an operand."""
    return _ranked_on(op, m, n, k, alpha, dtype_name(operand), operand.get_device(), structure, constant)


@lru_cache(maxsize=4096)
def _ranked_on(
    op: str, m: int, n: int, k: int, alpha: int, dtype: str, index: int, structure: str, constant: bool
) -> tuple[str, ...]:
    return ranked(op, m, n, k, alpha, dtype, roof_of(index), structure, constant)


def dtype_name(operand: Tensor) -> str:
    """What the cost model calls the type that an operand's products are computed in."""
    if operand.dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}[operand.dtype]


@cache
def roof_of(index: int) -> Roof:
    """The roof of a CUDA device: the measured one that is shipped, else what is published of it or of its kind."""
    return roof_for(torch.cuda.get_device_name(index), arch_of(torch.device("cuda", index)))


def roof_for(name: str, arch: int) -> Roof:
    """The roof of a GPU by its name; for one that is not known, the slowest published one of its architecture.

    Measured roofs are ``kernels/configs/roof_<name>.json``, as ``fpe gpu`` writes them.
    """
    shipped = files(__package__) / "configs" / file_name("roof", name)
    if shipped.is_file():
        return Roof.of(json.loads(shipped.read_text()), str(shipped))
    try:
        return roof_named(name)
    except ValueError:
        alike = [roof for roof in PUBLISHED.values() if roof.arch == arch] or list(PUBLISHED.values())
        return min(alike, key=lambda roof: roof.bandwidth)


@cache
def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def why_not_triton(operand: Tensor, limit: str | None = None) -> str | None:
    """What keeps Triton from running a call, in words; ``None`` where it can."""
    if not triton_installed():
        return "Triton is not installed"
    if not operand.is_cuda and not interpreting():
        return f"it needs a CUDA device (or TRITON_INTERPRET=1), the tensors are on {operand.device}"
    if operand.dtype not in TRITON_DTYPES:
        return f"it takes float16, bfloat16 and float32, got {operand.dtype}"
    return (too_old(operand.device) or _unfenced(operand.device) if operand.is_cuda else None) or limit


def _unfenced(device: torch.device) -> str | None:
    """Why the installed Triton's kernels may read stale shared memory on a device, in words; ``None`` where not.

    On 9.0 the kernels set the fence that is missing (:attr:`Device.sets_fence`). Further on Triton cannot pipeline one.
    """
    arch = arch_of(device)
    if not 100 <= arch < 120 or fences_copies():
        return None
    return f"on compute capability {arch / 10} it needs Triton 3.7.1 or newer: older ones leave out a fence"


def too_old(device: torch.device) -> str | None:
    """What keeps the kernels from a CUDA device, in words; ``None`` where nothing does."""
    arch = arch_of(device)
    return f"it needs compute capability {MIN_ARCH / 10} or newer, got {arch / 10}" if arch < MIN_ARCH else None
