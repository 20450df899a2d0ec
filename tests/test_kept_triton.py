"""Products of kept values in Triton under the interpreter: against float64 truth, poisoned and guarded."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from support import allow, assert_as_accurate, cast, guarded, integers, readable_id, seeded
from torch import Tensor
from torch.nn.functional import silu

from fpe.kernels import (
    Bitmap,
    PackedLabels,
    SeededHoles,
    SeededLabels,
    dispatch,
    masked_matmul,
    merge_matmul,
    partition_grad,
    split_matmul,
    unpack_values,
)
from fpe.kernels.bitmap import layout
from fpe.kernels.device import KNOWN
from fpe.kernels.partition import kept as choice
from fpe.kernels.partition import triton as partition_triton
from fpe.kernels.partition.config import MAX_ALPHA, Config, Problem
from fpe.kernels.roofs import PUBLISHED
from fpe.kernels.tables import choose

pytestmark = pytest.mark.usefixtures("poisoned")

OPS = ("split", "merge", "grad", "split_t", "merge_t", "grad_t")


@dataclass(frozen=True)
class Case:
    """A weight of which some entries are kept, as stored, and a batch."""

    n: int
    k: int
    m: int
    alpha: int = 2
    density: float = 0.5
    of_a_seed: bool = False
    per_row: int | None = None
    """Of holes of the seed too: they are of the whole weight."""

    @property
    def id(self) -> str:
        labels = "-seed" if self.of_a_seed else ""
        labels += f"-keeps{self.per_row}" if self.per_row else ""
        return f"{self.n}x{self.k}-m{self.m}-alpha{self.alpha}-density{self.density}{labels}"

    def mask(self) -> Tensor:
        if self.per_row:
            return self.kept().unpack()
        mask = torch.rand(self.n, self.k, generator=seeded()) < self.density
        if 0 < self.density < 1:
            mask[:1], mask[1:2], mask[:, -1:] = False, True, False  # an empty and a full row, an empty column
        return mask

    def kept(self) -> Bitmap | SeededHoles:
        if self.per_row:
            return SeededHoles.of(5, (self.n, self.k), self.per_row)
        return Bitmap.pack(self.mask())

    def table(self) -> Tensor:
        if self.of_a_seed:
            return self.made().unpack()
        return torch.randint(self.alpha, (self.n, self.k), generator=seeded(1), dtype=torch.uint8)

    def made(self) -> SeededLabels:
        """Those of a part of a weight that begins somewhere else."""
        return SeededLabels.of(5, (self.n, self.k), self.alpha, (0, 0) if self.per_row else (4, 256))

    def labels(self) -> PackedLabels | SeededLabels | None:
        if self.of_a_seed:
            return self.made()
        return PackedLabels.pack(self.table(), self.alpha) if self.alpha > 1 else None


CASES = (
    Case(32, 128, 16),
    Case(40, 70, 17, alpha=1),
    Case(5, 267, 1, alpha=3, density=0.25),  # runs of 32 words go on from row to row
    Case(35, 60, 18, alpha=8, density=0.75),
    Case(5, 64, 5, alpha=4, density=1.0),
    Case(5, 40, 3, density=0.0),
    Case(33, 131, 17, alpha=2, of_a_seed=True),
    Case(33, 131, 17, alpha=2, of_a_seed=True, per_row=77),
    Case(9, 139, 5, alpha=8, of_a_seed=True, per_row=139),
    Case(7, 40, 3, alpha=4, of_a_seed=True, per_row=1),
    Case(9, 139, 5, alpha=8, density=0.25, of_a_seed=True),
    Case(1, 1, 1, alpha=1, density=1.0),
    Case(48, 48, 0),
    Case(0, 48, 3),
    Case(48, 0, 3),
)


@cache
def operands(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The kept values between NaN, and the other operands by name."""
    shapes = {
        "x": (case.m, case.k),
        "z": (case.m, case.alpha, case.k),
        "y": (case.m, case.n),
        "dy": (case.m, case.alpha, case.n),
    }
    others = {name: guarded(*shape, seed=2 + i) for i, (name, shape) in enumerate(shapes.items())}
    return guarded(case.kept().nnz, seed=1), others


def compute(op: str, case: Case, dtype: torch.dtype, backend: str, activation: str | None = None) -> Tensor:
    """One operation, on the weight as stored or (``_t``) on its transpose; a bias joins an activation."""
    values, others = operands(case)
    x, z, y, dy = (cast(others[name], dtype) for name in ("x", "z", "y", "dy"))
    v, kept, labels, alpha = cast(values, dtype), case.kept(), case.labels(), case.alpha
    turned, on = None if labels is None else labels.T, {"backend": backend}
    bias = _bias(case).to(dtype)
    wide, narrow = (bias, bias[0].contiguous()) if activation else (None, None)
    return {
        "split": lambda: split_matmul(x, v, labels, alpha, wide, activation, kept=kept, **on),
        "merge": lambda: merge_matmul(z, v, labels, narrow, activation, kept=kept, **on),
        "grad": lambda: partition_grad(dy, x, labels, kept=kept, **on),
        "split_t": lambda: split_matmul(y, v, turned, alpha, kept=kept.T, **on),
        "merge_t": lambda: merge_matmul(dy, v, turned, kept=kept.T, **on),
        "grad_t": lambda: partition_grad(z, y, turned, kept=kept.T, **on),
    }[op]()


def _bias(case: Case) -> Tensor:
    return torch.randn(case.alpha, case.n, dtype=torch.float64, generator=seeded(8))


def truth(op: str, case: Case, dtype: torch.dtype, activation: str | None = None) -> Tensor:
    """Float64 on the operands as the dtype holds them; the weight is filled in place by place."""
    values, others = operands(case)
    x, z, y, dy = (others[name].to(dtype).double() for name in ("x", "z", "y", "dy"))
    mask, table = case.mask(), case.table()
    w = torch.zeros(case.n, case.k, dtype=torch.float64)
    w[mask] = values.to(dtype).double()
    masks = torch.stack([table == child for child in range(case.alpha)]).double()
    bias = _bias(case).to(dtype).double()
    if op == "split":
        result = torch.einsum("mk,nk,ank->man", x, w, masks)
        return silu(result + bias) if activation else result
    if op == "merge":
        result = torch.einsum("mak,nk,ank->mn", z, w, masks)
        return silu(result + bias[0]) if activation else result
    if op == "split_t":
        return torch.einsum("mn,nk,ank->mak", y, w, masks)
    if op == "merge_t":
        return torch.einsum("man,nk,ank->mk", dy, w, masks)
    left, right = (dy, x) if op == "grad" else (y[:, None].expand(-1, case.alpha, -1), None)
    if right is None:
        return torch.einsum("man,mak,ank->nk", left, z, masks)[mask]
    return torch.einsum("man,mk,ank->nk", left, right, masks)[mask]


@pytest.fixture
def never_decompressed() -> object:
    with patch.object(choice, "_decompressed", side_effect=AssertionError("decompressed")):
        yield


@pytest.mark.usefixtures("never_decompressed")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((CASES[i], dtype) for i, dtype in ((0, torch.float16), (1, torch.bfloat16), (2, torch.float16))),
        *((CASES[i], torch.float16) for i in (4, 5, 8)),
    ],
    ids=readable_id,
)
def test_triad(case: Case, op: str, dtype: torch.dtype) -> None:
    activation = "silu" if op in ("split", "merge") else None
    ours = compute(op, case, dtype, "triton", activation)
    with patch.object(choice, "_decompressed", DECOMPRESSED):
        eager = compute(op, case, dtype, "eager", activation)
    assert_as_accurate(ours, eager, truth(op, case, dtype, activation))


DECOMPRESSED = choice._decompressed


LARGE = Config(block_m=16, block_n=16, block_k=256, split=1, group=1, num_warps=4, num_stages=3)
SMALL = Config(block_m=16, block_n=16, block_k=32, split=4, group=2, num_warps=4, num_stages=3)
EMPTY = Config(block_m=32, block_n=32, block_k=128, split=16, group=3, num_warps=4, num_stages=3)


@pytest.mark.usefixtures("never_decompressed")
@pytest.mark.parametrize(
    ("config", "op"),
    [(LARGE, "split"), (SMALL, "merge"), (EMPTY, "split"), (SMALL, "split_t"), (EMPTY, "merge_t"), (LARGE, "grad"),
     (SMALL, "grad_t")],
    ids=lambda c: c if isinstance(c, str) else f"n{c.block_n}-k{c.block_k}-split{c.split}",
)  # fmt: skip
def test_every_configuration_computes_the_same(config: Config, op: str) -> None:
    """Tiles from a word to more than a row, splits, more splits than steps; twice with the same bits."""
    case = Case(9, 139, 5, alpha=3)
    activation = "silu" if op in ("split", "merge") else None
    with patch("fpe.kernels.partition.triton.choose", return_value=config):
        ours, again = (compute(op, case, torch.float32, "triton", activation) for _ in range(2))
    with patch.object(choice, "_decompressed", DECOMPRESSED):
        eager = compute(op, case, torch.float32, "eager", activation)
    assert_as_accurate(ours, eager, truth(op, case, torch.float32, activation))
    assert torch.equal(ours, again)


@pytest.mark.usefixtures("never_decompressed")
@pytest.mark.parametrize("end", ["lower", "upper", "both", "rows"])
@pytest.mark.parametrize("op", ["split", "merge_t"])
def test_pairs_of_16_bit_values_are_exact_up_to_the_last_value(op: str, end: str) -> None:
    """Whichever of the last pair exist, or none of the last rows; tiles of which two values follow and others."""
    mask = torch.rand(40, 40, generator=seeded()) < 0.5
    mask[-1] = False
    mask[-1, {"lower": [38], "upper": [39], "both": [38, 39], "rows": []}[end]] = True
    if end == "rows":
        mask[20:] = False
    kept = Bitmap.pack(mask)
    kept = kept.T if op == "merge_t" else kept
    labels = torch.randint(3, (40, 40), generator=seeded(1), dtype=torch.uint8)
    packed = PackedLabels.pack(labels, 3)
    values, x, z = (integers(*shape, seed=i).half() for i, shape in enumerate(((kept.nnz,), (3, 40), (3, 3, 40))))
    config = replace(SMALL, split=1)
    with patch("fpe.kernels.partition.triton.choose", return_value=config):
        if op == "split":
            ours = split_matmul(x, values, packed, 3, kept=kept, backend="triton")
        else:
            ours = merge_matmul(z, values, packed.T, kept=kept, backend="triton")
    with patch.object(choice, "_decompressed", DECOMPRESSED):
        if op == "split":
            eager = split_matmul(x.float(), values.float(), packed, 3, kept=kept, backend="eager")
        else:
            eager = merge_matmul(z.float(), values.float(), packed.T, kept=kept, backend="eager")
    assert torch.equal(ours.float(), eager)


@pytest.mark.usefixtures("never_decompressed")
@pytest.mark.parametrize("op", OPS)
def test_turned_products_and_starts_of_64_bits(op: str) -> None:
    """What runs where a computed weight must be the right operand; and an index that counts beyond 2**31."""
    case = Case(9, 100, 1, alpha=3)
    narrow = compute(op, case, torch.float16, "triton")
    with patch("fpe.kernels.partition.triton.device_of", return_value=KNOWN[90]):
        turned = compute(op, case, torch.float16, "triton")
    with patch.object(choice, "_decompressed", DECOMPRESSED):
        assert_as_accurate(turned, compute(op, case, torch.float16, "eager"), truth(op, case, torch.float16))
    with patch.object(layout, "NARROW", 0):
        assert case.kept().bases.dtype == torch.int64
        assert torch.equal(compute(op, case, torch.float16, "triton"), narrow)


def test_values_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that begins past 2**31 values; untouched pages of the buffer cost no memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far, near = torch.empty(2**31 + 64, dtype=torch.float16), torch.randn(40, generator=seeded()).half()
    far[-40:] = near
    small = Bitmap.pack(torch.ones(1, 40, dtype=torch.bool))
    large = small._replace(nnz=len(far), bases=small.bases.long() + len(far) - 40)
    x = torch.randn(3, 40, generator=seeded(1)).half()
    ours, same = (masked_matmul(x, v, kept, backend="triton") for v, kept in ((far, large), (near, small)))
    assert torch.equal(ours, same)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_both_orders_are_the_eager_twins(transposed: bool) -> None:
    case = Case(9, 70, 3)

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        values, others = operands(case)
        kept, labels = (case.kept().T, case.labels().T) if transposed else (case.kept(), case.labels())
        x, v = (t.float().to(dtype).requires_grad_() for t in (others["y" if transposed else "x"], values))
        hidden = split_matmul(x, v, labels, 2, kept=kept, backend=backend).tanh()
        out = merge_matmul(hidden, v, labels.T, kept=kept.T, backend=backend)
        first = torch.autograd.grad(out.square().sum(), [x, v], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, v])
        return [g.detach() for g in (*first, *second)]

    how = ((torch.float32, "triton"), (torch.float32, "eager"), (torch.float64, "eager"))
    for triad in zip(*(gradients(*h) for h in how), strict=True):
        assert_as_accurate(*triad)


def test_small_integers_are_exact_and_children_add_up() -> None:
    case = Case(9, 300, 5, alpha=4)
    kept, labels = case.kept(), case.labels()
    x = torch.randint(-3, 4, (5, 300), generator=seeded(2)).half()
    v = torch.randint(-3, 4, (kept.nnz,), generator=seeded(3)).half()
    whole = masked_matmul(x, v, kept, backend="triton")
    assert torch.equal(whole.float(), x.float() @ unpack_values(v, kept).float().T)
    assert torch.equal(split_matmul(x, v, labels, 4, kept=kept, backend="triton").float().sum(1), whole.float())


def test_many_rows_and_plain_tables_are_multiplied_by_a_decompressed_weight() -> None:
    x, (values, _) = torch.randn(choice.FUSED_ROWS + 1, 70, generator=seeded()), operands(CASES[1])
    for rows, calls in ((choice.FUSED_ROWS, 0), (choice.FUSED_ROWS + 1, 1)):
        with patch.object(choice, "_decompressed", wraps=DECOMPRESSED) as weight:
            ours = masked_matmul(x[:rows], values.float(), CASES[1].kept(), backend="triton")
        assert weight.call_count == calls
        torch.testing.assert_close(ours, x[:rows] @ unpack_values(values.float(), CASES[1].kept()).T)
    case = Case(20, 64, 2)
    with patch.object(choice, "_decompressed", wraps=DECOMPRESSED) as weight:
        v = operands(case)[0].float()
        ours = split_matmul(x[:2, :64], v, case.table(), 2, kept=case.kept(), backend="triton")
    assert weight.call_count == 1
    torch.testing.assert_close(ours, split_matmul(x[:2, :64], v, case.labels(), 2, kept=case.kept(), backend="eager"))


@pytest.mark.parametrize("arch", KNOWN)
def test_gathered_values_are_not_multiplied_where_a_fence_is_missing(arch: int) -> None:
    with patch.object(choice, "device_of", return_value=KNOWN[arch]):
        read = choice._reader("split_matmul", (1, 4, 4, 1), 3, torch.ones(3), None, torch.ones(1), False, "triton")
    assert read == (None if arch == 100 else "triton")


def test_auto_asks_the_cost_model_and_triton_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tensor that says that it lies on a GPU; what is asked is the share of the entries that exist."""
    there = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, get_device=lambda: 0)
    allow(monkeypatch, choice.SPLIT, "triton")
    monkeypatch.setattr(choice, "device_of", lambda tensor: KNOWN[90])
    monkeypatch.setattr(dispatch, "roof_of", lambda index: PUBLISHED["h200"])
    dispatch.ranked_on.cache_clear()

    def reads(m: int, nnz: int, backend: str = "auto", alpha: int = 1, turned: bool = False) -> str | None:
        return choice._reader("split_matmul", (m, 4096, 4096, alpha), nnz, there, None, torch.ones(1), turned, backend)

    assert reads(1, 4096 * 2048) == reads(1, 0) == "triton"
    assert reads(65, 4096 * 2048) is None
    assert reads(64, 4096 * 2048, alpha=8) == "triton"
    costly = reads(64, 4096 * 2048, alpha=8, turned=True)  # four tiles of rows count all bits again
    assert costly is None and reads(64, 4096 * 2048, "triton", 8, turned=True) == "triton"
    assert reads(1, 4096 * 2048, "eager") is None
    dispatch.ranked_on.cache_clear()


@pytest.mark.parametrize("arch", KNOWN)
def test_the_rule_chooses_tiles_of_whole_words(arch: int) -> None:
    sizes = ((1, 1), (100, 784), (4096, 14336))
    for op, m, (n, k), turned, alpha, size in product(
        ("split_matmul", "merge_matmul", "partition_grad"), (1, 17, 64), sizes, (False, True), range(1, MAX_ALPHA + 1),
        (2, 4),
    ):  # fmt: skip
        problem = Problem(op, m, n, k, turned, alpha, size, kept=0.25)
        config = choose(problem, KNOWN[arch])
        assert problem.fits(config, KNOWN[arch]) and not config.direct
    assert problem.fits(replace(config, block_m=16, block_n=16, block_k=32), KNOWN[arch])
    assert not problem.fits(replace(config, block_m=16, block_n=16, block_k=16), KNOWN[arch])


def test_the_direct_kernel_reads_whole_lines_along_rows() -> None:
    mask = torch.rand(16, 256, generator=seeded()) < 0.5
    kept, holes = Bitmap.pack(mask), SeededHoles.of(5, (16, 256), 128)
    values = torch.zeros(kept.nnz + 8, dtype=torch.float16)
    aligned = values[8:]

    def reads(values: Tensor, kept: Bitmap | SeededHoles) -> bool:
        return partition_triton._by_lines(partition_triton.kept_weight(values, None, kept))

    assert reads(aligned, kept)
    assert not reads(values[7:-1], kept)  # 16 bytes begin elsewhere
    assert not reads(aligned, kept.T)
    assert not reads(values[: holes.nnz], holes)
    with patch.object(partition_triton, "NARROW", kept.nnz):
        assert not reads(aligned, kept)
