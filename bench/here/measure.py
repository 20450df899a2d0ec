"""What is measured on this machine's CPU: what it can do, and what a layer costs on it.

Everything of one case takes turns in one run. The parent is the faster of two dense products: PyTorch's, and the
package's own kernel without labels, which is what the same compiler makes of a dense layer.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from fpe.kernels import BlockLayout, PackedLabels, block_matmul, split_matmul
from fpe.kernels.cpu import why_not_cpu
from fpe.kernels.here import ALPHAS, DEFAULT, ROWS, CpuRoof, cpu_name, predict

from ..latency.timing import interleaved
from ..results import Results, provenance

COPY = 256 << 20
"""Bytes of a copy that no cache holds."""
SMALL, LARGE = (2048, 1024), (4096, 8192)
"""Layers on which rates are measured: one that stays in a cache, and one that does not."""
BLOCK = (64, 64)
ENOUGH = 5
"""Repeats of a measurement of the roof; the fastest counts, as nothing makes a machine faster than it is."""


class Case(NamedTuple):
    """A layer and the children that its parent's neurons have."""

    n: int
    k: int
    alpha: int
    rows: tuple[int, ...]


BEYOND, INSIDE = (14336, 4096), (1024, 1024)
CASES = (Case(*BEYOND, 2, ROWS), Case(*BEYOND, 4, (1, 4, 16)), Case(*INSIDE, 2, ROWS))
QUICK = (Case(256, 384, 2, (1,)),)
"""A layer on which to see that it runs."""


class Layer(NamedTuple):
    """An expanded layer in each of its forms."""

    parent: Tensor
    only: PackedLabels
    labels: PackedLabels
    wide: Tensor | None
    values: Tensor
    layout: BlockLayout

    @classmethod
    def of(cls, n: int, k: int, alpha: int, seed: int, wide: bool = True) -> "Layer":
        """Random weights and labels; blocks as many as the parent has, each at one child."""
        generator = torch.Generator().manual_seed(seed)
        parent = torch.randn(n, k, generator=generator)
        table = torch.randint(alpha, (n, k), generator=generator, dtype=torch.uint8)
        dense = None
        if wide:
            dense = torch.zeros(alpha, n, k)
            for child in range(alpha):
                torch.where(table == child, parent, dense[child], out=dense[child])
            dense = dense.flatten(0, 1)
        tiles = -(-n // BLOCK[0]), -(-k // BLOCK[1])
        owner = torch.randint(alpha, tiles, generator=generator)
        mask = (owner == torch.arange(alpha)[:, None, None]).flatten(0, 1)
        layout = BlockLayout.from_mask(mask, (alpha * tiles[0] * BLOCK[0], k), BLOCK)
        values = torch.randn(layout.values_shape, generator=generator)
        only = PackedLabels.pack(torch.zeros_like(table), 1)
        return cls(parent, only, PackedLabels.pack(table, alpha), dense, values, layout)

    def calls(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        """What is timed, by name."""
        found: dict[str, Callable[[], Tensor]] = {
            "parent, torch": lambda: linear(x, self.parent),
            "parent, compiled": lambda: split_matmul(x, self.parent, self.only, 1, backend="cpu"),
            "ours": lambda: split_matmul(x, self.parent, self.labels, self.labels.alpha, backend="cpu"),
            "ours, blocks": lambda: block_matmul(x, self.values, self.layout, backend="cpu"),
        }
        wide = self.wide
        return found if wide is None else {**found, "wide": lambda: linear(x, wide)}


def fastest(call: Callable[[], object], repeats: int = ENOUGH) -> float:
    """Seconds of the fastest of several calls, after two that warm up."""
    taken = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken[2:])


def _copy() -> Callable[[], Tensor]:
    source, target = torch.zeros(COPY // 4), torch.zeros(COPY // 4)
    return lambda: target.copy_(source)


def why_not() -> str | None:
    """What keeps this machine from being measured, in words."""
    return why_not_cpu(torch.empty(0))


@torch.no_grad()
def roof(seed: int = 0) -> CpuRoof:
    """Measures what this CPU can do, in a second or two once the kernels are compiled."""
    copy = 2 * COPY / fastest(_copy())
    square = torch.randn(1024, 1024)
    flops = 2 * 1024**3 / fastest(lambda: square @ square)
    tiny = Layer.of(128, 128, 2, seed)
    call = fastest(tiny.calls(torch.randn(1, 128))["ours"], 50)
    weights = SMALL[0] * SMALL[1]
    rates: dict[str, list[float]] = {name: [] for name in ("dense", "torch", *(f"labels {a}" for a in ALPHAS))}
    layers = {alpha: Layer.of(*SMALL, alpha, seed, wide=False) for alpha in ALPHAS}
    for m in ROWS:
        x = torch.randn(m, SMALL[1])
        calls = layers[ALPHAS[0]].calls(x)
        alone = fastest(calls["parent, torch"])
        rates["torch"].append(alone / weights)
        rates["dense"].append(min(alone, max(fastest(calls["parent, compiled"]) - call, 0.1 * alone)) / weights)
        for alpha, layer in layers.items():
            took = fastest(layer.calls(x)["ours"])
            rates[f"labels {alpha}"].append(max(took - call, 0.1 * took) / weights)
    large = Layer.of(*LARGE, 2, seed, wide=False).calls(torch.randn(1, LARGE[1]))
    took = min(fastest(large["parent, torch"]), fastest(large["parent, compiled"]))
    size = 4 * LARGE[0] * LARGE[1]
    read = size / max(took - rates["dense"][0] * LARGE[0] * LARGE[1], 0.1 * took)
    names = {name: tuple(found) for name, found in rates.items()}
    return CpuRoof(
        cpu_name(), torch.get_num_threads(), torch.__version__, copy, read, flops, cache_bytes(), call, names
    )


def cache_bytes() -> int:
    """Bytes of the largest cache that a core reads through; 4 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) << (20 if text.endswith("M") else 10))
    return max(sizes, default=4 << 20)


def points(case: Case, found: CpuRoof, seconds: float, seed: int) -> list[dict[str, Any]]:
    """Times of a layer at each number of rows: a row for each provider."""
    layer, rows = Layer.of(case.n, case.k, case.alpha, seed), []
    sizes = {
        "parent, torch": layer.parent.nbytes,
        "parent, compiled": layer.parent.nbytes,
        "ours": layer.parent.nbytes + layer.labels.planes.nbytes,
        "ours, blocks": layer.values.nbytes + layer.layout.cols.nbytes,
        "wide": case.alpha * layer.parent.nbytes,
    }
    for m in case.rows:
        x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            times = interleaved(layer.calls(x), "cpu", seconds, (5, 60))
        for name, timing in times.items():
            rows.append(
                {
                    "provider": name,
                    "M": m,
                    "N": case.n,
                    "K": case.k,
                    "alpha": case.alpha,
                    "dtype": "fp32",
                    "milliseconds": timing.median,
                    "low": timing.low,
                    "high": timing.high,
                    "samples": timing.samples,
                    "bytes": sizes[name],
                }
            )
    return rows


def check(seed: int = 0) -> None:
    """Raises unless the kernels agree with float64 truth on a small layer: a wrong kernel gets no time.

    Raises:
        RuntimeError: They do not.
    """
    layer = Layer.of(96, 192, 2, seed)
    x = torch.randn(1, 192, generator=torch.Generator().manual_seed(seed))
    assert layer.wide is not None
    truths: Mapping[str, Tensor] = {
        "ours": x.double() @ layer.wide.double().T,
        "parent, compiled": x.double() @ layer.parent.double().T,
        "ours, blocks": x.double() @ layer.layout.to_dense(layer.values).double().T,
    }
    for name, truth in truths.items():
        error = float((layer.calls(x)[name]().flatten(1).double() - truth).abs().max() / truth.abs().max())
        if not error < 1e-5:
            raise RuntimeError(f"fpe here: {name} is wrong by {error:.1e} of the largest result; nothing was timed")


def run(quick: bool = False, seconds: float = 1.5, seed: int = 0) -> tuple[CpuRoof, Results]:
    """Measures the roof and every case.

    Args:
        quick: A small layer beside the roof of no machine, to see that it runs.
        seconds: To spend on each number of rows of a layer.
        seed: Of weights and labels.
    """
    cases = QUICK if quick else CASES
    check(seed)
    found = replace(DEFAULT, threads=torch.get_num_threads()) if quick else roof(seed)
    settings = {
        "cpu": found.name,
        "threads": found.threads,
        "seconds": seconds,
        "copy": found.copy,
        "read": found.read,
        "flops": found.flops,
        "cache": found.cache,
        "call": found.call,
        "rates": {name: list(rates) for name, rates in found.rates.items()},
    }
    device = {**provenance(), "device": f"{found.name}, {found.threads} threads"}
    rows = [row for case in cases for row in points(case, found, seconds, seed)]
    return found, Results("here", settings, rows, device)


def roof_of(results: Results) -> CpuRoof:
    """The roof that a results file was measured with."""
    s = results.settings
    rates = {name: tuple(each) for name, each in s["rates"].items()}
    version = results.provenance["torch"]
    return CpuRoof(s["cpu"], s["threads"], version, s["copy"], s["read"], s["flops"], s["cache"], s["call"], rates)


def compared(results: Results) -> list[dict[str, Any]]:
    """A row for each layer, children and number of rows: times, ratios, and the model's error.

    The parent is the faster of the two dense products. ``error`` is the prediction over the measurement, less one.
    """
    found: list[dict[str, Any]] = []
    by_point: dict[tuple, dict[str, Any]] = {}
    for row in results.rows:
        by_point.setdefault((row["N"], row["K"], row["alpha"], row["M"]), {})[row["provider"]] = row
    for (n, k, alpha, m), rows in by_point.items():
        parent = min(("parent, torch", "parent, compiled"), key=lambda name: rows[name]["milliseconds"])
        times = {name: rows[name]["milliseconds"] for name in ("wide", "ours", "ours, blocks")}
        times["parent"] = rows[parent]["milliseconds"]
        predicted = predict(m, n, k, alpha, roof_of(results))
        found.append(
            {
                "N": n,
                "K": k,
                "alpha": alpha,
                "M": m,
                "parent is": parent.partition(", ")[2],
                "milliseconds": times,
                "spread": {name: (rows[name]["low"], rows[name]["high"]) for name in ("wide", "ours")},
                "over parent": times["ours"] / times["parent"],
                "over wide": times["ours"] / times["wide"],
                "blocks over parent": times["ours, blocks"] / times["parent"],
                "share of copy": rows["ours"]["bytes"] / times["ours"] * 1e3 / results.settings["copy"],
                "predicted": {name: 1e3 * predicted[name] for name in ("parent", "wide", "ours")},
                "error": {name: 1e3 * predicted[name] / times[name] - 1 for name in ("parent", "wide", "ours")},
            }
        )
    return found


def crossovers(results: Results, tolerance: float = 0.10) -> list[dict[str, Any]]:
    """Up to how many rows a layer costs its parent's time and a tolerance: measured, and predicted at the same rows."""
    found = []
    rows = compared(results)
    for n, k, alpha in dict.fromkeys((row["N"], row["K"], row["alpha"]) for row in rows):
        own = [row for row in rows if (row["N"], row["K"], row["alpha"]) == (n, k, alpha)]
        held = {"measured": 0, "predicted": 0}
        for kind, row in product(held, own):
            ratio = row["over parent"]
            if kind == "predicted":
                ratio = row["predicted"]["ours"] / row["predicted"]["parent"]
            if ratio <= 1 + tolerance:
                held[kind] = row["M"]
        found.append({"N": n, "K": k, "alpha": alpha, **held})
    return found


def errors(results: Results, most: int = 16) -> np.ndarray:
    """The model's relative errors up to a number of rows."""
    return np.array([each for row in compared(results) if row["M"] <= most for each in row["error"].values()])
