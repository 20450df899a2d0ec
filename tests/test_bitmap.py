"""Weights stored as their kept values: the index, ``torch.library``, and calls that must fail."""

from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from support import BadCall, readable_id, seeded
from torch import Tensor

from fpe.kernels import (
    Bitmap,
    PackedLabels,
    masked_matmul,
    merge_matmul,
    pack_values,
    partition_grad,
    split_matmul,
    unpack_values,
)
from fpe.kernels.bitmap import layout

# The index


def counted(kept: Bitmap) -> Tensor:
    """How many values the index says stand before each word, in the order of the words."""
    words = torch.arange(kept.bits.numel())
    per_run, per_base = layout.RUN // layout.WORD, layout.BASE // layout.WORD
    ones = unpack_ones(kept)
    within = ones.cumsum(0) - ones
    run = words // per_run
    starts = kept.starts.long() & 0xFFFF
    return kept.bases[words // per_base] + starts[run] + within - within[run * per_run]


def unpack_ones(kept: Bitmap) -> Tensor:
    return (kept.bits.flatten()[:, None] >> torch.arange(32)).bitwise_and(1).sum(1)


@pytest.mark.parametrize(
    ("n", "k", "density"), [(1, 1, 1.0), (7, 33, 0.5), (5, 1500, 0.25), (3, 40_000, 1.0), (40, 0, 1.0), (0, 40, 1.0)]
)
def test_the_index_counts_the_values_before_every_word(n: int, k: int, density: float) -> None:
    """Rows that end inside of a word, runs that begin inside of a row, more than one base, starts beyond 2**15."""
    mask = torch.rand(n, k, generator=seeded()) < density
    kept = Bitmap.pack(mask)
    assert kept.nnz == int(mask.sum()) and torch.equal(kept.unpack(), mask) and torch.equal(kept.T.unpack(), mask.T)
    ones = unpack_ones(kept)
    assert torch.equal(counted(kept), ones.cumsum(0) - ones)
    assert kept.validate() is kept
    if density == 1 and n * k > layout.BASE:
        assert len(kept.bases) == 2 and int(kept.starts.min()) < 0
    with patch.object(layout, "NARROW", 0):
        assert torch.equal(counted(Bitmap.pack(mask)), counted(kept)) and Bitmap.pack(mask).bases.dtype == torch.int64


def test_moves_across_bases_are_exact() -> None:
    """More positions than one base covers, by the kernel and by its twin."""
    mask = torch.rand(16, 4128, generator=seeded()) < 0.9
    kept = Bitmap.pack(mask)
    assert len(kept.bases) == 2
    w = torch.randn(16, 4128, generator=seeded(1))
    for backend in ("triton", "eager"):
        values = pack_values(w, kept, backend=backend)
        assert torch.equal(values, w[mask])
        assert torch.equal(unpack_values(values, kept, backend=backend), torch.where(mask, w, 0))
        assert torch.equal(unpack_values(values, kept.T, backend=backend), torch.where(mask, w, 0).T)


@pytest.mark.parametrize("part", ["bits", "starts", "bases", "nnz"])
def test_an_index_that_does_not_fit_itself_is_refused(part: str) -> None:
    kept = Bitmap.pack(torch.rand(5, 90, generator=seeded()) < 0.5)
    was = getattr(kept, part)
    with pytest.raises(
        ValueError, match=r"Bitmap.validate: bits, starts, bases and nnz = \d+ do not describe one mask"
    ):
        kept._replace(**{part: was + 1}).validate()


# torch.library


@dataclass(frozen=True)
class Given:
    """Operands of every operation on a mask with an empty and a full row, on it or on its transpose."""

    transposed: bool
    children: int

    @property
    def id(self) -> str:
        return f"alpha{self.children}{'-transposed' * self.transposed}"

    def calls(self) -> dict[str, tuple]:
        """The registered operations' arguments."""
        mask = torch.rand(6, 37, generator=seeded()) < 0.5
        mask[0], mask[1] = False, True
        kept = Bitmap.pack(mask)
        (n, k), alpha, m = kept.T.sizes if self.transposed else kept.sizes, self.children, 4
        table = torch.randint(alpha, (6, 37), generator=seeded(1), dtype=torch.uint8)
        labels = PackedLabels.pack(table, alpha).planes if alpha > 1 else None
        x, z, dy, values, w, wide, bias = (
            torch.randn(*shape, generator=seeded(2 + i)).requires_grad_()
            for i, shape in enumerate(
                ((m, k), (m, alpha, k), (m, alpha, n), (kept.nnz,), (6, 37), (alpha, n), (n,))
            )
        )  # fmt: skip
        on = (*kept.tensors, labels, [])
        return {
            "unpack_values": (values, *kept.tensors, [], 6, 37, "eager"),
            "pack_values": (w, *kept.tensors, [], kept.nnz, "eager"),
            "kept_split": (x, values, *on, wide, None, alpha, n, self.transposed, "eager"),
            "kept_merge": (z, values, *on, bias, None, n, self.transposed, "eager"),
            "kept_grad": (dy, x, *on, kept.nnz, self.transposed, "eager"),
        }


@pytest.mark.parametrize("given", [Given(False, 1), Given(False, 3), Given(True, 2)], ids=readable_id)
@pytest.mark.parametrize("name", ["unpack_values", "pack_values", "kept_split", "kept_merge", "kept_grad"])
def test_opcheck(name: str, given: Given) -> None:
    torch.library.opcheck(getattr(torch.ops.fpe, name).default, given.calls()[name])


def test_masked_matmul_compiles_whole_with_dynamic_batch() -> None:
    kept = Bitmap.pack(torch.rand(6, 37, generator=seeded()) < 0.5)
    values = torch.randn(kept.nnz, generator=seeded(1), requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(masked_matmul, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, kept.sizes[1], generator=seeded(2), requires_grad=True)
        for mine, right in zip(
            *(torch.autograd.grad(f(x, values, kept).square().sum(), [x, values]) for f in (compiled, masked_matmul)),
            strict=True,
        ):
            assert torch.equal(mine, right)


# Calls that must fail

MASK = torch.tensor([[True, False, True, True], [False, False, True, False], [True, True, False, True]])
KEPT = Bitmap.pack(MASK)
X, Z, DY, W, V = torch.ones(5, 4), torch.ones(5, 2, 4), torch.ones(5, 2, 3), torch.ones(3, 4), torch.ones(7)
TABLE = torch.zeros(3, 4, dtype=torch.uint8)
LABELS, META = PackedLabels.pack(TABLE, 2), "meta"
HOLES = PackedLabels.pack(TABLE.masked_fill(~MASK, 255), 2)


def with_index(**parts: Tensor) -> Bitmap:
    return KEPT._replace(**parts)


BAD_CALLS = (
    BadCall("Bitmap.pack-dtype", lambda: Bitmap.pack(W), TypeError, ("mask", "bool", "float32")),
    BadCall("Bitmap.pack-dims", lambda: Bitmap.pack(MASK[0]), ValueError, ("mask", "[*, *]", "[4]")),
    BadCall("Bitmap.pack-meta", lambda: Bitmap.pack(MASK.to(META)), ValueError, ("mask", "meta")),
    BadCall("Bitmap.to_dense-values", lambda: KEPT.to_dense(V[:6]), ValueError, ("values", "[7]", "[6]")),
    BadCall("Bitmap.from_dense-weight", lambda: KEPT.from_dense(W.T), ValueError, ("weight", "[3, 4]", "[4, 3]")),
    BadCall("Bitmap.validate-dtype", lambda: with_index(bits=KEPT.bits.long()).validate(), TypeError,
            ("kept.bits", "int32", "int64")),
    BadCall("unpack_values-values", lambda: unpack_values(V[:6], KEPT), ValueError, ("values", "[7]", "[6]")),
    BadCall("unpack_values-dims", lambda: unpack_values(W, KEPT), ValueError, ("values", "[*]", "[3, 4]")),
    BadCall("unpack_values-dtype", lambda: unpack_values(V.int(), KEPT), TypeError, ("values", "float", "int32")),
    BadCall("unpack_values-list", lambda: unpack_values([1.0], KEPT), TypeError, ("values", "tensor", "list")),
    BadCall("unpack_values-kept", lambda: unpack_values(V, MASK), TypeError, ("kept", "Bitmap", "Tensor")),
    BadCall("unpack_values-bits", lambda: unpack_values(V, with_index(bits=KEPT.bits[:2])), ValueError,
            ("kept.bits", "[3, 1]", "[2, 1]")),
    BadCall("unpack_values-starts", lambda: unpack_values(V, with_index(starts=KEPT.starts.int())), TypeError,
            ("kept.starts", "int16", "int32")),
    BadCall("unpack_values-bases", lambda: unpack_values(V, with_index(bases=KEPT.bases.long())), TypeError,
            ("kept.bases", "int32", "int64")),
    BadCall("unpack_values-elsewhere", lambda: unpack_values(V, KEPT.to(META)), ValueError,
            ("kept.bits", "cpu", "meta")),
    BadCall("pack_values-w", lambda: pack_values(W.T, KEPT), ValueError, ("w", "[3, 4]", "[4, 3]")),
    BadCall("pack_values-dtype", lambda: pack_values(W.cfloat(), KEPT), TypeError, ("w", "float", "complex64")),
    BadCall("pack_values-kept", lambda: pack_values(W, None), TypeError, ("kept", "Bitmap", "NoneType")),
    BadCall("masked_matmul-x", lambda: masked_matmul(DY, V, KEPT), ValueError, ("x", "[..., 4]", "[5, 2, 3]")),
    BadCall("masked_matmul-x-dtype", lambda: masked_matmul(X.half(), V, KEPT), TypeError, ("x", "float32", "float16")),
    BadCall("masked_matmul-values", lambda: masked_matmul(X, W, KEPT), ValueError, ("values", "[*]", "[3, 4]")),
    BadCall("masked_matmul-count", lambda: masked_matmul(X, V[:6], KEPT), ValueError, ("values", "[7]", "[6]")),
    BadCall("masked_matmul-kept", lambda: masked_matmul(X, V, MASK), TypeError, ("kept", "Bitmap", "Tensor")),
    BadCall("masked_matmul-bias", lambda: masked_matmul(X, V, KEPT, torch.ones(4)), ValueError, ("bias", "[3]", "[4]")),
    BadCall("masked_matmul-activation", lambda: masked_matmul(X, V, KEPT, activation="tanh"), ValueError,
            ("activation", "relu", "'tanh'")),
    BadCall("split_matmul-values", lambda: split_matmul(X, V[:6], LABELS, 2, kept=KEPT), ValueError,
            ("w", "[7]", "[6]")),
    BadCall("split_matmul-kept", lambda: split_matmul(X, V, LABELS, 2, kept=MASK), TypeError, ("kept", "Bitmap")),
    BadCall("split_matmul-owners", lambda: split_matmul(X, V, None, 2, kept=KEPT), ValueError,
            ("labels", "2 children", "None")),
    BadCall("split_matmul-holes", lambda: split_matmul(X, V, HOLES, 2, kept=KEPT), ValueError,
            ("labels", "without holes", "kept")),
    BadCall("split_matmul-orientation", lambda: split_matmul(X, V, PackedLabels.pack(TABLE.T.contiguous(), 2).T, 2,
            kept=KEPT), ValueError, ("labels and kept", "one orientation", "True and False")),
    BadCall("merge_matmul-values", lambda: merge_matmul(Z, W, LABELS, kept=KEPT), ValueError, ("w", "[7]", "[3, 4]")),
    BadCall("merge_matmul-owners", lambda: merge_matmul(Z, V, None, kept=KEPT), ValueError, ("labels", "2 children")),
    BadCall("merge_matmul-labels", lambda: merge_matmul(Z, V, TABLE[:2], kept=KEPT), ValueError,
            ("labels", "[3, 4]", "[2, 4]")),
    BadCall("partition_grad-kept", lambda: partition_grad(DY, X, LABELS, kept=3), TypeError, ("kept", "Bitmap", "int")),
    BadCall("partition_grad-x", lambda: partition_grad(DY, DY[:, 0], LABELS, kept=KEPT), ValueError,
            ("x", "[..., 4]", "[5, 3]")),
    BadCall("partition_grad-elsewhere", lambda: partition_grad(DY, X, LABELS, kept=KEPT.to(META)), ValueError,
            ("kept.bits", "cpu", "meta")),
    *(
        BadCall(f"{name}-backend", call, ValueError, ("backend", "auto", "eager", "'cuda'"))
        for name, call in (
            ("unpack_values", lambda: unpack_values(V, KEPT, backend="cuda")),
            ("pack_values", lambda: pack_values(W, KEPT, backend="cuda")),
            ("masked_matmul", lambda: masked_matmul(X, V, KEPT, backend="cuda")),
            ("partition_grad", lambda: partition_grad(DY, X, LABELS, kept=KEPT, backend="cuda")),
        )
    ),
)  # fmt: skip


@pytest.mark.parametrize("bad", BAD_CALLS, ids=readable_id)
def test_bad_calls_name_op_argument_expected_and_got(bad: BadCall) -> None:
    """An id begins with the name of the op."""
    bad.check(f"{bad.id.split('-')[0]}: ")
