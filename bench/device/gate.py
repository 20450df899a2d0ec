"""The correctness gate: every operation and layer on the device, against float64 truth, PyTorch being the yardstick.

The triad: an implementation may err twice as much as the eager twin in the same dtype, and by the last bit of the
largest result on top. Memory that ``torch.empty`` hands out holds NaN meanwhile, so that an element which no program
writes is seen; every call is made twice and must give the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor

import fpe
from fpe import kernels
from fpe.kernels import BlockLayout

from ..problems import DTYPES
from ..suite import float32_as

LAST_BIT = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-23, "tf32": 2.0**-10}
SHAPES = ((17, 70, 90), (1, 16, 64), (64, 128, 256), (130, 257, 96), (5, 1, 33), (0, 8, 16), (3, 0, 16), (3, 8, 0))
"""``(M, N, K)``: tails, one row, whole tiles, primes, empty ones."""
Run = Callable[[torch.dtype, str], list[Tensor]]
"""Computes a check's results from the same numbers in a dtype, by a backend."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: Operation or layer, and case.
        family: ``"partition"``, ``"block"`` or ``"layers"``.
        run: See :data:`Run`.
    """

    name: str
    family: str
    run: Run


def checks(device: str, few: bool = False) -> Iterator[Check]:
    """All checks, the families taking turns: a cut gate has seen each of them.

    Args:
        device: Where they run.
        few: Two of each family alone, for slow tools such as a sanitizer.
    """
    families = (
        _layer_checks(device),
        _partition_checks(device),
        _block_checks(device),
        _semi_structured_checks(device),
        _mlp_checks(device),
    )
    for turn in islice(zip_longest(*families), 2 if few else None):
        yield from (check for check in turn if check is not None)
    if not few and device == "cuda" and torch.cuda.mem_get_info()[0] > 40e9:
        yield from _large_checks()


def compare(check: Check, dtype: str, backend: str) -> dict[str, Any]:
    """Runs a check and judges it.

    Returns:
        A row: ``check``, ``family``, ``dtype``, ``backend``; ``status``: ``"ok"``, ``"wrong"``, ``"absent"`` (the
        backend says that it cannot run this) or ``"error"``; ``error`` over ``allowed`` of the worst result, at most
        1 where all is well; and a ``reason`` where it is not.
    """
    row = {"check": check.name, "family": check.family, "dtype": dtype, "backend": backend}
    with float32_as(dtype), _poisoned():
        try:
            ours = check.run(DTYPES[dtype], backend)
            again = check.run(DTYPES[dtype], backend)
        except (ValueError, NotImplementedError, ImportError) as error:
            return {**row, "status": "absent", "reason": str(error).partition("\n")[0]}
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            return {**row, "status": "error", "reason": str(error).strip().partition("\n")[0]}
        yardstick, truth = check.run(DTYPES[dtype], "eager"), check.run(torch.float64, "eager")
    worst = max((_excess(*three, LAST_BIT[dtype]) for three in zip(ours, yardstick, truth, strict=True)), default=0.0)
    if not worst <= 1:
        return {**row, "status": "wrong", "error": worst, "reason": f"{worst:.3g} times the error allowed"}
    if not all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)):
        return {**row, "status": "wrong", "error": worst, "reason": "another run gave other bits"}
    return {**row, "status": "ok", "error": worst}


def _excess(ours: Tensor, yardstick: Tensor, truth: Tensor, last_bit: float) -> float:
    """Error over the error allowed, the larger of the largest and the root-mean-square one."""
    if ours.shape != truth.shape:
        return float("inf")
    if not truth.numel():
        return 0.0
    granted = last_bit * float(truth.abs().max())
    found = []
    for size in (torch.Tensor.max, lambda e: e.square().mean().sqrt()):
        error, allowed = (float(size((t.double() - truth).abs())) for t in (ours, yardstick))
        found.append(error / max(2 * allowed + granted, 1e-300) if error == error else float("inf"))
    return max(found)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Makes ``torch.empty`` return NaN, which PyTorch does in deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _draw(*shape: int, seed: int, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def _partition_checks(device: str) -> Iterator[Check]:
    """The three partition operations, holes in the labels, operands strided and not, labels as bytes and packed."""
    cases = [(shape, alpha, False) for shape in SHAPES for alpha in (2, 4)]
    cases += [(SHAPES[0], alpha, True) for alpha in (2, 3, 8)]
    for (m, n, k), alpha, strided in cases:
        for packed in (False, True):
            operands = _partition_operands(m, n, k, alpha, strided, device)
            case = f"{m}x{n}x{k} alpha {alpha}{' strided' * strided}{' packed' * packed}"
            for op in ("split_matmul", "merge_matmul", "partition_grad"):
                yield Check(f"{op} {case}", "partition", partial(_partition_op, op, operands, alpha, packed))


def _partition_operands(m: int, n: int, k: int, alpha: int, strided: bool, device: str) -> dict[str, Tensor]:
    labels = torch.randint(alpha + 1, (n, k), generator=torch.Generator().manual_seed(alpha))
    shapes = {"x": (m, k), "w": (n, k), "dy": (m, alpha, n), "z": (m, alpha, k)}
    drawn = {name: _draw(*shape, seed=seed, device=device) for seed, (name, shape) in enumerate(shapes.items())}
    if strided:
        drawn |= {name: drawn[name].mT.contiguous().mT for name in ("x", "w")}
    drawn["w"] = drawn["w"].masked_fill(labels.to(device) == alpha, 0)  # holes, as packed labels want them
    return {**drawn, "labels": torch.where(labels == alpha, kernels.HOLE, labels).to(torch.uint8).to(device)}


def _partition_op(
    op: str, operands: dict[str, Tensor], alpha: int, packed: bool, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    x, w, dy, z = (operands[name].to(dtype) for name in ("x", "w", "dy", "z"))
    labels: Any = operands["labels"]
    if packed and backend != "eager":
        labels = kernels.PackedLabels.pack(labels, alpha)
    if op == "split_matmul":
        return [kernels.split_matmul(x, w, labels, alpha, backend=backend)]
    if op == "merge_matmul":
        return [kernels.merge_matmul(z, w, labels, backend=backend)]
    return [kernels.partition_grad(dy, x, labels, backend=backend)]


def _block_checks(device: str) -> Iterator[Check]:
    """The three block operations, by side of the block, density and activation."""
    sides = ((64, 64), (16, 16), (128, 128), (32, 16), (16, 128), (128, 32))
    cases = [(shape, block, 0.5) for block in sides for shape in SHAPES[:3]]
    cases += [(shape, (64, 64), 0.5) for shape in SHAPES[3:]] + [(SHAPES[0], (16, 16), d) for d in (0.0, 0.1, 1.0)]
    for (m, n, k), block, density in cases:
        grid = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=torch.Generator().manual_seed(0)) < density
        layout = BlockLayout.from_mask(grid.to(device), (n, k), block)
        values = _draw(*layout.values_shape, seed=1, device=device)
        values = layout.from_dense(layout.to_dense(values))  # padding is zero
        x, dy = _draw(m, k, seed=2, device=device), _draw(m, n, seed=3, device=device)
        bias = _draw(n, seed=4, device=device)

        def forward(dtype: torch.dtype, backend: str, x: Tensor = x, values: Tensor = values, bias: Tensor = bias,
                    layout: BlockLayout = layout) -> list[Tensor]:  # fmt: skip
            operands = x.to(dtype), values.to(dtype), layout
            fused = kernels.block_matmul(*operands, bias.to(dtype), "relu", backend=backend)
            return [kernels.block_matmul(*operands, backend=backend), fused]

        def backward(dtype: torch.dtype, backend: str, dy: Tensor = dy, x: Tensor = x, values: Tensor = values,
                     layout: BlockLayout = layout) -> list[Tensor]:  # fmt: skip
            dx = kernels.block_matmul_t(dy.to(dtype), values.to(dtype), layout, backend=backend)
            return [dx, kernels.block_grad(dy.to(dtype), x.to(dtype), layout, backend=backend)]

        case = f"{m}x{n}x{k} blocks {block[0]}x{block[1]} density {density}"
        for name, run in (("block_matmul", forward), ("block_matmul_t and block_grad", backward)):
            yield Check(f"{name} {case}", "block", run)


def _mlp_checks(device: str) -> Iterator[Check]:
    """The fused MLP, its second layer dense and merged."""
    for m, k, hidden, n in ((1, 512, 8, 100), (33, 70, 13, 33), (64, 128, 64, 130)):
        for alpha, merged in ((2, False), (2, True), (4, False)):
            generator = torch.Generator().manual_seed(0)
            labels = torch.randint(alpha, (hidden, k), generator=generator, dtype=torch.uint8).to(device)
            reads = torch.randint(alpha, (n, hidden), generator=generator, dtype=torch.uint8).to(device)
            shapes = ((m, k), (hidden, k), (n, hidden * (1 if merged else alpha)), (alpha, hidden), (n,))
            drawn = [_draw(*shape, seed=i, device=device) for i, shape in enumerate(shapes)]

            def run(dtype: torch.dtype, backend: str, drawn: list[Tensor] = drawn, labels: Tensor = labels,
                    reads: Tensor | None = reads if merged else None, alpha: int = alpha) -> list[Tensor]:  # fmt: skip
                x, w1, w2, bias1, bias2 = (t.to(dtype) for t in drawn)
                more: dict[str, Any] = {"alpha": alpha, "bias1": bias1, "bias2": bias2, "activation": "gelu"}
                return [kernels.expanded_mlp(x, w1, labels, w2, reads, backend=backend, **more)]

            yield Check(f"expanded_mlp {m}x{k}-{hidden}-{n} alpha {alpha}{' merged' * merged}", "mlp", run)


def _semi_structured_checks(device: str) -> Iterator[Check]:
    """Forward, dX and dW of 2:4 weights: one child with a mask of its own, and both children of a parent."""
    for m, n, k in ((17, 70, 88), (1, 16, 64), (64, 128, 256), (130, 257, 96), (5, 1, 36)):
        for children in (1, 2):
            labels = fpe.Partition.semi_structured(n, k, generator=torch.Generator().manual_seed(0)).labels.to(device)
            both = kernels.SemiStructuredLayout.from_labels(labels)
            layout = both if children == 2 else kernels.SemiStructuredLayout.from_mask(labels == 0)
            w = _draw(n, k, seed=1, device=device)
            x, dy = _draw(m, k, seed=2, device=device), _draw(m, children, n, seed=3, device=device)

            def run(dtype: torch.dtype, backend: str, w: Tensor = w, x: Tensor = x, dy: Tensor = dy,
                    layout: kernels.SemiStructuredLayout = layout) -> list[Tensor]:  # fmt: skip
                values = kernels.semi_structured_compress(w.to(dtype), layout, backend="eager")
                leaves = [x.to(dtype).requires_grad_(), values.detach().requires_grad_()]
                y = kernels.semi_structured_matmul(leaves[0], leaves[1], layout, backend=backend)
                return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype).reshape(y.shape))]

            yield Check(f"semi_structured_matmul {m}x{n}x{k}, {children} children", "semi_structured", run)


def _layer_checks(device: str) -> Iterator[Check]:
    """Forward, dX and dW of the package's layers, a leading batch dimension included."""
    inputs, parents = 96, 40
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Callable[[str], Any]] = {}
    for name, partition in {
        "random": fpe.Partition.random(parents, inputs, 2, generator=generator),
        "random, alpha 4": fpe.Partition.random(parents, inputs, 4, generator=generator),
        "2:4": fpe.Partition.semi_structured(parents, inputs, generator=generator),
    }.items():
        made[f"SplitLinear {name}"] = partial(fpe.SplitLinear, partition, True)
        made[f"MergeLinear {name}"] = partial(fpe.MergeLinear, partition, True)
    for block in ((16, 16), (32, 64)):
        partition = fpe.Partition.block(parents, inputs, 2, block=block, generator=generator)
        kept, merged = partition.masks().flatten(0, 1), partition.masks().transpose(0, 1).flatten(1)
        made[f"BlockLinear {block}"] = partial(fpe.BlockLinear, kept, block, (2, 1), True)
        made[f"BlockLinear {block}, merging"] = partial(fpe.BlockLinear, merged, block, (1, 2), True)
    for name, make in made.items():

        def run(dtype: torch.dtype, backend: str, make: Callable[[str], Any] = make) -> list[Tensor]:
            torch.manual_seed(0)
            layer = make(backend).double().to(device).to(dtype)
            x = _draw(2, 9, layer.in_features, seed=1, device=device).to(dtype).requires_grad_()
            y = layer(x)
            dy = _draw(2, 9, layer.out_features, seed=2, device=device).to(dtype)
            return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]

        yield Check(name, "layers", run)


def _large_checks() -> Iterator[Check]:
    """More than 2^31 elements in a result: the last rows are right."""
    m, n, k, alpha = 70_000, 16_384, 16, 2

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(m, k, generator=generator, device="cuda", dtype=torch.float32).to(dtype)
        w = torch.randn(n, k, generator=generator, device="cuda", dtype=torch.float32).to(dtype)
        labels = torch.randint(alpha, (n, k), generator=generator, device="cuda", dtype=torch.uint8)
        rows = x if backend != "eager" else x[-3:]
        return [kernels.split_matmul(rows, w, labels, alpha, backend=backend)[-3:].clone()]

    yield Check(f"split_matmul {m}x{n}x{k}, beyond 2^31 elements", "partition", run)
