"""The latency suite: every provider of a case, checked against float64 truth and then timed side by side.

Levels: ``"op"`` is a layer without bias: forward, dX alone, dW alone, forward + backward. ``"layer"`` has a bias.
``"mlp"`` is the layer, an activation and its successor; ``"step"`` a training step of that with Adam.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fpe
from fpe.kernels import model
from fpe.partition import Structure

from . import memory
from .problems import AbsentError, Case, Problem
from .providers import OURS, Provider
from .timing import Call, interleaved

PASSES = {
    "op": ("forward", "dX", "dW", "forward+backward"),
    "layer": ("forward", "forward+backward"),
    "mlp": ("forward", "forward+backward"),
    "step": ("step",),
}
LEVELS = tuple(PASSES)
TOLERANCE = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 1e-2, "bf16": 5e-2}
"""Relative error in the Frobenius norm at which an implementation is wrong and its time is not printed."""


def measure(
    case: Case,
    providers: Sequence[Provider],
    device: str,
    level: str = "op",
    passes: Sequence[str] = (),
    seconds: float = 1.0,
    rounds: tuple[int, int] = (5, 100),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of one case: each provider and pass, timed in turns.

    Args:
        case: Sizes.
        providers: Who takes part.
        device: ``"cuda"`` or ``"cpu"``.
        level: ``"op"``, ``"layer"``, ``"mlp"`` or ``"step"``.
        passes: Of those that the level has; all without one.
        seconds: To spend on each pass, roughly.
        rounds: At least and at most so many samples.
        seed: Of the data.

    Returns:
        Rows with ``level``, ``pass``, ``provider``, the case's columns, and ``milliseconds``, ``low``, ``high``,
        ``samples``, ``host_milliseconds``, ``flops`` (useful: the parent's), ``bytes`` (compulsory) and
        ``implementation`` where the model knows the provider, memory columns; or with ``status``: ``"absent"``,
        ``"wrong"`` or ``"error"``, and a ``reason``, and no time.

    Raises:
        ValueError: The level or a pass is unknown.
    """
    wanted = check_passes(level, passes)
    with float32_as(case.dtype):
        problem = Problem.make(case, device, seed)
        built, rows = _build_all(problem, providers, level)
        for name in wanted:
            rows += _time(problem, built, name, level, seconds, rounds)
    return rows


Built = dict[str, tuple[Provider, nn.Module]]


def _build_all(problem: Problem, providers: Sequence[Provider], level: str) -> tuple[Built, list[dict[str, Any]]]:
    """The providers' modules, checked, and a row for each that is absent or wrong."""
    built: Built = {}
    rows = []
    for provider in providers:
        try:
            module = _build(problem, provider, level)
            _check(problem, provider, module, level)
        except Exception as error:
            rows.append(_untimed(problem.case, provider, level, error))
        else:
            built[provider.name] = provider, module
    return built, rows


def _untimed(case: Case, provider: Provider, level: str, error: Exception, name: str = "") -> dict[str, Any]:
    """The row of a provider that gets no time: absent where it says so or is a peer's, else wrong or an error.

    Raises:
        RuntimeError: The device is lost to this process.
    """
    if "CUDA error" in str(error):
        raise RuntimeError(str(error)) from error
    refuses = isinstance(error, (AbsentError, ImportError, NotImplementedError, ValueError, torch.OutOfMemoryError))
    status = "absent" if refuses or not provider.name.startswith(OURS) else "error"
    status = "wrong" if isinstance(error, WrongResultError) else status
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    row = {"level": level, "provider": provider.name, **case.row(), "status": status, "reason": reason}
    return {**row, "of_pass": name} if name else row


def _time(
    problem: Problem,
    built: Built,
    name: str,
    level: str,
    seconds: float,
    rounds: tuple[int, int],
) -> list[dict[str, Any]]:
    """Rows of one pass, its providers taking turns."""
    case, device = problem.case, problem.x.device.type
    able, rows = {}, []
    for who, (provider, module) in built.items():
        try:
            made = call(problem, module, name, provider.trains)
            if made is not None:
                made()
                able[who] = made
        except Exception as error:
            rows.append(_untimed(case, provider, level, error, name))
    for who, t in interleaved(able, device, seconds, rounds).items():
        provider, module = built[who]
        rows.append(
            {
                "level": level,
                "pass": name,
                "provider": who,
                **case.row(),
                "milliseconds": t.median,
                "low": t.low,
                "high": t.high,
                "samples": t.samples,
                "host_milliseconds": t.host,
                "timer": "events" if device == "cuda" else "wall clock",
                **costs(case, provider, name, level),
                **(memory.columns(module, problem.x) if name in ("forward+backward", "step") else {}),
            }
        )
    return rows


class WrongResultError(ValueError):
    """A provider's result is not the layer's."""


def check_passes(level: str, passes: Sequence[str] = ()) -> tuple[str, ...]:
    """The passes of a level that are wanted, all of them without one.

    Raises:
        ValueError: The level or a pass is unknown.
    """
    if level not in PASSES:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    unknown = set(passes) - set(PASSES[level])
    if unknown:
        raise ValueError(f"pass of level {level!r} must be one of {', '.join(PASSES[level])}, got {min(unknown)!r}")
    return tuple(passes) or PASSES[level]


def _build(problem: Problem, provider: Provider, level: str) -> nn.Module:
    if problem.case.structure not in provider.structures:
        raise AbsentError(f"it has no structure {problem.case.structure!r}")
    if level in ("mlp", "step") and not provider.trains:
        raise AbsentError("it has no gradients")
    module = provider.build(problem, level != "op")
    return module if level in ("op", "layer") else _mlp(problem, provider, module)


def _mlp(problem: Problem, provider: Provider, first: nn.Module) -> nn.Module:
    """The layer, GELU, and its successor back to ``K`` features, in which an edge reads one child."""
    case, weight = problem.case, problem.weight
    block = case.block[::-1] if case.structure == "block" else None
    structure: Structure = "block" if block else "random"
    partition = fpe.Partition(problem.partition.labels.T.contiguous(), case.alpha, structure, block)
    merged = fpe.MergeLinear(partition, True, "eager", weight.device, weight.dtype)
    merged.set_edge_weight(weight.T)
    second: nn.Module = merged
    if provider.name == "parent":
        second = nn.Linear(case.n, case.k, device=weight.device, dtype=weight.dtype)
    elif provider.name == "wide":
        second = merged.to_linear()
    elif provider.name == "masked":
        second = fpe.MaskedLinear(merged.kept(), True, weight.device, weight.dtype)
    elif provider.name.startswith(OURS):
        merged.backend = provider.name.removeprefix(OURS)
        if block:
            second = fpe.BlockLinear(
                merged.kept(), block, (1, case.alpha), True, merged.backend, weight.device, weight.dtype
            )
    return nn.Sequential(first, nn.GELU(), second)


def _check(problem: Problem, provider: Provider, module: nn.Module, level: str) -> None:
    """Runs the forward once and compares a layer's with float64 truth on the first and last rows."""
    with torch.no_grad():
        result = module(problem.x)
    if not provider.exact or level not in ("op", "layer"):
        return
    rows = sorted({*range(min(8, problem.case.m)), problem.case.m - 1})
    truth = problem.x[rows].double() @ problem.wide.double().T
    error = float((result[rows].double() - truth).norm() / truth.norm().clamp_min(1e-30))
    allowed = TOLERANCE[problem.case.dtype]
    if not error <= allowed:
        raise WrongResultError(f"forward is off by {error:.1e} of the result, more than {allowed}")


def call(problem: Problem, module: nn.Module, name: str, trains: bool = True) -> Call | None:
    """One pass of a module as a call without arguments; ``None`` where it has no such pass."""
    x, parameters = problem.x, list(module.parameters())
    if name == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return module(x)

        return forward
    if not trains:
        return None
    outputs = module(x[:1]).shape[-1]
    dy = problem.dy[:, :outputs] if outputs <= problem.dy.shape[1] else x
    dy = dy.contiguous()
    if name == "step":
        return _step(module, x, dy)
    leaf = x.detach().requires_grad_(name != "dW")
    if name == "forward+backward":
        return lambda: torch.autograd.grad(module(leaf), [leaf, *parameters], dy)
    for parameter in parameters:
        parameter.requires_grad_(name == "dW")
    y = module(leaf)
    for parameter in parameters:
        parameter.requires_grad_(True)
    wanted = parameters if name == "dW" else [leaf]
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> Call:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-6, foreach=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        module(x).backward(dy)
        optimizer.step()

    return step


def costs(case: Case, provider: Provider, name: str, level: str) -> dict[str, Any]:
    """Useful FLOPs of one pass; of one layer's also the compulsory bytes and the model's name of the implementation."""
    passes = {"forward+backward": model.TRAINING}.get(name, (name,))
    useful = 2 * case.m * case.n * case.k * len(passes)
    if level not in ("op", "layer"):
        return {"flops": 2 * useful * (3 if name == "step" else 1)}
    implementation = provider.predicted_as(case.structure)
    block = case.block if case.structure == "block" else None
    sizes = (case.structure, case.m, case.n, case.k, case.alpha, case.dtype)
    found = model.layer_candidates(passes, *sizes, model.PUBLISHED["h200"], block)  # bytes do not depend on a roof
    known = [c for pass_ in found for c in pass_ if c.name == implementation]
    if len(known) < len(passes):
        return {"flops": useful}
    return {"flops": useful, "bytes": sum(c.bytes for c in known), "implementation": implementation}


@dataclass(frozen=True)
class Plan:
    """Cases to be measured.

    Attributes:
        shapes: ``(N, K)`` pairs.
        rows: Batch sizes.
        structures: Of the expanded layer.
        alphas: Children per parent.
        dtypes: Of operands.
        block: Of the block structure.
    """

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    structures: tuple[str, ...] = ("random", "2:4", "block")
    alphas: tuple[int, ...] = (2,)
    dtypes: tuple[str, ...] = ("bf16",)
    block: tuple[int, int] = (64, 64)

    def cases(self) -> Iterator[Case]:
        """Every case, small batches first, shape by shape."""
        for dtype in self.dtypes:
            for n, k in self.shapes:
                for alpha in self.alphas:
                    for structure in self.structures:
                        if structure == "2:4" and (alpha != 2 or k % 4):
                            continue
                        case = Case(1, n, k, alpha, structure, dtype, self.block)
                        yield from (replace(case, m=m) for m in self.rows)


@contextmanager
def float32_as(dtype: str) -> Iterator[None]:
    """Lets PyTorch's float32 matmuls use TF32 or not, as a dtype's name says."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
