"""Every argument of every operation replaced by what it must not be: who complains, about what. The meta device."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support import BadCall, readable_id, seeded
from torch import Tensor

from fpe import kernels
from fpe.kernels import BlockLayout, PackedLabels, SemiStructuredLayout

N, K, ALPHA, OUT = 4, 8, 2, 3


def _labels(n: int, k: int) -> Tensor:
    return (torch.arange(n * k).view(n, k) % 2).to(torch.uint8)


LABELS = _labels(N, K)
BLOCKS = BlockLayout.from_mask(torch.tensor([[True, False], [True, True]]), (N, K), (2, 4))
QUADS = SemiStructuredLayout.from_labels(LABELS)
HOLES = SemiStructuredLayout.from_mask((LABELS == 1) & (torch.arange(K) < 6))


@dataclass(frozen=True)
class Good:
    """A call that works."""

    id: str
    call: Callable[..., Any]
    arguments: dict[str, Any]


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded())


GOOD = (
    Good(
        "split_matmul",
        kernels.split_matmul,
        {"x": _numbers(5, K), "w": _numbers(N, K), "labels": LABELS, "alpha": ALPHA, "bias": _numbers(ALPHA, N)}
        | {"activation": "relu"},
    ),
    Good(
        "merge_matmul",
        kernels.merge_matmul,
        {"z": _numbers(5, ALPHA, K), "w": _numbers(N, K), "labels": PackedLabels.pack(LABELS, ALPHA)}
        | {"bias": _numbers(N), "activation": "gelu"},
    ),
    Good(
        "partition_grad",
        kernels.partition_grad,
        {"dy": _numbers(5, ALPHA, N), "x": _numbers(5, K), "labels": LABELS},
    ),
    Good(
        "block_matmul",
        kernels.block_matmul,
        {"x": _numbers(5, K), "values": _numbers(3, 2, 4), "layout": BLOCKS, "bias": _numbers(N), "activation": None},
    ),
    Good(
        "block_matmul_t",
        kernels.block_matmul_t,
        {"dy": _numbers(5, N), "values": _numbers(3, 2, 4), "layout": BLOCKS},
    ),
    Good("block_grad", kernels.block_grad, {"dy": _numbers(5, N), "x": _numbers(5, K), "layout": BLOCKS}),
    Good(
        "semi_structured_matmul",
        kernels.semi_structured_matmul,
        {"x": _numbers(5, K), "values": _numbers(2, N, 4), "layout": QUADS, "bias": _numbers(2, N)},
    ),
    Good(
        "semi_structured_matmul_t",
        kernels.semi_structured_matmul_t,
        {"dy": _numbers(5, 1, N), "values": _numbers(1, N, 4), "layout": HOLES},
    ),
    Good(
        "semi_structured_grad",
        kernels.semi_structured_grad,
        {"dy": _numbers(5, 1, N), "x": _numbers(5, K), "layout": HOLES},
    ),
    Good("semi_structured_compress", kernels.semi_structured_compress, {"w": _numbers(N, K), "layout": HOLES}),
    Good(
        "expanded_mlp",
        kernels.expanded_mlp,
        {"x": _numbers(5, K), "w1": _numbers(N, K), "labels1": LABELS, "w2": _numbers(OUT, N)}
        | {"labels2": _labels(OUT, N), "alpha": ALPHA, "bias1": _numbers(ALPHA, N), "bias2": _numbers(OUT)},
    ),
    Good("PackedLabels.pack", PackedLabels.pack, {"labels": LABELS, "alpha": ALPHA}),
    Good(
        "BlockLayout.from_mask",
        BlockLayout.from_mask,
        {"mask": torch.ones(2, 2, dtype=torch.bool), "shape": (N, K), "block": (2, 4)},
    ),
    Good("BlockLayout.to_dense", BLOCKS.to_dense, {"values": _numbers(3, 2, 4)}),
    Good("BlockLayout.from_dense", BLOCKS.from_dense, {"weight": _numbers(N, K)}),
    Good("SemiStructuredLayout.from_mask", SemiStructuredLayout.from_mask, {"mask": LABELS == 1}),
    Good("SemiStructuredLayout.from_labels", SemiStructuredLayout.from_labels, {"labels": LABELS}),
    Good("SemiStructuredLayout.interleaved", SemiStructuredLayout.interleaved, {"labels": LABELS, "alpha": 2}),
    Good("SemiStructuredLayout.to_dense", QUADS.to_dense, {"values": _numbers(2, N, 4)}),
    Good("SemiStructuredLayout.from_dense", QUADS.from_dense, {"weight": _numbers(N, K)}),
)
OPS = tuple(good for good in GOOD if good.id in kernels.__all__)
OPTIONAL = ("bias", "bias1", "bias2", "activation", "labels2")


def wrong(good: Any, any_dtype: bool) -> Iterator[tuple[str, Any]]:
    """What an argument must not be, by what it is."""
    yield from {"string": "a", "list": [1.0], "lists": [[1, 0], [0, 1]], "numpy": np.ones((N, K)), "dict": {}}.items()
    yield from {"negative": -1, "float": 2.5, "three": (1, 2, 3), "strings": ("a", "b"), "bool": True}.items()
    if isinstance(good, Tensor):
        yield from {
            "scalar": good.new_zeros(()),
            "flat": good.new_zeros(77),
            "deep": good.new_zeros(1, 1, 7, 7),
        }.items()
        yield "sparse", good.float().to_sparse()
        yield "nested", torch.nested.nested_tensor([good.float(), good.float()], layout=torch.jagged)
        if not any_dtype:
            yield from {str(d): good.to(d) for d in (torch.float8_e4m3fn, torch.complex64, torch.int64)}.items()
    if isinstance(good, BlockLayout):
        yield from {
            "long rows": good._replace(rows=good.rows.long()),
            "lost columns": good._replace(cols=good.cols[:1]),
            "no order": good._replace(col_order=None),
            "index elsewhere": good._replace(panels=good.panels.to("meta")),
            "one size": good._replace(shape=(4,)),
            "blocks of none": good._replace(block=(0, 2)),
        }.items()
    if isinstance(good, SemiStructuredLayout):
        yield from {
            "no codes": good._replace(codes=None),
            "three children": good._replace(children=3),
            "number kept": good._replace(kept=torch.ones(good.values_shape)),
            "list kept": good._replace(kept=[True]),
            "codes elsewhere": good._replace(codes=good.codes.to("meta")),
        }.items()


@pytest.mark.parametrize("good", GOOD, ids=readable_id)
def test_what_is_wrong_is_named(good: Good) -> None:
    """With the operation; where two arguments do not fit each other it may be the other one."""
    good.call(**good.arguments)
    says = re.compile(f"{re.escape(good.id)}: .*({'|'.join(good.arguments)})")
    for name, value in good.arguments.items():
        every = dict(wrong(value, good.id.endswith("_dense")))
        for kind, bad in every.items() if name in OPTIONAL else (every | {"None": None}).items():
            try:
                good.call(**{**good.arguments, name: bad})
            except (TypeError, ValueError) as error:
                assert says.match(str(error)), (name, kind, error)
            else:
                raise AssertionError(f"{good.id} takes {kind} for {name}")


# The meta device.


def _on_meta(value: Any) -> Any:
    if isinstance(value, BlockLayout | SemiStructuredLayout):
        return type(value)(*(_on_meta(part) for part in value))
    return value.to("meta") if isinstance(value, Tensor | PackedLabels) else value


@pytest.mark.parametrize("index_too", [True, False], ids=["all-on-meta", "index-elsewhere"])
@pytest.mark.parametrize("good", OPS, ids=readable_id)
def test_shapes_on_the_meta_device_wherever_the_index_lies(good: Good, index_too: bool) -> None:
    index = () if index_too else ("labels", "labels1", "labels2", "layout")
    moved = {name: value if name in index else _on_meta(value) for name, value in good.arguments.items()}
    leaves = [t.requires_grad_() for t in moved.values() if isinstance(t, Tensor) and t.is_floating_point()]
    y, real = good.call(**moved), good.call(**good.arguments)
    assert y.is_meta and (y.shape, y.dtype) == (real.shape, real.dtype)
    for leaf, grad in zip(leaves, torch.autograd.grad(y, leaves, torch.ones_like(y)), strict=True):
        assert grad.is_meta and grad.shape == leaf.shape


MAKERS = tuple(good for good in GOOD if set(good.arguments) & {"mask", "labels"} and good not in OPS)


@pytest.mark.parametrize("good", MAKERS, ids=readable_id)
def test_a_layout_is_made_of_what_can_be_read(good: Good) -> None:
    name, value = next(iter(good.arguments.items()))
    bad = {**good.arguments, name: value.to("meta")}
    BadCall("", lambda: good.call(**bad), ValueError, (name, "meta")).check(good.id)
