"""What this machine's CPU can do, and what a product with few rows costs on it.

:func:`roof_here` never measures. It reads what ``fpe here`` wrote into the user's cache folder, for this CPU, number of
threads and PyTorch; where nothing was written, it is the slow machine of :data:`DEFAULT`. So ``backend="auto"`` decides
the same way from call to call, and nothing is timed inside of a forward.

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
        rates: Seconds for each weight of a layer in the cache, at :data:`ROWS`: of ``"dense"``, the faster of PyTorch's
            product and this compiler's, of ``"torch"``, PyTorch's alone, and of ``"labels 2"``, ``"labels 4"`` and
            ``"labels 8"``, ours.
        measured: Whether it was, here.
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
    measured: bool = True

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


def predict(m: int, n: int, k: int, alpha: int, roof: CpuRoof, itemsize: int = 4) -> dict[str, float]:
    """Seconds of a split of a parent ``[n, k]`` for ``m`` rows.

    Returns:
        ``"parent"``: the faster dense product; ``"wide"``: PyTorch's product with the wide dense weight, which is kept;
        ``"ours"``: the kernel on labels; ``"twin"``: the eager definition, which makes the wide weight in every call.
    """
    weights = n * k
    size = weights * itemsize
    index = weights * math.ceil(math.log2(max(alpha, 2))) / 8
    wide = alpha * weights * roof.rate("torch", m) + roof.memory(alpha * size)
    return {
        "parent": weights * roof.rate("dense", m) + roof.memory(size),
        "wide": wide,
        "ours": roof.call + weights * roof.labels(alpha, m) + roof.memory(size + index),
        # It reads labels, makes and reads an int64 table of them, and writes the wide weight twice.
        "twin": wide + (16 * weights + (2 * alpha + 1) * size) / roof.copy,
    }


DEFAULT = CpuRoof(
    "an unmeasured CPU",
    0,
    "",
    copy=10e9,
    read=8e9,
    flops=50e9,
    cache=4 << 20,
    call=200e-6,
    rates={
        "dense": (5e-11, 1.5e-10, 5e-10, 1.2e-9, 4.8e-9),
        "torch": (6e-11, 2e-10, 5e-10, 1.2e-9, 4.8e-9),
        "labels 2": (1e-10, 2e-10, 8e-10, 3.2e-9, 1.3e-8),
        "labels 4": (1.6e-10, 4e-10, 1.6e-9, 6.4e-9, 2.6e-8),
        "labels 8": (3.2e-10, 1.2e-9, 4.8e-9, 1.9e-8, 7.7e-8),
    },
    measured=False,
)
"""A slow machine, for deciding where nothing was measured: conservative figures, and no claim about any CPU."""


def path_here() -> Path:
    """Where the roof of this machine is kept: in ``XDG_CACHE_HOME``, or ``~/.cache``, by CPU, threads and PyTorch."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    words = "".join(c if c.isalnum() else "-" for c in f"{cpu_name()}-{torch.get_num_threads()}-{torch.__version__}")
    return folder / "fixed-parameter-expansion" / f"cpu-{words}.json"


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


def roof_here() -> CpuRoof:
    """The measured roof of this machine with its present number of threads, else :data:`DEFAULT`."""
    return _read(torch.get_num_threads())


@cache
def _read(threads: int) -> CpuRoof:
    try:
        given = json.loads(path_here().read_text())
        return CpuRoof(**{**given, "rates": {name: tuple(rates) for name, rates in given["rates"].items()}})
    except (OSError, ValueError, KeyError, TypeError):  # none, or one of another version
        return DEFAULT


def labels_win(m: int, n: int, k: int, alpha: int, itemsize: int, over: str) -> bool:
    """Whether the kernel on labels is predicted to be faster than ``"twin"`` or ``"wide"`` here."""
    if min(m, n, k) < 1:
        return False
    seconds = _predicted(m, n, k, alpha, itemsize, torch.get_num_threads())
    return seconds["ours"] < seconds[over]


@lru_cache(maxsize=4096)
def _predicted(m: int, n: int, k: int, alpha: int, itemsize: int, threads: int) -> dict[str, float]:
    return predict(m, n, k, alpha, roof_here(), itemsize)
