"""What is measured on this machine's CPU: what it can do, and what a layer costs on it.

What the machine can do and what the layers cost is measured in the same rounds, so that other work on the machine slows
both. Ratios are those of medians. The model says what a product takes where nothing else runs: it is made of the
fastest of all times, and judged by the fastest. The parent is the faster of two dense products: PyTorch's, and the
package's own kernel without labels, which is what the same compiler makes of a dense layer.
"""

import os
import time
from collections.abc import Callable, Hashable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from fpe.kernels import BlockLayout, PackedLabels, block_matmul, split_matmul
from fpe.kernels.cpu import why_not_cpu
from fpe.kernels.here import ALPHAS, ROWS, CpuRoof, cpu_name, predict

from ..results import Results, provenance

BLOCK = (64, 64)
TURNS = 20
"""Times that a call is made in a round, at most."""
SHARE = 0.4
"""Seconds of a round after which a group's calls take no more turns; they have one at least."""


class Case(NamedTuple):
    """A layer and the children that its parent's neurons have."""

    n: int
    k: int
    alpha: int
    rows: tuple[int, ...]


class Plan(NamedTuple):
    """What is measured.

    Attributes:
        cases: The layers.
        copy: Bytes of a copy that no cache holds.
        square: Side of the matrices whose product is timed.
        small: A layer that stays in a cache, for rates.
        large: One that does not, for the bandwidth at which weights are read.
        alphas: Children at which rates are measured.
    """

    cases: tuple[Case, ...]
    copy: int
    square: int
    small: tuple[int, int]
    large: tuple[int, int]
    alphas: tuple[int, ...]


BEYOND, INSIDE = (14336, 4096), (1024, 1024)
FULL = Plan(
    (Case(*BEYOND, 2, ROWS), Case(*BEYOND, 4, (1, 4, 16)), Case(*INSIDE, 2, ROWS)),
    *(256 << 20, 1024, (2048, 1024), (4096, 8192), ALPHAS),
)
QUICK = Plan((Case(256, 384, 2, (1, 4)),), 1 << 20, 128, (128, 128), (256, 256), ALPHAS[:1])
"""Sizes on which to see that it runs; what they say of a machine is nothing."""


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


class Group(NamedTuple):
    """Calls that take turns.

    Attributes:
        calls: By name.
        warm: Whether each is made once untimed before it is timed, so that it finds what it reads in a cache.
    """

    calls: Mapping[str, Callable[[], object]]
    warm: bool = False


Key = TypeVar("Key", bound=Hashable)


def in_rounds(groups: Mapping[Key, Group], rounds: int) -> dict[tuple[Key, str], np.ndarray]:
    """Times the calls of all groups in every round, those of a group in turns.

    Returns:
        Seconds of each time that a call was made, by its group's and its own name.
    """
    for group in groups.values():  # the first time fills allocators
        for call in group.calls.values():
            call()
    taken: dict[tuple[Key, str], list[float]] = {(key, name): [] for key, g in groups.items() for name in g.calls}
    for _ in range(rounds):
        for key, group in groups.items():
            begun = time.perf_counter()
            for turn in range(TURNS):
                if turn and time.perf_counter() - begun > SHARE:
                    break
                for name, call in group.calls.items():
                    if group.warm:
                        call()
                    start = time.perf_counter()
                    call()
                    taken[key, name].append(time.perf_counter() - start)
    return {which: np.array(each) for which, each in taken.items()}


def why_not() -> str | None:
    """What keeps this machine from being measured, in words."""
    return why_not_cpu(torch.empty(0))


def _random(m: int, k: int, seed: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


def roof_groups(plan: Plan, seed: int) -> dict[Hashable, Group]:
    """What says what this CPU can do."""
    source, target, square = (
        torch.zeros(plan.copy // 4),
        torch.zeros(plan.copy // 4),
        _random(plan.square, plan.square, seed),
    )
    tiny, large = Layer.of(128, 128, 2, seed), Layer.of(*plan.large, 2, seed, wide=False)
    layers = {alpha: Layer.of(*plan.small, alpha, seed, wide=False) for alpha in plan.alphas}
    groups: dict[Hashable, Group] = {
        "copy": Group({"copy": lambda: target.copy_(source)}),
        "gemm": Group({"gemm": lambda: square @ square}),
        "call": Group({"call": tiny.calls(_random(1, 128, seed))["ours"]}, warm=True),
        "read": Group(_dense(large, _random(1, plan.large[1], seed))),
    }
    for m in ROWS:
        x = _random(m, plan.small[1], seed)
        ours = {f"labels {alpha}": layer.calls(x)["ours"] for alpha, layer in layers.items()}
        groups[m] = Group({**_dense(layers[plan.alphas[0]], x), **ours}, warm=True)
    return groups


def _dense(layer: Layer, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The two products with the parent, named as the roof has their rates."""
    calls = layer.calls(x)
    return {name: calls[f"parent, {name}"] for name in ("torch", "compiled")}


def roof_from(plan: Plan, seconds: Mapping[tuple[Hashable, str], np.ndarray]) -> CpuRoof:
    """The roof, from the times of :func:`roof_groups`."""
    least = {which: float(each.min()) for which, each in seconds.items()}
    call, weights = least["call", "call"], plan.small[0] * plan.small[1]

    def rate(name: str, m: int) -> float:
        took = least[m, name]
        return (took if name == "torch" else max(took - call, 0.1 * took)) / weights

    rates = {
        name: tuple(rate(name, m) for m in ROWS)
        for name in ("torch", "compiled", *(f"labels {a}" for a in plan.alphas))
    }
    n, k = plan.large
    took = min(least["read", "torch"], least["read", "compiled"])
    cached = min(n * k * rates["torch"][0], call + n * k * rates["compiled"][0])
    return CpuRoof(
        cpu_name(),
        torch.get_num_threads(),
        torch.__version__,
        copy=2 * plan.copy / least["copy", "copy"],
        read=4 * n * k / max(took - cached, 0.1 * took),
        flops=2 * plan.square**3 / least["gemm", "gemm"],
        cache=cache_bytes(),
        call=call,
        rates=rates,
    )


def cache_bytes() -> int:
    """Bytes of the largest cache that a core reads through; 4 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) << (20 if text.endswith("M") else 10))
    return max(sizes, default=4 << 20)


def layer_groups(plan: Plan, seed: int) -> dict[tuple[Case, int], Group]:
    """The layers at each number of rows."""
    groups: dict[tuple[Case, int], Group] = {}
    for case in plan.cases:
        layer, inside = Layer.of(case.n, case.k, case.alpha, seed), 4 * case.n * case.k < cache_bytes()
        groups |= {(case, m): Group(layer.calls(_random(m, case.k, seed)), inside) for m in case.rows}
    return groups


def _row(case: Case, m: int, name: str, seconds: np.ndarray) -> dict[str, Any]:
    """A row of the results: what one provider took."""
    low, median, high = (1e3 * float(q) for q in np.quantile(seconds, (0.2, 0.5, 0.8)))
    dense, index = 4 * case.n * case.k, case.n * case.k * (case.alpha - 1).bit_length() // 8
    sizes = {"ours": dense + index, "wide": case.alpha * dense}
    return {
        "provider": name,
        "M": m,
        "N": case.n,
        "K": case.k,
        "alpha": case.alpha,
        "dtype": "fp32",
        "milliseconds": median,
        "low": low,
        "high": high,
        "fastest": 1e3 * float(seconds.min()),
        "samples": len(seconds),
        "bytes": sizes.get(name, dense),
    }


def check(alphas: tuple[int, ...] = ALPHAS, seed: int = 0) -> None:
    """Raises unless the kernels agree with float64 truth on a small layer: a wrong kernel gets no time.

    They are compiled here, before anything is timed.

    Raises:
        RuntimeError: They do not agree.
    """
    for alpha, m in product(alphas, (1, 4)):
        layer, x = Layer.of(96, 192, alpha, seed), _random(m, 192, seed)
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


@torch.no_grad()
def run(quick: bool = False, rounds: int = 3, seed: int = 0) -> tuple[CpuRoof, Results]:
    """Measures what this CPU can do, and every layer.

    Args:
        quick: Small layers, to see that it runs.
        rounds: In which everything is measured.
        seed: Of weights and labels.
    """
    plan = QUICK if quick else FULL
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    check(plan.alphas, seed)
    layers = layer_groups(plan, seed)
    groups = roof_groups(plan, seed)
    groups.update(layers.items())
    seconds = in_rounds(groups, rounds)
    found = roof_from(plan, seconds)
    settings = {
        "cpu": found.name,
        "threads": found.threads,
        "rounds": rounds,
        "load": load,
        "copy": found.copy,
        "read": found.read,
        "flops": found.flops,
        "cache": found.cache,
        "call": found.call,
        "rates": {name: list(rates) for name, rates in found.rates.items()},
    }
    device = {**provenance(), "device": f"{found.name}, {found.threads} threads"}
    rows = [_row(*key, name, seconds[key, name]) for key, group in layers.items() for name in group.calls]
    return found, Results("here", settings, rows, device)


def roof_of(results: Results) -> CpuRoof:
    """The roof that a results file was measured with."""
    s = results.settings
    rates = {name: tuple(each) for name, each in s["rates"].items()}
    version = results.provenance["torch"]
    return CpuRoof(s["cpu"], s["threads"], version, s["copy"], s["read"], s["flops"], s["cache"], s["call"], rates)


def compared(results: Results) -> list[dict[str, Any]]:
    """A row for each layer, children and number of rows: times, ratios, and the model's error.

    The parent is the faster of the two dense products. ``error`` is the prediction over the fastest time, less one.
    """
    found: list[dict[str, Any]] = []
    by_point: dict[tuple, dict[str, Any]] = {}
    for row in results.rows:
        by_point.setdefault((row["N"], row["K"], row["alpha"], row["M"]), {})[row["provider"]] = row
    for (n, k, alpha, m), rows in by_point.items():
        parent = min(("parent, torch", "parent, compiled"), key=lambda name: rows[name]["milliseconds"])
        times = {name: rows[name]["milliseconds"] for name in ("wide", "ours", "ours, blocks")}
        times["parent"] = rows[parent]["milliseconds"]
        fastest = {name: rows[name]["fastest"] for name in ("wide", "ours")}
        fastest["parent"] = min(rows[f"parent, {name}"]["fastest"] for name in ("torch", "compiled"))
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
                "error": {name: 1e3 * predicted[name] / fastest[name] - 1 for name in ("parent", "wide", "ours")},
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
