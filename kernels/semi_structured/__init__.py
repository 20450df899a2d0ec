"""Matmuls of a 2:4 weight, or of a parent whose inputs are shared out 2:4 between two children."""

from .api import semi_structured_compress, semi_structured_grad, semi_structured_matmul, semi_structured_matmul_t
from .eager import (
    semi_structured_compress_eager,
    semi_structured_grad_eager,
    semi_structured_matmul_eager,
    semi_structured_matmul_t_eager,
)
from .layout import SemiStructuredLayout

__all__ = [
    "SemiStructuredLayout",
    "semi_structured_compress",
    "semi_structured_compress_eager",
    "semi_structured_grad",
    "semi_structured_grad_eager",
    "semi_structured_matmul",
    "semi_structured_matmul_eager",
    "semi_structured_matmul_t",
    "semi_structured_matmul_t_eager",
]
