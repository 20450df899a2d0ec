"""What is computed from a layout's codes once: labels stay from step to step while weights change."""

from torch import Tensor

from ..memo import once_per_version
from .fragments import pack_metadata
from .layout import SemiStructuredLayout


@once_per_version
def metadata(codes: Tensor, quads: int) -> Tensor:
    """Metadata in fragment order: see :func:`~fpe.kernels.semi_structured.fragments.pack_metadata`."""
    return pack_metadata(codes, quads)


@once_per_version
def transposed_layout(codes: Tensor, k: int) -> SemiStructuredLayout:
    """The layout of the transposed weight of two children, from the first child's codes and the number of inputs."""
    return SemiStructuredLayout((codes.shape[0], k), codes, None, 2).transpose()
