"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operations.

Two for each stored weight and each row: the multiplications and additions that the definition asks for, as PyTorch
counts its own matmuls. So an expanded layer counts as many as its parent, whatever ``alpha`` is, and a block-masked
one those of its kept blocks. Holes among labels are counted, because the formulas see only shapes and a hole is a
stored zero there. What an implementation computes in addition is not counted (the packed kernels compute ``alpha``
products, of which the labels keep one), and neither are biases, activations and rearrangement.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def _weights_of_second(rows: Shape, weights: Shape, *rest: Any, **named: Any) -> int:
    return 2 * rows[0] * prod(weights)


def _weights_of_result(dy: Shape, x: Shape, *rest: Any, out_shape: Shape, **named: Any) -> int:
    return 2 * x[0] * prod(out_shape)


def _two_layers(
    x: Shape, w1: Shape, labels1: Shape, seed1: list, transposed1: bool, w2: Shape, *rest: Any, **named: Any
) -> int:
    return 2 * x[0] * (prod(w1) + prod(w2))


FORMULAS: dict[str, Callable[..., int]] = {
    "split_matmul": _weights_of_second,
    "merge_matmul": _weights_of_second,
    "partition_grad": _weights_of_result,
    "block_matmul": _weights_of_second,
    "block_matmul_t": _weights_of_second,
    "block_grad": _weights_of_result,
    "semi_structured_matmul": _weights_of_second,
    "semi_structured_matmul_t": _weights_of_second,
    "semi_structured_grad": _weights_of_result,
    "expanded_mlp": _two_layers,
    "kept_split": _weights_of_second,
    "kept_merge": _weights_of_second,
    "kept_grad": _weights_of_result,
}
"""By operation: FLOPs from the shapes of its arguments and of its result."""


def register() -> None:
    """Registers the formulas with PyTorch's counter once that is imported: importing it here would import Triton."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _OnImport())


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.fpe, name))(formula)


class _OnImport(MetaPathFinder):
    """Finds the counter as Python would, and registers the formulas once it is there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The counter's own spec; none for any other module."""
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register(module)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
