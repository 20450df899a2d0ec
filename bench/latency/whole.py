"""Whole models on a CPU beside what ``fpe.to_dense`` makes of them: what an expanded model costs its user there.

Everything is on one thread, and the clock is that thread's own, so that what else the machine does is not in it. Calls
are warm and in turns: a turn times both models one after the other, a millisecond each, and the ratio is taken turn by
turn. Its median and quantiles are kept.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import fpe
from fpe.kernels.structures import BLOCK, RANDOM, TWO_FOUR, admitted

from ..results import Results
from ..table import Table

SIZES = ((784, 32, 10), (512, 64, 100))
"""The README's own model, and a classifier of features: inputs, hidden neurons before the split, classes."""

ROWS = (1, 16, 256)

EXPANSIONS: dict[str, dict[str, Any]] = {
    "random auto": {},
    "2:4 auto": {"structure": TWO_FOUR},
    "4x16 auto": {"structure": BLOCK, "block": (4, 16)},
    "random magnitude": {"resparsify": "magnitude"},
    "random partition": {"resparsify": "partition"},
    "4x16 partition": {"structure": BLOCK, "block": (4, 16), "resparsify": "partition"},
}
"""Options of :func:`fpe.expand` by name; between them they hold every kind of layer."""

PASSES = ("inference", "step")
BARS = {"inference": {1: 1.5, 16: 1.25, 256: 1.1}, "step": dict.fromkeys(ROWS, 2.0)}
"""What a model may cost over its dense form at most, by pass and rows."""

SAMPLE = 1e-3
"""Seconds of a sample, about: one call or many."""


@dataclass(frozen=True)
class Case:
    """A model, how it is expanded, and a batch."""

    sizes: tuple[int, int, int]
    expansion: str
    rows: int
    alpha: int = 2


def cases(rows: Sequence[int] = ROWS, alpha: int = 2) -> list[Case]:
    """Every model in every expansion; 2:4 is for two children."""
    names = [name for name, how in EXPANSIONS.items() if how.get("structure", RANDOM) in admitted(alpha)]
    return [Case(sizes, name, m, alpha) for sizes in SIZES for name in names for m in rows]


def measure(case: Case, seconds: float = 1.0) -> Iterator[dict[str, Any]]:
    """Times both passes of a case.

    A step is that of the README: gradients to zero, forward, cross-entropy, backward, and Adam. Inference is in
    ``torch.inference_mode`` and ``eval``, with constant weights.

    Args:
        case: What to time.
        seconds: To spend on each pass, roughly.

    Yields:
        A row for each pass: the case, the medians of both models in microseconds, and ``ratio`` with its 20th and 80th
        percentile.
    """
    inputs, hidden, classes = case.sizes
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    generator = torch.Generator().manual_seed(0)
    wide = fpe.expand(parent, case.alpha, generator=generator, **EXPANSIONS[case.expansion])
    models = {"expanded": wide, "dense": fpe.to_dense(wide)}
    x, y = torch.randn(case.rows, inputs), torch.randint(classes, (case.rows,))
    named = {"model": "-".join(map(str, case.sizes)), "expansion": case.expansion, "alpha": case.alpha, "M": case.rows}
    for name in PASSES:
        calls = {who: _call(model, name, x, y) for who, model in models.items()}
        samples = in_turns(calls, seconds)
        ratios = samples["expanded"] / samples["dense"]
        low, ratio, high = (round(float(q), 4) for q in np.quantile(ratios, (0.2, 0.5, 0.8)))
        times = {f"{who}_us": round(float(np.median(taken)), 3) for who, taken in samples.items()}
        yield {**named, "pass": name, **times, "ratio": ratio, "low": low, "high": high, "turns": len(ratios)}


def _call(model: nn.Module, name: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    if name == "inference":
        model.eval()
        return torch.inference_mode()(lambda: model(x))
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_turns(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, np.ndarray]:
    """Microseconds of a call on one thread, turn by turn, by name; who begins a turn changes."""

    def sample(call: Callable[[], object], count: int) -> float:
        start = time.thread_time()
        for _ in range(count):
            call()
        return (time.thread_time() - start) / count

    with one_thread():
        for call in calls.values():
            sample(call, 3)
        count = max(1, round(SAMPLE / max(sample(call, 10) for call in calls.values())))
        taken: dict[str, list[float]] = {name: [] for name in calls}
        order, spent = list(calls), 0.0
        while spent < seconds or len(taken[order[0]]) < 5:
            for name in order:
                taken[name].append(sample(calls[name], count))
                spent += taken[name][-1] * count
            order.reverse()
    return {name: 1e6 * np.array(times) for name, times in taken.items()}


def table(results: Results) -> Table:
    """Ratios by model and expansion, a column for each pass and batch."""
    rows = results.rows
    batches = sorted({row["M"] for row in rows})
    ratios = {(row["model"], row["expansion"], row["pass"], row["M"]): row for row in rows}
    body = []
    for model, expansion in dict.fromkeys((row["model"], row["expansion"]) for row in rows):
        found = [ratios.get((model, expansion, name, m)) for name in PASSES for m in batches]
        body.append((model, expansion, *("-" if row is None else f"{row['ratio']:.2f}" for row in found)))
    columns = ("model", "expansion", *(f"{name}, M = {m}" for name in PASSES for m in batches))
    alpha = ", ".join(sorted({f"alpha = {row['alpha']}" for row in rows}))
    title = f"Time over that of to_dense(), {alpha}, one thread, {results.provenance['device']}"
    return Table(title, columns, body)
