"""What is measured on this machine's CPU: what it can do, and what a layer costs on it.

What the machine can do and what the layers cost is measured in the same rounds, so that other work on the machine slows
both. Ratios are those of medians. The model says what a product takes where nothing else runs: it is made of the
fastest of all times, and judged by the fastest. The parent is the faster of two dense products: PyTorch's, and the
package's own kernel without labels, which is what the same compiler makes of a dense layer.
"""

import json
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from fpe.kernels import (
    Bitmap,
    BlockLayout,
    PackedLabels,
    SeededLabels,
    block_matmul,
    masked_matmul,
    split_matmul,
    split_matmul_eager,
)
from fpe.kernels.cpu import threads_for, why_not_cpu
from fpe.kernels.here import ALPHAS, BITS_KEPT, DENSITY, FEW, LABELS, ROWS, CpuRoof, cpu_name, predict, roof_from

from ..results import Results, provenance

BLOCK = (64, 64)
TURNS = 20
"""Times that a call is made in a round, at most."""
SHARE = 0.06
"""Seconds of a round for each of a group's calls, after which they take no more turns. They have one in the first round
at least; what is spent beyond is taken from the rounds that follow."""

WARM = 8
"""Untimed calls, one after the other, after which what a call reads is in a cache: a large cache keeps it at the second
reading or later."""
WARMING = 5e-3
"""Seconds after which no more of them are begun: a longer call has more to do than to read."""


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
        large: One that does not, for what memory adds.
        alphas: Children at which rates are measured.
    """

    cases: tuple[Case, ...]
    copy: int
    square: int
    small: tuple[int, int]
    large: tuple[int, int]
    alphas: tuple[int, ...]


TINY = (128, 128)
"""A layer whose call is all that takes time."""
BEYOND, INSIDE = (14336, 4096), (1024, 1024)
FULL = Plan(
    (Case(*BEYOND, 2, ROWS), Case(*BEYOND, 4, FEW), Case(*INSIDE, 2, ROWS)),
    *(256 << 20, 1024, (768, 1024), (16384, 4096), ALPHAS),
)
QUICK = Plan((Case(256, 384, 2, (1, 4)),), 1 << 20, 128, (128, 128), (256, 256), ALPHAS[:1])
"""Sizes on which to see that it runs; what they say of a machine is nothing."""


class Layer(NamedTuple):
    """An expanded layer in each of its forms.

    Attributes:
        parent: The dense weight.
        only: Labels of one child, with which the kernels multiply by the parent.
        labels: Of its children.
        seed: Labels of a seed, as many children.
        wide: The dense weight of all children.
        values: Of blocks, as many as the parent has.
        layout: Each block at one child.
        packed: Kept values of half of the parent's entries.
        kept: Which half.
    """

    parent: Tensor
    only: PackedLabels
    labels: PackedLabels
    seed: SeededLabels
    wide: Tensor
    values: Tensor
    layout: BlockLayout
    packed: Tensor
    kept: Bitmap

    @classmethod
    def of(cls, n: int, k: int, alpha: int, seed: int) -> "Layer":
        """Random weights, labels, blocks and kept entries."""
        generator = torch.Generator().manual_seed(seed)
        parent = torch.randn(n, k, generator=generator)
        table = torch.randint(alpha, (n, k), generator=generator, dtype=torch.uint8)
        wide = torch.zeros(alpha, n, k)
        for child in range(alpha):
            torch.where(table == child, parent, wide[child], out=wide[child])
        tiles = -(-n // BLOCK[0]), -(-k // BLOCK[1])
        owner = torch.randint(alpha, tiles, generator=generator)
        mask = (owner == torch.arange(alpha)[:, None, None]).flatten(0, 1)
        layout = BlockLayout.from_mask(mask, (alpha * tiles[0] * BLOCK[0], k), BLOCK)
        values = torch.randn(layout.values_shape, generator=generator)
        of_seed = SeededLabels.of(seed, (n, k), alpha)
        labels = PackedLabels.pack(table, alpha)
        packed, kept = _kept(parent, generator)
        return cls(parent, _only(parent), labels, of_seed, wide.flatten(0, 1), values, layout, packed, kept)

    def calls(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        """What is timed, by name."""
        alpha = self.labels.alpha
        found: dict[str, Callable[[], Tensor]] = {
            "parent, torch": lambda: linear(x, self.parent),
            "parent, compiled": lambda: split_matmul(x, self.parent, self.only, 1, backend="cpu"),
            "ours": lambda: split_matmul(x, self.parent, self.labels, alpha, backend="cpu"),
            "ours, blocks": lambda: block_matmul(x, self.values, self.layout, backend="cpu"),
            "wide": lambda: linear(x, self.wide),
        }
        if len(x) <= FEW[-1]:
            found["ours, seeded"] = lambda: split_matmul(x, self.parent, self.seed, alpha, backend="cpu")
            found["ours, bitmap"] = lambda: masked_matmul(x, self.packed, self.kept, backend="cpu")
        return found


def _only(parent: Tensor) -> PackedLabels:
    """Labels of an only child."""
    return PackedLabels.pack(torch.zeros(parent.shape, dtype=torch.uint8), 1)


def _kept(parent: Tensor, generator: torch.Generator) -> tuple[Tensor, Bitmap]:
    """Kept values of a part of a weight's entries, and which they are."""
    kept = Bitmap.pack(torch.rand(parent.shape, generator=generator) < DENSITY)
    return kept.from_dense(parent), kept


Timed = tuple[Hashable, str]
"""What a call belongs to, and its name there."""


class Group(NamedTuple):
    """Calls that take turns, so that one that is predicted and what it is predicted from find the machine alike.

    Attributes:
        calls: By what they belong to and their name.
        warm: Whether each finds what it reads in a cache, by untimed calls before it is timed.
    """

    calls: Mapping[Timed, Callable[[], object]]
    warm: bool = False


def in_rounds(groups: Sequence[Group], rounds: int) -> dict[Timed, np.ndarray]:
    """Times the calls of all groups in every round, those of a group in turns, shuffled anew in each.

    The order counts: PyTorch's threads keep their cores busy for a while after a product of its own, and what comes
    next takes longer.

    Returns:
        Seconds of each time that a call was made.
    """
    for group in groups:  # the first time fills allocators
        for call in group.calls.values():
            call()
    taken: dict[Timed, list[float]] = {which: [] for group in groups for which in group.calls}
    spent = [0.0] * len(groups)
    shuffle = Random(0).shuffle
    for done in range(rounds):
        for i, group in enumerate(groups):
            turn = 0
            while turn < TURNS and spent[i] < (done + 1) * SHARE * len(group.calls):
                begun = time.perf_counter()
                turns = list(group.calls.items())
                shuffle(turns)
                for which, call in turns:
                    if group.warm:
                        _warm(call)
                    start = time.perf_counter()
                    call()
                    taken[which].append(time.perf_counter() - start)
                spent[i] += time.perf_counter() - begun
                turn += 1
    return {which: np.array(each) for which, each in taken.items()}


def _warm(call: Callable[[], object]) -> None:
    begun = time.perf_counter()
    for _ in range(WARM):
        call()
        if time.perf_counter() - begun > WARMING:
            return


def why_not() -> str | None:
    """Returns why this machine cannot be measured, or ``None`` if it can."""
    return why_not_cpu(torch.empty(0))


def _random(m: int, k: int, seed: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


def groups_of(plan: Plan, seed: int) -> list[Group]:
    """What is timed: what says what this CPU can do, and the layers.

    A layer takes turns with the products that it is predicted from: those with as many rows, in the caches
    or beyond them.
    """
    source, target = torch.zeros(plan.copy // 4), torch.zeros(plan.copy // 4)
    square = _random(plan.square, plan.square, seed)
    groups = [
        Group({("copy", "copy"): lambda: target.copy_(source)}),
        Group({("gemm", "gemm"): lambda: square @ square}),
        Group(_named(("calls", 1), _products(TINY, plan.alphas, seed)(_random(1, TINY[1], seed))), warm=True),
    ]
    layers = {case: Layer.of(case.n, case.k, case.alpha, seed) for case in plan.cases}
    for part, sizes, measured in (("rates", plan.small, ROWS), ("beyond", plan.large, FEW)):
        products, warm = _products(sizes, plan.alphas, seed), part == "rates"
        for m in ROWS:
            calls = _named((part, m), products(_random(m, sizes[1], seed))) if m in measured else {}
            for case, layer in layers.items():
                if m in case.rows and (4 * case.n * case.k < cache_bytes()) == warm:
                    calls |= _named((case, m), layer.calls(_random(m, case.k, seed)))
            if calls:
                groups.append(Group(calls, warm))
    return groups


def _named(what: Hashable, calls: Mapping[str, Callable[[], Tensor]]) -> dict[Timed, Callable[[], Tensor]]:
    return {(what, name): call for name, call in calls.items()}


def _products(
    sizes: tuple[int, int], alphas: tuple[int, ...], seed: int
) -> Callable[[Tensor], dict[str, Callable[[], Tensor]]]:
    """What the roof times of a layer, by the names that the roof has for it."""
    generator = torch.Generator().manual_seed(seed)
    parent = torch.randn(sizes, generator=generator)
    only, (packed, kept) = _only(parent), _kept(parent, generator)
    labels = {alpha: PackedLabels.pack(SeededLabels.of(seed, sizes, alpha).unpack(), alpha) for alpha in alphas}
    of_seed = SeededLabels.of(seed, sizes, ALPHAS[0])

    def products(x: Tensor) -> dict[str, Callable[[], Tensor]]:
        def on_labels(alpha: int) -> Callable[[], Tensor]:
            return lambda: split_matmul(x, parent, labels[alpha], alpha, backend="cpu")

        return {
            "torch": lambda: linear(x, parent),
            "compiled": lambda: split_matmul(x, parent, only, 1, backend="cpu"),
            "kept": lambda: masked_matmul(x, packed, kept, backend="cpu"),
            "seeded": lambda: split_matmul(x, parent, of_seed, of_seed.alpha, backend="cpu"),
            **{LABELS[alpha]: on_labels(alpha) for alpha in alphas},
        }

    return products


def roof_of_times(plan: Plan, seconds: Mapping[Timed, np.ndarray]) -> CpuRoof:
    """The roof, from the times of :func:`groups_of`."""
    least = {which: float(each.min()) for which, each in seconds.items()}
    threads = torch.get_num_threads()
    names = ("torch", "compiled", "kept", "seeded", *(LABELS[alpha] for alpha in plan.alphas))
    calls = {"torch": least[("calls", 1), "torch"], "kernels": least[("calls", 1), LABELS[plan.alphas[0]]]}
    (small_n, small_k), (large_n, large_k) = plan.small, plan.large
    weights = small_n * small_k

    def rate(name: str, m: int) -> float:
        took = least[("rates", m), name]
        shared = 1 if name == "torch" else threads_for(weights * m)
        return max(took - calls["torch" if name == "torch" else "kernels"], 0.1 * took) * shared / weights

    rates = {name: tuple(rate(name, m) for m in ROWS) for name in names}
    index = {"kept": DENSITY - 1 + BITS_KEPT / 32, **{LABELS[a]: (a - 1).bit_length() / 32 for a in plan.alphas}}
    cached = CpuRoof(
        cpu_name(),
        threads,
        torch.__version__,
        copy=2 * plan.copy / least["copy", "copy"],
        read=4 * large_n * large_k / min(least[("beyond", 1), name] for name in ("torch", "compiled")),
        flops=2 * plan.square**3 / least["gemm", "gemm"],
        cache=cache_bytes(),
        calls=calls,
        rates=rates,
        beyond={name: (0.0,) * len(FEW) for name in names},
    )

    def more(name: str, m: int) -> float:
        size = 4 * large_n * large_k * (1 + index.get(name, 0.0))
        return (least[("beyond", m), name] - cached.seconds(name, m, large_n * large_k, size)) / size

    return replace(cached, beyond={name: tuple(more(name, m) for m in FEW) for name in names})


def cache_bytes() -> int:
    """Bytes of the largest cache that a core reads through; 4 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) << (20 if text.endswith("M") else 10))
    return max(sizes, default=4 << 20)


def _row(case: Case, m: int, name: str, seconds: np.ndarray) -> dict[str, Any]:
    """A row of the results: what one provider took."""
    low, median, high = (1e3 * float(q) for q in np.quantile(seconds, (0.2, 0.5, 0.8)))
    weights = case.n * case.k
    dense, index = 4 * weights, weights * (case.alpha - 1).bit_length() // 8
    bitmap = int(weights * (4 * DENSITY + BITS_KEPT / 8))
    sizes = {"ours": dense + index, "wide": case.alpha * dense, "ours, bitmap": bitmap}
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
        truths: Mapping[str, Tensor] = {
            "ours": x.double() @ layer.wide.double().T,
            "parent, compiled": x.double() @ layer.parent.double().T,
            "ours, blocks": x.double() @ layer.layout.to_dense(layer.values).double().T,
            "ours, seeded": split_matmul_eager(x.double(), layer.parent.double(), layer.seed, alpha).flatten(1),
            "ours, bitmap": x.double() @ layer.kept.to_dense(layer.packed).double().T,
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
    seconds = in_rounds(groups_of(plan, seed), rounds)
    found = roof_of_times(plan, seconds)
    facts = {name: fact for name, fact in asdict(found).items() if name not in ("name", "torch")}
    settings = {"cpu": found.name, "rounds": rounds, "load": load, **json.loads(json.dumps(facts))}
    device = {**provenance(), "device": f"{found.name}, {found.threads} threads"}
    rows = [
        _row(case, m, name, times)
        for case, m in ((case, m) for case in plan.cases for m in case.rows)
        for (of, name), times in seconds.items()
        if of == (case, m)
    ]
    return found, Results("here", settings, rows, device)


def roof_of(results: Results) -> CpuRoof:
    """The roof that a results file was measured with."""
    found = {**results.settings, "name": results.settings["cpu"], "torch": results.provenance["torch"]}
    return roof_from({field.name: found[field.name] for field in fields(CpuRoof)})


def compared(results: Results) -> list[dict[str, Any]]:
    """A row for each layer, children and number of rows: times, ratios, and the model's error.

    The parent is the faster of the two dense products. ``error`` is the prediction over the fastest time, less one.
    """
    found: list[dict[str, Any]] = []
    by_point: dict[tuple, dict[str, Any]] = {}
    for row in results.rows:
        by_point.setdefault((row["N"], row["K"], row["alpha"], row["M"]), {})[row["provider"]] = row
    roof = roof_of(results)
    for (n, k, alpha, m), rows in by_point.items():
        parent = min(("parent, torch", "parent, compiled"), key=lambda name: rows[name]["milliseconds"])
        rows["parent"] = rows[parent]
        times = {name: row["milliseconds"] for name, row in rows.items()}
        fastest = {name: row["fastest"] for name, row in rows.items()}
        fastest["parent"] = min(fastest["parent, torch"], fastest["parent, compiled"])
        predicted = {name: 1e3 * s for name, s in predict(m, n, k, alpha, roof).items() if name != "twin"}
        if "ours, bitmap" in rows:
            predicted["ours, seeded"] = 1e3 * predict(m, n, k, alpha, roof, seeded=True)["ours"]
            predicted["ours, bitmap"] = 1e3 * predict(m, n, k, 1, roof, density=DENSITY)["ours"]
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
                "bitmap over dense": times.get("ours, bitmap", np.nan) / times["parent"],
                "seeded over labels": times.get("ours, seeded", np.nan) / times["ours"],
                "share of copy": rows["ours"]["bytes"] / times["ours"] * 1e3 / results.settings["copy"],
                "predicted": predicted,
                "error": {name: each / fastest[name] - 1 for name, each in predicted.items()},
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
