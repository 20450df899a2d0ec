"""What the gate checks: the operations and layers at awkward small sizes, their operands in float64."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor

import fpe
from fpe import kernels
from fpe.kernels.structures import TWO_FOUR

from ..families import FAMILIES
from ..families.check import SPARSE_BACKENDS, Cast, Check, drawn


def checks(few: bool = False, large: bool = False) -> Iterator[Check]:
    """All checks, the families taking turns: a cut gate has seen each of them. Nothing here touches a device.

    Args:
        few: Two of each family alone, for slow tools such as a sanitizer.
        large: Also one with a result of more than 2^31 elements; where there is no room for it, it is absent.
    """
    families = (_layer_checks(), *(family.checks() for family in FAMILIES.values()))
    for turn in islice(zip_longest(*families), 2 if few else None):
        yield from (check for check in turn if check is not None)
    if large:
        yield _large_check()


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
            x = cast(drawn(2, 9, layer.in_features, seed=1)).requires_grad_()
            layer.to(x.device)
            for parameter in layer.parameters():
                parameter.data = cast(parameter.data)
            y = layer(x)
            dy = cast(drawn(2, 9, layer.out_features, seed=2))
            return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]

        family = "block" if "Block" in name else "semi_structured" if name == "SplitLinear 2:4" else "partition"
        sparse = name == "SplitLinear 2:4" or name.startswith("MergeLinear")
        yield Check(name, family, "", run, SPARSE_BACKENDS if sparse else ("triton",))


def _large_check() -> Check:
    """More than 2^31 elements in a result: the last rows are right."""
    m, n, k, alpha = 70_000, 16_384, 16, 2
    x, w = drawn(m, k, seed=1), drawn(n, k, seed=2)
    labels = torch.randint(alpha, (n, k), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def run(cast: Cast, backend: str) -> list[Tensor]:
        rows = cast(x if backend != "eager" else x[-3:])
        return [kernels.split_matmul(rows, cast(w), labels.to(rows.device), alpha, backend=backend)[-3:].clone()]

    return Check(f"split_matmul {m}x{n}x{k}, beyond 2^31 elements", "partition", "split_matmul", run)
