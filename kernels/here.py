"""What this machine's CPU can do, and what a product with few rows costs on it.

:func:`roof_here` never measures. It reads what ``fpe here`` wrote into the user's cache folder, for this CPU, number of
threads and PyTorch. Where nothing was written nothing is predicted, and ``backend="auto"`` takes the eager twin. So
it decides in the same way in every call, and nothing is timed inside a forward.

The model is a sum of three times: that of a call; the time in which the product would run from the caches
(:attr:`CpuRoof.rates`, measured on a small layer, in proportion to the weights); and, if its bytes do not fit the
caches, the additional time because they come from memory (:attr:`CpuRoof.beyond`, measured on a large layer, in
proportion to the bytes). How much of the memory's time is hidden behind arithmetic depends on the kernel and on the
rows, so each has a figure of its own.
"""

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from .cpu import MAX_ROWS, WORTH, numba_installed

ROWS = (1, 4, 16, 64, 256)
"""Rows of activations at which rates are measured; in between they are interpolated."""
FEW = ROWS[:3]
"""The numbers of rows at which the time of memory is measured."""
ALPHAS = (2, 4, 8)
"""Children at which the rates of the kernel on labels are measured."""
LABELS = {alpha: f"labels {alpha}" for alpha in ALPHAS}
KERNELS = ("compiled", "kept", *LABELS.values(), "seeded")
"""This package's kernels that are measured: with one child (``compiled``), the same on kept values (``kept``), on
labels of 2, 4 and 8 children, and on labels of a seed of two children (``seeded``)."""
BITS_KEPT = 1.125
"""Bits of a bitmap a position."""
DENSITY = 0.5
"""Share of the entries that exist where ``"kept"`` is measured."""


@dataclass(frozen=True)
class CpuRoof:
    """What a CPU can do with a number of threads.

    Attributes:
        name: The CPU's name.
        threads: Number of PyTorch's threads.
        torch: PyTorch's version.
        copy: Bytes a second that a large copy reads and writes together.
        read: Bytes a second at which a product of one row reads a large dense weight.
        flops: FLOPs a second of a large float32 matrix product.
        cache: Bytes of a layer that stay in the caches.
        calls: Seconds of a call on a tiny layer: of ``"torch"``, PyTorch's dense product, and of ``"kernels"``.
        rates: Seconds for each weight of a float32 layer in the caches, at :data:`ROWS`: of ``"torch"``, and of each of
            :data:`KERNELS` multiplied by the number of threads that share the work.
        beyond: Additional seconds for each byte of a layer that does not fit the caches, of the same, at :data:`FEW`.
            Below zero where the small layer, on which the rates are measured, was too small for its threads.
    """

    name: str
    threads: int
    torch: str
    copy: float
    read: float
    flops: float
    cache: float
    calls: Mapping[str, float]
    rates: Mapping[str, tuple[float, ...]]
    beyond: Mapping[str, tuple[float, ...]]

    def seconds(self, name: str, m: int, weights: int, size: float) -> float:
        """Seconds of a product with ``m`` rows and a weight of ``weights`` entries in ``size`` bytes."""
        cached = weights * _between(ROWS, self.rates[name], m) * max(m / ROWS[-1], 1.0)
        if name == "torch":
            took = self.calls["torch"] + cached
        else:
            took = self.calls["kernels"] + cached / min(self.threads, max(weights * m // WORTH, 1))
        return took + (size * _between(FEW, self.beyond[name], m) if size > self.cache else 0.0)

    def labels(self, alpha: int, m: int, weights: int, size: float) -> float:
        """:meth:`seconds` of the kernel on labels for a number of children: linear between those measured."""
        high = next((a for a in ALPHAS if a >= alpha), ALPHAS[-1])
        low = max((a for a in ALPHAS if a < high), default=high)
        slow, fast = (self.seconds(LABELS[a], m, weights, size) for a in (high, low))
        return slow if high == low else fast + (slow - fast) * (max(alpha, low) - low) / (high - low)


def _between(rows: tuple[int, ...], known: tuple[float, ...], m: int) -> float:
    """A figure at ``m`` rows: a power law between measured ones; linear in ``log(m)`` if one is not positive."""
    if m >= rows[-1]:
        return known[-1]
    i = next(i for i, most in enumerate(rows[1:]) if m <= most)
    share = (math.log(m) - math.log(rows[i])) / (math.log(rows[i + 1]) - math.log(rows[i]))
    if min(known[i : i + 2]) > 0:
        return known[i] ** (1 - share) * known[i + 1] ** share
    return known[i] * (1 - share) + known[i + 1] * share


def predict(
    m: int, n: int, k: int, alpha: int, roof: CpuRoof, *, density: float | None = None, seeded: bool = False
) -> dict[str, float]:
    """Seconds of a float32 split of a parent ``[n, k]`` for ``m`` rows.

    Args:
        m: Rows of activations.
        n: Outputs of the parent.
        k: Inputs.
        alpha: Children; 1 if there are no labels.
        roof: Of the machine.
        density: Share of the entries that exist where the weight is stored as its kept values.
        seeded: Whether labels are of a seed.

    Returns:
        ``"parent"``: the faster dense product; ``"wide"``: PyTorch's product with the wide dense weight, which is kept;
        ``"ours"``: the kernel; ``"twin"``: the eager definition, which makes the wide weight in every call.
    """
    weights = n * k
    size = 4 * weights
    stored = size + (0 if seeded else weights * (alpha - 1).bit_length() / 8)
    if density is not None:
        stored += weights * (4 * density + BITS_KEPT / 8 - 4)
    ours = roof.seconds("compiled", m, weights, stored) if alpha == 1 else roof.labels(alpha, m, weights, stored)
    for differs, name, plain in ((density is not None, "kept", "compiled"), (seeded, "seeded", LABELS[ALPHAS[0]])):
        if differs:  # plus the time to place values, or to make labels
            ours += roof.seconds(name, m, weights, stored) - roof.seconds(plain, m, weights, stored)
    wide = roof.seconds("torch", m, alpha * weights, alpha * size)
    return {
        "parent": min(roof.seconds("torch", m, weights, size), roof.seconds("compiled", m, weights, size)),
        "wide": wide,
        "ours": ours,
        # It reads labels, makes and reads an int64 table of them, and writes the wide weight twice.
        "twin": wide + (16 * weights + (2 * alpha + 1) * size) / roof.copy,
    }


def folder() -> Path:
    """Where this package keeps what it has measured for a user: in ``XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fixed-parameter-expansion"


def path_here() -> Path:
    """Where the roof of this machine is kept, by CPU, threads and PyTorch."""
    words = "".join(c if c.isalnum() else "-" for c in f"{cpu_name()}-{torch.get_num_threads()}-{torch.__version__}")
    return folder() / f"cpu-{words}.json"


@cache
def cpu_name() -> str:
    """The CPU's name, with its family and model: some virtual machines hide the name itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    name = named.get("model name", platform.machine())
    return f"{name} family {named['cpu family']} model {named['model']}" if "cpu family" in named else name


def write(roof: CpuRoof) -> Path:
    """Writes a measured roof to the user's cache folder, for later calls; returns its path."""
    path = path_here()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(roof)))
    _read.cache_clear()
    _predicted.cache_clear()
    return path


def roof_here() -> CpuRoof | None:
    """The measured roof of this machine with its present number of threads.

    ``None`` if it was not measured, or if Numba, which compiles the kernels, is not installed.
    """
    return _read(torch.get_num_threads())


@cache
def _read(threads: int) -> CpuRoof | None:
    if not numba_installed():
        return None
    try:
        given = json.loads(path_here().read_text())
        return roof_from(given)
    except (OSError, ValueError, KeyError, TypeError):  # none, or one of another version
        return None


def roof_from(given: Mapping[str, Any]) -> CpuRoof:
    """A roof from a mapping of its fields, as JSON has it.

    Raises:
        KeyError: ``rates`` or ``beyond`` is missing.
        TypeError: Another field is missing, or there is an unknown one.
    """
    tables = {table: {name: tuple(each) for name, each in given[table].items()} for table in ("rates", "beyond")}
    return CpuRoof(**{**given, **tables})


def kernel_wins(
    m: int, n: int, k: int, alpha: int, dtype: torch.dtype, over: str, density: float | None = None
) -> bool:
    """Whether the kernel is predicted to be faster than ``"twin"`` or ``"wide"`` here.

    False if nothing is known: no roof was measured, the weights are not float32, or there are more rows or children
    than the kernels or the rates know.

    Args:
        m: Rows of activations.
        n: Outputs of the parent.
        k: Inputs.
        alpha: Children.
        dtype: Of the weights.
        over: What it is compared with, as :func:`predict` names it.
        density: Share of the entries that exist, where the weight is stored as its kept values.
    """
    threads = torch.get_num_threads()
    known = _read(threads) is not None and dtype == torch.float32 and alpha <= ALPHAS[-1]
    if not known or min(n, k) == 0 or not 0 < m <= MAX_ROWS:
        return False
    seconds = _predicted(m, n, k, alpha, threads, density)
    return seconds["ours"] < seconds[over]


@lru_cache(maxsize=4096)
def _predicted(m: int, n: int, k: int, alpha: int, threads: int, density: float | None) -> dict[str, float]:
    roof = _read(threads)
    assert roof is not None
    return predict(m, n, k, alpha, roof, density=density)
