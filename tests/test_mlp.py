"""The expanded MLP in one launch: against float64 truth under the interpreter, and as a module on a model's layers."""

from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from unittest.mock import patch

import pytest
import torch
from support import BadCall, Recipe, assert_as_accurate, cast, guarded, mlp, readable_id, seeded
from torch import Tensor, nn
from torch.nn.functional import pad

import fpe
from fpe.kernels import PackedLabels, expanded_mlp
from fpe.kernels.device import KNOWN
from fpe.kernels.mlp.config import MAX_ACCUMULATORS, Config, Problem, limit, warps_of
from fpe.kernels.tables import choose

DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Sizes of an expanded MLP: inputs, parents, outputs, rows."""

    k: int
    hidden: int
    n: int
    m: int
    alpha: int = 2
    merged: bool = False
    activation: str | None = "relu"
    bias: bool = True

    @property
    def id(self) -> str:
        second = "merged" if self.merged else "dense"
        return f"{self.k}-{self.hidden}-{self.n}-m{self.m}-alpha{self.alpha}-{second}-{self.activation}"

    def tables(self) -> tuple[Tensor, Tensor | None]:
        first = torch.randint(self.alpha, (self.hidden, self.k), generator=seeded(), dtype=torch.uint8)
        second = torch.randint(self.alpha, (self.n, self.hidden), generator=seeded(1), dtype=torch.uint8)
        return first, second if self.merged else None

    def operands(self) -> dict[str, Tensor]:
        wide = self.hidden * (1 if self.merged else self.alpha)
        shapes = {"x": (self.m, self.k), "w1": (self.hidden, self.k), "w2": (self.n, wide)}
        if self.bias:
            shapes |= {"bias1": (self.alpha, self.hidden), "bias2": (1, self.n)}
        return {name: guarded(*shape, seed=2 + i) for i, (name, shape) in enumerate(shapes.items())}


CASES = (
    Case(64, 16, 10, 16),
    Case(70, 13, 33, 5, alpha=3, merged=True, activation="gelu"),
    Case(131, 8, 100, 1, alpha=4, activation="silu"),
    Case(33, 30, 70, 35, alpha=8, merged=True),
    Case(512, 1, 1, 3, alpha=2, bias=False, activation=None),
    Case(48, 31, 65, 70, alpha=2, merged=True, bias=False),
    Case(48, 16, 10, 0),
    Case(0, 16, 10, 3),
)


def compute(case: Case, dtype: torch.dtype, backend: str) -> Tensor:
    t = {name: cast(value, dtype) for name, value in case.operands().items()}
    first, second = case.tables()
    labels = [x if x is None or backend == "eager" else PackedLabels.pack(x, case.alpha) for x in (first, second)]
    bias2 = t["bias2"][0] if case.bias else None
    more = {"bias1": t.get("bias1"), "bias2": bias2, "activation": case.activation, "backend": backend}
    return expanded_mlp(t["x"], t["w1"], labels[0], t["w2"], labels[1], alpha=case.alpha, **more)


def truth(case: Case, dtype: torch.dtype) -> Tensor:
    """Float64 on the operands as the dtype holds them."""
    t = {name: value.to(dtype).double() for name, value in case.operands().items()}
    first, second = case.tables()
    function = getattr(torch.nn.functional, case.activation) if case.activation else (lambda t: t)
    out = t["bias2"] if case.bias else 0
    for child in range(case.alpha):
        h = t["x"] @ (t["w1"] * (first == child)).T
        h = function(h + t["bias1"][child] if case.bias else h)
        planes = t["w2"][:, child * case.hidden : (child + 1) * case.hidden]
        out = out + h @ (planes if second is None else t["w2"] * (second == child)).T
    return out


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
@pytest.mark.parametrize("case", CASES, ids=readable_id)
def test_triad(case: Case, dtype: torch.dtype) -> None:
    assert_as_accurate(compute(case, dtype, "triton"), compute(case, dtype, "eager"), truth(case, dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=readable_id)
def test_the_turned_product_is_as_accurate(case: Case) -> None:
    """What runs where a computed weight must be the right operand."""
    dtype = torch.float16
    with patch("fpe.kernels.mlp.triton.device_of", return_value=KNOWN[90]):
        ours = compute(case, dtype, "triton")
    assert_as_accurate(ours, compute(case, dtype, "eager"), truth(case, dtype))


def test_planes_of_labels_may_lie_apart() -> None:
    x, w1, w2 = (torch.randn(*shape, generator=seeded(1)).half() for shape in ((3, 70), (16, 70), (5, 16)))
    tables = [torch.randint(2, w.shape, generator=seeded(2), dtype=torch.uint8) for w in (w1, w2)]
    near = [PackedLabels.pack(table, 2) for table in tables]
    apart = [labels._replace(planes=pad(labels.planes, (0, 16, 0, 3))[:, :-3, :-16]) for labels in near]
    one, two = (expanded_mlp(x, w1, a, w2, b, alpha=2, backend="triton") for a, b in (near, apart))
    assert torch.equal(one, two)


def test_with_a_gradient_it_is_its_two_operations() -> None:
    case = CASES[1]
    leaves = {name: t.clone().requires_grad_() for name, t in case.operands().items()}
    first, second = case.tables()
    more = {"bias1": leaves["bias1"], "bias2": leaves["bias2"][0], "activation": "gelu"}
    y = expanded_mlp(leaves["x"], leaves["w1"], first, leaves["w2"], second, alpha=3, **more)
    assert torch.autograd.gradcheck(
        lambda x, w1, w2: expanded_mlp(x, w1, first, w2, second, alpha=3, activation="gelu"),
        [leaves[name].detach()[:3].requires_grad_() if name == "x" else leaves[name] for name in ("x", "w1", "w2")],
    )
    torch.testing.assert_close(y.detach(), truth(case, torch.float64))


@pytest.mark.parametrize("merged", [False, True])
def test_opcheck(merged: bool) -> None:
    case = Case(40, 12, 9, 5, merged=merged)
    t = {name: value.half() for name, value in case.operands().items()}
    first, second = case.tables()
    one = PackedLabels.pack(first, 2).planes
    two = None if second is None else PackedLabels.pack(second, 2).planes
    arguments = (
        t["x"],
        t["w1"],
        one,
        [],
        False,
        t["w2"],
        two,
        [],
        False,
        2,
        t["bias1"],
        t["bias2"][0],
        "relu",
        "triton",
    )
    torch.library.opcheck(torch.ops.fpe.expanded_mlp.default, arguments)


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(resparsify="partition", alpha=3), Recipe("2:4", "input")], ids=readable_id
)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU])
def test_a_fused_model_computes_the_same(recipe: Recipe, activation: type[nn.Module]) -> None:
    dense = mlp(24, 13, 6)
    dense[1] = activation()
    wide = recipe.expand(dense).eval().bfloat16()
    fused = fpe.fuse(wide, "triton")
    assert isinstance(fused[0], fpe.ExpandedMLP) and {*map(id, fused.parameters())} == {*map(id, wide.parameters())}
    x = torch.randn(4, 5, 24, generator=seeded()).bfloat16()
    with torch.no_grad():
        assert_as_accurate(fused(x), wide(x), deepcopy(wide).double()(x.double()))
    fused, wide, x = fused.double(), wide.double(), x.double()
    fused[0].backend = "auto"
    fused(x).square().sum().backward()
    grads = [p.grad.clone() for p in wide.parameters()]  # type: ignore[union-attr]
    wide.zero_grad()
    wide(x).square().sum().backward()
    for ours, own in zip(grads, wide.parameters(), strict=True):
        torch.testing.assert_close(ours, own.grad)


def test_only_what_fits_is_fused() -> None:
    wide = fpe.expand(mlp(24, 12, 8, 12, 6), 2, generator=seeded())
    fused = fpe.fuse(wide)
    kinds = [type(m).__name__ for m in fused]
    assert kinds.count("ExpandedMLP") == 2 and len(kinds) == len(wide) - 4
    tanh = nn.Sequential(wide[0], nn.Tanh(), wide[2])
    assert [type(m) for m in fpe.fuse(tanh)] == [type(m) for m in tanh]
    rough = nn.Sequential(wide[0], nn.GELU("tanh"), wide[2])
    assert len(fpe.fuse(rough)) == 3


REFUSED = (
    BadCall("model", lambda: fpe.fuse(nn.Linear(2, 2)), TypeError, ("fuse", "nn.Sequential", "Linear")),  # type: ignore[arg-type]
    BadCall(
        "second",
        lambda: fpe.ExpandedMLP(fpe.SplitLinear(fpe.Partition.random(4, 8, 2)), "relu", nn.Linear(9, 3)),
        ValueError,
        ("ExpandedMLP", "8 children", "in_features=9"),
    ),
    BadCall(
        "first",
        lambda: fpe.ExpandedMLP(nn.Linear(8, 8), "relu", nn.Linear(8, 3)),  # type: ignore[arg-type]
        TypeError,
        ("ExpandedMLP: first", "SplitLinear", "got Linear"),
    ),
    BadCall(
        "kind of second",
        lambda: fpe.ExpandedMLP(fpe.SplitLinear(fpe.Partition.random(4, 8, 2)), "relu", nn.Identity()),  # type: ignore[arg-type]
        TypeError,
        ("ExpandedMLP: second", "MergeLinear", "got Identity"),
    ),
    BadCall(
        "activation",
        lambda: fpe.ExpandedMLP(fpe.SplitLinear(fpe.Partition.random(4, 8, 2)), "tanh", nn.Linear(8, 3)),
        ValueError,
        ("ExpandedMLP: activation", "relu", "'tanh'"),
    ),
    BadCall(
        "w2",
        lambda: expanded_mlp(torch.ones(1, 4), torch.ones(3, 4), torch.zeros(3, 4).byte(), torch.ones(2, 3), alpha=2),
        ValueError,
        ("expanded_mlp", "w2", "[*, 6]", "[2, 3]"),
    ),
    BadCall(
        "too large",
        lambda: expanded_mlp(
            torch.ones(1, 4).half(),
            torch.ones(129, 4).half(),
            torch.zeros(129, 4).byte(),
            torch.ones(2, 258).half(),
            alpha=2,
            backend="triton",
        ),
        ValueError,
        ("expanded_mlp", "'triton'", "128 hidden parents", "129"),
    ),
    BadCall(
        "float32",
        lambda: expanded_mlp(
            torch.ones(1, 4), torch.ones(3, 4), torch.zeros(3, 4).byte(), torch.ones(2, 6), alpha=2, backend="triton"
        ),
        ValueError,
        ("expanded_mlp", "'triton'", "float16 and bfloat16"),
    ),
    BadCall(
        "gradient",
        lambda: expanded_mlp(
            torch.ones(1, 4, requires_grad=True),
            torch.ones(3, 4),
            torch.zeros(3, 4).byte(),
            torch.ones(2, 6),
            alpha=2,
            backend="triton",
        ),
        ValueError,
        ("expanded_mlp", "'triton'", "gradient"),
    ),
)


@pytest.mark.parametrize("case", REFUSED, ids=readable_id)
def test_bad_calls_say_what_is_wrong(case: BadCall) -> None:
    case.check()


def test_what_is_said_to_fit_fits() -> None:
    for alpha, hidden in product(range(1, 9), (1, 16, 17, 64, 100, 128)):
        if limit(hidden, alpha, 2) is None:
            config = choose(Problem(64, hidden, 512, alpha), KNOWN[90])
            held = (1 << (alpha - 1).bit_length()) * config.block_h * config.block_m
            assert hidden <= config.block_h and held <= MAX_ACCUMULATORS
    assert limit(129, 2, 2) and limit(8, 2, 4) and limit(128, 8, 2) is None


def test_few_rows_go_from_memory_to_the_tensor_cores() -> None:
    for alpha, hidden, k, m in product(range(1, 9), (2, 16, 18, 64, 100, 128), (8, 100, 512, 4096), (1, 16, 33, 64)):
        problem = Problem(m, hidden, k, alpha, pairs=True)
        config = choose(problem, KNOWN[90])
        assert config.direct and problem.fits(config, KNOWN[90])
        warps_in, warps_out = warps_of(config)
        assert config.num_warps == warps_in * warps_out in (4, 8) and config.block_h >= hidden
        assert alpha * config.block_m * config.block_h // (32 * warps_out) <= 128
        assert not choose(replace(problem, pairs=False), KNOWN[90]).direct
        assert not choose(replace(problem, m=65), KNOWN[90]).direct


@pytest.mark.parametrize(
    "change",
    [
        {"block_m": 4},
        {"block_m": 128},
        {"block_h": 32},
        {"block_k": 128},
        {"block_k": 2048},
        {"block_o": 64},
        {"num_warps": 4},
    ],
    ids=str,
)
def test_an_impossible_direct_configuration_is_invalid(change: dict[str, int]) -> None:
    problem, good = Problem(16, 64, 512, 4, pairs=True), Config(16, 64, 256, 128, 8, 1, direct=True)
    assert problem.fits(good, KNOWN[90]) and not problem.fits(replace(good, **change), KNOWN[90])
    assert not replace(problem, pairs=False).fits(good, KNOWN[90])
