"""Who owns each edge of a parent layer: the labels that divide its weights among the children."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from fpe.kernels import HOLE, SeededHoles, SeededLabels
from fpe.kernels.block.layout import grid, tiles
from fpe.kernels.checks import check_tensor
from fpe.kernels.partition.seeded import SEEDS
from fpe.kernels.structures import BLOCK, RANDOM, SEEDED, STRUCTURES, TWO_FOUR, Structure

_CHUNK = 1 << 24  # keys drawn at a time: bounds the working memory of large layers


@dataclass(frozen=True, eq=False)
class Partition:
    """Divides a parent layer's edges among ``alpha`` children per neuron (paper, section 2.3).

    Build one with :meth:`random`, :meth:`from_groups`, :meth:`from_gram`, :meth:`semi_structured`,
    :meth:`block` or :meth:`seeded`; labels of your own go through the constructor and :meth:`validate`.

    Attributes:
        labels: uint8 ``[out_features, in_features]``; ``labels[n, k]`` is the child of parent ``n`` that owns
            the edge from input ``k``, or ``HOLE`` (255) where the edge has been pruned.
        alpha: Children per parent, from 2 to 254.
        structure: ``"random"`` (any label anywhere), ``"2:4"`` (two of every four consecutive inputs to each
            of two children), ``"block"`` (one label to a tile) or ``"seeded"`` (a function of a seed).
        block_shape: ``(bn, bk)`` of structure ``"block"``, else ``None``.
        seed: The seed of structure ``"seeded"``, else ``None``. It says which child owns an edge; some edges may be
            pruned nevertheless (``HOLE``).
        kept: Number of edges of each parent, if the seed of structure ``"seeded"`` also says which edges exist; else
            ``None``.
        turned: With structure ``"seeded"``: whether the outputs of each input are divided among the children, instead
            of the inputs of each output.

    Example:
        >>> partition = fpe.Partition.random(2, 8, 2, generator=torch.Generator().manual_seed(0))
        >>> partition
        Partition(2x8, alpha=2, random)
        >>> partition.masks().sum(-1)  # edges of each child of each parent
        tensor([[4, 4],
                [4, 4]])
    """

    labels: Tensor
    alpha: int
    structure: Structure = "random"
    block_shape: tuple[int, int] | None = None
    seed: int | None = None
    kept: int | None = None
    turned: bool = False

    def __post_init__(self) -> None:
        """Checks what can be checked without reading the labels."""
        if not isinstance(self.labels, Tensor) or self.labels.dtype != torch.uint8:
            got = getattr(self.labels, "dtype", type(self.labels).__name__)
            raise TypeError(f"Partition: labels must be a uint8 tensor, got {got}")
        if self.labels.dim() != 2:
            raise ValueError(f"Partition: labels must be [out_features, in_features], got {list(self.labels.shape)}")
        _check_alpha(self.alpha)
        if self.structure not in STRUCTURES:
            raise ValueError(f"Partition: structure must be one of {STRUCTURES}, got {self.structure!r}")
        if (self.structure == BLOCK) != (self.block_shape is not None):
            raise ValueError(
                f"Partition: block_shape belongs to structure 'block' alone, got {self.block_shape} with "
                f"{self.structure!r}"
            )
        if (self.structure == SEEDED) != (self.seed is not None):
            raise ValueError(
                f"Partition: a seed belongs to structure 'seeded' alone, got {self.seed} with {self.structure!r}"
            )
        if self.kept is not None and self.seed is None:
            raise ValueError(f"Partition: kept needs a seed, got kept = {self.kept} without one")
        if self.turned and (self.seed is None or self.kept is not None):
            raise ValueError(
                f"Partition: labels of a seed alone can be turned, without its holes, got seed = {self.seed} and "
                f"kept = {self.kept}"
            )

    @classmethod
    def random(
        cls, out_features: int, in_features: int, alpha: int, *, generator: Generator | None = None
    ) -> "Partition":
        """Deals each parent's inputs to its children at random, equally (paper, section 2.3).

        Where ``alpha`` does not divide ``in_features`` the children's shares differ by one; which child gets
        more differs from parent to parent.

        Args:
            out_features: Parents ``N``.
            in_features: Inputs ``K``, at least ``alpha``.
            alpha: Children per parent.
            generator: Source of randomness (CPU); ``None`` uses PyTorch's default.

        Raises:
            ValueError: A size is out of range.
        """
        _check_sizes(out_features, in_features, alpha)
        return cls(deal(out_features, in_features, alpha, generator), alpha)

    @classmethod
    def from_groups(
        cls, groups: Sequence[int] | Tensor, out_features: int, alpha: int, *, generator: Generator | None = None
    ) -> "Partition":
        """Keeps groups of inputs together: the paper's clause split (section 2.2.1) and feature split.

        All inputs of a group go to the same child of a parent; which child it is differs from parent to
        parent. Children of a parent get equally many groups, as far as the counts divide.

        Args:
            groups: Group of each input, ``[in_features]`` integers; any values.
            out_features: Parents ``N``.
            alpha: Children per parent, at most the number of groups.
            generator: Source of randomness (CPU).

        Raises:
            TypeError: ``groups`` are not integers.
            ValueError: ``groups`` is not one-dimensional, or has fewer groups than ``alpha``.
        """
        groups = groups.cpu() if isinstance(groups, Tensor) else torch.as_tensor(groups, device="cpu")
        if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
            raise TypeError(f"from_groups: groups must be integers, got {groups.dtype}")
        if groups.dim() != 1 or not len(groups):
            raise ValueError(f"from_groups: groups must be a list over inputs, got shape {list(groups.shape)}")
        _check_sizes(out_features, len(groups), alpha)
        names, index = groups.unique(return_inverse=True)
        if len(names) < alpha:
            raise ValueError(
                f"from_groups: {alpha} children of a neuron need at least {alpha} groups of inputs, got {len(names)}"
            )
        dealt = deal(out_features, len(names), alpha, generator)
        return cls(dealt[:, index].contiguous(), alpha)

    @classmethod
    def from_gram(
        cls, weight: Tensor, alpha: int, *, clusters: int | None = None, generator: Generator | None = None
    ) -> "Partition":
        """Groups inputs that the layer uses alike (the paper's feature-based split, section 2.3).

        The rows of the Gram matrix ``G = W.T @ W`` are clustered (scikit-learn's k-means); clusters are then
        groups as in :meth:`from_groups`.

        Args:
            weight: The parent's trained weight ``[out_features, in_features]``.
            alpha: Children per parent.
            clusters: Number of clusters, from ``alpha`` to ``in_features``. Default: a quarter of the inputs (four to a
                cluster, as in the clauses of the Boolean task), at least ``alpha`` and at most 256.
            generator: Source of randomness (CPU).

        Raises:
            ImportError: scikit-learn is not installed.
            TypeError: ``weight`` is not floating point.
            ValueError: ``weight`` is not a finite matrix, or ``clusters`` is out of range.
        """
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            got = getattr(weight, "dtype", type(weight).__name__)
            raise TypeError(f"from_gram: weight must be a floating-point tensor, got {got}")
        if weight.is_meta:
            raise ValueError("from_gram: weight is on 'meta' and has no values to cluster")
        if weight.dim() != 2 or not bool(weight.isfinite().all()):
            got = "NaN or infinity in it" if weight.dim() == 2 else f"shape {list(weight.shape)}"
            raise ValueError(f"from_gram: weight must be a finite matrix, got {got}")
        out_features, in_features = weight.shape
        _check_sizes(out_features, in_features, alpha)
        if clusters is None:
            clusters = min(max(alpha, in_features // 4), 256)
        if not alpha <= clusters <= in_features:
            raise ValueError(f"from_gram: clusters must be from {alpha} to {in_features}, got {clusters}")
        groups = _cluster(weight.detach().to("cpu", torch.float64), clusters, generator)
        return cls.from_groups(groups, out_features, alpha, generator=generator)

    @classmethod
    def semi_structured(cls, out_features: int, in_features: int, *, generator: Generator | None = None) -> "Partition":
        """Gives two of every four consecutive inputs to each of two children, at random (2:4).

        Args:
            out_features: Parents ``N``.
            in_features: Inputs ``K``, a multiple of 4.
            generator: Source of randomness (CPU).

        Raises:
            ValueError: ``in_features`` is not a multiple of 4.
        """
        _check_sizes(out_features, in_features, 2)
        if in_features % 4:
            raise ValueError(f"semi_structured: in_features must be a multiple of 4, got {in_features}")
        quads = deal(out_features * in_features // 4, 4, 2, generator)
        return cls(quads.view(out_features, in_features), 2, TWO_FOUR)

    @classmethod
    def block(
        cls,
        out_features: int,
        in_features: int,
        alpha: int,
        *,
        block: tuple[int, int],
        generator: Generator | None = None,
    ) -> "Partition":
        """Deals whole ``bn x bk`` tiles to the children; each row of tiles is shared out equally.

        Args:
            out_features: Parents ``N``.
            in_features: Inputs ``K``.
            alpha: Children per parent, at most the number of tiles along ``K``.
            block: ``(bn, bk)``. Tiles at the lower and right edges may be smaller.
            generator: Source of randomness (CPU).

        Raises:
            ValueError: ``block`` is not a pair of positive integers, or a row has fewer tiles than ``alpha``.
        """
        _check_sizes(out_features, in_features, alpha)
        bn, bk = check_block("Partition.block", block)
        rows, columns = grid((out_features, in_features), (bn, bk))
        if columns < alpha:
            raise ValueError(
                f"Partition.block: {alpha} children of a neuron need at least {alpha} tiles in a row, got {columns} of "
                f"width {bk} over {in_features} inputs"
            )
        dealt = deal(rows, columns, alpha, generator)
        labels = dealt.repeat_interleave(bn, 0).repeat_interleave(bk, 1)
        return cls(labels[:out_features, :in_features].contiguous(), alpha, BLOCK, (bn, bk))

    @classmethod
    def seeded(
        cls,
        out_features: int,
        in_features: int,
        alpha: int,
        seed: int,
        kept: int | None = None,
        turned: bool = False,
    ) -> "Partition":
        """Divides by a function of a seed (:class:`fpe.kernels.SeededLabels`), so that no label is stored.

        Each child gets one of every ``alpha`` consecutive inputs; a hash says which one.

        Args:
            out_features: Parents ``N``.
            in_features: Inputs ``K``, at least ``alpha`` unless ``turned``.
            alpha: Children per parent: 2, 4 or 8.
            seed: 0 to 2^32 - 1. The same seed always gives the same labels, on every device.
            kept: Number of edges that each parent keeps, chosen by the seed too
                (:class:`fpe.kernels.SeededHoles`); ``None`` keeps all.
            turned: Whether each child gets one of every ``alpha`` consecutive outputs of an input instead. These are
                the labels of the transposed weight.

        Raises:
            TypeError: ``seed`` is not an integer.
            ValueError: A number is out of range.
        """
        _check_sizes(out_features, in_features, alpha, turned)
        shape = out_features, in_features
        labels = seeded_labels(seed, shape, alpha, turned).unpack("cpu")
        if kept is not None:
            labels.masked_fill_(~SeededHoles.of(seed, shape, kept).unpack("cpu"), HOLE)
        return cls(labels, alpha, SEEDED, seed=seed, kept=kept, turned=turned)

    @classmethod
    def of(
        cls,
        structure: Structure,
        out_features: int,
        in_features: int,
        alpha: int,
        *,
        block: tuple[int, int] | None = None,
        generator: Generator | None = None,
    ) -> "Partition":
        """Deals the edges at random in a structure that is given by its name.

        Args:
            structure: ``"random"``, ``"2:4"``, ``"block"`` or ``"seeded"``, whose seed is drawn from the generator.
            out_features: Parents ``N``.
            in_features: Inputs ``K``.
            alpha: Children per parent.
            block: ``(bn, bk)``, for structure ``"block"``.
            generator: Source of randomness (CPU).

        Raises:
            ValueError: The structure is unknown, a size is out of range, or the structure cannot have it.
        """
        if structure not in RULES:
            raise ValueError(f"Partition: structure must be one of {STRUCTURES}, got {structure!r}")
        _check_alpha(alpha)
        return RULES[structure].deal(out_features, in_features, alpha, block, generator)

    @property
    def unit(self) -> tuple[int, int]:
        """``(bn, bk)`` of what policy ``"input"`` removes as a whole: a tile, a quad ``(1, 4)``, or a single edge."""
        return self.block_shape or RULES[self.structure].unit

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of the parent."""
        return self.labels.shape[0], self.labels.shape[1]

    def masks(self) -> Tensor:
        """Each child's mask, bool ``[alpha, out_features, in_features]``: disjoint, together all edges that exist."""
        children = torch.arange(self.alpha, device=self.labels.device, dtype=torch.uint8)
        return self.labels == children[:, None, None]

    def without(self, removed: Tensor) -> "Partition":
        """Returns the same division in which no child owns the removed edges.

        Args:
            removed: bool ``[out_features, in_features]``.

        Raises:
            TypeError: ``removed`` is not a bool tensor.
            ValueError: It has another shape.
        """
        check_tensor("Partition.without", "removed", removed, self.shape, dtype=torch.bool)
        return replace(self, labels=self.labels.masked_fill(removed, HOLE), kept=None)

    def to(self, device: torch.device | str) -> "Partition":
        """The same division with its labels on a device."""
        return replace(self, labels=self.labels.to(device))

    def validate(self) -> "Partition":
        """Reads the labels and checks range and structure; returns the partition.

        Raises:
            ValueError: A label names no child and is not ``HOLE``; a tile holds two labels; a group of four
                gives a child more than two inputs; a label is not that of the seed. The message names the first place.
        """
        labels = self.labels
        foreign = (labels >= self.alpha) & (labels != HOLE)
        if bool(foreign.any()):
            n, k = foreign.nonzero()[0].tolist()
            raise ValueError(
                f"Partition: labels[{n}, {k}] is {int(labels[n, k])}; expected 0 .. {self.alpha - 1} or {HOLE}"
            )
        RULES[self.structure].check(self)
        return self

    def __repr__(self) -> str:
        block = f", block={self.block_shape}" if self.block_shape else ""
        out_features, in_features = self.shape
        seed = "" if self.seed is None else f", seed={self.seed}"
        seed += "" if self.kept is None else f", kept={self.kept}"
        seed += ", turned" if self.turned else ""
        return f"Partition({out_features}x{in_features}, alpha={self.alpha}, {self.structure}{block}{seed})"


@dataclass(frozen=True)
class Rules:
    """What is particular to a structure.

    Attributes:
        deal: Draws a partition, from outputs, inputs, ``alpha``, ``block`` and a generator.
        check: Raises ``ValueError`` if the labels of a partition do not have the structure.
        unit: ``(bn, bk)`` of what policy ``"input"`` removes as a whole, if the partition has no blocks.
    """

    deal: Callable[[int, int, int, tuple[int, int] | None, Generator | None], Partition]
    check: Callable[[Partition], None] = lambda partition: None
    unit: tuple[int, int] = (1, 1)


def _check_quads(partition: Partition) -> None:
    if partition.alpha != 2 or partition.shape[1] % 4:
        raise ValueError(
            f"Partition: structure {TWO_FOUR!r} needs alpha = 2 and inputs in fours, got alpha = {partition.alpha} and "
            f"{partition.shape[1]} inputs"
        )
    crowded = (partition.masks().unflatten(-1, (-1, 4)).sum(-1) > 2).any(0)
    if bool(crowded.any()):
        n, quad = crowded.nonzero()[0].tolist()
        raise ValueError(f"Partition: not 2:4, row {n} gives a child more than two inputs in quad {quad}")


def _check_tiles(partition: Partition) -> None:
    assert partition.block_shape is not None
    present = torch.stack([tiles(mask, partition.block_shape).flatten(2).any(-1) for mask in partition.masks()])
    mixed = present.sum(0) > 1
    if bool(mixed.any()):
        r, c = mixed.nonzero()[0].tolist()
        raise ValueError(f"Partition: tile ({r}, {c}) of {partition.block_shape} belongs to several children")


def _deal_quads(
    out_features: int, in_features: int, alpha: int, block: tuple[int, int] | None, generator: Generator | None
) -> Partition:
    if alpha != 2:
        raise ValueError(f"Partition: structure {TWO_FOUR!r} has two children per neuron, got alpha = {alpha!r}")
    return Partition.semi_structured(out_features, in_features, generator=generator)


def _deal_tiles(
    out_features: int, in_features: int, alpha: int, block: tuple[int, int] | None, generator: Generator | None
) -> Partition:
    return Partition.block(out_features, in_features, alpha, block=check_block("Partition", block), generator=generator)


def _deal_seeded(
    out_features: int, in_features: int, alpha: int, block: tuple[int, int] | None, generator: Generator | None
) -> Partition:
    check_generator("Partition", generator)
    seed = int(torch.randint(SEEDS, (), generator=generator, device="cpu"))
    return Partition.seeded(out_features, in_features, alpha, seed)


def _check_seeded(partition: Partition) -> None:
    assert partition.seed is not None
    (n, k), kept = partition.shape, partition.kept
    made = Partition.seeded(n, k, partition.alpha, partition.seed, kept, partition.turned).labels
    made = made.to(partition.labels.device)
    other = (partition.labels != made) & (partition.labels != HOLE)
    if partition.kept is not None:
        other |= (partition.labels == HOLE) != (made == HOLE)
    other = other.nonzero()
    if len(other):
        n, k = other[0].tolist()
        raise ValueError(
            f"Partition: labels[{n}, {k}] is {int(partition.labels[n, k])}, of seed {partition.seed} it "
            f"is {int(made[n, k])}"
        )


RULES: dict[Structure, Rules] = {
    RANDOM: Rules(lambda n, k, alpha, block, generator: Partition.random(n, k, alpha, generator=generator)),
    TWO_FOUR: Rules(_deal_quads, _check_quads, (1, 4)),
    BLOCK: Rules(_deal_tiles, _check_tiles),
    SEEDED: Rules(_deal_seeded, _check_seeded),
}
"""What is particular to each structure: its one place in this package, beside its name."""


def check_block(op: str, block: object) -> tuple[int, int]:
    """Returns ``(bn, bk)`` if ``block`` is a pair of positive integers, else raises ``ValueError``."""
    if (
        not isinstance(block, Sequence)
        or len(block) != 2
        or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in block)
    ):
        raise ValueError(f"{op}: block must be a pair (bn, bk) of positive integers, got {block!r}")
    return block[0], block[1]


def check_generator(op: str, generator: object) -> None:
    """Raises unless ``generator`` is a source of randomness on the CPU, or ``None``."""
    if generator is None:
        return
    if not isinstance(generator, Generator):
        raise TypeError(
            f"{op}: generator must be a torch.Generator or None, got {type(generator).__name__}; from a seed: "
            "torch.Generator().manual_seed(seed)"
        )
    if generator.device.type != "cpu":
        raise ValueError(f"{op}: generator must be on the CPU, got {generator.device}")


def _check_alpha(alpha: object) -> None:
    if not isinstance(alpha, int) or isinstance(alpha, bool) or not 2 <= alpha < HOLE:
        raise ValueError(f"Partition: alpha must be an integer from 2 to {HOLE - 1}, got {alpha!r}")


def seeded_labels(seed: int, shape: tuple[int, int], alpha: int, turned: bool) -> SeededLabels:
    """The labels of a seed for a weight of shape ``[N, K]``; if ``turned``, the transposed ones of ``[K, N]``."""
    return SeededLabels.of(seed, shape[::-1], alpha).T if turned else SeededLabels.of(seed, shape, alpha)


def _check_sizes(out_features: int, in_features: int, alpha: int, turned: bool = False) -> None:
    _check_alpha(alpha)
    for name, size in (("out_features", out_features), ("in_features", in_features)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"Partition: {name} must be a positive integer, got {size!r}")
    if in_features < alpha and not turned:
        raise ValueError(f"Partition: {alpha} children of a neuron need at least {alpha} inputs, got {in_features}")


def deal(rows: int, cards: int, alpha: int, generator: Generator | None) -> Tensor:
    """Deals ``cards`` to ``alpha`` hands in every row at random: uint8 labels ``[rows, cards]``.

    Hands differ by at most one card. Each row draws again which hands get one more.
    """
    check_generator("Partition", generator)
    labels = torch.empty(rows, cards, dtype=torch.uint8, device="cpu")
    step = max(1, _CHUNK // max(cards, 1))
    for part in labels.split(step):
        order = torch.rand(part.shape, generator=generator, device="cpu").argsort(dim=1)
        hands = torch.rand(len(part), alpha, generator=generator, device="cpu").argsort(dim=1).to(torch.uint8)
        dealt = hands.repeat(1, -(-cards // alpha))[:, :cards]
        part.scatter_(1, order, dealt)
    return labels


def _cluster(weight: Tensor, clusters: int, generator: Generator | None) -> Tensor:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(
            "the Gram split clusters with scikit-learn: pip install 'fixed-parameter-expansion[bench]'"
        ) from error
    check_generator("from_gram", generator)
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device="cpu"))
    gram = (weight.mT @ weight).numpy()
    return torch.from_numpy(KMeans(clusters, n_init=4, random_state=seed).fit_predict(gram))
