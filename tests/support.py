"""What several test files share: bad calls, the triad, awkward strides, small models and ways to expand them."""

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fpe
from fpe.bench import accuracy
from fpe.bench.families.accesses import Access
from fpe.kernels.dispatch import Backend
from fpe.kernels.structures import STRUCTURES

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FORMS = ("contiguous", "transposed", "sliced", "expanded")
MEASURED_ROOF = {
    "name": "test", "arch": 90, "bandwidth": 4.2e12, "flops": {"bf16": 7e14}, "l2": 6e7, "integer": 1.6e13,
    "shares": {"blocks": [0.8, 0.7]}, "provenance": {"device": "x"},
}  # fmt: skip
"""A file of a device's roof, as a measurement leaves it."""


def bytes_touched(access: Access) -> np.ndarray:
    """Every byte offset of a rectangle: the plainest expansion there is."""
    rows = (access.row + np.arange(access.rows)) * access.pitch + access.column
    return (rows[:, None] + np.arange(access.width)).reshape(-1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def allow(
    monkeypatch: pytest.MonkeyPatch,
    backends: dict[str, Backend],
    name: str,
    why_not: Callable[..., str | None] = lambda *call: None,
) -> None:
    """Lets a backend run anywhere, or says otherwise why not."""
    monkeypatch.setitem(backends, name, replace(backends[name], why_not=why_not))


def readable_id(value: object) -> str | None:
    """An id from a case's own ``id``, a dtype or a function; pytest's own for the rest."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "id", None) or getattr(value, "__name__", None)


def changed_fields(case: object) -> str:
    """Names a dataclass case by the fields that differ from their defaults."""
    own = {f.name: getattr(case, f.name) for f in fields(case) if getattr(case, f.name) != f.default}  # type: ignore[arg-type]
    return "-".join(f"{name}={value}".replace(" ", "") for name, value in own.items())


def guarded(*shape: int, seed: int = 0) -> Tensor:
    """Float64 numbers inside a larger buffer of NaN: whatever is read outside shows."""
    buffer = torch.full([size + 6 for size in shape], float("nan"), dtype=torch.float64)
    inner = buffer[tuple(slice(3, 3 + size) for size in shape)]
    inner.copy_(torch.randn(*shape, dtype=torch.float64, generator=seeded(seed)))
    return inner


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Another dtype with the guard around it: the whole buffer is cast."""
    base = t if t._base is None else t._base
    return base.to(dtype)[tuple(slice(3, 3 + size) for size in t.shape)]


def assert_as_accurate(ours: Tensor, yardstick: Tensor, truth: Tensor) -> None:
    """The triad, by the gate's own bound: about twice the error of PyTorch in the same dtype, against float64 truth."""
    assert (ours.dtype, ours.shape) == (yardstick.dtype, truth.shape)
    assert accuracy.excess_of_triad(ours, yardstick, truth) <= 1


def strided(shape: tuple[int, ...], form: str, generator: torch.Generator) -> Tensor:
    """Normal float64 numbers of the given shape, laid out in memory in an awkward way."""
    double = {"dtype": torch.float64, "generator": generator}
    if form == "transposed":
        return torch.randn(shape[::-1], **double).permute(*reversed(range(len(shape))))
    if form == "sliced":
        return torch.randn([2 * size for size in shape], **double)[tuple(slice(1, None, 2) for _ in shape)]
    if form == "expanded":
        return torch.randn((1, *shape[1:]), **double).expand(shape)
    return torch.randn(shape, **double)


def convert(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 numbers as another dtype, strides kept, zero strides included.

    In float64 they become integers: sums are then exact in any order, and the triad asks for equality.
    """
    if t.dim() and t.stride(0) == 0 and len(t) > 1:
        return convert(t[:1], dtype).expand(t.shape)
    return (4 * t).round() if dtype == torch.float64 else t.to(dtype)


def mlp(*sizes: int, between: Iterable[nn.Module] = (), bias: bool = True, seed: int = 0) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them; ``between`` follows the first linear layer."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(inputs, outputs, bias), *(between if i == 0 else ()), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """The MLP block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Transformer(nn.Module):
    """Two blocks and a head: no Sequential at the top."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Residual(), Residual()])
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything a model stores."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Every stored tensor is bitwise what it was."""
    now = model.state_dict()
    assert list(now) == list(before)
    for name, value in now.items():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name


@dataclass(frozen=True)
class BadCall:
    """A call that must fail, and what the message must hold: who complains, what was expected, what came."""

    id: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]

    def check(self, *also_says: str) -> None:
        with pytest.raises(self.error) as caught:
            self.call()
        for part in (*self.says, *also_says):
            assert part in str(caught.value)


@dataclass(frozen=True)
class Recipe:
    """A way to expand a model: the options of ``fpe.expand``."""

    structure: str = "random"
    resparsify: str = "magnitude"
    alpha: int = 2
    split: str = "random"
    block: tuple[int, int] = (4, 5)

    @property
    def id(self) -> str:
        return changed_fields(self) or "default"

    def options(self, inputs: int) -> dict[str, Any]:
        """Keywords of ``fpe.expand``; groups are of three inputs."""
        options: dict[str, Any] = {name: getattr(self, name) for name in ("structure", "resparsify", "alpha", "split")}
        if "block" in (self.structure, self.resparsify):
            options["block"] = self.block
        if self.split == "groups":
            options["groups"] = [i // 3 for i in range(inputs)]
        return options

    def expand(self, model: nn.Sequential, seed: int = 0) -> nn.Sequential:
        """Expands a model of one pair."""
        return fpe.expand(model, **self.options(model[0].in_features), generator=seeded(seed))


POLICIES = ("magnitude", "input", "block", "partition")
RECIPES = (
    *(Recipe(structure, policy) for structure in STRUCTURES for policy in POLICIES),
    *(Recipe(structure, policy, alpha=3) for structure in ("random", "block") for policy in POLICIES),
    Recipe(alpha=4),
    Recipe("block", "input", alpha=4),
    Recipe(split="groups"),
    Recipe(resparsify="partition", split="gram"),
)
MOVING = tuple(r for r in RECIPES if (r.structure, r.resparsify) != ("seeded", "partition"))
"""Those whose edges may move."""
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=readable_id)
each_moving = pytest.mark.parametrize("recipe", MOVING, ids=readable_id)

SIZES = (24, 13, 6)
"""Inputs, hidden neurons and outputs of the usual small model: ragged in blocks of 4 x 5, and 24 is in fours."""


def integer_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with small non-zero integers as linear weights and biases: sums are exact in any order."""
    model.double()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters():
                size = torch.randint(1, 9, parameter.shape, generator=seeded(seed))
                sign = 2 * torch.randint(2, parameter.shape, generator=seeded(seed + 1)) - 1
                parameter.data.copy_(size * sign)
    return model


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-9, 10, shape, generator=seeded(seed)).double()


def true_nonzeros(dense: nn.Module) -> int:
    """Counts the linear weights of a plain model that are not zero."""
    return sum(int((m.weight != 0).sum()) for m in dense.modules() if isinstance(m, nn.Linear))


def removed_entries(layer: fpe.layers.ExpandedLinear) -> Tensor:
    """Which entries of the layer's weight parameter stand for no edge."""
    ones = deepcopy(layer)
    ones.edge_weight.data.fill_(1)
    ones.clear_removed()
    return ones.edge_weight == 0


def expanded_layers(model: nn.Module) -> list[fpe.layers.ExpandedLinear]:
    return [m for m in model.modules() if isinstance(m, fpe.layers.ExpandedLinear)]


def without_pictures(page: str) -> str:
    """A page of HTML without the pictures in it, whose letters may spell anything."""
    return re.sub(r"base64,[\w+/=\s]*", "", page)
