"""Matmuls of a layer whose edges are divided among ``alpha`` children by a table of labels."""

from .api import masked_matmul, merge_matmul, partition_grad, split_matmul
from .eager import merge_matmul_eager, partition_grad_eager, split_matmul_eager
from .labels import HOLE, PackedLabels
from .seeded import SeededLabels

__all__ = [
    "HOLE",
    "PackedLabels",
    "SeededLabels",
    "masked_matmul",
    "merge_matmul",
    "merge_matmul_eager",
    "partition_grad",
    "partition_grad_eager",
    "split_matmul",
    "split_matmul_eager",
]
