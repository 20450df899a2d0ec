"""The Triton partition kernels under the interpreter: against float64 truth, with poisoned outputs and guard bands."""

from dataclasses import dataclass
from functools import cache
from itertools import product
from unittest.mock import patch

import pytest
import torch
from support import BadCall, assert_as_accurate, cast, guarded, readable_id, seeded
from torch import Tensor

from fpe.kernels import HOLE, PackedLabels, SeededLabels, merge_matmul, partition_grad, split_matmul
from fpe.kernels.device import KNOWN
from fpe.kernels.partition.config import (
    MAX_ALPHA,
    Config,
    Problem,
)
from fpe.kernels.tables import choose

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRIAD = ((torch.float32, "triton"), (torch.float32, "eager"), (torch.float64, "eager"))
OPS = ("split", "merge", "grad", "split_t", "merge_t", "grad_t")


@dataclass(frozen=True)
class Case:
    """A partitioned weight, as stored, and a batch."""

    n: int
    k: int
    m: int
    alpha: int = 2
    labels: str = "random"
    packed: bool = True

    @property
    def id(self) -> str:
        return f"{self.n}x{self.k}-m{self.m}-alpha{self.alpha}-{self.labels}" + "-plain" * (not self.packed)

    def table(self) -> Tensor:
        if self.labels == "seeded":
            return self.of_a_seed.unpack()
        labels = torch.randint(self.alpha, (self.n, self.k), generator=seeded(), dtype=torch.uint8)
        if self.labels == "holes":
            labels[torch.rand(self.n, self.k, generator=seeded(9)) < 0.3] = HOLE
            labels[:1], labels[:, -1:] = HOLE, self.alpha  # an empty row and an empty column
        if self.labels == "one child":
            labels[:] = self.alpha - 1
        return labels

    @property
    def of_a_seed(self) -> SeededLabels:
        """Of a part of a larger weight."""
        return SeededLabels.of(5, (self.n, self.k), self.alpha, (4, 256))

    def given(self) -> Tensor | PackedLabels | SeededLabels:
        if self.labels == "seeded":
            return self.of_a_seed
        return PackedLabels.pack(self.table(), self.alpha) if self.packed else self.table()


CASES = (
    Case(64, 128, 16),
    Case(40, 70, 17, labels="holes"),
    Case(67, 131, 1),  # odd inputs: no pairs of weights
    Case(130, 200, 70, alpha=3),
    Case(33, 66, 5, alpha=4, labels="holes"),
    Case(65, 40, 3, alpha=8),
    Case(20, 258, 33, alpha=2, labels="one child"),
    Case(40, 70, 17, labels="holes", packed=False),
    Case(31, 45, 9, alpha=5, packed=False),
    Case(1, 1, 1),
    Case(48, 48, 0),
    Case(0, 48, 3),
    Case(48, 0, 3),
    Case(64, 128, 16, labels="seeded"),
    Case(67, 131, 1, alpha=4, labels="seeded"),
    Case(17, 139, 5, alpha=8, labels="seeded"),
)


@cache
def operands(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight, zero at holes, and the other operands by name."""
    w = guarded(case.n, case.k, seed=1)
    w[case.table() >= case.alpha] = 0
    shapes = {
        "x": (case.m, case.k),
        "z": (case.m, case.alpha, case.k),
        "y": (case.m, case.n),
        "dy": (case.m, case.alpha, case.n),
    }
    others = {name: guarded(*shape, seed=2 + i) for i, (name, shape) in enumerate(shapes.items())}
    return w, others


def compute(op: str, case: Case, dtype: torch.dtype, backend: str, activation: str | None = None) -> Tensor:
    """One operation, on the stored weight or (``_t``) on its transpose; a bias joins where there is an activation."""
    w, others = operands(case)
    x, z, y, dy = (cast(others[name], dtype) for name in ("x", "z", "y", "dy"))
    w, labels, alpha, on = cast(w, dtype), case.given(), case.alpha, {"backend": backend}
    bias = torch.randn(alpha, max(case.n, case.k), dtype=torch.float64, generator=seeded(8)).to(dtype)
    wide, narrow = (bias[:, : case.n], bias[0, : case.n]) if activation else (None, None)
    return {
        "split": lambda: split_matmul(x, w, labels, alpha, wide, activation, **on),
        "merge": lambda: merge_matmul(z, w, labels, narrow, activation, **on),
        "grad": lambda: partition_grad(dy, x, labels, **on),
        "split_t": lambda: split_matmul(y, w.T, labels.T, alpha, **on),
        "merge_t": lambda: merge_matmul(dy, w.T, labels.T, **on),
        "grad_t": lambda: partition_grad(z, y, labels.T, **on),
    }[op]()


def truth(op: str, case: Case, dtype: torch.dtype, activation: str | None = None) -> Tensor:
    """Float64 on the operands as the dtype holds them."""
    w, others = operands(case)
    rounded = {name: t.to(dtype).double() for name, t in others.items()}
    x, z, y, dy = (rounded[name] for name in ("x", "z", "y", "dy"))
    w, labels, alpha = w.to(dtype).double(), case.table(), case.alpha
    bias = torch.randn(alpha, max(case.n, case.k), dtype=torch.float64, generator=seeded(8)).to(dtype).double()
    wide, narrow = (bias[:, : case.n], bias[0, : case.n]) if activation else (None, None)
    masks = torch.stack([labels == child for child in range(alpha)]).double()
    function = getattr(torch.nn.functional, activation) if activation else (lambda t: t)
    if op == "split":
        return function(torch.einsum("mk,nk,ank->man", x, w, masks) + (0 if wide is None else wide))
    if op == "merge":
        return function(torch.einsum("mak,nk,ank->mn", z, w, masks) + (0 if narrow is None else narrow))
    if op == "split_t":
        return torch.einsum("mn,nk,ank->mak", y, w, masks)
    if op == "merge_t":
        return torch.einsum("man,nk,ank->mk", dy, w, masks)
    return torch.einsum("man,mk,ank->nk", dy, x, masks) if op == "grad" else torch.einsum("mak,mn,ank->kn", z, y, masks)


@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", CASES, ids=readable_id)
def test_triad(case: Case, op: str, dtype: torch.dtype) -> None:
    ours, eager = (compute(op, case, dtype, backend) for backend in ("triton", "eager"))
    assert_as_accurate(ours, eager, truth(op, case, dtype))
    if "grad" in op:
        holes = case.table() >= case.alpha
        assert not ours[holes.T if op == "grad_t" else holes].any()


@pytest.mark.parametrize("op", ["split", "merge", "split_t", "merge_t"])
@pytest.mark.parametrize("case", CASES, ids=readable_id)
def test_the_turned_product_is_as_accurate(case: Case, op: str) -> None:
    """What runs where a computed weight must be the right operand."""
    dtype, activation = torch.float16, None if op.endswith("_t") else "silu"
    with patch("fpe.kernels.partition.triton.device_of", return_value=KNOWN[90]):
        ours = compute(op, case, dtype, "triton", activation)
    assert_as_accurate(ours, compute(op, case, dtype, "eager", activation), truth(op, case, dtype, activation))


def test_a_computed_weight_is_the_right_operand_where_the_left_one_may_race() -> None:
    assert {arch for arch, device in KNOWN.items() if device.computed_right} == {90}
    for alpha, transposed in product(range(2, MAX_ALPHA + 1), (False, True)):
        for op in ("split_matmul", "merge_matmul"):
            config = choose(Problem(op, 8192, 14336, 4096, transposed, alpha, 2), KNOWN[90])
            assert config.block_m >= 64, "large batches fill a warpgroup's matrix instruction"


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("op", ["split", "merge"])
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_bias_and_activation_in_the_epilogue(activation: str, op: str, dtype: torch.dtype) -> None:
    ours, eager = (compute(op, CASES[1], dtype, backend, activation) for backend in ("triton", "eager"))
    assert_as_accurate(ours, eager, truth(op, CASES[1], dtype, activation))


CONFIGS = (
    Config(block_m=16, block_n=16, block_k=16, split=1, group=1, num_warps=4, num_stages=3),
    Config(block_m=32, block_n=32, block_k=64, split=4, group=2, num_warps=4, num_stages=3),
    Config(block_m=16, block_n=64, block_k=32, split=16, group=3, num_warps=4, num_stages=3),
)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"m{c.block_m}-n{c.block_n}-k{c.block_k}-split{c.split}")
def test_every_configuration_computes_the_same(config: Config, op: str) -> None:
    """Splits, more splits than steps, partial groups; twice with the same bits."""
    case, activation = Case(50, 90, 37, alpha=3), "silu" if op in ("split", "merge") else None
    with patch("fpe.kernels.partition.triton.choose", return_value=config):
        ours, again = (compute(op, case, torch.float32, "triton", activation) for _ in range(2))
    eager = compute(op, case, torch.float32, "eager", activation)
    assert_as_accurate(ours, eager, truth(op, case, torch.float32, activation))
    assert torch.equal(ours, again)


@pytest.mark.parametrize("alpha", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_children_add_up_to_the_parent(alpha: int, dtype: torch.dtype) -> None:
    """Small integers: every sum is exact in every dtype."""
    x, w = (torch.randint(-3, 4, size, generator=seeded(i)).to(dtype) for i, size in enumerate(((9, 70), (33, 70))))
    labels = PackedLabels.pack(torch.randint(alpha, (33, 70), generator=seeded(), dtype=torch.uint8), alpha)
    parent = (x.float() @ w.float().T).to(dtype)
    children = split_matmul(x, w, labels, alpha, backend="triton")
    assert torch.equal(children.sum(1), parent)
    same = x[:, None].expand(9, alpha, 70)
    assert torch.equal(merge_matmul(same, w, labels, backend="triton"), parent)
    # <split(x), z> = <x, merge_t(z)>: each is the other's transpose.
    z = torch.randint(-3, 4, (9, alpha, 33), generator=seeded(5)).to(dtype)
    back = merge_matmul(z, w.T, labels.T, backend="triton")
    assert (children.double() * z.double()).sum() == (x.double() * back.double()).sum()


def gradients(case: Case, dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
    w, others = operands(case)
    leaves = [t.float().to(dtype).clone().requires_grad_() for t in (others["x"], w)]
    bias = torch.linspace(-1, 1, case.alpha * case.n, dtype=dtype).view(case.alpha, case.n).requires_grad_()
    hidden = split_matmul(leaves[0], leaves[1], case.given(), case.alpha, bias, "gelu", backend=backend)
    out = merge_matmul(hidden, leaves[1].T, case.given().T, leaves[0].new_ones(case.k), "silu", backend=backend)
    return torch.autograd.grad(out.square().sum(), [*leaves, bias])


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[7]], ids=readable_id)
def test_gradients_are_the_eager_twins(case: Case) -> None:
    ours, eager, exact = (gradients(case, *how) for how in TRIAD)
    for triad in zip(ours, eager, exact, strict=True):
        assert_as_accurate(*triad)


def test_rows_do_not_depend_on_the_batch() -> None:
    w, others = operands(CASES[0])
    x, w, labels = others["x"].half(), w.half(), CASES[0].given()
    whole = split_matmul(x, w, labels, 2, backend="triton")
    for i in (0, 7, 15):  # the same tiles: the same bits
        assert torch.equal(split_matmul(x[i], w, labels, 2, backend="triton"), whole[i])


def test_strided_and_batched_operands() -> None:
    case = CASES[1]
    x = torch.randn(70, 3, 2, generator=seeded()).permute(2, 1, 0)
    w, labels = operands(case)[0].float(), case.given()
    bias = torch.randn(4, 80, generator=seeded(1))[::2, ::2]
    ours, eager = (split_matmul(x, w, labels, 2, bias, backend=backend) for backend in ("triton", "eager"))
    assert ours.shape == (2, 3, 2, 40)
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("offset", [0, 1])
def test_weights_that_do_not_start_at_a_pair(offset: int) -> None:
    """A view that begins at an odd element cannot be read in pairs of 16-bit weights."""
    room = torch.randn(40 * 72, generator=seeded()).half()
    w = room.as_strided((40, 70), (72, 1), offset)
    labels = PackedLabels.pack(torch.randint(2, (40, 70), generator=seeded(), dtype=torch.uint8), 2)
    x = torch.randn(5, 70, generator=seeded(1)).half()
    ours, eager = (split_matmul(x, w, labels, 2, backend=backend) for backend in ("triton", "eager"))
    assert_as_accurate(ours, eager, split_matmul(x.double(), w.double(), labels, 2, backend="eager"))


@pytest.mark.parametrize("op", ["split", "grad"])
def test_offsets_beyond_32_bits(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2**30 elements apart: the third begins past 2**31. Untouched pages of the buffer cost no memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2**31 + 64).as_strided((3, 64), (2**30, 1))
    near = torch.randn(3, 64, generator=seeded())
    far.copy_(near)
    labels = PackedLabels.pack(torch.randint(2, (3, 64), generator=seeded(), dtype=torch.uint8), 2)

    def run(a: Tensor, backend: str) -> Tensor:
        if op == "split":  # activations and weights
            return split_matmul(a, a, labels, 2, backend=backend)
        return partition_grad(near[:, :3].expand(2, 3, 3).permute(1, 0, 2), a, labels, backend=backend)

    assert torch.equal(run(far, "triton"), run(near, "triton"))
    torch.testing.assert_close(run(far, "triton"), run(near, "eager"))


@pytest.mark.parametrize("op", ["split_matmul", "merge_matmul", "partition_grad"])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(op: str, transposed: bool) -> None:
    """The schema, the fake (strides included) and the registered gradient hold for this backend too."""
    case = CASES[1]
    w, others = operands(case)
    labels = case.given()
    assert isinstance(labels, PackedLabels)
    if transposed:
        w = w.T
    x, z, y, dy = (others[name].float().requires_grad_() for name in ("x", "z", "y", "dy"))
    w, x, z, dy = (w.float().requires_grad_(), y, dy, z) if transposed else (w.float().requires_grad_(), x, z, dy)
    arguments = {
        "split_matmul": (x, w, labels.planes, [], torch.ones(2, w.shape[0]), None, 2, transposed, "triton"),
        "merge_matmul": (z, w, labels.planes, [], torch.ones(w.shape[0]), None, True, transposed, "triton"),
        "partition_grad": (dy, x, labels.planes, [], transposed, "triton"),
    }[op]
    torch.library.opcheck(getattr(torch.ops.fpe, op).default, arguments)


W, PACKED = torch.ones(6, 20), PackedLabels.pack(torch.zeros(6, 20, dtype=torch.uint8), 2)
REFUSED = (
    BadCall(
        "orientation",
        lambda: split_matmul(torch.ones(1, 6), W.T, PACKED, 2),
        ValueError,
        ("split_matmul", "[20, 6]", "[6, 20]", "labels.T"),
    ),
    BadCall(
        "alpha",
        lambda: split_matmul(torch.ones(1, 20), W, PACKED, 3),
        ValueError,
        ("split_matmul", "alpha = 3", "alpha = 2"),
    ),
    BadCall(
        "another weight",
        lambda: merge_matmul(torch.ones(1, 2, 8), torch.ones(6, 8), PACKED),
        ValueError,
        ("merge_matmul", "[6, 8]", "[6, 20]"),
    ),
    BadCall(
        "planes",
        lambda: split_matmul(torch.ones(1, 20), W, PACKED._replace(planes=PACKED.planes[:, :, :3]), 2),
        ValueError,
        ("split_matmul", "labels.planes", "[1, 6, 16]", "[1, 6, 3]"),
    ),
    BadCall(
        "planes' dtype",
        lambda: partition_grad(torch.ones(1, 2, 6), torch.ones(1, 20), PACKED._replace(planes=PACKED.planes.int())),
        TypeError,
        ("partition_grad", "labels.planes", "uint8", "int32"),
    ),
    BadCall("pack", lambda: PackedLabels.pack(torch.zeros(2, 2), 2), TypeError, ("PackedLabels.pack", "uint8")),
    BadCall("pack's alpha", lambda: PackedLabels.pack(PACKED.unpack(), 0), ValueError, ("alpha", "1 to 254", "0")),
    BadCall(
        "children",
        lambda: split_matmul(torch.ones(1, 20), W, PACKED.unpack(), 9, backend="triton"),
        ValueError,
        ("split_matmul", "'triton'", "up to 8 children", "9"),
    ),
    BadCall(
        "float64",
        lambda: split_matmul(torch.ones(1, 20).double(), W.double(), PACKED, 2, backend="triton"),
        ValueError,
        ("split_matmul", "'triton'", "bfloat16", "float64"),
    ),
    BadCall(
        "bias",
        lambda: split_matmul(torch.ones(1, 20), W, PACKED, 2, torch.ones(12)),
        ValueError,
        ("split_matmul", "bias", "[2, 6]", "[12]"),
    ),
    BadCall(
        "activation",
        lambda: merge_matmul(torch.ones(1, 2, 20), W, PACKED, activation="tanh"),
        ValueError,
        ("merge_matmul", "relu, gelu, silu", "'tanh'"),
    ),
)


@pytest.mark.parametrize("case", REFUSED, ids=readable_id)
def test_bad_calls_say_what_is_wrong(case: BadCall) -> None:
    case.check()
