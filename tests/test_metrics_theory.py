"""Metrics in closed form; the paper's appendix A.5 against masks drawn by ``Partition.random``."""

from dataclasses import dataclass
from itertools import combinations
from math import comb, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BadCall, readable_id, seeded
from torch import Tensor

from fpe import Partition, metrics, theory

# Metrics


def weight_of(neurons: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(neurons, features, dtype=torch.float64, generator=seeded(seed))


def test_orthogonal_features_have_a_dimension_each() -> None:
    q, _ = torch.linalg.qr(weight_of(6, 6))
    torch.testing.assert_close(metrics.feature_capacity(3 * q[:, :4]), torch.ones(4).double())


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_duplicates_share_a_dimension(copies: int) -> None:
    capacity = metrics.feature_capacity(torch.eye(4).repeat_interleave(copies, 1))
    torch.testing.assert_close(capacity, torch.full((4 * copies,), 1 / copies))


def test_a_feature_without_weights_has_no_capacity() -> None:
    assert metrics.feature_capacity(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).tolist() == [1.0, 0.0]
    assert metrics.feature_capacity(torch.zeros(3, 2)).tolist() == [0.0, 0.0]


def test_capacity_at_an_angle() -> None:
    """Two unit features at 60 degrees: ``1 / (1 + cos^2)``."""
    weight = torch.tensor([[1.0, 0.5], [0.0, sqrt(3) / 2]])
    torch.testing.assert_close(metrics.feature_capacity(weight), torch.tensor([0.8, 0.8]))


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 99))
def test_capacities_sum_to_at_most_the_neurons(neurons: int, features: int, seed: int) -> None:
    capacity = metrics.feature_capacity(weight_of(neurons, features, seed))
    assert ((capacity >= 0) & (capacity <= 1)).all()
    assert capacity.sum() <= neurons * (1 + 1e-12)


def test_capacity_of_groups_is_the_sum_over_each() -> None:
    weight = weight_of(4, 7)
    each = metrics.feature_capacity(weight)
    for groups in ([0, 3, 0, 1, 1, 1, 0], torch.tensor([0, 3, 0, 1, 1, 1, 0], dtype=torch.int32)):
        wanted = torch.stack([each[[0, 2, 6]].sum(), each[3:6].sum(), each.new_zeros(()), each[1]])
        torch.testing.assert_close(metrics.feature_capacity(weight, groups), wanted)
    assert metrics.feature_capacity(torch.ones(3, 0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 99))
def test_mean_cosine_is_the_mean_over_pairs(neurons: int, features: int, seed: int) -> None:
    weight = weight_of(neurons, features, seed)
    weight[0] *= seed % 2  # a neuron without weights, every other time
    cosines = [torch.cosine_similarity(weight[i], weight[j], dim=0) for i, j in combinations(range(neurons), 2)]
    torch.testing.assert_close(metrics.mean_cosine_similarity(weight), torch.stack(cosines).mean())


def test_mean_cosine_of_equal_opposite_and_lonely_neurons() -> None:
    row = torch.tensor([[3.0, 4.0]])
    assert metrics.mean_cosine_similarity(row.repeat(5, 1)).item() == pytest.approx(1)
    assert metrics.mean_cosine_similarity(torch.cat([row, -2 * row])).item() == pytest.approx(-1)
    assert metrics.mean_cosine_similarity(row).item() == 0
    assert metrics.mean_cosine_similarity(row[:0]).item() == 0


def test_gram() -> None:
    weight = weight_of(3, 5)
    wanted = torch.stack([torch.stack([weight[:, i] @ weight[:, j] for j in range(5)]) for i in range(5)])
    torch.testing.assert_close(metrics.gram(weight), wanted)


# Theory, by Monte Carlo. Seeds are fixed; a bound of four standard errors fails by chance once in 16 000.

PARENTS = 20_000
STANDARD_ERRORS = 4


def covers(inputs: int, alpha: int, clauses: int, literals: int, parents: int = PARENTS) -> Tensor:
    """Which child covers which clause, bool ``[alpha, parents, clauses]``; clauses are disjoint runs of inputs."""
    masks = Partition.random(parents, inputs, alpha, generator=seeded(inputs + alpha)).masks()
    return masks[..., : clauses * literals].unflatten(-1, (clauses, literals)).all(-1)


def assert_frequency(hits: Tensor, probability: float) -> None:
    """The share of independent ``hits`` agrees with a probability, within its standard error."""
    standard_error = sqrt(probability * (1 - probability) / hits.numel())
    assert abs(hits.double().mean().item() - probability) <= STANDARD_ERRORS * standard_error


@dataclass(frozen=True)
class Setting:
    """Inputs of a parent, literals of a clause, children of a parent."""

    inputs: int
    literals: int
    alpha: int

    @property
    def id(self) -> str:
        return f"{self.inputs}in-{self.literals}lit-alpha{self.alpha}"


SETTINGS = (
    Setting(8, 1, 2),
    Setting(8, 2, 2),
    Setting(12, 3, 2),
    Setting(12, 2, 3),
    Setting(16, 4, 2),
    Setting(16, 2, 4),
)
each_setting = pytest.mark.parametrize("s", SETTINGS, ids=readable_id)


@each_setting
def test_child_coverage(s: Setting) -> None:
    covered = covers(s.inputs, s.alpha, 1, s.literals)[:, :, 0]
    for child in covered:
        assert_frequency(child, theory.child_coverage(s.inputs, s.literals, s.alpha))


@each_setting
@pytest.mark.parametrize("parents", [1, 3, 10])
def test_clause_coverage(s: Setting, parents: int) -> None:
    layers = PARENTS // parents
    by_some_child = covers(s.inputs, s.alpha, 1, s.literals).any(0)[: layers * parents].view(layers, parents).any(1)
    assert_frequency(by_some_child, theory.clause_coverage(s.inputs, s.literals, s.alpha, parents))


@pytest.mark.parametrize("s", [Setting(120, 2, 2), Setting(120, 3, 2), Setting(120, 2, 3)], ids=readable_id)
@pytest.mark.parametrize("parents", [10, 20, 40])
def test_coverage_bound_is_a_lower_bound_for_many_inputs(s: Setting, parents: int) -> None:
    """Its regime: many inputs to a clause (here 40 or 60), where a child's coverage is near ``alpha ** -k``."""
    clauses, layers = 4, 2000
    by_some_child = covers(s.inputs, s.alpha, clauses, s.literals, layers * parents).any(0)
    every_clause = by_some_child.view(layers, parents, clauses).any(1).all(1).double().mean().item()
    standard_error = sqrt(max(every_clause * (1 - every_clause), 1 / layers) / layers)
    bound = theory.coverage_bound(clauses, s.literals, s.alpha, parents)
    assert 0 <= bound <= every_clause + STANDARD_ERRORS * standard_error


def test_coverage_bound_says_something() -> None:
    assert theory.coverage_bound(4, 2, 2, 1) == 0
    assert theory.coverage_bound(4, 2, 2, 20) == pytest.approx(1 - 4 * 2.718281828459045**-10)
    assert theory.coverage_bound(4, 2, 2, 100) == pytest.approx(1)


@each_setting
def test_expected_collisions(s: Setting) -> None:
    clauses = 3 if 3 * s.literals <= s.inputs else 2
    covered = covers(s.inputs, s.alpha, clauses, s.literals).sum(-1)
    collisions = (covered * (covered - 1) // 2).sum(0).double()  # per parent: pairs that one child covers
    # Parents are independent, so the standard error of their mean comes from their spread.
    standard_error = max(collisions.std().item(), 1 / sqrt(PARENTS)) / sqrt(PARENTS)
    expected = theory.expected_collisions(s.inputs, s.literals, clauses, s.alpha, parents=1)
    assert abs(collisions.mean().item() - expected) <= STANDARD_ERRORS * standard_error
    assert theory.expected_collisions(s.inputs, s.literals, clauses, s.alpha, 7) == pytest.approx(7 * expected)


def test_dense_neurons_collide_on_every_pair() -> None:
    assert theory.expected_collisions(16, 4, 4, 1, 8) == 8 * comb(4, 2)
    assert theory.expected_collisions(16, 4, 1, 2, 8) == 0


@pytest.mark.parametrize(("literals", "alpha"), [(1, 2), (2, 2), (4, 2), (2, 3), (2, 4)])
def test_collision_ratio_is_the_limit_for_many_inputs(literals: int, alpha: int) -> None:
    def ratio(inputs: int) -> float:
        before, after = (theory.expected_collisions(inputs, literals, 2, a, 8) for a in (1, alpha))
        return after / before

    limit = theory.collision_ratio(literals, alpha)
    gaps = [limit - ratio(alpha * 10**power) for power in (2, 3, 4)]
    assert gaps[0] > gaps[1] > gaps[2] > 0  # sharing without replacement collides less
    assert gaps[2] < 0.01 * limit


def test_impossible_coverage() -> None:
    assert theory.child_coverage(8, 5, 2) == 0
    assert theory.clause_coverage(8, 5, 2, 10) == 0
    assert theory.child_coverage(8, 8, 1) == 1
    assert theory.collision_ratio(3, 1) == 1


# Bad input


W = torch.ones(3, 4)
BAD = (
    BadCall("gram-int", lambda: metrics.gram(W.long()), TypeError, ("floating", "int64")),
    BadCall("gram-list", lambda: metrics.gram([[1.0]]), TypeError, ("floating", "list")),  # type: ignore[arg-type]
    BadCall("gram-dims", lambda: metrics.gram(W[0]), ValueError, ("[neurons, features]", "[4]")),
    BadCall("cosine-int", lambda: metrics.mean_cosine_similarity(W.int()), TypeError, ("floating", "int32")),
    BadCall("cosine-dims", lambda: metrics.mean_cosine_similarity(W[None]), ValueError, ("neurons", "[1, 3, 4]")),
    BadCall("groups-float", lambda: metrics.feature_capacity(W, [0.0] * 4), TypeError, ("integers", "float32")),
    BadCall("groups-length", lambda: metrics.feature_capacity(W, [0, 1]), ValueError, ("[4]", "[2]")),
    BadCall("groups-negative", lambda: metrics.feature_capacity(W, [0, 1, -1, 0]), ValueError, ("from 0", "-1")),
    BadCall("coverage-divide", lambda: theory.child_coverage(9, 2, 2), ValueError, ("alpha = 2", "divide", "got 9")),
    BadCall("coverage-literals", lambda: theory.child_coverage(8, 9, 2), ValueError, ("9 literals", "got 8")),
    BadCall("coverage-zero", lambda: theory.child_coverage(8, 0, 2), ValueError, ("literals", "positive", "got 0")),
    BadCall("coverage-float", lambda: theory.child_coverage(8.0, 2, 2), ValueError, ("inputs", "got 8.0")),  # type: ignore[arg-type]
    BadCall("clause-parents", lambda: theory.clause_coverage(8, 2, 2, 0), ValueError, ("parents", "got 0")),
    BadCall("bound-clauses", lambda: theory.coverage_bound(-1, 2, 2, 1), ValueError, ("clauses", "got -1")),
    BadCall("bound-alpha", lambda: theory.coverage_bound(1, 2, 0, 1), ValueError, ("alpha", "got 0")),
    BadCall("collisions-fit", lambda: theory.expected_collisions(8, 3, 3, 2, 1), ValueError, ("3 clauses", "than 8")),
    BadCall("ratio-alpha", lambda: theory.collision_ratio(2, 0), ValueError, ("alpha", "got 0")),
)


@pytest.mark.parametrize("bad", BAD, ids=readable_id)
def test_bad_input_is_refused(bad: BadCall) -> None:
    bad.check()
