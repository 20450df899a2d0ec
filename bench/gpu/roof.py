"""The roofs of the device at hand: what a large copy, large GEMMs and empty kernels reach on it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from fpe.kernels.device import KNOWN
from fpe.kernels.model import PASSES, Sizes, layer_candidates
from fpe.kernels.roofs import ASSUMED, ASSUMED_LAUNCH, Roof

from ..latency.problems import DTYPES
from ..latency.suite import float32_as
from ..latency.timing import interleaved

COPIED = 1 << 30
"""Bytes of the copy on a GPU."""
GEMM = 8192
"""Sides of the square products on a GPU."""


def measure(device: str) -> dict[str, Any]:
    """Measures a roof, as :meth:`fpe.kernels.roofs.Roof.of` reads it.

    Copy bandwidth counts bytes read and written; the GEMMs are square and their operands random, as zeros run faster.
    """
    cuda = device == "cuda"
    source = torch.randint(127, (COPIED if cuda else 1 << 24,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.5)["copy"].median
    flops = {}
    size = GEMM if cuda else 256
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with float32_as(name):
            taken = interleaved({"gemm": partial(torch.matmul, a, b)}, device, seconds=0.3, rounds=(5, 30))["gemm"]
        flops[name] = 2 * size**3 / (taken.median / 1e3)
    return {
        **(_properties() if cuda else {"name": "CPU", "arch": 80, "l2": 1 << 20, "integer": 1e11}),
        "bandwidth": 2 * source.numel() / (copied / 1e3),
        "flops": flops,
        "launch_seconds": _launch_seconds() if cuda else ASSUMED_LAUNCH,
        "source": "measured",
    }


def _properties() -> dict[str, Any]:
    """What the driver says of the device; 64 bitwise instructions a clock and multiprocessor."""
    from triton.runtime import driver

    properties = torch.cuda.get_device_properties(0)
    arch = properties.major * 10 + properties.minor
    kilohertz = driver.active.utils.get_device_properties(0).get("sm_clock_rate", 1_500_000)
    return {
        "name": torch.cuda.get_device_name(),
        "arch": arch,
        "l2": getattr(properties, "L2_cache_size", KNOWN[90].l2),
        "integer": 64.0 * properties.multi_processor_count * kilohertz * 1e3,
    }


def _launch_seconds(launches: int = 200) -> float:
    """Time of an empty-handed kernel in a row of them, replayed as a CUDA graph."""
    x = torch.zeros(1, device="cuda")
    x.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            x.add_(1)
    return interleaved({"graph": graph.replay}, "cuda", seconds=0.2)["graph"].median / 1e3 / launches


def fit(rows: Iterable[Mapping[str, Any]], roof: Roof) -> dict[str, list[float]]:
    """Shares of the roof that each implementation reached, from measured rows.

    A row that the model says is limited by memory sets the share of bandwidth by how far its time was from the
    prediction, one limited by arithmetic that of arithmetic; the median over rows counts. Rows below 20 microseconds
    say more about launches and are left out.

    Args:
        rows: Of the latency suite; those of one pass whose ``implementation`` is known are used.
        roof: With the shares to be corrected.

    Returns:
        ``[bandwidth, arithmetic]`` by implementation, those alone of which there are rows of either kind.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.get("milliseconds", 0) > 0.02 and row.get("implementation") and row["pass"] in PASSES:
            sizes = Sizes(*(row[name] for name in ("M", "N", "K", "alpha", "structure", "dtype")))
            if row["block"]:
                bn, bk = map(int, row["block"].split("x"))
                sizes = replace(sizes, block=(bn, bk))
            (candidates,) = layer_candidates((row["pass"],), sizes, roof)
            predicted = next(c for c in candidates if c.name == row["implementation"])
            ratio = 1e3 * predicted.seconds / row["milliseconds"]
            found.setdefault((predicted.name, predicted.limited_by), []).append(ratio)
    shares = {}
    for name in ASSUMED:
        factors = [found.get((name, limit)) for limit in ("memory", "arithmetic")]
        if any(factors):
            pairs = zip(roof.shares[name], factors, strict=True)
            shares[name] = [float(f"{share * median(factor):.4g}") if factor else share for share, factor in pairs]
    return shares
