"""What the paper's appendix A.5 predicts for random splits, exactly and by its bounds.

A parent with ``inputs`` inputs deals them at random to ``alpha`` children, equally. A child *covers* a clause
of ``literals`` inputs if it owns all of them; two clauses *collide* in a neuron that covers both. Dense
neurons cover everything, so that every pair of clauses collides in each of them.
"""

from math import comb, exp


def child_coverage(inputs: int, literals: int, alpha: int) -> float:
    """Probability that one child covers a clause (A.5).

    ``C(inputs - literals, s - literals) / C(inputs, s)`` for a child of degree ``s = inputs / alpha``; about
    ``alpha ** -literals`` for many inputs.

    Args:
        inputs: Inputs of the parent ``m``, a multiple of ``alpha``.
        literals: Inputs of the clause ``k``.
        alpha: Children per parent.

    Raises:
        ValueError: An argument is out of range, or ``alpha`` does not divide ``inputs``.
    """
    _check(inputs, literals, alpha)
    degree = inputs // alpha
    if literals > degree:
        return 0.0
    return comb(inputs - literals, degree - literals) / comb(inputs, degree)


def clause_coverage(inputs: int, literals: int, alpha: int, parents: int) -> float:
    """Probability that some child of some parent covers a given clause (A.5).

    Siblings exclude each other and parents are independent: ``1 - (1 - alpha * p) ** parents`` with ``p`` of
    :func:`child_coverage`.

    Args:
        inputs: Inputs of a parent ``m``.
        literals: Inputs of the clause ``k``.
        alpha: Children per parent.
        parents: Number of parents ``r``.

    Raises:
        ValueError: An argument is out of range.
    """
    _check(inputs, literals, alpha)
    _positive("parents", parents)
    return 1.0 - (1.0 - alpha * child_coverage(inputs, literals, alpha)) ** parents


def coverage_bound(clauses: int, literals: int, alpha: int, parents: int) -> float:
    """Lower bound on the probability that every clause is covered by some child (A.5).

    ``1 - C * exp(-r / alpha ** (k - 1))``, from the large-input limit of :func:`child_coverage` and a union
    bound over clauses; not below 0.

    Args:
        clauses: Number of clauses ``C``.
        literals: Inputs of each clause ``k``.
        alpha: Children per parent.
        parents: Number of parents ``r``.

    Raises:
        ValueError: An argument is out of range.
    """
    for name, value in (("literals", literals), ("alpha", alpha)):
        _positive(name, value)
    _positive("clauses", clauses)
    _positive("parents", parents)
    return max(0.0, 1.0 - clauses * exp(-parents / alpha ** (literals - 1)))


def expected_collisions(inputs: int, literals: int, clauses: int, alpha: int, parents: int) -> float:
    """Expected number of (neuron, pair of clauses) collisions (A.5).

    ``r * alpha * C(clauses, 2) * p``, with ``p`` the probability that a child covers the ``2k`` inputs of a
    pair of disjoint clauses. ``alpha = 1`` is the dense layer, where every pair collides in every neuron.

    Args:
        inputs: Inputs of a parent ``m``.
        literals: Inputs of each clause ``k``.
        clauses: Number of disjoint clauses.
        alpha: Children per parent, 1 for dense.
        parents: Number of parents ``r``.

    Raises:
        ValueError: An argument is out of range, or the clauses do not fit into the inputs.
    """
    _check(inputs, literals, alpha)
    _positive("clauses", clauses)
    _positive("parents", parents)
    if clauses * literals > inputs:
        raise ValueError(f"theory: {clauses} clauses of {literals} literals need more than {inputs} inputs")
    if clauses < 2:
        return 0.0
    return parents * alpha * comb(clauses, 2) * child_coverage(inputs, 2 * literals, alpha)


def collision_ratio(literals: int, alpha: int) -> float:
    """Collisions after the split over collisions before, for many inputs: ``alpha ** -(2k - 1)`` (A.5).

    Args:
        literals: Inputs of each clause ``k``.
        alpha: Children per parent.

    Raises:
        ValueError: An argument is out of range.
    """
    _positive("literals", literals)
    _positive("alpha", alpha)
    return float(alpha) ** -(2 * literals - 1)


def _check(inputs: int, literals: int, alpha: int) -> None:
    for name, value in (("inputs", inputs), ("literals", literals), ("alpha", alpha)):
        _positive(name, value)
    if inputs % alpha:
        raise ValueError(f"theory: alpha = {alpha} must divide the inputs, got {inputs}")
    if literals > inputs:
        raise ValueError(f"theory: a clause of {literals} literals needs as many inputs, got {inputs}")


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"theory: {name} must be a positive integer, got {value!r}")
