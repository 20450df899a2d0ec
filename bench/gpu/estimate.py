"""What the units of ``fpe gpu`` are expected to take: times of the cost model, and a few allowances.

The allowances are assumed; every row says in ``seconds`` what its unit really took.
"""

from collections.abc import Iterable, Sequence
from heapq import heapify, heappushpop

from fpe.kernels import model
from fpe.kernels.model import layer_candidates
from fpe.kernels.roofs import Roof

from ..families import Case as Launch
from ..latency.problems import Case
from ..latency.providers import Provider
from ..latency.suite import PASSES
from ..latency.timing import FLUSH
from ..results import COMMITTED, Results

SETUP = 0.15
"""Seconds to draw a case's data and to build its layers, for small ones."""
SETUP_BANDWIDTH = 4e10
"""Bytes of the wide weight that a second of setting up goes through: labels, packed forms, copies."""
HOST = 0.6e-3
"""Seconds that the host needs for a call and its two synchronizations."""
CHECKED = 0.02
"""Seconds of a provider's check beside the calls that it makes."""
POOL = 10.0
"""Seconds until a pool's processes have imported everything and are gone again."""
COMPILED = 3.0
"""Processor seconds of a kernel that nobody has compiled yet."""


def seconds_of_case(
    case: Case,
    providers: Sequence[Provider],
    level: str,
    passes: Sequence[str],
    roof: Roof,
    limits: tuple[float, int],
) -> float:
    """What a case is expected to take.

    Args:
        case: Sizes.
        providers: Who takes part.
        level: Of the suite.
        passes: Of it; all without one.
        roof: Of the device.
        limits: Seconds to spend on a pass, and the fewest samples.
    """
    able = [p for p in providers if case.structure in (p.merges if level == "merge" else p.structures)]
    wide = 2.0 * case.alpha * case.n * case.k
    total = SETUP + len(able) * wide / SETUP_BANDWIDTH
    for name in passes or PASSES[level]:
        products = {"forward+backward": 3, "step": 6}.get(name, 1) * (2 if level == "mlp" else 1)
        calls = [products * _seconds_of_product(case, p, roof) for p in able]
        turn = sum(2 * (seconds + HOST + FLUSH / roof.bandwidth) for seconds in calls)
        total += max(limits[0], limits[1] * turn) + 3 * turn + CHECKED * len(able)
    return total


def _seconds_of_product(case: Case, provider: Provider, roof: Roof) -> float:
    """A forward's time; of who is not in the cost model, the wide dense layer's."""
    (found,) = layer_candidates(("forward",), case, roof)
    name = provider.predicted_as(case.structure)
    if not name and provider.name == "fpe/auto":
        return model.best(found).seconds
    return next(c.seconds for c in found if c.name == (name or "wide dense"))


def seconds_of_compiling(todo: Iterable[Launch], jobs: int) -> float:
    """What a pool is expected to take, from what the same launches took when they were compiled offline.

    The longest come first, and a process that is done takes the next one.
    """
    known: dict[str, float] = {}
    for row in Results.read(COMMITTED / "lab/headline-compile.jsonl").rows:
        known[row["launch"]] = known.get(row["launch"], 0.0) + row["compile_seconds"]
    mean = sum(known.values()) / max(len(known), 1) or COMPILED
    each = sorted((known.get(launch.name, mean) for launch in dict.fromkeys(todo)), reverse=True)
    ends = [0.0] * max(jobs, 1)
    heapify(ends)
    for seconds in each:
        heappushpop(ends, ends[0] + seconds)
    return POOL + max(ends)
