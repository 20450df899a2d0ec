"""The CPU kernels on weights stored as their kept values, and on labels of a seed: against float64 truth."""

import ctypes
import mmap
import sys
from dataclasses import dataclass

import pytest
import torch
from cpu_cases import needs_numba
from support import assert_as_accurate, changed_fields, guarded, readable_id, seeded
from torch import Tensor

from fpe.kernels import (
    Bitmap,
    PackedLabels,
    SeededLabels,
    UnsupportedError,
    masked_matmul,
    merge_matmul,
    split_matmul,
)
from fpe.kernels.partition import kept as of_kept


@dataclass(frozen=True)
class Case:
    """A product with a weight ``[n, k]`` as it is stored; ``turned`` takes its transpose.

    Without a seed the weight is its kept values: of row 1 none, of row 2 all.
    """

    seed: int | None = None
    merge: bool = False
    alpha: int = 1
    m: int = 1
    dtype: torch.dtype = torch.float32
    turned: bool = False
    n: int = 37
    k: int = 300
    density: float = 0.5
    offsets: tuple[int, int] = (0, 0)
    activation: str | None = None

    @property
    def id(self) -> str:
        return changed_fields(self) or "default"

    def mask(self) -> Tensor:
        mask = torch.rand(self.n, self.k, generator=seeded(1)) < self.density
        if self.n > 2 and self.density:
            mask[1], mask[2] = False, True
        return mask

    def index(self) -> tuple[SeededLabels | PackedLabels | None, Bitmap | None]:
        """Labels and bitmap; the words around those of the bitmap say that all entries exist."""
        if self.seed is not None:
            labels = SeededLabels.of(self.seed, (self.n, self.k), self.alpha, self.offsets)
            return (labels.T if self.turned else labels), None
        kept, packed = Bitmap.pack(self.mask()), None
        around = torch.full((kept.bits.numel() + 32,), -1, dtype=torch.int32)
        around[16:-16] = kept.bits.flatten()
        kept = kept._replace(bits=around[16:-16].view(kept.bits.shape))
        if self.alpha > 1:
            table = torch.randint(self.alpha, (self.n, self.k), generator=seeded(5)).to(torch.uint8)
            packed = PackedLabels.pack(table, self.alpha)
        return (packed.T if packed and self.turned else packed), kept.T if self.turned else kept

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Activations, weight or kept values between NaN, and a bias; in float64."""
        w = guarded(self.n, self.k, seed=2) if self.seed is not None else guarded(int(self.mask().sum()), seed=2)
        if self.seed is not None and self.turned:
            w = w.T
        n, k = (self.k, self.n) if self.turned else (self.n, self.k)
        x = torch.randn(*((self.m, self.alpha, k) if self.merge else (self.m, k)), generator=seeded(3)).double()
        bias = torch.randn(*((n,) if self.merge else (self.alpha, n)), generator=seeded(4)).double()
        return x, w, bias

    def result(self, backend: str, rounded: torch.dtype, dtype: torch.dtype) -> Tensor:
        """The product of operands rounded to a type, in a type."""
        labels, kept = self.index()
        x, w, bias = (t.to(rounded).to(dtype) for t in self.operands())
        if kept is not None:
            buffer = torch.full((w.numel() + 64,), torch.nan, dtype=dtype)
            buffer[32:-32] = w
            w = buffer[32:-32]
        if self.merge:
            return merge_matmul(x, w, labels, bias, self.activation, kept=kept, backend=backend)
        return split_matmul(x, w, labels, self.alpha, bias, self.activation, kept=kept, backend=backend)


KEPT = (
    Case(),
    Case(m=5, turned=True),
    Case(alpha=2, m=2, dtype=torch.bfloat16, activation="gelu"),
    Case(alpha=3, merge=True, m=5, dtype=torch.float16, turned=True),
    Case(alpha=8, merge=True, m=2, k=1100),  # in tiles that begin within runs
    Case(n=3, k=7),
    Case(n=20, k=6500),  # more columns than go together
    Case(n=2, k=1100, m=5, turned=True),
    Case(density=0.0),
    Case(density=1.0, n=16, k=128),
)
SEEDED = (
    Case(seed=7, alpha=2),
    Case(seed=2**32 - 1, alpha=4, m=5, turned=True, offsets=(6, 384)),
    Case(seed=7, alpha=8, merge=True, m=2, dtype=torch.bfloat16),
    Case(seed=7, alpha=2, merge=True, turned=True, offsets=(2, 128)),
    Case(seed=0, alpha=2, n=3, k=7, activation="relu"),
)


@needs_numba
@pytest.mark.parametrize("case", (*KEPT, *SEEDED), ids=readable_id)
def test_triad(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are read where they lie."""
    yardstick = case.result("eager", case.dtype, case.dtype)
    truth = case.result("eager", case.dtype, torch.float64)

    def refuse(*call: object) -> None:
        raise AssertionError("the weight is decompressed")

    monkeypatch.setattr(of_kept, "_moved", refuse)
    assert_as_accurate(case.result("cpu", case.dtype, case.dtype), yardstick, truth)


@needs_numba
@pytest.mark.parametrize("size", [0, 1, 2], ids=["m", "n", "k"])
@pytest.mark.parametrize("seed", [None, 7], ids=["kept", "seeded"])
def test_nothing_to_multiply(seed: int | None, size: int) -> None:
    sizes = [2, 3, 4]
    sizes[size] = 0
    case = Case(seed=seed, alpha=2, m=sizes[0], n=sizes[1], k=sizes[2])
    results = (case.result(backend, torch.float32, torch.float32) for backend in ("cpu", "eager"))
    assert torch.equal(*results)


@needs_numba
def test_a_general_mask() -> None:
    case = KEPT[0]
    _, kept = case.index()
    x, w, bias = (t.float() for t in case.operands())
    assert kept is not None
    ours = masked_matmul(x, w, kept, bias[0], backend="cpu")
    assert torch.equal(ours, case.result("cpu", torch.float32, torch.float32)[:, 0])


@needs_numba
def test_gradients_of_kept_values_are_those_of_the_twin() -> None:
    case, grads = Case(alpha=2, m=5), []
    labels, kept = case.index()
    for backend, dtype in (("cpu", torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
        x, w, bias = (t.float().to(dtype).requires_grad_() for t in case.operands())
        y = split_matmul(x, w, labels, 2, bias, kept=kept, backend=backend)
        grads.append(torch.autograd.grad(y.square().sum(), (x, w, bias)))
    for ours, twins, truth in zip(*grads, strict=True):
        assert_as_accurate(ours, twins, truth)


@needs_numba
def test_a_plain_table_beside_kept_values_decompresses() -> None:
    case = Case(alpha=2)
    labels, kept = case.index()
    assert isinstance(labels, PackedLabels)
    x, w, _ = (t.float() for t in case.operands())
    table = labels.unpack()
    table[0, 0] = 9  # nobody's, although the value is there
    ours, twin = (split_matmul(x, w, table, 2, kept=kept, backend=backend) for backend in ("cpu", "eager"))
    truth = split_matmul(x.double(), w.double(), table, 2, kept=kept, backend="eager")
    assert_as_accurate(ours, twin, truth)


@needs_numba
@pytest.mark.skipif(sys.platform != "linux", reason="memory is locked as Linux does it")
@pytest.mark.parametrize(
    "case",
    [Case(n=9), Case(n=8, m=5, turned=True), Case(alpha=2, m=2, dtype=torch.bfloat16, density=0.01)],
    ids=readable_id,
)
def test_nothing_is_read_behind_the_last_value(case: Case) -> None:
    """Memory that may not be read follows it: a kernel that reads there ends the process."""
    labels, kept = case.index()
    x, w, bias = (t.to(case.dtype) for t in case.operands())
    pages = -(-w.numel() * w.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory, pages))
    values = torch.frombuffer(memory, dtype=w.dtype, count=w.numel(), offset=pages - w.numel() * w.element_size())
    values.copy_(w)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), mmap.PAGESIZE, 0) == 0
    y = split_matmul(x, values, labels, case.alpha, bias, kept=kept, backend="cpu")
    assert torch.equal(y, case.result("cpu", case.dtype, case.dtype))


@needs_numba
def test_a_part_that_begins_between_words_is_refused() -> None:
    labels = SeededLabels.of(7, (4, 64), 2, (1, 0))
    with pytest.raises(UnsupportedError, match="multiples of 2 rows and 128 columns"):
        split_matmul(torch.ones(1, 64), torch.ones(4, 64), labels, 2, backend="cpu")
