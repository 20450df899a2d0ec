"""Who is measured: one expanded layer's function as different programs run it, on the same weights and labels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fpe
from fpe.kernels.dispatch import BACKENDS
from fpe.layers import ExpandedLinear

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUADS = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]])
"""The ways to deal four inputs to two children, two each."""


@dataclass(frozen=True)
class Case:
    """A layer and a batch.

    Attributes:
        m: Rows of activations.
        n: Output features of the parent.
        k: Input features.
        alpha: Children per parent.
        structure: ``"random"``, ``"2:4"`` or ``"block"``.
        dtype: A key of :data:`DTYPES`.
        block: ``(bn, bk)`` of structure ``"block"``.
    """

    m: int
    n: int
    k: int
    alpha: int = 2
    structure: str = "random"
    dtype: str = "bf16"
    block: tuple[int, int] = (64, 64)

    def row(self) -> dict[str, Any]:
        """The columns that name it in a results file."""
        block = f"{self.block[0]}x{self.block[1]}" if self.structure == "block" else ""
        sizes = {"M": self.m, "N": self.n, "K": self.k, "alpha": self.alpha}
        return {**sizes, "structure": self.structure, "block": block, "dtype": self.dtype}


@dataclass(frozen=True)
class Problem:
    """A case's data on a device, the same for every provider.

    Attributes:
        case: What it is of.
        partition: Who owns each edge.
        weight: The parent's ``[N, K]``.
        x: Activations ``[M, K]``.
        dy: Gradients of the children's outputs ``[M, alpha * N]``.
    """

    case: Case
    partition: fpe.Partition
    weight: Tensor
    x: Tensor
    dy: Tensor

    @classmethod
    def make(cls, case: Case, device: str, seed: int = 0) -> "Problem":
        """Draws random data on the device itself: a host would take longer than the measurement."""
        generator = torch.Generator(device).manual_seed(seed)
        draw = partial(torch.randn, generator=generator, device=device, dtype=DTYPES[case.dtype])
        labels = _labels(case, generator, device)
        block = case.block if case.structure == "block" else None
        partition = fpe.Partition(labels, case.alpha, case.structure, block)  # type: ignore[arg-type]
        weight = draw(case.n, case.k) / case.k**0.5
        return cls(case, partition, weight, draw(case.m, case.k), draw(case.m, case.alpha * case.n))

    @property
    def wide(self) -> Tensor:
        """The expanded layer's dense weight, ``[alpha * N, K]``."""
        return torch.where(self.partition.masks(), self.weight, self.weight.new_zeros(())).flatten(0, 1)


def _labels(case: Case, generator: torch.Generator, device: str) -> Tensor:
    """Labels of the case's structure, each child's share equal but for rounding, without a sort of every edge."""
    n, k, alpha = case.n, case.k, case.alpha

    def dealt(rows: int, columns: int) -> Tensor:
        order = torch.rand(rows, columns, generator=generator, device=device).argsort(1)
        return (order % alpha).to(torch.uint8)

    if case.structure == "block":
        down, across = -(-n // case.block[0]), -(-k // case.block[1])
        grid = dealt(down, across)
        return grid.repeat_interleave(case.block[0], 0).repeat_interleave(case.block[1], 1)[:n, :k].contiguous()
    if case.structure == "2:4":
        choice = torch.randint(len(QUADS), (n, -(-k // 4)), generator=generator, device=device)
        return QUADS.to(device, torch.uint8)[choice].flatten(1)[:, :k].contiguous()
    return torch.randint(alpha, (n, k), generator=generator, device=device, dtype=torch.uint8)


class AbsentError(Exception):
    """A provider cannot run a case; the message says why."""


@dataclass(frozen=True)
class Provider:
    """A program that runs an expanded layer.

    Attributes:
        name: As in results files.
        build: Makes the layer of a problem; raises :class:`AbsentError`, or what the library raises.
        structures: Structures that it runs.
        trains: Whether it has gradients.
        exact: Whether it computes the expanded layer's function; the parent does not.
        candidate: Name of the cost model's candidate, by structure.
    """

    name: str
    build: Callable[[Problem, bool], nn.Module]
    structures: tuple[str, ...] = ("random", "2:4", "block")
    trains: bool = True
    exact: bool = True
    candidate: tuple[str, str, str] = ("", "", "")

    def predicted_as(self, structure: str) -> str:
        """The cost model's name for it, or nothing."""
        return self.candidate[("random", "2:4", "block").index(structure)]


def find(names: tuple[str, ...] = ()) -> list[Provider]:
    """Providers by name, all of them without one.

    Raises:
        ValueError: There is no such provider.
    """
    unknown = sorted(set(names) - set(PROVIDERS))
    if unknown:
        raise ValueError(f"provider must be one of {', '.join(PROVIDERS)}, got {', '.join(unknown)}")
    return [PROVIDERS[name] for name in names or PROVIDERS]


def _linear(weight: Tensor, bias: bool) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=weight.device, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    if bias:
        layer.bias.data.zero_()
    return layer


def expanded(problem: Problem, bias: bool, backend: str) -> ExpandedLinear:
    """The package's layer of a problem: blocks where the structure has them, labels otherwise."""
    case = problem.case
    placed = {"device": problem.weight.device, "dtype": problem.weight.dtype}
    layer: fpe.BlockLinear | fpe.SplitLinear
    if case.structure == "block":
        kept = problem.partition.masks().flatten(0, 1)
        layer = fpe.BlockLinear(kept, case.block, (case.alpha, 1), bias, backend, **placed)  # type: ignore[arg-type]
        layer.set_wide_weight(problem.wide)
    else:
        layer = fpe.SplitLinear(problem.partition, bias, backend, **placed)  # type: ignore[arg-type]
        layer.weight.data.copy_(problem.weight)
    if layer.bias is not None:
        layer.bias.data.zero_()
    return layer


def _masked(problem: Problem, bias: bool) -> nn.Module:
    weight = problem.weight
    layer = fpe.MaskedLinear(problem.partition.masks().flatten(0, 1), bias, weight.device, weight.dtype)
    layer.weight.data.copy_(problem.wide)
    if layer.bias is not None:
        layer.bias.data.zero_()
    return layer


def _semi_structured(problem: Problem, bias: bool) -> nn.Module:
    """PyTorch's own 2:4 weight, cuSPARSELt's algorithm searched where the build has it."""
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    if not problem.weight.is_cuda:
        raise AbsentError("it needs a CUDA device")
    has_cusparselt = torch.backends.cusparselt.is_available()
    SparseSemiStructuredTensor._FORCE_CUTLASS = not has_cusparselt  # what PyTorch's own documentation has users set
    layer = _linear(problem.wide, bias)
    weight: Any = to_sparse_semi_structured(layer.weight.detach())
    if has_cusparselt:
        weight.alg_id_cusparselt = torch._cslt_sparse_mm_search(weight.packed, weight._pad_dense_input(problem.x).t())
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _bsr(problem: Problem, bias: bool) -> nn.Module:
    block, (outputs, inputs) = problem.case.block, (problem.case.alpha * problem.case.n, problem.case.k)
    if outputs % block[0] or inputs % block[1]:
        raise AbsentError(f"its blocks of {block} must divide {outputs} x {inputs}")
    layer = _linear(problem.wide, bias)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_bsr(block), requires_grad=False)
    return layer


OURS = "fpe/"
"""What the names of the package's own providers begin with; the backend follows."""
_RUNS_AS = {
    "eager": ("masked dense", "masked dense", ""),
    "triton": ("packed labels", "packed labels", "blocks"),
    "torch": ("", "torch.sparse", ""),
    "sparse_tensor_core": ("", "sparse tensor cores", ""),
}
PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider("parent", lambda p, bias: _linear(p.weight, bias), exact=False, candidate=("parent",) * 3),
        Provider("wide", lambda p, bias: _linear(p.wide, bias), candidate=("wide dense",) * 3),
        Provider("masked", _masked),
        *(
            Provider(f"{OURS}{name}", partial(expanded, backend=name), candidate=_RUNS_AS.get(name, ("", "", "")))
            for name in BACKENDS
        ),
        Provider("torch.sparse 2:4", _semi_structured, ("2:4",), trains=False, candidate=("", "torch.sparse", "")),
        Provider("torch BSR", _bsr, ("block",), trains=False),
    )
}
"""The parent and the wide dense layer are yardsticks; "masked" is what people do today; ours by backend; peers."""
YARDSTICKS = ("parent", "wide")
PEERS = ("masked", "torch.sparse 2:4", "torch BSR")
