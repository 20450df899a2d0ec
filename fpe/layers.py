"""Drop-in replacements of ``nn.Linear``: the expanded layer and its widened successor.

An expanded layer's children lie in planes: output ``a * parents + n`` is child ``a`` of parent ``n``. Removed
edges are zero in the parameter, and so are their gradients: any element-wise optimizer (SGD with momentum,
Adam, with weight decay or without) keeps them there. They take no part in the forward whatever is stored.

===================  ==========================================  =================================================
layer                parameter                                   used for
===================  ==========================================  =================================================
:class:`SplitLinear`   the parent's weight ``[parents, inputs]``    an expanded layer, any labels
:class:`MergeLinear`   the parent's weight ``[outputs, parents]``   its successor, each edge at one child
:class:`MaskedLinear`  the wide weight ``[outputs, inputs]``        its successor, any mask
:class:`BlockLinear`   the kept blocks ``[blocks, bn, bk]``         either, where whole blocks are kept
===================  ==========================================  =================================================
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from .kernels import (
    HOLE,
    BlockLayout,
    PackedLabels,
    SemiStructuredLayout,
    block_matmul,
    merge_matmul,
    semi_structured_compress,
    semi_structured_matmul,
    split_matmul,
)
from .kernels.block.layout import tiles
from .kernels.partition.labels import digits
from .kernels.semi_structured.memo import once_per_version
from .partition import STRUCTURES, Partition, check_block

FORMAT_VERSION = 2
"""Version of the state dict's layout; its first entry in every layer's header."""


class ExpandedLinear(nn.Module):
    """What the FPE layers have in common: sizes, the wide view, and a checked state dict.

    Attributes:
        in_features: Width of the input.
        out_features: Width of the output.
        backend: Which implementation runs: ``"auto"``, ``"triton"`` or ``"eager"``.
    """

    def __init__(self, in_features: int, out_features: int, backend: str) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.backend = backend

    bias: nn.Parameter | None

    def wide_weight(self) -> Tensor:
        """The weight of the equivalent dense layer, ``[out_features, in_features]``, differentiable."""
        raise NotImplementedError

    def kept(self) -> Tensor:
        """Which entries of :meth:`wide_weight` exist, bool ``[out_features, in_features]``."""
        raise NotImplementedError

    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask with as many edges, as :class:`fpe.Rewiring` makes it; in place.

        Edges that stay keep their weight. New edges begin at zero.

        Args:
            kept: The new :meth:`kept`, bool ``[out_features, in_features]``.
            followers: Tensors of the weight parameter's shape that belong to it entry by entry, as an optimizer's
                moments; edges keep their entries, new ones begin at zero there too.

        Raises:
            ValueError: The mask is one that the layer cannot have.
        """
        raise NotImplementedError

    @property
    def nonzeros(self) -> int:
        """Number of weights that the layer keeps."""
        return int(self.kept().sum())

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` that computes the same function at the wide size."""
        weight = self.wide_weight()
        dense = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        dense.weight.copy_(weight)
        dense.weight.requires_grad_(next(self.parameters()).requires_grad)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    def reset_parameters(self, fan_in: int) -> None:
        """Draws weights as ``nn.Linear`` with ``fan_in`` inputs does, zero where no edge is kept."""
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        self.clear_removed()

    def clear_removed(self) -> None:
        """Sets the stored values of removed edges to zero."""
        raise NotImplementedError

    # The state dict. Every entry is a tensor, so that safetensors takes it too.

    def _header(self) -> list[int]:
        """What a state dict must agree with before it can be loaded, besides its tensors' shapes."""
        return [FORMAT_VERSION, KINDS.index(type(self)), self.in_features, self.out_features]

    def get_extra_state(self) -> Tensor:
        """The header, int64."""
        return torch.tensor(self._header(), dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: :meth:`check_state` has compared the header before loading began."""

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Raises unless the entries under ``prefix`` are a state of a layer like this one.

        Raises:
            ValueError: An entry is missing, has another shape or holds what cannot be. Nothing has been
                loaded then.
        """
        header = state.get(f"{prefix}_extra_state")
        if not isinstance(header, Tensor) or header.dtype != torch.int64:
            raise ValueError(
                f"state dict: expected the header of a {type(self).__name__} at '{prefix}_extra_state', got "
                f"{'nothing' if header is None else type(header).__name__}"
            )
        if header.tolist() != self._header():
            raise ValueError(
                f"state dict: '{prefix}_extra_state' should be {self._header()} (format, kind, in, out, ...), got "
                f"{header.tolist()}"
            )
        for name, own in self._expected_tensors().items():
            value = state.get(prefix + name)
            if not isinstance(value, Tensor):
                raise ValueError(f"state dict: expected a tensor at '{prefix}{name}', got {type(value).__name__}")
            _expect(prefix + name, list(value.shape), own)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], prefix: str = "") -> "ExpandedLinear":
        """Builds the layer whose entries stand under ``prefix``, weights included.

        Raises:
            ValueError: The entries are no state of an FPE layer.
        """
        header = state.get(f"{prefix}_extra_state")
        values = header.tolist() if isinstance(header, Tensor) and header.dtype == torch.int64 else []
        if len(values) < 4 or values[0] != FORMAT_VERSION or not 0 <= values[1] < len(KINDS):
            raise ValueError(
                f"state dict: expected the header of an FPE layer of format {FORMAT_VERSION} at "
                f"'{prefix}_extra_state', got {values or type(header).__name__}"
            )
        own = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        try:
            layer = KINDS[values[1]]._empty(values, own)
            layer.load_state_dict(own)
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"state dict: the entries under '{prefix}' are damaged: {error}") from error
        return layer

    @classmethod
    def _empty(cls, header: list[int], own: Mapping[str, Tensor]) -> "ExpandedLinear":
        """A layer of the topology that a state describes, weights still to be loaded."""
        raise NotImplementedError

    def _expected_tensors(self) -> dict[str, list[int]]:
        """Names and shapes of the tensors of a state dict."""
        own = {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}
        return {n: list(t.shape) for n, t in own.items() if n not in self._non_persistent_buffers_set}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.check_state(state_dict, prefix)
        self._adopt_topology(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.clear_removed()

    def _adopt_topology(self, state: Mapping[str, Any], prefix: str) -> None:
        """Makes room for a checked state whose tensors have other sizes than the layer's."""

    def _repr_details(self) -> str:
        return ""

    def extra_repr(self) -> str:
        """Sizes, structure and the share of weights kept."""
        total = max(self.in_features * self.out_features, 1)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self._repr_details()}"
            f"nonzeros={self.nonzeros} ({self.nonzeros / total:.1%}), bias={self.bias is not None}"
        )

    def _make_bias(self, bias: bool, **factory: Any) -> nn.Parameter | None:
        return nn.Parameter(torch.empty(self.out_features, **factory)) if bias else None


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
        self._set_labels(partition.labels.to(device=device))
        self.weight = nn.Parameter(torch.empty(partition.shape, device=device, dtype=dtype))
        self.bias = self._make_bias(bias, device=device, dtype=dtype)
        self.reset_parameters(partition.shape[1])

    @staticmethod
    def _sizes(partition: Partition) -> tuple[int, int]:
        """Widths of the layer's input and output."""
        raise NotImplementedError

    def _set_labels(self, labels: Tensor) -> None:
        self.register_buffer("planes", PackedLabels.pack(labels, self.alpha).planes)

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
        _expect(name, planes.dtype, torch.uint8)
        own = self.packed
        holes = planes.shape[0] > digits(self.alpha)
        _expect(name, list(planes.shape), [digits(self.alpha) + holes, *own.planes.shape[1:]])
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
        self.planes = state[f"{prefix}planes"].to(self.planes.device, copy=True)

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

    def _set_labels(self, labels: Tensor) -> None:
        super()._set_labels(labels)
        self._index_quads(labels)

    def _index_quads(self, labels: Tensor) -> None:
        """Derives from the labels what the 2:4 kernels read."""
        layout = SemiStructuredLayout.from_labels(labels) if self.structure == "2:4" else None
        self.register_buffer("codes", layout.codes if layout else None, persistent=False)
        self.register_buffer("stored", layout.kept if layout else None, persistent=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._index_quads(self.labels)

    def forward(self, x: Tensor) -> Tensor:
        """``y[..., a * parents + n] = sum_k x[..., k] * w[n, k] * (labels[n, k] == a) + bias``."""
        if self.codes is not None and (x.is_cuda or self.backend not in ("auto", "eager")):
            y = self._multiply_quads(x, self.codes).flatten(-2)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        bias = None if self.bias is None else self.bias.view(self.alpha, -1)
        return split_matmul(x, self.weight, self.packed, self.alpha, bias, backend=self.backend).flatten(-2)

    def _multiply_quads(self, x: Tensor, codes: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        compress = _compress if trains or torch.compiler.is_compiling() else _compress_once
        values = compress(self.weight, codes, self.stored, self.backend)
        layout = SemiStructuredLayout((self.weight.shape[0], self.weight.shape[1]), codes, None, 2)
        return semi_structured_matmul(x, values, layout, backend=self.backend)

    def wide_weight(self) -> Tensor:
        """The weight of the equivalent dense layer, ``[alpha * parents, inputs]``."""
        return torch.where(self.partition.masks(), self.weight, self.weight.new_zeros(())).flatten(0, 1)

    def kept(self) -> Tensor:
        """Which entries of :meth:`wide_weight` exist."""
        return self.partition.masks().flatten(0, 1)

    def _children(self, kept: Tensor) -> Tensor:
        return kept.unflatten(0, (self.alpha, -1))


def _interleave(weight: Tensor, planes: Tensor, alpha: int) -> tuple[Tensor, SemiStructuredLayout]:
    """A parent's weight as the 2:4 weight that reads its inputs' children side by side."""
    labels = PackedLabels(planes, (weight.shape[0], weight.shape[1]), alpha).unpack()
    layout = SemiStructuredLayout.interleaved(labels, alpha)
    return layout.from_parent(weight), layout._replace(kept=None)


_interleave_once = once_per_version(_interleave)


class MergeLinear(_LabelledLinear):
    """The successor of an expanded layer in which every parent edge reads exactly one child.

    Input ``[..., alpha * parents]`` in planes of children, output ``[..., outputs]``. The partition's labels are
    ``[outputs, parents]``: which child an edge reads; the arguments are those of :class:`_LabelledLinear`. With two or
    four children the backends ``"sparse_tensor_core"`` and ``"torch"`` run it as a 2:4 weight, whatever the labels.
    """

    @staticmethod
    def _sizes(partition: Partition) -> tuple[int, int]:
        outputs, parents = partition.shape
        return partition.alpha * parents, outputs

    def forward(self, z: Tensor) -> Tensor:
        """``y[..., n] = sum_k z[..., labels[n, k] * parents + k] * w[n, k] + bias``."""
        planes = z.unflatten(-1, (self.alpha, self.weight.shape[1]))
        if self.backend in ("sparse_tensor_core", "torch"):
            trains = torch.is_grad_enabled() and self.weight.requires_grad
            interleave = _interleave if trains or torch.compiler.is_compiling() else _interleave_once
            values, layout = interleave(self.weight, self.planes, self.alpha)
            beside = planes.transpose(-1, -2).flatten(-2)
            y = semi_structured_matmul(beside, values, layout, backend=self.backend).squeeze(-2)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return merge_matmul(planes, self.weight, self.packed, self.bias, backend=self.backend)

    def wide_weight(self) -> Tensor:
        """The weight of the equivalent dense layer, ``[outputs, alpha * parents]``."""
        wide = torch.where(self.partition.masks(), self.weight, self.weight.new_zeros(()))
        return wide.transpose(0, 1).flatten(1)

    def kept(self) -> Tensor:
        """Which entries of :meth:`wide_weight` exist."""
        return self.partition.masks().transpose(0, 1).flatten(1)

    def _children(self, kept: Tensor) -> Tensor:
        return kept.unflatten(1, (self.alpha, -1)).transpose(0, 1)


class MaskedLinear(ExpandedLinear):
    """A linear layer with any mask, stored wide: the successor under the paper's magnitude ranking.

    Args:
        mask: bool ``[outputs, inputs]``, true where an edge exists.
        bias: Whether outputs have a bias.
        device: As of ``nn.Linear``.
        dtype: As of ``nn.Linear``.
    """

    mask: Tensor

    def __init__(
        self,
        mask: Tensor,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mask.shape[1], mask.shape[0], "eager")
        self.register_buffer("mask", mask.to(device=device, copy=True))
        self.weight = nn.Parameter(torch.empty(mask.shape, device=device, dtype=dtype))
        self.bias = self._make_bias(bias, device=device, dtype=dtype)
        self.reset_parameters(mask.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """``y = x @ (weight * mask).T + bias``."""
        return linear(x, self.wide_weight(), self.bias)

    def wide_weight(self) -> Tensor:
        """The masked weight, ``[outputs, inputs]``."""
        return torch.where(self.mask, self.weight, self.weight.new_zeros(()))

    def kept(self) -> Tensor:
        """The mask."""
        return self.mask

    @torch.no_grad()
    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask; see :meth:`ExpandedLinear.rewire`."""
        for tensor in (self.weight.data, *followers):
            tensor.masked_fill_(kept != self.mask, 0)
        self.mask.copy_(kept)

    @torch.no_grad()
    def clear_removed(self) -> None:
        """Sets the stored values of removed edges to zero."""
        self.weight.masked_fill_(~self.mask, 0)

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Raises unless the state fits; see :meth:`ExpandedLinear.check_state`."""
        super().check_state(state, prefix)
        _expect(f"{prefix}mask", state[f"{prefix}mask"].dtype, torch.bool)

    @classmethod
    def _empty(cls, header: list[int], own: Mapping[str, Tensor]) -> ExpandedLinear:
        return cls(own["mask"], "bias" in own, own["weight"].device, own["weight"].dtype)


class BlockLinear(ExpandedLinear):
    """A linear layer of which whole blocks are kept: an expanded layer or a successor.

    Rows or columns may lie in planes of children (``planes``); the block grid is laid over each plane on its
    own, so that a block never holds weights of two children of different number. A few weights inside a kept
    block may be removed too, where a non-zero count that no block divides demands it.

    Args:
        kept: bool ``[outputs, inputs]``, true where an edge exists.
        block: ``(bn, bk)``.
        planes: Planes along the outputs and along the inputs.
        bias: Whether outputs have a bias.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.
        device: As of ``nn.Linear``.
        dtype: As of ``nn.Linear``.

    Raises:
        ValueError: ``planes`` do not divide the sizes, or ``block`` is no pair of positive integers.
    """

    values: nn.Parameter
    block_mask: Tensor
    inside: Tensor | None
    rows: Tensor
    cols: Tensor

    def __init__(
        self,
        kept: Tensor,
        block: tuple[int, int],
        planes: tuple[int, int] = (1, 1),
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        outputs, inputs = kept.shape
        super().__init__(inputs, outputs, backend)
        self.block_shape = check_block("BlockLinear", block)
        self.planes = planes
        if outputs % planes[0] or inputs % planes[1]:
            raise ValueError(f"BlockLinear: planes {planes} must divide the weight's {outputs} x {inputs}")
        self._set_mask(kept.to(device=device))
        self.values = nn.Parameter(torch.empty(self.layout.values_shape, device=device, dtype=dtype))
        self.bias = self._make_bias(bias, device=device, dtype=dtype)
        self.reset_parameters(inputs)

    @property
    def layout(self) -> BlockLayout:
        """Where the kept blocks lie in the grid over the planes."""
        return BlockLayout(
            self._padded_shape(), self.block_shape, *(self.get_buffer(name) for name in BlockLayout._fields[2:])
        )

    def forward(self, x: Tensor) -> Tensor:
        """``y = x @ W.T + bias``, at the cost of the kept blocks."""
        if self.planes[1] > 1:
            x = self._pad_planes(x, -1, 1)
        size, padded = self._plane(0)
        if size == padded:
            return block_matmul(x, self._kept_values(), self.layout, self.bias, backend=self.backend)
        y = self._crop_planes(block_matmul(x, self._kept_values(), self.layout, backend=self.backend), -1, 0)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def wide_weight(self) -> Tensor:
        """The weight of the equivalent dense layer, ``[outputs, inputs]``."""
        return self._from_planes(self.layout.to_dense(self._kept_values()))

    def kept(self) -> Tensor:
        """Which entries of :meth:`wide_weight` exist."""
        inside = self.inside
        if inside is None:
            inside = self.values.new_ones(self.layout.values_shape, dtype=torch.bool)
        return self._from_planes(self.layout.to_dense(inside))

    @torch.no_grad()
    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask of whole blocks; see :meth:`ExpandedLinear.rewire`."""
        count = int(tiles(self._to_planes(kept), self.block_shape).flatten(2).any(-1).sum())
        if count != len(self.rows):
            raise ValueError(f"BlockLinear.rewire: expected a mask of {len(self.rows)} blocks, got {count}")
        tensors = (self.values.data, *followers)
        stay = self._to_planes(kept & self.kept())
        dense = [self.layout.to_dense(tensor) for tensor in tensors]
        self._set_mask(kept)
        for tensor, old in zip(tensors, dense, strict=True):
            tensor.copy_(self.layout.from_dense(torch.where(stay, old, 0)))

    @torch.no_grad()
    def clear_removed(self) -> None:
        """Sets the stored values of removed edges, and the padding of edge blocks, to zero."""
        self.set_wide_weight(self.wide_weight())

    @torch.no_grad()
    def set_wide_weight(self, weight: Tensor) -> None:
        """Takes the kept weights from a dense ``[outputs, inputs]``."""
        self.values.copy_(self.layout.from_dense(self._to_planes(torch.where(self.kept(), weight, 0))))

    def _kept_values(self) -> Tensor:
        if self.inside is None:
            return self.values
        return torch.where(self.inside, self.values, self.values.new_zeros(()))

    def _set_mask(self, kept: Tensor) -> None:
        """Lays out the blocks of a mask ``[outputs, inputs]``, and what is removed inside them."""
        kept_tiles = tiles(self._to_planes(kept), self.block_shape)
        self._set_topology(kept_tiles.flatten(2).any(-1))
        at = self.layout.rows.long(), self.layout.cols.long()
        real = tiles(self._to_planes(torch.ones_like(kept)), self.block_shape)[at]
        inside = kept_tiles[at]
        self.register_buffer("inside", None if torch.equal(inside, real) else inside)

    def _set_topology(self, block_mask: Tensor) -> None:
        layout = BlockLayout.from_mask(block_mask, self._padded_shape(), self.block_shape)
        self.register_buffer("block_mask", block_mask)
        for name, index in zip(BlockLayout._fields[2:], layout.tensors, strict=True):
            self.register_buffer(name, index, persistent=False)

    # Planes: [P * size] <-> [P * padded], so that the block grid starts anew in every plane.

    def _plane(self, axis: int) -> tuple[int, int]:
        """Size of a plane along the outputs (0) or the inputs (1), and that size padded to whole blocks."""
        size = (self.out_features, self.in_features)[axis] // self.planes[axis]
        return size, size if self.planes[axis] == 1 else size + -size % self.block_shape[axis]

    def _padded_shape(self) -> tuple[int, int]:
        return self.planes[0] * self._plane(0)[1], self.planes[1] * self._plane(1)[1]

    def _pad_planes(self, t: Tensor, dim: int, axis: int) -> Tensor:
        size, padded = self._plane(axis)
        if size == padded:
            return t
        t = t.movedim(dim, -1).unflatten(-1, (self.planes[axis], size))
        return pad(t, (0, padded - size)).flatten(-2).movedim(-1, dim)

    def _crop_planes(self, t: Tensor, dim: int, axis: int) -> Tensor:
        size, padded = self._plane(axis)
        if size == padded:
            return t
        t = t.movedim(dim, -1).unflatten(-1, (self.planes[axis], padded))
        return t[..., :size].flatten(-2).movedim(-1, dim)

    def _to_planes(self, wide: Tensor) -> Tensor:
        return self._pad_planes(self._pad_planes(wide, 0, 0), 1, 1)

    def _from_planes(self, padded: Tensor) -> Tensor:
        return self._crop_planes(self._crop_planes(padded, 0, 0), 1, 1)

    # The number of stored blocks belongs to the state, so that loading may change it.

    def _header(self) -> list[int]:
        return [*super()._header(), *self.block_shape, *self.planes]

    @classmethod
    def _empty(cls, header: list[int], own: Mapping[str, Tensor]) -> ExpandedLinear:
        inputs, outputs, bn, bk, *planes = header[2:]
        kept = torch.ones(outputs, inputs, dtype=torch.bool, device=own["values"].device)
        factory = {"device": kept.device, "dtype": own["values"].dtype}
        return cls(kept, (bn, bk), (planes[0], planes[1]), "bias" in own, **factory)  # type: ignore[arg-type]

    def _expected_tensors(self) -> dict[str, list[int]]:
        expected = super()._expected_tensors()
        expected.pop("inside", None)
        del expected["values"]
        return expected

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Raises unless the state fits, block mask included; see :meth:`ExpandedLinear.check_state`."""
        super().check_state(state, prefix)
        block_mask = state[f"{prefix}block_mask"]
        _expect(f"{prefix}block_mask", block_mask.dtype, torch.bool)
        shape = [int(block_mask.sum()), *self.block_shape]
        values, inside = state.get(f"{prefix}values"), state.get(f"{prefix}inside")
        _expect(f"{prefix}values", list(values.shape) if isinstance(values, Tensor) else values, shape)
        if inside is not None:
            _expect(f"{prefix}inside", (list(inside.shape), inside.dtype), (shape, torch.bool))

    def _adopt_topology(self, state: Mapping[str, Any], prefix: str) -> None:
        device = self.block_mask.device
        incoming = state[f"{prefix}block_mask"].to(device)
        if not torch.equal(incoming, self.block_mask):
            self._set_topology(incoming.clone())
            shape = self.layout.values_shape
            self.values = nn.Parameter(self.values.new_empty(shape), self.values.requires_grad)
        inside = state.get(f"{prefix}inside")
        self.register_buffer("inside", None if inside is None else inside.to(device).clone())

    def _repr_details(self) -> str:
        return f"block={self.block_shape}, blocks={len(self.rows)} of {self.block_mask.numel()}, "


KINDS = (SplitLinear, MergeLinear, MaskedLinear, BlockLinear)
"""The layers, numbered as in the state dict's header: append only."""


def _expect(name: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise ValueError(f"state dict: '{name}' should be {wanted}, got {got}")
