"""Which implementation runs an operation: a pure choice, never a silent fallback.

:func:`choose_backend` says what can run, when an operation is called. Where several can and which is fastest depends on
the batch, :func:`fastest` decides when the operation runs, by the cost model that ``fpe explain`` prints.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec

import torch
from torch import Tensor

from .cpu import numba_installed
from .device import arch_of, fences_copies, interpreting
from .gpus import OLDEST, architecture
from .here import kernel_wins
from .model import DECOMPRESSED, MASKED_DENSE, Sizes, candidates
from .roofs import Roof, roof_named
from .structures import RANDOM
from .tables import file_name

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class UnsupportedError(ValueError):
    """A backend that was requested by name cannot run this call. The message says why."""


def never(*call: object) -> None:
    """Returns ``None``: the backend can run every call."""


@dataclass(frozen=True)
class Backend:
    """A way to run the operations of a family, under the name that callers give it.

    Attributes:
        module: Where they are (:func:`fpe.kernels.library.implementation`).
        in_model: What the cost model calls it.
        why_not: Returns why it cannot run a call, or ``None``. It takes the tensor whose device and dtype decide, and
            whatever else matters for the calls of the family.
    """

    module: str
    in_model: str
    why_not: Callable[..., str | None] = never


def choose_backend(
    op: str, requested: str, operand: Tensor, backends: Mapping[str, Backend], *call: object, by_cost: bool = False
) -> str:
    """Resolves a requested backend to one that can run.

    Args:
        op: Name of the operation, for the message.
        requested: A backend's name; or ``"auto"``, for the first that can run on a GPU, and elsewhere the eager twin.
        operand: A tensor of the call: its device and dtype decide.
        backends: Those of the family, the eager twin among them.
        call: What else their ``why_not`` takes.
        by_cost: Whether ``"auto"`` is left open until the operation runs, for :func:`fastest` to decide on a GPU, and
            for :func:`fastest_on_cpu` on a CPU if the family has kernels for it and Numba is installed.

    Returns:
        A name in ``backends``; or, left open, ``"auto"`` on a GPU and :data:`AUTO_ON_CPU` on a CPU.

    Raises:
        ValueError: No such backend exists.
        UnsupportedError: The one insisted on cannot run this call; the message says why.
    """
    if requested == "auto":
        if not operand.is_cuda:
            open_there = by_cost and operand.is_cpu and "cpu" in backends and numba_installed()
            return AUTO_ON_CPU if open_there else "eager"
        return "auto" if by_cost else next(name for name, b in backends.items() if not b.why_not(operand, *call))
    if requested not in backends:
        raise ValueError(f"{op}: backend must be one of {', '.join(('auto', *backends))}, got {requested!r}")
    reason = backends[requested].why_not(operand, *call)
    if reason:
        raise UnsupportedError(f"{op}: backend {requested!r} cannot run here: {reason}")
    return requested


def fastest(
    op: str,
    sizes: tuple[int, int, int, int],
    operand: Tensor,
    backends: Mapping[str, Backend],
    *call: object,
    structure: str = RANDOM,
    constant: bool = True,
    transposed: bool = False,
) -> str:
    """The backend that is predicted to be fastest of those that can run.

    Args:
        op: ``"split_matmul"``, ``"merge_matmul"`` or ``"partition_grad"``.
        sizes: ``(m, n, k, alpha)`` of the weight as the operation takes it.
        operand: A tensor of the call: its device and dtype decide.
        backends: Those of the family.
        call: What else their ``why_not`` takes.
        structure: As the cost model names it.
        constant: Whether the weights stay from call to call.
        transposed: Whether the weight is stored as its transpose.
    """
    if operand.dtype in TRITON_DTYPES:
        names = {backend.in_model: name for name, backend in backends.items()}
        order = ranked_on(operand.get_device(), op, sizes, dtype_name(operand), structure, constant, transposed)
        for known in order:
            if known in names and not backends[names[known]].why_not(operand, *call):
                return names[known]
    return "eager"


def fastest_of_kept(op: str, sizes: tuple[int, int, int, int], kept: float, operand: Tensor, transposed: bool) -> str:
    """The faster way to run an operation on kept values, as the cost model names it; see :func:`fastest`.

    The twin is none: where Triton runs, it decompresses quicker.

    Args:
        op: As there.
        sizes: As there.
        kept: Share of the entries that exist.
        operand: A CUDA tensor of the call: its device and dtype decide.
        transposed: As there.
    """
    share = round(kept, 2)  # few different ones: answers are kept
    order = ranked_on(operand.get_device(), op, sizes, dtype_name(operand), RANDOM, True, transposed, share)
    return next((name for name in order if name != EAGER), DECOMPRESSED)


def fastest_on_cpu(
    op: str,
    sizes: tuple[int, int, int, int],
    operand: Tensor,
    backends: Mapping[str, Backend],
    *call: object,
    density: float | None = None,
) -> str:
    """:func:`fastest` on a CPU, where the model is that of :mod:`.here`: its kernels, or the eager twin.

    It is the twin where nobody has measured the machine (``fpe here``).

    Args:
        op: As :func:`ranked` takes it; no CPU kernel computes ``"partition_grad"``.
        sizes: ``(m, n, k, alpha)``.
        operand: A tensor of the call: its dtype decides.
        backends: Those of the family.
        call: What else their ``why_not`` takes.
        density: Share of the entries that exist, where the weight is stored as its kept values.
    """
    able = op != "partition_grad" and not backends["cpu"].why_not(operand, *call)
    return "cpu" if able and kernel_wins(*sizes, operand.dtype, "twin", density) else "eager"


def stays(given: Tensor, used: Tensor) -> bool:
    """Whether a weight is the same tensor from call to call, so that forms of it can be kept.

    It is where no gradient of it is wanted and the operation takes it as it was given: what was cast or masked is a new
    tensor in every call.
    """
    return used is given and not (torch.is_grad_enabled() and given.requires_grad)


EAGER = MASKED_DENSE
"""What the cost model calls the eager twin; it can always run."""
AUTO_ON_CPU = "auto on a CPU"
"""A choice that stays open until the operation runs, for :func:`fastest_on_cpu`."""
CPU = "labels on a CPU"
"""The kernel that runs on CPUs, whose cost is a model of its own (:mod:`.here`)."""


def ranked(op: str, sizes: Sizes, roof: Roof, constant: bool = True, transposed: bool = False) -> tuple[str, ...]:
    """The candidates of the cost model, the one that is predicted to be fastest first; those after the twin left out.

    Arguments are those of :func:`~fpe.kernels.model.candidates`; sizes may be 0 here.
    """
    if min(sizes.m, sizes.n, sizes.k) < 1:
        return (EAGER,)
    every = candidates(op, sizes, roof, constant, transposed)
    names = [c.name for c in sorted(every, key=lambda c: c.seconds) if not c.reason_not]
    return tuple(names[: names.index(EAGER) + 1])


@lru_cache(maxsize=4096)
def ranked_on(
    index: int,
    op: str,
    sizes: tuple[int, int, int, int],
    dtype: str,
    structure: str,
    constant: bool,
    transposed: bool,
    kept: float | None = None,
) -> tuple[str, ...]:
    """:func:`ranked` on a CUDA device by its index, kept: a host asks before every call."""
    return ranked(op, Sizes(*sizes, structure, dtype, kept=kept), roof_of(index), constant, transposed)


def dtype_name(operand: Tensor) -> str:
    """What the cost model calls the type that an operand's products are computed in."""
    if operand.dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}[operand.dtype]


@cache
def roof_of(index: int) -> Roof:
    """The roof of a CUDA device: the measured one that is shipped, else what is published of it or of its like."""
    return roof_for(torch.cuda.get_device_name(index), arch_of(torch.device("cuda", index)))


def roof_for(name: str, arch: int) -> Roof:
    """The roof of a GPU by its name, measured if one is shipped, else :func:`~fpe.kernels.roofs.roof_named`.

    Measured roofs are ``kernels/configs/roof_<name>.json``, as ``fpe gpu`` writes them.
    """
    shipped = files(__package__) / "configs" / file_name("roof", name)
    if shipped.is_file():
        return Roof.of(json.loads(shipped.read_text()), str(shipped))
    return roof_named(name, max(arch, OLDEST))


@cache
def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def why_not_triton(operand: Tensor, limit: str | None = None) -> str | None:
    """Returns why Triton cannot run a call, or ``None`` if it can."""
    if not triton_installed():
        return "Triton is not installed"
    if not operand.is_cuda and not interpreting():
        return f"it needs a CUDA device (or TRITON_INTERPRET=1), the tensors are on {operand.device}"
    if operand.dtype not in TRITON_DTYPES:
        return f"it takes float16, bfloat16 and float32, got {operand.dtype}"
    if not operand.is_cuda:
        return limit
    arch = arch_of(operand.device)
    return _too_old(arch) or _unfenced(arch) or limit


def _unfenced(arch: int) -> str | None:
    """Returns why the installed Triton's kernels may read stale shared memory on a device, or ``None``.

    On 9.0 the kernels set the fence that is missing (:attr:`Device.sets_fence`). Further on Triton cannot pipeline one.
    """
    if architecture(arch).matrix != "tcgen05.mma" or fences_copies():
        return None
    return f"on compute capability {arch / 10} it needs Triton 3.7.1 or newer: older ones leave out a fence"


def too_old(device: torch.device) -> str | None:
    """Returns why the kernels cannot run on a CUDA device, or ``None`` if they can."""
    return _too_old(arch_of(device))


def _too_old(arch: int) -> str | None:
    return f"it needs compute capability {OLDEST / 10} or newer, got {arch / 10}" if arch < OLDEST else None
