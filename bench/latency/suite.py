"""The latency suite: the providers of a case, timed side by side; each layer is checked against float64 truth first.

Only single passes of the expanded layer's function are checked: not the parent, and not networks or training steps.

Levels: ``"op"`` is a layer without bias: forward, dX alone, dW alone, forward + backward. ``"merge"`` is the same of
the layer's successor, back to ``K`` features, in which an edge reads one child. ``"layer"`` has a bias. ``"mlp"`` is
the layer, an activation and its successor; ``"step"`` a training step of that with Adam.

A provider that is wrong, refuses or fails in a pass gets a row with the reason and no time; the others are timed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fpe
from fpe.kernels import UnsupportedError, model
from fpe.kernels.roofs import PUBLISHED
from fpe.kernels.structures import BLOCK, STRUCTURES, admitted
from fpe.partition import Structure

from ..costs import memory
from ..gpu.lost import raise_if_lost
from . import peers
from .problems import AbsentError, Case, Problem
from .providers import OURS, Provider
from .timing import Call, interleaved
from .truth import Truth, WrongResultError

PASSES = {
    "op": ("forward", "dX", "dW", "forward+backward"),
    "merge": ("forward", "dX", "dW"),
    "layer": ("forward", "forward+backward"),
    "mlp": ("forward", "forward+backward"),
    "step": ("step",),
}
LEVELS = tuple(PASSES)
Skip = Callable[[str, str], str]
"""Says of a provider and a pass why it must not be timed, or nothing."""


def measure(
    case: Case,
    providers: Sequence[Provider],
    device: str,
    level: str = "op",
    passes: Sequence[str] = (),
    seconds: float = 1.0,
    rounds: tuple[int, int] = (5, 100),
    seed: int = 0,
    skip: Skip = lambda provider, pass_: "",
) -> list[dict[str, Any]]:
    """Rows of one case: each provider and pass, timed in turns.

    Args:
        case: Sizes.
        providers: Who takes part.
        device: ``"cuda"`` or ``"cpu"``.
        level: ``"op"``, ``"merge"``, ``"layer"``, ``"mlp"`` or ``"step"``.
        passes: Of those that the level has; all without one.
        seconds: To spend on each pass, roughly.
        rounds: At least and at most so many samples.
        seed: Of the data.
        skip: See :data:`Skip`.

    Returns:
        Rows with ``level``, ``pass``, ``provider``, the case's columns, those of :meth:`Timing.columns`, ``error``
        (over the error allowed) where the pass was checked, ``flops`` (useful: the parent's), ``bytes`` (compulsory)
        and ``implementation`` where the model knows the provider, memory columns; or with ``status``: ``"absent"``,
        ``"wrong"``, ``"error"`` or ``"blocked"``, and a ``reason``, and no time.

    Raises:
        ValueError: The level or a pass is unknown.
        LostError: The device no longer answers.
    """
    wanted = check_passes(level, passes)
    with float32_as(case.dtype):
        problem = Problem.make(case, device, seed)
        built, rows = _build_all(problem, providers, level)
        truth = Truth(problem, level)
        for name in wanted:
            rows += _time(problem, built, truth, name, seconds, rounds, skip)
    return rows


Built = dict[str, tuple[Provider, nn.Module]]


def _build_all(problem: Problem, providers: Sequence[Provider], level: str) -> tuple[Built, list[dict[str, Any]]]:
    """The providers' modules, and a row for each that cannot be built."""
    built: Built = {}
    rows = []
    for provider in providers:
        try:
            built[provider.name] = provider, _build(problem, provider, level)
        except Exception as error:
            rows.append(_untimed(problem.case, provider, level, error))
    return built, rows


def _untimed(case: Case, provider: Provider, level: str, error: Exception, name: str = "") -> dict[str, Any]:
    """The row of a provider that gets no time: absent where it says so or is a peer's, else wrong or an error.

    Raises:
        LostError: The device no longer answers.
    """
    raise_if_lost(error)
    refuses = isinstance(
        error, (AbsentError, ImportError, NotImplementedError, UnsupportedError, torch.OutOfMemoryError)
    )
    status = "absent" if refuses or not provider.name.startswith(OURS) else "error"
    status = "wrong" if isinstance(error, WrongResultError) else status
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    row = {"level": level, "provider": provider.name, **case.row(), "status": status, "reason": reason}
    return {**row, "of_pass": name} if name else row


def _time(
    problem: Problem,
    built: Built,
    truth: Truth,
    name: str,
    seconds: float,
    rounds: tuple[int, int],
    skip: Skip,
) -> list[dict[str, Any]]:
    """Rows of one pass: its providers are checked one by one, and then take turns."""
    case, device, level = problem.case, problem.x.device.type, truth.level
    able, errors, rows = {}, {}, []
    for who, (provider, module) in built.items():
        reason = skip(who, name)
        if reason:
            row = {"level": level, "provider": who, **case.row(), "status": "blocked", "reason": reason}
            rows.append({**row, "of_pass": name})
            continue
        try:
            made = call(problem, module, name, provider.trains, level)
            if made is not None:
                errors[who] = truth.check(provider, module, name, made)
                able[who] = made
        except Exception as error:
            rows.append(_untimed(case, provider, level, error, name))
    timed = interleaved(able, device, seconds, rounds) if able else {}
    for who, t in timed.items():
        provider, module = built[who]
        rows.append(
            {
                "level": level,
                "pass": name,
                "provider": who,
                **case.row(),
                **t.columns(),
                **({} if errors[who] is None else {"error": errors[who]}),
                "timer": "events" if device == "cuda" else "wall clock",
                **costs(case, provider, name, level),
                **(memory.columns_on(module, problem.x) if name in ("forward+backward", "step") else {}),
            }
        )
    return rows


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
    structure = problem.case.structure
    if structure not in (provider.merges if level == "merge" else provider.structures):
        raise AbsentError(f"it has no structure {structure!r}{' in a merge' if level == 'merge' else ''}")
    if level in ("mlp", "step") and not (provider.trains and structure in provider.merges):
        raise AbsentError("it has no gradients" if not provider.trains else "it has no successor of the layer")
    if level == "merge":
        return successor(problem, provider, False)
    module = provider.build(problem, level != "op")
    return module if level in ("op", "layer") else nn.Sequential(module, nn.GELU(), successor(problem, provider))


def successor(problem: Problem, provider: Provider, bias: bool = True) -> nn.Module:
    """The layer after the expanded one, back to ``K`` features: every edge reads one child."""
    case, weight = problem.case, problem.weight
    block = case.block[::-1] if case.structure == BLOCK else None
    structure: Structure = "block" if block else "random"
    partition = fpe.Partition(problem.partition.labels.T.contiguous(), case.alpha, structure, block)
    merged = fpe.MergeLinear(partition, bias, "eager", weight.device, weight.dtype)
    merged.set_edge_weight(weight.T)
    if provider.name == "parent":
        dense = nn.utils.skip_init(nn.Linear, case.n, case.k, bias=bias, device=weight.device, dtype=weight.dtype)
        dense.weight.data.copy_(weight.T)
        if bias:
            dense.bias.data.zero_()
        return dense
    if provider.name == "wide":
        return merged.to_linear()
    if provider.name == "masked":
        return peers.Masked(merged.wide_weight(), merged.kept(), bias)
    if not provider.name.startswith(OURS):
        return merged
    merged.backend = provider.name.removeprefix(OURS)
    if not block:
        return merged
    blocks = fpe.BlockLinear(merged.kept(), block, (1, case.alpha), bias, merged.backend, weight.device, weight.dtype)
    blocks.set_wide_weight(merged.wide_weight())
    return blocks


def call(problem: Problem, module: nn.Module, name: str, trains: bool = True, level: str = "op") -> Call | None:
    """One pass of a module as a call without arguments; ``None`` where it has no such pass."""
    x, dy = operands(problem, level)
    parameters = list(module.parameters())
    inputs = getattr(module, "in_features", x.shape[1])
    x = x[:, :inputs].contiguous()  # a parent reads fewer
    if name == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return module(x)

        return forward
    if not trains:
        return None
    outputs = module(x[:1]).shape[-1]
    dy = (dy[:, :outputs] if outputs <= dy.shape[1] else x).contiguous()
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


def operands(problem: Problem, level: str) -> tuple[Tensor, Tensor]:
    """Activations and gradients of outputs; a successor reads what the layer gives."""
    return (problem.dy, problem.x) if level == "merge" else (problem.x, problem.dy)


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
    found = model.layer_candidates(passes, case, PUBLISHED["h200"])  # bytes do not depend on a roof
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
    structures: tuple[str, ...] = STRUCTURES
    alphas: tuple[int, ...] = (2,)
    dtypes: tuple[str, ...] = ("bf16",)
    block: tuple[int, int] = (64, 64)

    def cases(self) -> Iterator[Case]:
        """Every case, small batches first, shape by shape."""
        for dtype in self.dtypes:
            for n, k in self.shapes:
                for alpha in self.alphas:
                    for structure in self.structures:
                        if structure not in admitted(alpha, k):
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
