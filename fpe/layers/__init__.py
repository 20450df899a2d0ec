"""Drop-in replacements of ``nn.Linear``: the expanded layer and its widened successor.

An expanded layer's children lie in planes: output ``a * parents + n`` is child ``a`` of parent ``n``. Removed
edges are zero in the parameter, and so are their gradients: any element-wise optimizer (SGD with momentum,
Adam, with weight decay or without) keeps them there. Whoever writes to a parameter otherwise calls ``clear_removed()``.

===================  ==========================================  =================================================
layer                parameter ``edge_weight``                   used for
===================  ==========================================  =================================================
:class:`SplitLinear`   the parent's weight ``[parents, inputs]``    an expanded layer, any labels
:class:`MergeLinear`   the parent's weight ``[outputs, parents]``   its successor, each edge at one child
:class:`MaskedLinear`  the wide weight ``[outputs, inputs]``        its successor, any mask
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
