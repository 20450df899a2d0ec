"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operations.

Two for each weight that is stored and each row: the multiplications and additions that the definition asks for, as
PyTorch counts its own matmuls. So an expanded layer counts what its parent does, whatever ``alpha`` is, and a
block-masked one its kept blocks. Not counted: holes are (the formulas see shapes, and a hole is a stored zero), nor
what an implementation computes besides, as the packed kernels do ``alpha`` products of which the labels keep one; nor
biases, activations and rearrangement.
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
"""By operation, from the shapes of its arguments and of its result."""


def register() -> None:
    """Makes PyTorch's counter know the operations, now or when it is imported: importing it imports Triton."""
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
