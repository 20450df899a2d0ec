"""Fixed Parameter Expansion: wider, sparser layers at the parent's number of non-zero weights.

The method of *Expand Neurons, Not Parameters* (arXiv 2510.04500) as drop-in PyTorch layers::

    wide = fpe.expand(trained, alpha=2)
    assert fpe.nonzeros(wide) == fpe.nonzeros(trained)

A name is imported when it is first used, so that ``fpe --help`` does not wait for PyTorch. The operations join
``torch.ops.fpe`` when :mod:`fpe.kernels` is imported: at once if PyTorch was imported before this package, otherwise
with the first name that needs them.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .companion import accompany

if TYPE_CHECKING:
    from . import checkpoint as checkpoint
    from . import convolution as convolution
    from . import expansion as expansion
    from . import files as files
    from . import fused as fused
    from . import kernels as kernels
    from . import layers as layers
    from . import metrics as metrics
    from . import models as models
    from . import partition as partition
    from . import resparsify as resparsify
    from . import rewiring as rewiring
    from . import surgery as surgery
    from . import theory as theory
    from .checkpoint import restore
    from .expansion import PaddingWarning, expand, expand_pair, nonzeros, to_dense
    from .files import save
    from .fused import ExpandedMLP, fuse
    from .layers import BlockLinear, MaskedLinear, MergeLinear, SplitLinear
    from .models import find_pairs
    from .partition import Partition
    from .rewiring import Rewiring
    from .scratch import sparse

__version__ = "0.2.0"

_NAMES = {
    "checkpoint": ("restore",),
    "expansion": ("PaddingWarning", "expand", "expand_pair", "nonzeros", "to_dense"),
    "files": ("save",),
    "fused": ("ExpandedMLP", "fuse"),
    "layers": ("BlockLinear", "MaskedLinear", "MergeLinear", "SplitLinear"),
    "models": ("find_pairs",),
    "partition": ("Partition",),
    "rewiring": ("Rewiring",),
    "scratch": ("sparse",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = (*_NAMES, "convolution", "kernels", "metrics", "resparsify", "surgery", "theory")

__all__ = [
    "BlockLinear",
    "ExpandedMLP",
    "MaskedLinear",
    "MergeLinear",
    "PaddingWarning",
    "Partition",
    "Rewiring",
    "SplitLinear",
    "convolution",
    "expand",
    "expand_pair",
    "find_pairs",
    "fuse",
    "kernels",
    "metrics",
    "models",
    "nonzeros",
    "restore",
    "save",
    "sparse",
    "theory",
    "to_dense",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


if "torch" in sys.modules:
    import_module(".kernels", __name__)
accompany()
