"""Who owns each edge: properties of every way to divide a parent's inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BadCall, readable_id, seeded
from torch import Tensor

from fpe import Partition
from fpe.kernels import HOLE

seeds = st.integers(0, 2**31)
outs = st.integers(1, 12)
alphas = st.integers(2, 5)


@dataclass(frozen=True)
class Drawn:
    """A partition, how it was made, and the units (group or tile of each input) that were dealt."""

    make: Callable[[int], Partition]
    seed: int
    units: Tensor
    rows: int = 1

    @property
    def partition(self) -> Partition:
        return self.make(self.seed)


@st.composite
def randoms(draw: st.DrawFn) -> Drawn:
    alpha, out = draw(alphas), draw(outs)
    inputs = draw(st.integers(alpha, 30))

    def make(seed: int) -> Partition:
        return Partition.random(out, inputs, alpha, generator=seeded(seed))

    return Drawn(make, draw(seeds), torch.arange(inputs))


@st.composite
def grouped(draw: st.DrawFn) -> Drawn:
    alpha, out = draw(alphas), draw(outs)
    names = draw(st.lists(st.integers(-9, 9), min_size=alpha, max_size=30).filter(lambda g: len(set(g)) >= alpha))

    def make(seed: int) -> Partition:
        return Partition.from_groups(names, out, alpha, generator=seeded(seed))

    return Drawn(make, draw(seeds), torch.tensor(names))


@st.composite
def semi_structured(draw: st.DrawFn) -> Drawn:
    out, inputs = draw(outs), 4 * draw(st.integers(1, 8))

    def make(seed: int) -> Partition:
        return Partition.semi_structured(out, inputs, generator=seeded(seed))

    return Drawn(make, draw(seeds), torch.arange(inputs))


@st.composite
def blocks(draw: st.DrawFn) -> Drawn:
    alpha, out = draw(alphas), draw(outs)
    bn, bk = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    inputs = draw(st.integers((alpha - 1) * bk + 1, 30))

    def make(seed: int) -> Partition:
        return Partition.block(out, inputs, alpha, block=(bn, bk), generator=seeded(seed))

    return Drawn(make, draw(seeds), torch.arange(inputs) // bk, bn)


every_kind = st.one_of(randoms(), grouped(), semi_structured(), blocks())


# What holds for all of them


@given(every_kind)
def test_masks_are_disjoint_and_cover(drawn: Drawn) -> None:
    masks = drawn.partition.validate().masks()
    assert masks.dtype == torch.bool
    assert masks.shape == (drawn.partition.alpha, *drawn.partition.shape)
    assert (masks.sum(0) == 1).all()


@given(every_kind)
def test_units_stay_together(drawn: Drawn) -> None:
    labels = drawn.partition.labels
    for unit in drawn.units.unique():
        own = labels[:, drawn.units == unit]
        assert (own == own[:, :1]).all()
    for start in range(0, len(labels), drawn.rows):
        assert (labels[start : start + drawn.rows] == labels[start]).all()


@given(every_kind)
def test_shares_differ_by_at_most_one_unit(drawn: Drawn) -> None:
    one_input_of_each = [int((drawn.units == unit).nonzero()[0]) for unit in drawn.units.unique()]
    shares = drawn.partition.masks()[:, :, one_input_of_each].sum(-1)
    assert int((shares.amax(0) - shares.amin(0)).max()) <= 1


@given(every_kind)
def test_the_seed_decides(drawn: Drawn) -> None:
    once, again = drawn.make(drawn.seed), drawn.make(drawn.seed)
    assert torch.equal(once.labels, again.labels)
    assert (once.alpha, once.structure, once.block_shape) == (again.alpha, again.structure, again.block_shape)


# What is particular to one


@given(semi_structured())
def test_two_of_every_four_go_to_each_child(drawn: Drawn) -> None:
    assert drawn.partition.structure == "2:4"
    assert (drawn.partition.masks().unflatten(-1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda g: Partition.random(64, 12, 3, generator=g),
        lambda g: Partition.from_groups([0, 0, 1, 1, 2, 2], 64, 3, generator=g),
        lambda g: Partition.semi_structured(64, 8, generator=g),
        lambda g: Partition.block(64, 12, 3, block=(1, 4), generator=g),
    ],
    ids=["random", "groups", "2:4", "block"],
)
def test_parents_and_seeds_differ(make: Callable[[torch.Generator], Partition]) -> None:
    labels = make(seeded(0)).labels
    assert len(labels.unique(dim=0)) > 4
    assert not torch.equal(labels, make(seeded(1)).labels)


def test_the_child_with_one_input_more_differs_between_parents() -> None:
    shares = Partition.random(200, 7, 3, generator=seeded()).masks().sum(-1)  # [alpha, parents]
    # Each of three children is the larger one a third of the time: 66.7 of 200, standard error 6.7.
    assert ((shares == 3).sum(1) - 200 / 3).abs().max() < 4 * 6.7


@given(st.integers(2, 4), st.integers(2, 5), seeds)
def test_gram_keeps_identical_columns_together(alpha: int, distinct: int, seed: int) -> None:
    distinct = max(distinct, alpha)
    columns = torch.randn(16, distinct, generator=seeded(seed))
    index = torch.arange(3 * distinct) % distinct
    partition = Partition.from_gram(columns[:, index], alpha, clusters=distinct, generator=seeded(seed))
    assert (partition.labels == partition.labels[:, :distinct].repeat(1, 3)).all()
    again = Partition.from_gram(columns[:, index], alpha, clusters=distinct, generator=seeded(seed))
    assert torch.equal(partition.labels, again.labels)


def test_gram_finds_planted_clusters() -> None:
    """Orthogonal prototypes with a little noise: the clusters are the prototypes."""
    prototype = torch.arange(24) % 4
    weight = torch.eye(8)[:, prototype] + 0.01 * torch.randn(8, 24, generator=seeded())
    labels = Partition.from_gram(weight, 2, clusters=4, generator=seeded()).labels
    for group in range(4):
        own = labels[:, prototype == group]
        assert (own == own[:, :1]).all()


def test_without_makes_holes() -> None:
    partition = Partition.random(5, 8, 2, generator=seeded())
    removed = torch.rand(5, 8, generator=seeded(1)) < 0.5
    pruned = partition.without(removed).validate()
    assert torch.equal(pruned.labels == HOLE, removed)
    assert torch.equal(pruned.labels[~removed], partition.labels[~removed])
    assert torch.equal(pruned.masks().sum(0) == 0, removed)


def test_repr_names_sizes() -> None:
    assert repr(Partition.random(5, 8, 2)) == "Partition(5x8, alpha=2, random)"
    assert repr(Partition.block(5, 8, 2, block=(2, 4))) == "Partition(5x8, alpha=2, block, block=(2, 4))"


# Bad input


LABELS = torch.zeros(2, 4, dtype=torch.uint8)
QUAD = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.uint8)
TILES = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.uint8)
NAN = torch.full((3, 8), float("nan"))
BAD = (
    BadCall("labels-dtype", lambda: Partition(LABELS.long(), 2), TypeError, ("uint8", "int64")),
    BadCall("labels-list", lambda: Partition([[0, 1]], 2), TypeError, ("uint8", "list")),  # type: ignore[arg-type]
    BadCall("labels-dims", lambda: Partition(LABELS[0], 2), ValueError, ("[out_features, in_features]", "[4]")),
    BadCall("structure", lambda: Partition(LABELS, 2, "4:8"), ValueError, ("2:4", "'4:8'")),  # type: ignore[arg-type]
    BadCall("no-block", lambda: Partition(LABELS, 2, "block"), ValueError, ("block_shape", "None")),
    BadCall("stray-block", lambda: Partition(LABELS, 2, block_shape=(2, 2)), ValueError, ("block_shape", "(2, 2)")),
    *(
        BadCall(f"alpha-{a}", lambda a=a: Partition.random(4, 8, a), ValueError, ("alpha", "2 to 254", repr(a)))
        for a in (1, 0, -2, 255, 2.0, "2", True, None)
    ),
    BadCall("few-inputs", lambda: Partition.random(4, 2, 3), ValueError, ("at least 3 inputs", "got 2")),
    BadCall("no-outputs", lambda: Partition.random(0, 8, 2), ValueError, ("out_features", "positive", "got 0")),
    BadCall("float-inputs", lambda: Partition.random(2, 8.0, 2), ValueError, ("in_features", "positive", "got 8.0")),  # type: ignore[arg-type]
    BadCall("unknown", lambda: Partition.of("4:8", 2, 8, 2), ValueError, ("structure", "2:4", "'4:8'")),  # type: ignore[arg-type]
    BadCall(
        "without-dtype", lambda: Partition(LABELS, 2).without(LABELS), TypeError, ("without: removed", "bool", "uint8")
    ),
    BadCall(
        "without-shape",
        lambda: Partition(LABELS, 2).without(LABELS[:1].bool()),
        ValueError,
        ("without: removed", "[2, 4]", "[1, 4]"),
    ),
    BadCall("2:4-inputs", lambda: Partition.semi_structured(4, 6), ValueError, ("multiple of 4", "got 6")),
    BadCall("groups-float", lambda: Partition.from_groups([0.0, 1.0], 4, 2), TypeError, ("integers", "float32")),
    BadCall("groups-bool", lambda: Partition.from_groups([True, False], 4, 2), TypeError, ("integers", "bool")),
    BadCall("groups-2d", lambda: Partition.from_groups([[0, 1]], 4, 2), ValueError, ("list", "[1, 2]")),  # type: ignore[list-item]
    BadCall("groups-empty", lambda: Partition.from_groups(LABELS[0, :0], 4, 2), ValueError, ("list", "[0]")),
    BadCall("groups-few", lambda: Partition.from_groups([1, 1, 2], 4, 3), ValueError, ("at least 3 groups", "got 2")),
    BadCall("gram-int", lambda: Partition.from_gram(LABELS, 2), TypeError, ("floating", "uint8")),
    BadCall("gram-list", lambda: Partition.from_gram([[1.0]], 2), TypeError, ("floating", "list")),  # type: ignore[arg-type]
    BadCall("gram-dims", lambda: Partition.from_gram(torch.ones(8), 2), ValueError, ("matrix", "[8]")),
    BadCall("gram-nan", lambda: Partition.from_gram(NAN, 2), ValueError, ("finite", "got NaN")),
    BadCall(
        "gram-clusters",
        lambda: Partition.from_gram(torch.ones(3, 8), 3, clusters=2),
        ValueError,
        ("clusters", "3 to 8", "got 2"),
    ),
    BadCall("block-narrow", lambda: Partition.block(4, 8, 3, block=(2, 4)), ValueError, ("at least 3 tiles", "got 2")),
    *(
        BadCall(f"block-{b}", lambda b=b: Partition.block(4, 8, 2, block=b), ValueError, ("pair", "positive", repr(b)))
        for b in ((0, 2), (2,), (2, 2.0), 4, None)
    ),
    BadCall(
        "foreign-label",
        lambda: Partition(LABELS + 2, 2).validate(),
        ValueError,
        ("labels[0, 0] is 2", "0 .. 1", "255"),
    ),
    BadCall("crowded-quad", lambda: Partition(QUAD, 2, "2:4").validate(), ValueError, ("row 1", "two", "quad 0")),
    BadCall("2:4-alpha", lambda: Partition(LABELS, 3, "2:4").validate(), ValueError, ("alpha = 2", "alpha = 3")),
    BadCall(
        "mixed-tile", lambda: Partition(TILES, 2, "block", (2, 2)).validate(), ValueError, ("tile (0, 1)", "(2, 2)")
    ),
)


@pytest.mark.parametrize("bad", BAD, ids=readable_id)
def test_bad_input_is_refused(bad: BadCall) -> None:
    bad.check()
