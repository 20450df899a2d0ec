"""Who is measured: one expanded layer's function as different programs run it, on the same weights and labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

import fpe
from fpe.kernels.block.backends import BACKENDS as BLOCKS
from fpe.kernels.partition.backends import MERGE, SPLIT
from fpe.kernels.semi_structured.backends import BACKENDS as SEMI_STRUCTURED
from fpe.kernels.structures import BLOCK, RANDOM, SEEDED, STRUCTURES, TWO_FOUR
from fpe.layers import ExpandedLinear

from . import peers
from .problems import Problem, dense_layer


@dataclass(frozen=True)
class Provider:
    """A program that runs an expanded layer.

    Attributes:
        name: As in results files.
        build: Makes the layer of a problem; raises :class:`AbsentError`, or what the library raises.
        structures: Structures that it runs.
        merges: Structures of the layer's successor that it runs.
        trains: Whether it has gradients.
        exact: Whether it computes the expanded layer's function; the parent does not.
        candidate: Name of the cost model's candidate, by structure.
        about: What it is, in a few words.
    """

    name: str
    build: Callable[[Problem, bool], nn.Module]
    structures: tuple[str, ...] = STRUCTURES
    merges: tuple[str, ...] = STRUCTURES
    trains: bool = True
    exact: bool = True
    candidate: Mapping[str, str] = field(default_factory=dict)
    about: str = ""

    def predicted_as(self, structure: str) -> str:
        """The cost model's name for it, or nothing."""
        return self.candidate.get(structure, "")


def find(names: tuple[str, ...] = ()) -> list[Provider]:
    """Providers by name, all of them without one.

    Raises:
        ValueError: There is no such provider.
    """
    unknown = sorted(set(names) - set(PROVIDERS))
    if unknown:
        raise ValueError(f"provider must be one of {', '.join(PROVIDERS)}, got {', '.join(unknown)}")
    return [PROVIDERS[name] for name in names or PROVIDERS]


def expanded(problem: Problem, bias: bool, backend: str) -> ExpandedLinear:
    """The package's layer of a problem: blocks where the structure has them, labels otherwise."""
    case = problem.case
    placed = {"device": problem.weight.device, "dtype": problem.weight.dtype}
    layer: fpe.BlockLinear | fpe.SplitLinear
    if case.structure == BLOCK:
        kept = problem.partition.masks().flatten(0, 1)
        layer = fpe.BlockLinear(kept, case.block, (case.alpha, 1), bias, backend, **placed)  # type: ignore[arg-type]
        layer.set_wide_weight(problem.wide)
    else:
        layer = fpe.SplitLinear(problem.partition, bias, backend, **placed)  # type: ignore[arg-type]
        layer.set_wide_weight(problem.wide)
    if layer.bias is not None:
        layer.bias.data.zero_()
    return layer


def _masked(problem: Problem, bias: bool) -> nn.Module:
    return peers.Masked(problem.wide, problem.partition.masks().flatten(0, 1), bias)


OURS = "fpe/"
"""What the names of the package's own providers begin with; the backend follows."""


_FAMILIES = {TWO_FOUR: SEMI_STRUCTURED, BLOCK: BLOCKS, SEEDED: SPLIT}
ABOUT = {
    "auto": "the package's own choice, as layers make it; on a CPU its kernels there, or a dense weight that is kept",
    "triton": "the package's Triton kernels",
    "eager": "the definition in plain PyTorch, which builds its dense weight in every call",
    "sparse_tensor_core": "the package's kernel on sparse tensor cores",
    "torch": "the package's layer on PyTorch's semi-structured matmul",
}
"""What the package's backends are, in words for a table's legend."""


def _ours(name: str) -> Provider:
    """The package's layer with a backend insisted on, or with ``"auto"``."""
    families = {structure: _FAMILIES.get(structure, SPLIT) for structure in STRUCTURES}
    runs_as: dict[str, str] = {
        structure: backends[name].in_model for structure, backends in families.items() if name in backends
    }
    build = partial(expanded, backend=name)
    if name in SPLIT or name == "auto":
        return Provider(OURS + name, build, candidate=runs_as, about=ABOUT[name])
    return Provider(OURS + name, build, (TWO_FOUR,), (RANDOM, TWO_FOUR), candidate=runs_as, about=ABOUT[name])


def _always(name: str) -> dict[str, str]:
    return dict.fromkeys(STRUCTURES, name)


PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider(
            "parent",
            lambda p, bias: dense_layer(p.weight, bias),
            exact=False,
            candidate=_always("parent"),
            about="the dense layer before its split",
        ),
        Provider(
            "wide",
            lambda p, bias: dense_layer(p.wide, bias),
            candidate=_always("wide dense"),
            about="the dense layer of the same function, fpe.to_dense",
        ),
        Provider("masked", _masked, about="fpe.MaskedLinear, a dense weight times a mask"),
        *(_ours(name) for name in ("auto", *MERGE) if name != "cpu"),  # ``fpe here`` measures that one
        Provider(
            "torch.sparse 2:4",
            peers.semi_structured,
            (TWO_FOUR,),
            (),
            trains=False,
            candidate={TWO_FOUR: "torch.sparse"},
            about="torch.sparse.to_sparse_semi_structured",
        ),
        Provider("torch BSR", peers.bsr, (BLOCK,), (), trains=False, about="PyTorch's block-sparse rows"),
        Provider("blksprs", peers.blksprs, (BLOCK,), (), trains=False, about="the package of that name"),
    )
}
"""The parent and the wide dense layer are yardsticks; "masked" is what people do today; ours by backend; peers."""
PEERS = ("masked", "torch.sparse 2:4", "torch BSR", "blksprs")
