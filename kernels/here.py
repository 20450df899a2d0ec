"""What this machine's CPU can do, and what a product with few rows costs on it.

:func:`roof_here` never measures. It reads what ``fpe here`` wrote into the user's cache folder, for this CPU, number of
threads and PyTorch. Where nothing was written nothing is predicted, and ``backend="auto"`` takes the eager twin. So it
decides the same way from call to call, and nothing is timed inside of a forward.

The model is a sum: a product takes the time in which it would run from the cache (:attr:`CpuRoof.rates`, measured on a
small layer, in proportion to the weights), and the time in which its bytes come from memory where they do not fit the
cache. On a GPU thousands of warps hide one behind the other; a core's loads wait for one another.
"""

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from .cpu import MAX_ROWS, numba_installed

ROWS = (1, 4, 16, 64, 256)
"""Rows of activations at which rates are measured; in between they are interpolated."""
ALPHAS = (2, 4, 8)
"""Children at which the rates of the kernel on labels are measured."""


@dataclass(frozen=True)
class CpuRoof:
    """What a CPU can do with a number of threads.

    Attributes:
        name: Of the CPU.
        threads: Of PyTorch.
        torch: PyTorch's version.
        copy: Bytes a second that a large copy reads and writes together.
        read: Bytes a second at which a product of one row reads a large dense weight.
        flops: Of a large float32 matrix product, a second.
        cache: Bytes of a layer that stay in the caches.
        call: Seconds of a call on next to nothing, through the operation.
        rates: Seconds for each weight of a float32 layer in the cache, at :data:`ROWS`: of ``"torch"``, PyTorch's dense
            product, of ``"compiled"``, the kernel with one child, and of ``"labels 2"``, ``"labels 4"`` and
            ``"labels 8"``, the kernel with more.
    """

    name: str
    threads: int
    torch: str
    copy: float
    read: float
    flops: float
    cache: float
    call: float
    rates: Mapping[str, tuple[float, ...]]

    def rate(self, name: str, m: int) -> float:
        """Seconds for each weight at a number of rows, interpolated between those measured, in proportion beyond."""
        known = self.rates[name]
        if m >= ROWS[-1]:
            return known[-1] * m / ROWS[-1]
        i = next(i for i, rows in enumerate(ROWS[1:]) if m <= rows)
        share = (math.log(m) - math.log(ROWS[i])) / (math.log(ROWS[i + 1]) - math.log(ROWS[i]))
        return known[i] ** (1 - share) * known[i + 1] ** share

    def labels(self, alpha: int, m: int) -> float:
        """:meth:`rate` of the kernel on labels for a number of children: linear between those measured."""
        if alpha <= ALPHAS[0]:
            return self.rate(f"labels {ALPHAS[0]}", m)
        high = next((a for a in ALPHAS if a >= alpha), ALPHAS[-1])
        low = max(a for a in ALPHAS if a < high)
        slow, fast = self.rate(f"labels {high}", m), self.rate(f"labels {low}", m)
        return fast + (slow - fast) * (alpha - low) / (high - low)

    def memory(self, size: float) -> float:
        """Seconds until the bytes of a layer are here: none for one that stays in the caches."""
        return size / self.read if size > self.cache else 0.0


def predict(m: int, n: int, k: int, alpha: int, roof: CpuRoof) -> dict[str, float]:
    """Seconds of a float32 split of a parent ``[n, k]`` for ``m`` rows.

    Returns:
        ``"parent"``: the faster dense product; ``"wide"``: PyTorch's product with the wide dense weight, which is kept;
        ``"ours"``: the kernel on labels; ``"twin"``: the eager definition, which makes the wide weight in every call.
    """
    weights = n * k
    size = 4 * weights
    index = weights * math.ceil(math.log2(max(alpha, 2))) / 8
    wide = alpha * weights * roof.rate("torch", m) + roof.memory(alpha * size)
    return {
        "parent": min(weights * roof.rate("torch", m), roof.call + weights * roof.rate("compiled", m))
        + roof.memory(size),
        "wide": wide,
        "ours": roof.call + weights * roof.labels(alpha, m) + roof.memory(size + index),
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
    """The CPU's own name, with its family and model, which some virtual machines leave it alone with."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    name = named.get("model name", platform.machine())
    return f"{name} family {named['cpu family']} model {named['model']}" if "cpu family" in named else name


def write(roof: CpuRoof) -> Path:
    """Keeps a measured roof for the calls to come; returns where."""
    path = path_here()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(roof)))
    _read.cache_clear()
    _predicted.cache_clear()
    return path


def roof_here() -> CpuRoof | None:
    """The measured roof of this machine with its present number of threads.

    None where it was not measured, or where Numba, which compiles the kernels, is gone.
    """
    return _read(torch.get_num_threads())


@cache
def _read(threads: int) -> CpuRoof | None:
    if not numba_installed():
        return None
    try:
        given = json.loads(path_here().read_text())
        return CpuRoof(**{**given, "rates": {name: tuple(rates) for name, rates in given["rates"].items()}})
    except (OSError, ValueError, KeyError, TypeError):  # none, or one of another version
        return None


def labels_win(m: int, n: int, k: int, alpha: int, dtype: torch.dtype, over: str) -> bool:
    """Whether the kernel on labels is predicted to be faster than ``"twin"`` or ``"wide"`` here.

    It is not where nothing is known: no roof was measured, or the weights are not float32, as the rates are.
    """
    threads = torch.get_num_threads()
    known = _read(threads) is not None and dtype == torch.float32 and alpha <= ALPHAS[-1]
    if not known or min(n, k) == 0 or not 0 < m <= MAX_ROWS:
        return False
    seconds = _predicted(m, n, k, alpha, threads)
    return seconds["ours"] < seconds[over]


@lru_cache(maxsize=4096)
def _predicted(m: int, n: int, k: int, alpha: int, threads: int) -> dict[str, float]:
    roof = _read(threads)
    assert roof is not None
    return predict(m, n, k, alpha, roof)
