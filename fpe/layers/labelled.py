"""Layers stored as their parent's weight and the labels of its edges."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..kernels import (
    HOLE,
    PackedLabels,
    SemiStructuredLayout,
    merge_matmul,
    semi_structured_compress,
    semi_structured_matmul,
    split_matmul,
)
from ..kernels.partition.labels import digits
from ..kernels.semi_structured.memo import once_per_version
from ..partition import STRUCTURES, Partition
from .base import ExpandedLinear, expect
from .dense_form import dense_weight, masked_copy


class _LabelledLinear(ExpandedLinear):
    """A layer stored as its parent's weight and the labels of its edges, packed into bits.

    An edge that nobody owns is a weight stored as zero. Gradients keep it so; whoever writes to the weight itself calls
    :meth:`clear_removed` afterwards.

    Args:
        partition: Labels of the parent's weight.
        bias: Whether every output has a bias.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.
        device: As of ``nn.Linear``.
        dtype: As of ``nn.Linear``.
    """

    planes: Tensor
    made_of = ("weight", "planes")

    def __init__(
        self,
        partition: Partition,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(*self._sizes(partition), backend)
        self.alpha = partition.alpha
        self.structure = partition.structure
        self.block_shape = partition.block_shape
        self.weight = nn.Parameter(torch.empty(partition.shape, device=device, dtype=dtype))
        self._set_labels(partition.labels.to(device=device))
        self.bias = self._make_bias(bias, device=device, dtype=dtype)
        self.reset_parameters(partition.shape[1])

    @staticmethod
    def _sizes(partition: Partition) -> tuple[int, int]:
        """Widths of the layer's input and output."""
        raise NotImplementedError

    def _set_labels(self, labels: Tensor) -> None:
        self._set_planes(PackedLabels.pack(labels, self.alpha).planes)

    def _set_planes(self, planes: Tensor) -> None:
        """Takes labels as bits, and with them whatever is derived from labels."""
        self.register_buffer("planes", planes)

    @property
    def packed(self) -> PackedLabels:
        """The labels as the operations take them."""
        return PackedLabels(self.planes, (self.weight.shape[0], self.weight.shape[1]), self.alpha)

    @property
    def labels(self) -> Tensor:
        """The labels unpacked, uint8 of the weight's shape, ``HOLE`` where nobody owns the edge."""
        return self.packed.unpack()

    @property
    def partition(self) -> Partition:
        """Who owns each edge."""
        return Partition(self.labels, self.alpha, self.structure, self.block_shape)

    @torch.no_grad()
    def clear_removed(self) -> None:
        """Sets the stored values of removed edges to zero."""
        self.weight.masked_fill_(self.labels >= self.alpha, 0)

    @torch.no_grad()
    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask; see :meth:`ExpandedLinear.rewire`."""
        owners = self._children(kept)
        labels = torch.where(owners.any(0), owners.to(torch.uint8).argmax(0), HOLE).to(torch.uint8)
        old = self.partition
        new = Partition(labels, self.alpha, self.structure, self.block_shape).validate()
        if not torch.equal(new.masks(), owners):
            raise ValueError(f"{type(self).__name__}.rewire: expected every edge at one child at most")
        for tensor in (self.weight.data, *followers):
            tensor.masked_fill_(new.labels != old.labels, 0)
        self._set_labels(new.labels)

    def _children(self, kept: Tensor) -> Tensor:
        """A mask of the wide weight, child by child: bool ``[alpha, *partition.shape]``."""
        raise NotImplementedError

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Raises unless the state fits, labels included; see :meth:`ExpandedLinear.check_state`."""
        super().check_state(state, prefix)
        name = f"{prefix}planes"
        planes = state.get(name)
        if not isinstance(planes, Tensor) or planes.dim() != 3:
            raise ValueError(f"state dict: expected planes of bits at '{name}', got {type(planes).__name__}")
        expect(name, planes.dtype, torch.uint8)
        own = self.packed
        holes = planes.shape[0] > digits(self.alpha)
        expect(name, list(planes.shape), [digits(self.alpha) + holes, *own.planes.shape[1:]])
        try:
            labels = own._replace(planes=planes).unpack()
            Partition(labels, self.alpha, self.structure, self.block_shape).validate()
        except (TypeError, ValueError) as error:
            raise ValueError(f"state dict: '{name}' is damaged: {error}") from error

    def _expected_tensors(self) -> dict[str, list[int]]:
        expected = super()._expected_tensors()
        del expected["planes"]  # one more where there are holes
        return expected

    def _adopt_topology(self, state: Mapping[str, Any], prefix: str) -> None:
        self._set_planes(state[f"{prefix}planes"].to(self.planes.device, copy=True))

    def _header(self) -> list[int]:
        structure = [STRUCTURES.index(self.structure), *(self.block_shape or (0, 0))]
        return [*super()._header(), self.alpha, *structure]

    @classmethod
    def _empty(cls, header: list[int], own: Mapping[str, Tensor]) -> ExpandedLinear:
        alpha, structure, bn, bk = header[4:]
        n, k = own["weight"].shape
        labels = PackedLabels(own["planes"], (n, k), alpha).unpack()
        partition = Partition(labels, alpha, STRUCTURES[structure], (bn, bk) if bn else None)
        return cls(partition, "bias" in own, device=own["weight"].device, dtype=own["weight"].dtype)

    def _repr_details(self) -> str:
        return f"alpha={self.alpha}, structure={self.structure}, "


def _compress(weight: Tensor, codes: Tensor, stored: Tensor | None, backend: str) -> Tensor:
    """A parent's weight as its two children's values, zero where an edge was removed."""
    layout = SemiStructuredLayout((weight.shape[0], weight.shape[1]), codes, stored, 2)
    return semi_structured_compress(weight, layout, backend=backend)


_compress_once = once_per_version(_compress)


class SplitLinear(_LabelledLinear):
    """An expanded layer: ``alpha`` children per parent, each with the edges that its label gives it.

    Input ``[..., inputs]``, output ``[..., alpha * parents]`` in planes of children. The partition's labels are
    ``[parents, inputs]``; the arguments are those of :class:`_LabelledLinear`. With the ``"2:4"`` structure every
    backend of :func:`fpe.kernels.semi_structured_matmul` serves: on a GPU ``"auto"`` takes sparse tensor cores. The
    values are compressed once a forward in training, and once for each version of the weight without gradients.
    """

    codes: Tensor | None
    stored: Tensor | None

    @staticmethod
    def _sizes(partition: Partition) -> tuple[int, int]:
        parents, inputs = partition.shape
        return inputs, partition.alpha * parents

    def _set_planes(self, planes: Tensor) -> None:
        """As above; the 2:4 kernels read codes that are derived from the labels."""
        super()._set_planes(planes)
        layout = SemiStructuredLayout.from_labels(self.labels) if self.structure == "2:4" else None
        self.register_buffer("codes", layout.codes if layout else None, persistent=False)
        self.register_buffer("stored", layout.kept if layout else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``y[..., a * parents + n] = sum_k x[..., k] * w[n, k] * (labels[n, k] == a) + bias``."""
        dense = dense_weight(self, x)
        if dense is not None:
            return linear(x, dense, self.bias)
        bias = None if self.bias is None else self.bias.view(self.alpha, -1)
        if self.codes is not None and (x.is_cuda or self.backend not in ("auto", "eager")):
            return self._multiply_quads(x, self.codes, bias).flatten(-2)
        return split_matmul(x, self.weight, self.packed, self.alpha, bias, backend=self.backend).flatten(-2)

    def masked_copy(self) -> Tensor:
        """:meth:`wide_weight`, quicker."""
        return masked_copy(self, 0, self.alpha)

    def _multiply_quads(self, x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        compress = _compress if trains or torch.compiler.is_compiling() else _compress_once
        values = compress(self.weight, codes, self.stored, self.backend)
        layout = SemiStructuredLayout((self.weight.shape[0], self.weight.shape[1]), codes, None, 2)
        return semi_structured_matmul(x, values, layout, bias, backend=self.backend)

    def wide_weight(self) -> Tensor:
        """The weight of the equivalent dense layer, ``[alpha * parents, inputs]``."""
        return torch.where(self.partition.masks(), self.weight, self.weight.new_zeros(())).flatten(0, 1)

    def kept(self) -> Tensor:
        """Which entries of :meth:`wide_weight` exist."""
        return self.partition.masks().flatten(0, 1)

    def _children(self, kept: Tensor) -> Tensor:
        return kept.unflatten(0, (self.alpha, -1))


class MergeLinear(_LabelledLinear):
    """The successor of an expanded layer in which every parent edge reads exactly one child.

    Input ``[..., alpha * parents]`` in planes of children, output ``[..., outputs]``. The partition's labels are
    ``[outputs, parents]``: which child an edge reads; the arguments are those of :class:`_LabelledLinear`. With two or
    four children it can run as a 2:4 weight whatever the labels; ``"auto"`` does where that is predicted to be fastest.
    """

    @staticmethod
    def _sizes(partition: Partition) -> tuple[int, int]:
        outputs, parents = partition.shape
        return partition.alpha * parents, outputs

    def forward(self, z: Tensor) -> Tensor:
        """``y[..., n] = sum_k z[..., labels[n, k] * parents + k] * w[n, k] + bias``."""
        dense = dense_weight(self, z)
        if dense is not None:
            return linear(z, dense, self.bias)
        planes = z.unflatten(-1, (self.alpha, self.weight.shape[1]))
        return merge_matmul(planes, self.weight, self.packed, self.bias, backend=self.backend)

    def masked_copy(self) -> Tensor:
        """:meth:`wide_weight`, quicker."""
        return masked_copy(self, 1, self.alpha)

    def wide_weight(self) -> Tensor:
        """The weight of the equivalent dense layer, ``[outputs, alpha * parents]``."""
        wide = torch.where(self.partition.masks(), self.weight, self.weight.new_zeros(()))
        return wide.transpose(0, 1).flatten(1)

    def kept(self) -> Tensor:
        """Which entries of :meth:`wide_weight` exist."""
        return self.partition.masks().transpose(0, 1).flatten(1)

    def _children(self, kept: Tensor) -> Tensor:
        return kept.unflatten(1, (self.alpha, -1)).transpose(0, 1)
