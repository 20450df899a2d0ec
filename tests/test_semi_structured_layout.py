"""The 2:4 layout: its codes, values there and back, any labels interleaved, and PyTorch's own tensor."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from semi_structured_cases import Case, each_case
from support import BadCall, readable_id, seeded
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from fpe import kernels
from fpe.kernels import HOLE, SemiStructuredLayout, semi_structured_matmul
from fpe.kernels.semi_structured import torch_sparse as torch_backend
from fpe.kernels.semi_structured.layout import CODES, complement


@pytest.fixture(params=[True, False], ids=["cusparselt", "no-cusparselt"])
def any_build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both builds of PyTorch: with cuSPARSELt in it, where CPU values are none of its business, and without."""
    monkeypatch.setattr(torch_backend, "has_cusparselt", lambda: request.param)


def test_the_complement_of_each_of_the_six_codes() -> None:
    for first, second in combinations(range(4), 2):
        third, fourth = (i for i in range(4) if i not in (first, second))
        assert first + 4 * second in CODES
        both = torch.tensor([(first + 4 * second) * 17], dtype=torch.uint8)
        assert complement(both).tolist() == [(third + 4 * fourth) * 17]


@each_case
def test_values_and_positions_round_trip(case: Case) -> None:
    layout, masks, (w, *_) = case.layout().validate(), case.masks(), case.tensors()
    assert torch.equal(layout.mask(), masks)
    values = layout.from_dense(w)
    assert values.shape == layout.values_shape and values.count_nonzero() == masks.sum()
    assert torch.equal(layout.to_dense(values), w * masks)
    assert torch.equal(layout.from_dense(w * masks), values)
    assert (layout.kept is None) == (int(masks.sum()) == values.numel())


@each_case
def test_both_children_share_the_parents_values(case: Case) -> None:
    case = replace(case, children=2, holes=0.0, k=case.k - case.k % 4)
    layout, (w, *_) = case.layout(), case.tensors()
    together = layout.from_dense(w).flatten(1).sort().values if w.numel() else w
    assert layout.kept is None and layout.from_dense(w).numel() == w.numel()
    assert torch.equal(together.flatten().sort().values, w.flatten().sort().values)


@pytest.mark.parametrize("alpha", [2, 4])
@each_case
def test_any_labels_are_2_to_4_interleaved(case: Case, alpha: int) -> None:
    w, *_ = case.tensors()
    labels = any_labels(case, alpha)
    layout = SemiStructuredLayout.interleaved(labels, alpha).validate()
    wide = torch.stack([w * (labels == child) for child in range(alpha)], -1).flatten(1)
    values = layout.from_parent(w.masked_fill(labels == HOLE, float("nan")))
    assert torch.equal(layout.to_dense(values)[0], wide)
    assert torch.equal(layout.from_dense(wide), values)
    if alpha == 2:  # the parent's values in their own order
        assert torch.equal(values[0, :, : case.k], w * (labels < 2))


def any_labels(case: Case, alpha: int) -> Tensor:
    labels = torch.randint(alpha, (case.n, case.k), generator=seeded(5)).to(torch.uint8)
    labels[torch.rand(labels.shape, generator=seeded(6)) < case.holes] = HOLE
    return labels


@pytest.mark.parametrize("alpha", [2, 4])
@each_case
def test_merge_matmul_is_a_matmul_of_the_interleaved_weight(case: Case, alpha: int) -> None:
    w, labels = (4 * case.tensors()[0]).round(), any_labels(case, alpha)
    z = torch.randint(-4, 5, (case.m, alpha, case.k), generator=seeded(7)).double()
    layout = SemiStructuredLayout.interleaved(labels, alpha)
    y = semi_structured_matmul(z.transpose(1, 2).flatten(1), layout.from_parent(w), layout)
    assert torch.equal(y[:, 0], kernels.merge_matmul(z, w, labels))


@each_case
def test_the_transposed_weight_of_two_children_is_2_to_4(case: Case) -> None:
    case = replace(case, children=2)
    layout, (w, *_) = case.layout(), case.tensors()
    values_t, layout_t = layout.transposed(layout.from_dense(w))
    wide = w * case.masks()  # [2, n, k]
    assert torch.equal(layout_t.validate().to_dense(values_t)[0], wide.permute(2, 1, 0).flatten(1))


@pytest.mark.usefixtures("any_build")
@pytest.mark.parametrize("children", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=readable_id)
@pytest.mark.parametrize(("n", "k"), [(32, 64), (96, 192)])
def test_pytorchs_own_tensor_and_back(n: int, k: int, dtype: torch.dtype, children: int) -> None:
    case = Case(n=n, k=k, children=children)
    layout, (w, *_) = case.layout(), case.tensors(dtype)
    values = layout.from_dense(w)
    wide = layout.to_dense(values).flatten(0, 1)
    theirs, metadata = sparse_semi_structured_from_dense_cutlass(wide.contiguous())
    tensor = torch_backend.to_sparse_semi_structured(values, layout)
    assert torch.equal(tensor.packed, theirs) and torch.equal(tensor.meta, metadata)
    assert torch.equal(tensor.to_dense(), wide)
    back, back_layout = torch_backend.from_sparse_semi_structured(tensor)
    assert torch.equal(back_layout.validate().to_dense(back)[0], wide)


def _mask_with_three() -> Tensor:
    mask = torch.zeros(5, 10, dtype=torch.bool)
    mask[3, 4:7], mask[4, :4] = True, True
    return mask


BAD_LAYOUTS = (
    BadCall(
        "mask", lambda: SemiStructuredLayout.from_mask(_mask_with_three()), ValueError, ("3 inputs", "quad 1", "row 3")
    ),
    BadCall(
        "labels",
        lambda: SemiStructuredLayout.from_labels(torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]], dtype=torch.uint8)),
        ValueError,
        ("child 1 has 3 inputs", "quad 0", "row 1"),
    ),
    BadCall("dtype", lambda: SemiStructuredLayout.from_mask(torch.ones(2, 4)), TypeError, ("torch.bool", "float32")),
    BadCall(
        "parent",
        lambda: SemiStructuredLayout.interleaved(torch.ones(4, 6).byte()).from_parent(torch.ones(4, 5)),
        ValueError,
        ("from_parent: weight", "[4, 6]", "[4, 5]"),
    ),
    BadCall(
        "one-child",
        lambda: SemiStructuredLayout.from_mask(torch.zeros(4, 8, dtype=torch.bool)).transpose(),
        ValueError,
        ("transpose", "children is 2", "got 1"),
    ),
    BadCall("rank", lambda: SemiStructuredLayout.interleaved(torch.ones(4).byte()), ValueError, ("[N, K]", "[4]")),
    BadCall(
        "alpha", lambda: SemiStructuredLayout.interleaved(torch.ones(2, 2).byte(), 3), ValueError, ("2 or 4", "got 3")
    ),
    BadCall(
        "code",
        lambda: SemiStructuredLayout((2, 8), torch.tensor([[0x44], [0x54]], dtype=torch.uint8)).validate(),
        ValueError,
        ("row 1, quad 1", "is 5"),
    ),
    BadCall(
        "size",
        lambda: SemiStructuredLayout((2, 8), torch.ones(2, 2).byte()).validate(),
        ValueError,
        ("[2, 1]", "[2, 2]"),
    ),
    BadCall(
        "to-torch-shape",
        lambda: torch_backend.to_sparse_semi_structured(torch.ones(1, 32, 24).half(), Case(n=32, k=48).layout()),
        ValueError,
        ("multiples of 64", "48"),
    ),
    BadCall(
        "to-torch-dtype",
        lambda: torch_backend.to_sparse_semi_structured(torch.ones(1, 32, 32), Case(n=32, k=64).layout()),
        TypeError,
        ("bfloat16", "float32"),
    ),
    BadCall("from-torch", lambda: torch_backend.from_sparse_semi_structured(torch.ones(2)), TypeError, ("Tensor",)),  # type: ignore[arg-type]
)


@pytest.mark.usefixtures("any_build")
@pytest.mark.parametrize("case", BAD_LAYOUTS, ids=readable_id)
def test_bad_layouts(case: BadCall) -> None:
    case.check()
