"""Layers stored as the weights of their parent's edges and the labels of these."""

from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fpe.kernels import (
    HOLE,
    Bitmap,
    PackedLabels,
    SeededHoles,
    SeededLabels,
    SemiStructuredLayout,
    merge_matmul,
    semi_structured_compress,
    semi_structured_matmul,
    split_matmul,
    unpack_values,
)
from fpe.kernels.bitmap.existence import Kept
from fpe.kernels.memo import once_per_version
from fpe.kernels.partition.eager import table
from fpe.kernels.partition.interleaved import quad_codes
from fpe.kernels.partition.labels import digits, row_bytes
from fpe.kernels.partition.seeded import SEEDS, TURNED, VERSION, VERSIONS
from fpe.kernels.structures import SEEDED, STRUCTURES, TWO_FOUR

from ..partition import RULES, Partition, seeded_labels
from .base import check_known
from .dense_form import masked_copy
from .kept import KeptLinear, stored_shape
from .state import Header, to_bits, to_words

Labels = PackedLabels | SeededLabels
Labelled = TypeVar("Labelled", bound="_LabelledLinear")


class _LabelledLinear(KeptLinear):
    """A layer stored as the weights of its parent's edges and the labels of these, packed into bits.

    ``edge_weight`` is the parent's weight ``[N, K]``. If some edges do not exist, it is ``[nnz]``, the weights of the
    others.
    """

    STORED: ClassVar[tuple[str, ...]] = ("packed", "bitmap")
    AXIS: ClassVar[int]
    """Where children lie side by side in the wide weight: along its outputs (0) or its inputs (1)."""
    packed: Labels
    """The labels as the operations take them; at positions without an edge they have no meaning."""

    def __init__(
        self,
        partition: Partition,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        if not isinstance(partition, Partition):
            raise TypeError(f"{name}: partition must be an fpe.Partition, got {type(partition).__name__}")
        check_known(name, "the partition's labels", partition.labels, torch.uint8)
        sizes = list(partition.shape)
        sizes[self.AXIS] *= partition.alpha
        super().__init__(sizes[1], sizes[0], backend)
        self.alpha = partition.alpha
        self.structure = partition.structure
        self.block_shape = partition.block_shape
        self._build(stored_shape(self._mask_of(partition)), bias, partition, device=device, dtype=dtype)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the parent's weight."""
        return self.packed.sizes

    @property
    def planes(self) -> tuple[int, int]:
        """Planes of children along the outputs and along the inputs: ``alpha`` along one of them."""
        return (1, self.alpha) if self.AXIS else (self.alpha, 1)

    @property
    def unit(self) -> tuple[int, int]:
        """``(bn, bk)`` of what the structure has as a whole: a tile, a quad or a single edge."""
        return self.block_shape or RULES[self.structure].unit

    @property
    def labels(self) -> Tensor:
        """The labels unpacked, uint8 of the parent's shape; ``HOLE`` (255) where no child owns the edge."""
        labels = table(self.packed, self._topology_device)
        return labels if self.bitmap is None else labels.masked_fill(~self._exists(), HOLE)

    def _exists(self) -> Tensor:
        """Which positions hold an edge, where some hold none."""
        kept = self.bitmap
        assert kept is not None
        return kept.unpack(self._topology_device) if isinstance(kept, SeededHoles) else kept.unpack()

    @property
    def partition(self) -> Partition:
        """Who owns each edge."""
        seed = self.packed.seed if isinstance(self.packed, SeededLabels) else None
        kept = self.bitmap.per_row if isinstance(self.bitmap, SeededHoles) else None
        turned = seed is not None and self.packed.transposed
        return Partition(self.labels, self.alpha, self.structure, self.block_shape, seed, kept, turned)

    def product(self, x: Tensor, weight: Tensor, labels: Labels, kept: Kept | None, bias: Tensor | None) -> Tensor:
        """The layer's function of an input, with operands that are the layer's own or a process's part of them."""
        raise NotImplementedError

    def _multiply(self, x: Tensor) -> Tensor:
        weight = self.edge_weight
        return self.product(x, weight, self._beside(weight, self.packed), self._beside(weight, self.bitmap), self.bias)

    def _children_weights(self) -> Tensor:
        """The weight of each child, ``[alpha, *partition.shape]``, zero at the edges of others."""
        weight = self.matrix()
        return torch.where(self._beside(weight, self.partition.masks()), weight, weight.new_zeros(()))

    def masked_copy(self) -> Tensor:
        """:meth:`wide_weight`, quicker."""
        return masked_copy(self, self.AXIS, self.alpha) if self.bitmap is None else super().masked_copy()

    def places(self) -> Tensor:
        """The position of each stored weight in the flattened :meth:`wide_weight`: in the plane of its child."""
        rows, columns = self._mask_of(self.partition).nonzero(as_tuple=True)
        child, (n, k) = self.labels[rows, columns].long(), self.matrix_shape
        return (rows * self.alpha + child if self.AXIS else child * n + rows) * k + columns

    def wide_weight(self) -> Tensor:
        """The weight of the equivalent dense layer, ``[out_features, in_features]``."""
        return self._side_by_side(self._children_weights())

    def kept(self) -> Tensor:
        """Which entries of :meth:`wide_weight` exist."""
        return self._side_by_side(self.partition.masks())

    @torch.no_grad()
    def set_wide_weight(self, weight: Tensor) -> None:
        """Takes the weights of the kept edges from a dense weight ``[out_features, in_features]``."""
        self._check_weight("set_wide_weight", weight, (self.out_features, self.in_features))
        masks = self.partition.masks()
        self.set_matrix(torch.where(masks, self._children(weight), weight.new_zeros(())).sum(0))

    @torch.no_grad()
    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask; see :meth:`ExpandedLinear.rewire`."""
        owners = self._children(kept)
        labels = torch.where(owners.any(0), owners.to(torch.uint8).argmax(0), HOLE).to(torch.uint8)
        own = self.partition
        old, new = own.labels, replace(own, labels=labels).validate()
        if not torch.equal(new.masks(), owners):
            raise ValueError(f"{type(self).__name__}.rewire: expected every edge at one child at most")
        self._moved(labels == old, new, int((labels != HOLE).sum()), (self.edge_weight, *followers))

    def _children(self, wide: Tensor) -> Tensor:
        """A wide weight or its mask, child by child: ``[alpha, *partition.shape]``."""
        return wide.unflatten(self.AXIS, (self.alpha, -1)).movedim(self.AXIS, 0)

    def _side_by_side(self, children: Tensor) -> Tensor:
        return children.movedim(0, self.AXIS).flatten(self.AXIS, self.AXIS + 1)

    def may_hold(self) -> Tensor | None:
        """With labels of a seed, an edge may only be at the child that the seed says; others allow every place."""
        if not isinstance(self.packed, SeededLabels):
            return None
        children = torch.arange(self.alpha, device=self._topology_device)[:, None, None]
        return self._side_by_side(self.packed.unpack(self._topology_device) == children)

    def _set_topology(self, topology: Partition) -> None:
        self.bitmap = None
        if topology.seed is not None:
            self.packed = seeded_labels(topology.seed, topology.shape, self.alpha, topology.turned)
            version = TURNED if topology.turned else VERSION
            number = topology.seed + (version + (topology.kept or 0) * VERSIONS) * SEEDS
            words, mask = torch.tensor([number], dtype=torch.int64, device="cpu"), self._mask_of(topology)
            if topology.kept is not None:
                self.bitmap = SeededHoles.of(topology.seed, topology.shape, topology.kept)
            elif not bool(mask.all()):
                if topology.turned:
                    name = type(self).__name__
                    raise ValueError(f"{name}: of a seed's labels that are turned every position must hold an edge")
                self.bitmap = Bitmap.pack(mask)
                words = torch.cat([words, to_words(mask)])
            self._topology_is(words)
            return
        with_holes = self.packed = PackedLabels.pack(topology.labels, self.alpha)  # as the state dict has them
        if with_holes.has_holes:
            self.packed = PackedLabels.pack(self._without_holes(topology.labels), self.alpha)
            self.bitmap = Bitmap.pack(self._mask_of(topology))
        self._topology_is(to_words(with_holes.planes))

    def _without_holes(self, labels: Tensor) -> Tensor:
        """Returns labels with some child at every hole; it does not matter which, since the bitmap says what exists."""
        return labels.masked_fill(labels == HOLE, 0)

    @classmethod
    def _mask_of(cls, topology: Partition) -> Tensor:
        return topology.labels != HOLE

    def _header(self) -> Header:
        structure = (STRUCTURES.index(self.structure), *(self.block_shape or (0, 0)))
        return super()._header()._replace(settings=(self.alpha, *structure))

    @classmethod
    def _parse(cls, header: Header, words: Tensor) -> Partition:
        alpha, structure, bn, bk = header.settings
        if alpha < 1 or not 0 <= structure < len(STRUCTURES):
            raise ValueError(f"alpha = {alpha} and structure {structure} are unknown")
        sizes = [header.out_features, header.in_features]
        sizes[cls.AXIS] //= alpha
        n, k = sizes
        if STRUCTURES[structure] == SEEDED:
            number, seed = divmod(int(words[0]), SEEDS) if len(words) else (0, 0)
            kept, version = divmod(number, VERSIONS)
            if version not in (VERSION, TURNED):
                raise ValueError(
                    f"expected a seed of version {VERSION} or {TURNED} of the labels' function, got "
                    f"{words[:1].tolist()}"
                )
            if len(words) == 1:
                return Partition.seeded(n, k, alpha, seed, kept or None, version == TURNED)
            mask, more = to_bits(words[1:], n, k)
            if len(more):
                raise ValueError(f"expected a seed and bits of {n} x {k} edges, got {len(more)} words more")
            return Partition.seeded(n, k, alpha, seed, turned=version == TURNED).without(~mask)
        planes, left = divmod(8 * len(words), n * row_bytes(k))
        if left or planes not in (digits(alpha), digits(alpha) + 1):
            raise ValueError(f"expected {digits(alpha)} planes of labels, or one more, of {n} x {k} edges")
        packed = PackedLabels(words.view(torch.uint8).view(planes, n, row_bytes(k)), (n, k), alpha)
        return Partition(packed.unpack(), alpha, STRUCTURES[structure], (bn, bk) if bn else None).validate()

    @classmethod
    def _of(cls: type[Labelled], header: Header, topology: Partition, bias: bool, **factory: Any) -> Labelled:
        return cls(topology, bias, **factory)

    def _repr_details(self) -> str:
        return f"alpha={self.alpha}, structure={self.structure}, "


def _compress(weight: Tensor, codes: Tensor, sizes: tuple[int, int], backend: str, *bitmap: Any) -> Tensor:
    """The values of two children: from a parent's weight, or from its kept values and their bitmap."""
    dense = unpack_values(weight, Bitmap(*bitmap)) if bitmap else weight
    return semi_structured_compress(dense, SemiStructuredLayout(sizes, codes, None, 2), backend=backend)


_compress_once = once_per_version(_compress)


class SplitLinear(_LabelledLinear):
    """An expanded layer: ``alpha`` children per parent, each with the edges that its label gives it.

    Input ``[..., inputs]``, output ``[..., alpha * parents]`` in planes of children. ``edge_weight`` is the parent's
    weight ``[parents, inputs]``. If some edges do not exist, it is ``[nnz]``: the weights of the others, by rows.

    With the 2:4 structure, on a GPU or with a backend other than ``"auto"``, ``"eager"`` and ``"cpu"``, the layer runs
    :func:`fpe.kernels.semi_structured_matmul`. The children's values are then compressed in every forward in training,
    and once for each version of the weight without gradients.

    Args:
        partition: Who owns each edge of the parent, labels ``[parents, inputs]``.
        bias: Whether every output has a bias.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"eager"``; with two children of a seed also
            ``"sparse_tensor_core"``, and with the 2:4 structure also ``"sparse_tensor_core"`` or ``"torch"``.
        device: As in ``nn.Linear``.
        dtype: As in ``nn.Linear``.

    Raises:
        TypeError: ``partition`` is not a :class:`fpe.Partition`.
        ValueError: Its labels are on ``"meta"``.

    Example:
        >>> layer = fpe.SplitLinear(fpe.Partition.random(8, 16, alpha=2))
        >>> layer(torch.ones(3, 16)).shape
        torch.Size([3, 16])
    """

    KIND = 0
    AXIS = 0

    @property
    def exchanges(self) -> bool:
        """Whether the structure is 2:4."""
        return self.structure == TWO_FOUR

    def _without_holes(self, labels: Tensor) -> Tensor:
        """Returns labels that give each child two of every four: then they alone say where the values of a quad are."""
        if not self.exchanges:
            return super()._without_holes(labels)
        quads = labels.unflatten(1, (-1, 4))
        holes = quads == HOLE
        short = 2 - (quads == 0).sum(-1, keepdim=True)  # what the first child lacks
        second = (holes.cumsum(-1) > short).to(labels.dtype)
        return torch.where(holes, second, quads).flatten(1)

    def product(self, x: Tensor, weight: Tensor, labels: Labels, kept: Kept | None, bias: Tensor | None) -> Tensor:
        """``y[..., a * parents + n] = sum_k x[..., k] * w[n, k] * (labels[n, k] == a) + bias[a * parents + n]``."""
        bias = None if bias is None else bias.view(self.alpha, -1)
        by_labels = self.backend == "cpu" or (self.backend in ("auto", "eager") and not x.is_cuda)
        if self.exchanges and not by_labels:
            assert isinstance(labels, PackedLabels)  # a 2:4 layer's
            trains = torch.is_grad_enabled() and weight.requires_grad
            compress = _compress if trains or torch.compiler.is_compiling() else _compress_once
            quads = SemiStructuredLayout(labels.shape, quad_codes(labels.planes, labels.shape[1]), None, 2)
            values = compress(weight, quads.codes, quads.shape, self.backend, *(kept or ()))
            return semi_structured_matmul(x, values, quads, bias, backend=self.backend).flatten(-2)
        return split_matmul(x, weight, labels, self.alpha, bias, kept=kept, backend=self.backend).flatten(-2)


class MergeLinear(_LabelledLinear):
    """The successor of an expanded layer in which every parent edge reads exactly one child.

    Input ``[..., alpha * parents]`` in planes of children, output ``[..., outputs]``. ``edge_weight`` is the parent's
    weight ``[outputs, parents]``. If some edges do not exist, it is ``[nnz]``: the weights of the others, by rows.

    With two or four children it can run as a 2:4 weight, whatever the labels are, unless they are of a seed. On a GPU
    ``"auto"`` does that where it is predicted to be fastest.

    Args:
        partition: Which child each edge reads, labels ``[outputs, parents]``.
        bias: Whether every output has a bias.
        backend: ``"auto"``, ``"triton"``, ``"cpu"``, ``"eager"``, ``"sparse_tensor_core"`` or ``"torch"``.
        device: As in ``nn.Linear``.
        dtype: As in ``nn.Linear``.

    Raises:
        TypeError: ``partition`` is not a :class:`fpe.Partition`.
        ValueError: Its labels are on ``"meta"``.

    Example:
        >>> layer = fpe.MergeLinear(fpe.Partition.random(4, 8, alpha=2))
        >>> layer(torch.ones(3, 16)).shape
        torch.Size([3, 4])
    """

    KIND = 1
    AXIS = 1

    def _fan_in(self) -> int:
        return self.in_features // self.alpha

    def product(self, x: Tensor, weight: Tensor, labels: Labels, kept: Kept | None, bias: Tensor | None) -> Tensor:
        """``y[..., n] = sum_k z[..., labels[n, k] * parents + k] * w[n, k] + bias[n]``."""
        planes = x.unflatten(-1, (self.alpha, labels.sizes[1]))
        return merge_matmul(planes, weight, labels, bias, kept=kept, backend=self.backend)
