"""Fixed Parameter Expansion: wider, sparser layers at the parent's number of non-zero weights.

The method of *Expand Neurons, Not Parameters* (arXiv 2510.04500) as drop-in PyTorch layers::

    wide = fpe.expand(trained, alpha=2)
    assert fpe.nonzeros(wide) == fpe.nonzeros(trained)
"""

from . import kernels, metrics, theory
from .checkpoint import restore
from .expansion import expand, expand_pair, nonzeros, to_dense
from .fused import ExpandedMLP, fuse
from .layers import BlockLinear, MaskedLinear, MergeLinear, SplitLinear
from .partition import Partition
from .rewiring import Rewiring

__version__ = "0.1.0"

__all__ = [
    "BlockLinear",
    "ExpandedMLP",
    "MaskedLinear",
    "MergeLinear",
    "Partition",
    "Rewiring",
    "SplitLinear",
    "expand",
    "expand_pair",
    "fuse",
    "kernels",
    "metrics",
    "nonzeros",
    "restore",
    "theory",
    "to_dense",
]
