"""What an expansion changes in a model's books: weights by layer."""

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
