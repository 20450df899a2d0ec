"""The Boolean task of the paper (sections 2.2.1 and A.2.1): a monotone read-once DNF, seeded and vectorised."""

import torch
from torch import Generator, Tensor


def make_dnf(
    samples: int,
    clauses: int = 8,
    literals: int = 4,
    active: tuple[int, int] = (4, 16),
    true_range: tuple[float, float] = (0.9, 1.1),
    false_range: tuple[float, float] = (0.0, 0.1),
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples a balanced, noisy data set: true where all literals of at least one clause are on.

    Variables are numbered clause by clause. Half of the samples are positive: one random clause is switched on,
    then random other variables until the number of active bits equals a count drawn uniformly from ``active``.
    Half of the negatives are such assignments with one random literal switched off in each satisfied clause (so
    that they can fall below the lower bound); the others are random assignments within the bounds, drawn anew
    until they do not satisfy the formula. Bits then become uniform in ``true_range`` or ``false_range``.

    Args:
        samples: Number of samples; an odd one more is negative.
        clauses: Number of clauses.
        literals: Positive literals in each clause; every variable occurs once.
        active: Smallest and largest number of active bits, both included.
        true_range: Values of a bit that is on.
        false_range: Values of a bit that is off.
        generator: Source of all randomness (CPU).

    Returns:
        ``x`` float32 ``[samples, clauses * literals]`` and ``y`` float32 ``[samples]``, in random order.

    Raises:
        ValueError: The sizes or the bounds admit no such data.
    """
    if samples < 0 or clauses < 1 or literals < 1:
        raise ValueError(
            f"make_dnf: expected samples >= 0 and clauses, literals >= 1, got {samples}, {clauses}, {literals}"
        )
    low, high = active
    if not literals <= low <= high <= clauses * literals or low > clauses * (literals - 1):
        raise ValueError(
            f"make_dnf: active must be an ascending pair from {literals} to {clauses * literals} whose lower bound "
            f"leaves every clause a literal to turn off, got {active}"
        )
    positives = samples // 2
    near = (samples - positives) // 2
    satisfying = _satisfying(positives + near, clauses, literals, active, generator)
    broken = _break_clauses(satisfying[positives:], clauses, generator)
    far = _unsatisfying(samples - positives - near, clauses, literals, active, generator)
    order = torch.randperm(samples, generator=generator)
    bits = torch.cat([satisfying[:positives], broken, far])[order]
    noise = torch.rand(bits.shape, generator=generator)
    on, off = (low + noise * (high - low) for low, high in (true_range, false_range))
    return torch.where(bits, on, off), (order < positives).float()


def satisfies(bits: Tensor, clauses: int) -> Tensor:
    """Which assignments, bool ``[n, clauses * literals]``, have a clause with all literals on: bool ``[n]``."""
    return bits.unflatten(1, (clauses, -1)).all(2).any(1)


def clause_of(clauses: int, literals: int) -> Tensor:
    """Clause of each variable, int64 ``[clauses * literals]``: the groups of the clause split."""
    return torch.arange(clauses).repeat_interleave(literals)


def _switch_on(priority: Tensor, active: tuple[int, int], generator: Generator | None) -> Tensor:
    """Switches on a random number of bits in each row, those of lowest priority first."""
    rows, variables = priority.shape
    count = torch.randint(active[0], active[1] + 1, (rows, 1), generator=generator)
    return torch.zeros(rows, variables, dtype=torch.bool).scatter_(
        1, priority.argsort(1), torch.arange(variables) < count
    )


def _satisfying(n: int, clauses: int, literals: int, active: tuple[int, int], generator: Generator | None) -> Tensor:
    """One random clause is on, then random other bits."""
    priority = torch.rand(n, clauses, literals, generator=generator)
    priority[torch.arange(n), torch.randint(clauses, (n,), generator=generator)] = -1.0
    return _switch_on(priority.flatten(1), active, generator)


def _break_clauses(bits: Tensor, clauses: int, generator: Generator | None) -> Tensor:
    """Switches off one random literal in each satisfied clause."""
    table = bits.unflatten(1, (clauses, -1))
    victim = torch.randint(table.shape[2], (*table.shape[:2], 1), generator=generator)
    hit = torch.arange(table.shape[2]) == victim
    return (table & ~(hit & table.all(2, keepdim=True))).flatten(1)


def _unsatisfying(n: int, clauses: int, literals: int, active: tuple[int, int], generator: Generator | None) -> Tensor:
    """Random assignments that do not satisfy the formula."""
    kept = [torch.zeros(0, clauses * literals, dtype=torch.bool)]
    missing = n
    while missing > 0:
        priority = torch.rand(missing + missing // 4 + 16, clauses * literals, generator=generator)
        bits = _switch_on(priority, active, generator)
        kept.append(bits[~satisfies(bits, clauses)][:missing])
        missing -= len(kept[-1])
    return torch.cat(kept)
