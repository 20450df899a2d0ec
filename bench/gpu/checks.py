"""What the gate checks: the operations and layers at awkward small sizes, their operands in float64."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor

import fpe
from fpe import kernels
from fpe.kernels import BlockLayout
from fpe.kernels.structures import TWO_FOUR

from .gate import Cast, Check

SHAPES = ((17, 70, 90), (1, 16, 64), (64, 128, 256), (130, 257, 96), (5, 1, 33), (0, 8, 16), (3, 0, 16), (3, 8, 0))
"""``(M, N, K)``: tails, one row, whole tiles, primes, empty ones."""
SPARSE = ("triton", "sparse_tensor_core", "torch")
"""Backends of what can run as a 2:4 matmul."""


def checks(few: bool = False, large: bool = False) -> Iterator[Check]:
    """All checks, the families taking turns: a cut gate has seen each of them. Nothing here touches a device.

    Args:
        few: Two of each family alone, for slow tools such as a sanitizer.
        large: Also one with a result of more than 2^31 elements; where there is no room for it, it is absent.
    """
    families = (_layer_checks(), _partition_checks(), _block_checks(), _semi_structured_checks(), _mlp_checks())
    for turn in islice(zip_longest(*families), 2 if few else None):
        yield from (check for check in turn if check is not None)
    if large:
        yield _large_check()


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _partition_checks() -> Iterator[Check]:
    """The three partition operations, holes in the labels, operands strided and not, labels as bytes and packed."""
    cases = [(shape, alpha, False) for shape in SHAPES for alpha in (2, 4)]
    cases += [(SHAPES[0], alpha, True) for alpha in (2, 3, 8)]
    for (m, n, k), alpha, strided in cases:
        for packed in (False, True):
            operands = _partition_operands(m, n, k, alpha, strided)
            case = f"{m}x{n}x{k} alpha {alpha}{' strided' * strided}{' packed' * packed}"
            for op in ("split_matmul", "merge_matmul", "partition_grad"):
                run = partial(_partition_op, op, operands, alpha, packed)
                yield Check(f"{op} {case}", "partition", op, run, SPARSE if op == "merge_matmul" else ("triton",))


def _partition_operands(m: int, n: int, k: int, alpha: int, strided: bool) -> dict[str, Tensor]:
    labels = torch.randint(alpha + 1, (n, k), generator=torch.Generator().manual_seed(alpha))
    shapes = {"x": (m, k), "w": (n, k), "dy": (m, alpha, n), "z": (m, alpha, k)}
    drawn = {name: _draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    if strided:
        drawn |= {name: drawn[name].mT.contiguous().mT for name in ("x", "w")}
    drawn["w"] = drawn["w"].masked_fill(labels == alpha, 0)  # holes, as packed labels want them
    return {**drawn, "labels": torch.where(labels == alpha, kernels.HOLE, labels).to(torch.uint8)}


def _partition_op(
    op: str, operands: dict[str, Tensor], alpha: int, packed: bool, cast: Cast, backend: str
) -> list[Tensor]:
    x, w, dy, z = (cast(operands[name]) for name in ("x", "w", "dy", "z"))
    labels: Any = operands["labels"].to(x.device)
    if packed and backend != "eager":
        labels = kernels.PackedLabels.pack(labels, alpha)
    if op == "split_matmul":
        return [kernels.split_matmul(x, w, labels, alpha, backend=backend)]
    if op == "merge_matmul":
        return [kernels.merge_matmul(z, w, labels, backend=backend)]
    return [kernels.partition_grad(dy, x, labels, backend=backend)]


def _block_checks() -> Iterator[Check]:
    """The three block operations, by side of the block, density and activation."""
    sides = ((64, 64), (16, 16), (128, 128), (32, 16), (16, 128), (128, 32))
    cases = [(shape, block, 0.5) for block in sides for shape in SHAPES[:3]]
    cases += [(shape, (64, 64), 0.5) for shape in SHAPES[3:]] + [(SHAPES[0], (16, 16), d) for d in (0.0, 0.1, 1.0)]
    for (m, n, k), block, density in cases:
        grid = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=torch.Generator().manual_seed(0)) < density
        layout = BlockLayout.from_mask(grid, (n, k), block)
        values = _draw(*layout.values_shape, seed=1)
        values = layout.from_dense(layout.to_dense(values))  # padding is zero
        x, dy = _draw(m, k, seed=2), _draw(m, n, seed=3)
        bias = _draw(n, seed=4)

        def forward(cast: Cast, backend: str, x: Tensor = x, values: Tensor = values, bias: Tensor = bias,
                    layout: BlockLayout = layout) -> list[Tensor]:  # fmt: skip
            operands = cast(x), cast(values), _on(layout, cast)
            fused = kernels.block_matmul(*operands, cast(bias), "relu", backend=backend)
            return [kernels.block_matmul(*operands, backend=backend), fused]

        def backward(cast: Cast, backend: str, dy: Tensor = dy, values: Tensor = values,
                     layout: BlockLayout = layout) -> list[Tensor]:  # fmt: skip
            return [kernels.block_matmul_t(cast(dy), cast(values), _on(layout, cast), backend=backend)]

        def outer(cast: Cast, backend: str, dy: Tensor = dy, x: Tensor = x,
                  layout: BlockLayout = layout) -> list[Tensor]:  # fmt: skip
            return [kernels.block_grad(cast(dy), cast(x), _on(layout, cast), backend=backend)]

        case = f"{m}x{n}x{k} blocks {block[0]}x{block[1]} density {density}"
        for op, run in (("block_matmul", forward), ("block_matmul_t", backward), ("block_grad", outer)):
            yield Check(f"{op} {case}", "block", op, run)


def _on(layout: BlockLayout, cast: Cast) -> BlockLayout:
    """The layout on the device that operands are cast to."""
    device = cast(torch.empty(0, dtype=torch.float64)).device
    return BlockLayout(layout.shape, layout.block, *(index.to(device) for index in layout.tensors))


def _mlp_checks() -> Iterator[Check]:
    """The fused MLP, its second layer dense and merged."""
    for m, k, hidden, n in ((1, 512, 8, 100), (33, 70, 13, 33), (64, 128, 64, 130)):
        for alpha, merged in ((2, False), (2, True), (4, False)):
            generator = torch.Generator().manual_seed(0)
            labels = torch.randint(alpha, (hidden, k), generator=generator, dtype=torch.uint8)
            reads = torch.randint(alpha, (n, hidden), generator=generator, dtype=torch.uint8)
            shapes = ((m, k), (hidden, k), (n, hidden * (1 if merged else alpha)), (alpha, hidden), (n,))
            drawn = [_draw(*shape, seed=i) for i, shape in enumerate(shapes)]

            def run(cast: Cast, backend: str, drawn: list[Tensor] = drawn, labels: Tensor = labels,
                    reads: Tensor | None = reads if merged else None, alpha: int = alpha) -> list[Tensor]:  # fmt: skip
                x, w1, w2, bias1, bias2 = map(cast, drawn)
                more: dict[str, Any] = {"alpha": alpha, "bias1": bias1, "bias2": bias2, "activation": "gelu"}
                second = None if reads is None else reads.to(x.device)
                return [kernels.expanded_mlp(x, w1, labels.to(x.device), w2, second, backend=backend, **more)]

            name = f"expanded_mlp {m}x{k}-{hidden}-{n} alpha {alpha}{' merged' * merged}"
            yield Check(name, "mlp", "expanded_mlp", run, by_yardstick=True)


def _semi_structured_checks() -> Iterator[Check]:
    """The three 2:4 operations: one child with a mask of its own, and both children of a parent."""
    for m, n, k in ((17, 70, 88), (1, 16, 64), (64, 128, 256), (130, 257, 96), (5, 1, 36)):
        for children in (1, 2):
            labels = fpe.Partition.semi_structured(n, k, generator=torch.Generator().manual_seed(0)).labels
            both = kernels.SemiStructuredLayout.from_labels(labels)
            layout = both if children == 2 else kernels.SemiStructuredLayout.from_mask(labels == 0)
            drawn = [_draw(n, k, seed=1), _draw(m, k, seed=2)]
            drawn.append(_draw(m, children, n, seed=3))
            for op in ("semi_structured_matmul", "semi_structured_matmul_t", "semi_structured_grad"):
                run = partial(_semi_structured_op, op, drawn, layout)
                yield Check(f"{op} {m}x{n}x{k}, {children} children", "semi_structured", op, run, SPARSE)


def _semi_structured_op(
    op: str, drawn: list[Tensor], layout: kernels.SemiStructuredLayout, cast: Cast, backend: str
) -> list[Tensor]:
    w, x, dy = map(cast, drawn)
    kept = layout.kept if layout.kept is None else layout.kept.to(x.device)
    layout = layout._replace(codes=layout.codes.to(x.device), kept=kept)
    values = kernels.semi_structured_compress(w, layout, backend="eager")
    if op == "semi_structured_matmul":
        return [kernels.semi_structured_matmul(x, values, layout, backend=backend)]
    if op == "semi_structured_matmul_t":
        return [kernels.semi_structured_matmul_t(dy, values, layout, backend=backend)]
    return [kernels.semi_structured_grad(dy, x, layout, backend=backend)]


def _layer_checks() -> Iterator[Check]:
    """Forward, dX and dW of the package's layers, a leading batch dimension included."""
    inputs, parents = 96, 40
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Callable[[str], Any]] = {}
    for name, partition in {
        "random": fpe.Partition.random(parents, inputs, 2, generator=generator),
        "random, alpha 4": fpe.Partition.random(parents, inputs, 4, generator=generator),
        TWO_FOUR: fpe.Partition.semi_structured(parents, inputs, generator=generator),
    }.items():
        made[f"SplitLinear {name}"] = partial(fpe.SplitLinear, partition, True)
        made[f"MergeLinear {name}"] = partial(fpe.MergeLinear, partition, True)
    for block in ((16, 16), (32, 64)):
        partition = fpe.Partition.block(parents, inputs, 2, block=block, generator=generator)
        kept, merged = partition.masks().flatten(0, 1), partition.masks().transpose(0, 1).flatten(1)
        made[f"BlockLinear {block}"] = partial(fpe.BlockLinear, kept, block, (2, 1), True)
        made[f"BlockLinear {block}, merging"] = partial(fpe.BlockLinear, merged, block, (1, 2), True)
    for name, make in made.items():

        def run(cast: Cast, backend: str, make: Callable[[str], Any] = make) -> list[Tensor]:
            torch.manual_seed(0)
            layer = make(backend).double()
            x = cast(_draw(2, 9, layer.in_features, seed=1)).requires_grad_()
            layer.to(x.device)
            for parameter in layer.parameters():
                parameter.data = cast(parameter.data)
            y = layer(x)
            dy = cast(_draw(2, 9, layer.out_features, seed=2))
            return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]

        family = "block" if "Block" in name else "semi_structured" if name == "SplitLinear 2:4" else "partition"
        sparse = name == "SplitLinear 2:4" or name.startswith("MergeLinear")
        yield Check(name, family, "", run, SPARSE if sparse else ("triton",))


def _large_check() -> Check:
    """More than 2^31 elements in a result: the last rows are right."""
    m, n, k, alpha = 70_000, 16_384, 16, 2
    x, w = _draw(m, k, seed=1), _draw(n, k, seed=2)
    labels = torch.randint(alpha, (n, k), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def run(cast: Cast, backend: str) -> list[Tensor]:
        rows = cast(x if backend != "eager" else x[-3:])
        return [kernels.split_matmul(rows, cast(w), labels.to(rows.device), alpha, backend=backend)[-3:].clone()]

    return Check(f"split_matmul {m}x{n}x{k}, beyond 2^31 elements", "partition", "split_matmul", run)
