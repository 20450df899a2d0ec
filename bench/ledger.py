"""What an expansion changes in a model's books: weights by layer, and bytes by storage format."""

from collections.abc import Mapping
from math import ceil, log2
from typing import Any

from torch import nn

from fpe.layers import ExpandedLinear


def layer_ledger(model: nn.Module) -> list[dict[str, Any]]:
    """One row for each linear layer: size, weights kept, parameters stored, biases."""
    rows = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, ExpandedLinear)):
            continue
        bias = 0 if module.bias is None else module.bias.numel()
        rows.append(
            {
                "layer": name,
                "kind": type(module).__name__,
                "out": module.out_features,
                "in": module.in_features,
                "nonzeros": module.weight.numel() if isinstance(module, nn.Linear) else module.nonzeros,
                "stored": sum(p.numel() for p in module.parameters()) - bias,
                "biases": bias,
            }
        )
    return rows


def bytes_by_format(n: int, k: int, alpha: int, itemsize: int = 2, block: tuple[int, int] = (64, 64)) -> dict[str, int]:
    """Bytes of one layer's weights, ``[n, k]`` before its split into ``alpha`` children, by storage format.

    ======================  ==================================================================================
    format                  what is stored
    ======================  ==================================================================================
    parent (dense)          ``n * k`` values: the yardstick
    wide (dense)            ``alpha * n * k`` values, most of them zero
    CSR                     ``n * k`` values, an int32 column each, int32 row pointers
    wide + bitmap           ``n * k`` values, a bit for each of ``alpha * n * k`` positions
    partition labels        ``n * k`` values, ``ceil(log2(alpha))`` bits each
    2:4 (alpha = 2)         ``n * k`` values, two bits each
    blocks                  ``n * k`` values in whole tiles, an int32 column for each, int32 row pointers
    ======================  ==================================================================================

    Args:
        n: Output features of the parent.
        k: Input features.
        alpha: Children per parent.
        itemsize: Bytes of a value.
        block: Tile ``(bn, bk)`` of the block format.
    """
    values = n * k * itemsize
    tiles_down, tiles_across = ceil(n / block[0]), ceil(k / block[1])
    tiles = tiles_down * tiles_across
    formats = {
        "parent (dense)": values,
        "wide (dense)": alpha * values,
        "CSR": values + 4 * n * k + 4 * (alpha * n + 1),
        "wide + bitmap": values + ceil(alpha * n * k / 8),
        "partition labels": values + ceil(n * k * ceil(log2(alpha)) / 8),
        "blocks": tiles * block[0] * block[1] * itemsize + 4 * tiles + 4 * (alpha * tiles_down + 1),
    }
    if alpha == 2:
        formats["2:4"] = values + ceil(n * k * 2 / 8)
    return formats


def relative(formats: Mapping[str, int]) -> dict[str, float]:
    """Bytes of each format over those of the dense parent."""
    return {name: size / formats["parent (dense)"] for name, size in formats.items()}
