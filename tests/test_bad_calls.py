"""Calls of the partition and block operations that must fail, each with what its message must say."""

import pytest
import torch
from support import BadCall, readable_id

from fpe.kernels import (
    BlockLayout,
    block_grad,
    block_matmul,
    block_matmul_t,
    merge_matmul,
    partition_grad,
    split_matmul,
)

X, Z, W, DY = torch.ones(5, 4), torch.ones(5, 2, 4), torch.ones(3, 4), torch.ones(5, 2, 3)
LABELS = torch.zeros(3, 4, dtype=torch.uint8)
LAYOUT = BlockLayout.from_mask(torch.tensor([[True, False], [True, True]]), (3, 4), (2, 2))
VALUES, FLAT_DY = torch.ones(3, 2, 2), torch.ones(5, 3)
LONG, META = LABELS.long(), "meta"
EMPTY_LAYOUT = LAYOUT._replace(rows=LAYOUT.rows.long())

BAD_CALLS = (
    BadCall(
        "split_matmul-x-width", lambda: split_matmul(X[:, :3], W, LABELS, 2), ValueError, ("x", "[..., 4]", "[5, 3]")
    ),
    BadCall("split_matmul-x-scalar", lambda: split_matmul(X.sum(), W, LABELS, 2), ValueError, ("x", "[..., 4]", "[]")),
    BadCall("split_matmul-x-list", lambda: split_matmul([1.0], W, LABELS, 2), TypeError, ("x", "tensor", "list")),
    BadCall("split_matmul-x-int", lambda: split_matmul(X.long(), W, LABELS, 2), TypeError, ("x", "float", "int64")),
    BadCall(
        "split_matmul-x-complex", lambda: split_matmul(X.cfloat(), W, LABELS, 2), TypeError, ("x", "float", "complex64")
    ),
    BadCall(
        "split_matmul-x-dtype", lambda: split_matmul(X.half(), W, LABELS, 2), TypeError, ("x", "float32", "float16")
    ),
    BadCall("split_matmul-x-device", lambda: split_matmul(X.to(META), W, LABELS, 2), ValueError, ("x", "cpu", "meta")),
    BadCall("split_matmul-w-dims", lambda: split_matmul(X, W[0], LABELS, 2), ValueError, ("w", "[*, *]", "[4]")),
    BadCall("split_matmul-w-int", lambda: split_matmul(X, W.int(), LABELS, 2), TypeError, ("w", "float", "int32")),
    BadCall(
        "split_matmul-labels-shape", lambda: split_matmul(X, W, LABELS.T, 2), ValueError, ("labels", "[3, 4]", "[4, 3]")
    ),
    BadCall("split_matmul-labels-dtype", lambda: split_matmul(X, W, LONG, 2), TypeError, ("labels", "uint8", "int64")),
    BadCall(
        "split_matmul-labels-none", lambda: split_matmul(X, W, None, 2), TypeError, ("labels", "tensor", "NoneType")
    ),
    BadCall(
        "split_matmul-labels-device",
        lambda: split_matmul(X, W, LABELS.to(META), 2),
        ValueError,
        ("labels", "cpu", "meta"),
    ),
    *(
        BadCall(
            f"split_matmul-alpha-{alpha}",
            lambda alpha=alpha: split_matmul(X, W, LABELS, alpha),
            ValueError,
            ("alpha", "254", repr(alpha)),
        )
        for alpha in (0, -1, 255, 2.0, "2", None, True)
    ),
    BadCall(
        "merge_matmul-z-width",
        lambda: merge_matmul(Z[..., :3], W, LABELS),
        ValueError,
        ("z", "[..., *, 4]", "[5, 2, 3]"),
    ),
    BadCall("merge_matmul-z-dims", lambda: merge_matmul(X[0], W, LABELS), ValueError, ("z", "[..., *, 4]", "[4]")),
    BadCall(
        "merge_matmul-z-dtype", lambda: merge_matmul(Z.double(), W, LABELS), TypeError, ("z", "float32", "float64")
    ),
    BadCall("merge_matmul-no-child", lambda: merge_matmul(Z[:, :0], W, LABELS), ValueError, ("alpha", "1 to 254", "0")),
    BadCall("merge_matmul-labels", lambda: merge_matmul(Z, W, LABELS[:2]), ValueError, ("labels", "[3, 4]", "[2, 4]")),
    BadCall("partition_grad-labels", lambda: partition_grad(DY, X, LABELS[0]), ValueError, ("labels", "[*, *]", "[4]")),
    BadCall(
        "partition_grad-labels-dtype", lambda: partition_grad(DY, X, LONG), TypeError, ("labels", "uint8", "int64")
    ),
    BadCall("partition_grad-x", lambda: partition_grad(DY, X.T, LABELS), ValueError, ("x", "[..., 4]", "[4, 5]")),
    BadCall(
        "partition_grad-dy-rows",
        lambda: partition_grad(DY[:4], X, LABELS),
        ValueError,
        ("dy", "[5, *, 3]", "[4, 2, 3]"),
    ),
    BadCall("partition_grad-dy-list", lambda: partition_grad([DY], X, LABELS), TypeError, ("dy", "tensor", "list")),
    BadCall(
        "partition_grad-dy-dtype", lambda: partition_grad(DY.half(), X, LABELS), TypeError, ("dy", "float32", "float16")
    ),
    BadCall(
        "partition_grad-no-child", lambda: partition_grad(DY[:, :0], X, LABELS), ValueError, ("alpha", "1 to 254", "0")
    ),
    BadCall("block_matmul-x", lambda: block_matmul(FLAT_DY, VALUES, LAYOUT), ValueError, ("x", "[..., 4]", "[5, 3]")),
    BadCall(
        "block_matmul-x-dtype", lambda: block_matmul(X.half(), VALUES, LAYOUT), TypeError, ("x", "float32", "float16")
    ),
    BadCall(
        "block_matmul-values",
        lambda: block_matmul(X, VALUES[:2], LAYOUT),
        ValueError,
        ("values", "[3, 2, 2]", "[2, 2, 2]"),
    ),
    BadCall(
        "block_matmul-values-list", lambda: block_matmul(X, [VALUES], LAYOUT), TypeError, ("values", "tensor", "list")
    ),
    BadCall(
        "block_matmul-values-int",
        lambda: block_matmul(X, VALUES.int(), LAYOUT),
        TypeError,
        ("values", "float", "int32"),
    ),
    BadCall("block_matmul-index", lambda: block_matmul(X, VALUES, EMPTY_LAYOUT), TypeError, ("rows", "int32", "int64")),
    BadCall(
        "block_matmul-layout", lambda: block_matmul(X, VALUES, None), TypeError, ("layout", "BlockLayout", "NoneType")
    ),
    BadCall("block_matmul_t-dy", lambda: block_matmul_t(X, VALUES, LAYOUT), ValueError, ("dy", "[..., 3]", "[5, 4]")),
    BadCall(
        "block_matmul_t-layout", lambda: block_matmul_t(FLAT_DY, VALUES, 3), TypeError, ("layout", "BlockLayout", "int")
    ),
    BadCall("block_grad-x", lambda: block_grad(FLAT_DY, FLAT_DY, LAYOUT), ValueError, ("x", "[..., 4]", "[5, 3]")),
    BadCall("block_grad-dy", lambda: block_grad(FLAT_DY[:4], X, LAYOUT), ValueError, ("dy", "[5, 3]", "[4, 3]")),
    BadCall("block_grad-dy-none", lambda: block_grad(None, X, LAYOUT), TypeError, ("dy", "tensor", "NoneType")),
    BadCall(
        "block_grad-layout", lambda: block_grad(FLAT_DY, X, VALUES), TypeError, ("layout", "BlockLayout", "Tensor")
    ),
    *(
        BadCall(f"{name}-backend", call, ValueError, ("backend", "auto", "eager", "'cuda'"))
        for name, call in (
            ("split_matmul", lambda: split_matmul(X, W, LABELS, 2, backend="cuda")),
            ("merge_matmul", lambda: merge_matmul(Z, W, LABELS, backend="cuda")),
            ("partition_grad", lambda: partition_grad(DY, X, LABELS, backend="cuda")),
            ("block_matmul", lambda: block_matmul(X, VALUES, LAYOUT, backend="cuda")),
            ("block_matmul_t", lambda: block_matmul_t(FLAT_DY, VALUES, LAYOUT, backend="cuda")),
            ("block_grad", lambda: block_grad(FLAT_DY, X, LAYOUT, backend="cuda")),
        )
    ),
)


@pytest.mark.parametrize("bad", BAD_CALLS, ids=readable_id)
def test_bad_calls_name_op_argument_expected_and_got(bad: BadCall) -> None:
    """An id begins with the name of the op."""
    bad.check(f"{bad.id.split('-')[0]}: ")
