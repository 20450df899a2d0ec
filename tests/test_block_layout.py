"""Where kept blocks lie: round trips, orders, damage, and SciPy's block-sparse matrix as an oracle."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from scipy.sparse import bsr_array
from support import BadCall, seeded
from torch import Tensor
from torch.nn.functional import pad

from fpe import kernels
from fpe.kernels import BlockLayout, block_grad, block_matmul, block_matmul_t

SHAPES = (((8, 12), (4, 4)), ((7, 11), (3, 4)), ((6, 10), (1, 5)), ((9, 4), (2, 16)), ((1, 1), (5, 5)))


def random_mask(shape: tuple[int, int], block: tuple[int, int], density: float) -> Tensor:
    return torch.rand(kernels.block.layout.grid(shape, block), generator=seeded(4)) < density


@pytest.mark.parametrize(("shape", "block"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_scipys_block_sparse_matrix(shape: tuple[int, int], block: tuple[int, int], density: float) -> None:
    """Same indices, stored blocks and products; SciPy knows whole blocks only, so that the weight is padded."""
    layout = BlockLayout.from_mask(random_mask(shape, block, density), shape, block)
    (n, k), (r, c) = shape, layout.grid
    weight = layout.to_dense(torch.randint(1, 9, layout.values_shape, generator=seeded()).double())
    values = layout.from_dense(weight)
    whole = pad(weight, (0, c * block[1] - k, 0, r * block[0] - n))
    theirs = bsr_array(whole.numpy(), blocksize=block)
    by_columns = bsr_array(whole.T.numpy(), blocksize=block[::-1])
    assert theirs.indptr.tolist() == layout.row_ptr.tolist()
    assert theirs.indices.tolist() == layout.cols.tolist()
    assert by_columns.indptr.tolist() == layout.col_ptr.tolist()
    assert by_columns.indices.tolist() == layout.col_rows.tolist()
    assert torch.equal(torch.from_numpy(theirs.data), values)
    assert torch.equal(torch.from_numpy(by_columns.data), values[layout.col_order.long()].mT)
    x, dy = (torch.randint(-9, 10, (5, size), generator=seeded(size)).double() for size in (k, n))
    wide_x, wide_dy = pad(x, (0, c * block[1] - k)).numpy(), pad(dy, (0, r * block[0] - n)).numpy()
    assert torch.equal(block_matmul(x, values, layout), torch.from_numpy((theirs @ wide_x.T).T)[:, :n])
    assert torch.equal(block_matmul_t(dy, values, layout), torch.from_numpy((theirs.T @ wide_dy.T).T)[:, :k])
    outer = bsr_array(wide_dy.T @ wide_x * whole.bool().numpy(), blocksize=block)
    assert torch.equal(
        layout.to_dense(block_grad(dy, x, layout)) * (weight != 0), torch.from_numpy(outer.todense())[:n, :k]
    )


@pytest.mark.parametrize(
    ("shape", "block"), [((7, 11), (3, 4)), ((8, 12), (4, 4)), ((1, 1), (5, 5)), ((0, 4), (2, 2)), ((5, 3), (1, 1))]
)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_layout_round_trips(shape: tuple[int, int], block: tuple[int, int], density: float) -> None:
    mask = torch.rand(kernels.block.layout.grid(shape, block), generator=seeded(4)) < density
    layout = BlockLayout.from_mask(mask, shape, block).validate()
    dense = torch.randn(shape, generator=seeded(5))
    wanted = dense * mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    values = layout.from_dense(dense)
    assert torch.equal(layout.mask(), mask)
    assert values.shape == layout.values_shape
    assert torch.equal(layout.to_dense(values), wanted)
    assert torch.equal(layout.from_dense(wanted), values)
    assert all(index.dtype == torch.int32 for index in layout.tensors)


def test_layout_orders_agree_with_the_mask() -> None:
    mask = torch.rand(5, 5, generator=seeded(1)) < 0.5
    layout = BlockLayout.from_mask(mask, (13, 17), (3, 4))
    for r, c in product(range(mask.shape[0]), range(mask.shape[1])):
        in_row = layout.cols[layout.row_ptr[r] : layout.row_ptr[r + 1]].tolist()
        in_column = layout.rows[layout.col_order[layout.col_ptr[c] : layout.col_ptr[c + 1]].long()].tolist()
        assert in_row == mask[r].nonzero().flatten().tolist()
        assert in_column == mask[:, c].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", BlockLayout._fields[2:])
@pytest.mark.parametrize(
    "damage",
    [lambda i: i + 1, lambda i: i - 1, lambda i: i + 100, lambda i: i.flip(0), lambda i: i[:-1], torch.zeros_like],
    ids=["shifted", "negative", "out-of-range", "reversed", "truncated", "zeroed"],
)
def test_validate_catches_damage(name: str, damage: Callable[[Tensor], Tensor]) -> None:
    mask = torch.tensor([[True, True, False], [False, True, True], [True, False, True]])
    layout = BlockLayout.from_mask(mask, (6, 6), (2, 2)).validate()
    damaged = damage(getattr(layout, name))
    with pytest.raises(ValueError, match=r"BlockLayout\.validate"):
        layout._replace(**{name: damaged}).validate()


def test_validate_wants_int32() -> None:
    layout = BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), (4, 4), (2, 2))
    wide = layout._replace(panels=layout.panels.long())
    BadCall("", wide.validate, TypeError, ("BlockLayout.validate: panels", "torch.int32", "torch.int64")).check()


@pytest.mark.parametrize(
    ("mask", "shape", "block", "error", "says"),
    [
        (torch.ones(2, 2), (4, 4), (2, 2), TypeError, ("bool", "float32")),
        ([[True]], (1, 1), (1, 1), TypeError, ("bool", "list")),
        (torch.ones(2, 3, dtype=torch.bool), (4, 4), (2, 2), ValueError, ("[2, 2]", "[2, 3]")),
        (torch.ones(2, 2, dtype=torch.bool), (4, 4), (0, 2), ValueError, ("positive", "(0, 2)")),
        (torch.ones(2, 2, dtype=torch.bool), (-4, 4), (2, 2), ValueError, ("negative", "(-4, 4)")),
    ],
    ids=["float-mask", "list-mask", "mask-shape", "zero-block", "negative-shape"],
)
def test_from_mask_refuses(mask: Any, shape: Any, block: Any, error: type[Exception], says: tuple[str, ...]) -> None:
    BadCall("", lambda: BlockLayout.from_mask(mask, shape, block), error, says).check("BlockLayout.from_mask: ")
