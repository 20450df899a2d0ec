"""Drop-in replacements of ``nn.Linear``: the expanded layer and its widened successor.

An expanded layer's children lie in planes: output ``a * parents + n`` is child ``a`` of parent ``n``. Removed edges are
not stored, with one exception: whole blocks also store entries that are no edges. These are zero, and so are their
gradients, so that every element-wise optimizer (SGD with momentum, Adam, with weight decay or without) keeps them zero.
After writing to ``edge_weight`` of a block layer yourself, call ``clear_removed()``.

===================  ==========================================  =================================================
layer                parameter ``edge_weight``                   used for
===================  ==========================================  =================================================
:class:`SplitLinear`   the parent's weight, or its edges ``[nnz]``  an expanded layer, any labels
:class:`MergeLinear`   the same                                    its successor, each edge at one child
:class:`MaskedLinear`  the edges of the wide weight, ``[nnz]``      its successor, any mask
:class:`BlockLinear`   the kept blocks ``[blocks, bn, bk]``         either, where whole blocks are kept
===================  ==========================================  =================================================

``weight`` is every layer's wide weight ``[out_features, in_features]``, only to be read. The parameter is not called
``weight``, so that neither an ``nn.Linear`` nor an FPE layer takes the other's state unnoticed.
"""

from .base import ExpandedLinear
from .block import BlockLinear
from .labelled import MergeLinear, SplitLinear
from .masked import MaskedLinear
from .stacked import StackedLinear
from .state import FORMAT_VERSION

KINDS: tuple[type[ExpandedLinear], ...] = (SplitLinear, MergeLinear, MaskedLinear, BlockLinear)
"""The layers, each at its index ``KIND``, which the header of a state dict holds: only append."""

__all__ = [
    "FORMAT_VERSION",
    "KINDS",
    "BlockLinear",
    "ExpandedLinear",
    "MaskedLinear",
    "MergeLinear",
    "SplitLinear",
    "StackedLinear",
]
