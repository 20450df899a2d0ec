"""Drop-in replacements of ``nn.Linear``: the expanded layer and its widened successor.

An expanded layer's children lie in planes: output ``a * parents + n`` is child ``a`` of parent ``n``. Removed edges are
not stored; in whole blocks alone there are entries of none, zero like their gradients, and any element-wise optimizer
(SGD with momentum, Adam, with weight decay or without) keeps them so. Whoever writes to those calls
``clear_removed()``.

===================  ==========================================  =================================================
layer                parameter ``edge_weight``                   used for
===================  ==========================================  =================================================
:class:`SplitLinear`   the parent's weight, or its edges ``[nnz]``  an expanded layer, any labels
:class:`MergeLinear`   the same                                    its successor, each edge at one child
:class:`MaskedLinear`  the edges of the wide weight, ``[nnz]``      its successor, any mask
:class:`BlockLinear`   the kept blocks ``[blocks, bn, bk]``         either, where whole blocks are kept
===================  ==========================================  =================================================

``weight`` is every layer's wide weight ``[out_features, in_features]``, to read. No ``nn.Linear`` has an
``edge_weight``, so that neither takes the other's state unnoticed.
"""

from .base import ExpandedLinear
from .block import BlockLinear
from .labelled import MergeLinear, SplitLinear
from .masked import MaskedLinear
from .stacked import StackedLinear
from .state import FORMAT_VERSION

KINDS: tuple[type[ExpandedLinear], ...] = (SplitLinear, MergeLinear, MaskedLinear, BlockLinear)
"""The layers, at the places that the state dict's header names (``KIND``): append only."""

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
