"""Who should use this package: short answers, drawn from committed rows or from the cost model."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fpe.kernels.here import FEW
from fpe.kernels.roofs import PUBLISHED
from fpe.kernels.structures import BLOCK, RANDOM

from ..costs import verdict
from ..costs.verdict import rows_in_words
from ..here import measure
from ..results import COMMITTED, Results
from ..studies.catalogue import CIFAR100
from ..studies.conditions import FRESH, WIDE
from ..studies.intervals import interval
from ..studies.study import committed
from ..studies.tables import against_control, still_shallow
from ..table import Table
from . import costs

SHOWN_GPUS = ("a100", "4090", "h200")


def should_i() -> Table:
    """The questions that are asked first, and their answers."""
    widths = (4, 8, 16, 32, 64)
    rows = [
        (
            "What does it gain?",
            f"{_points('random input', widths)} points of test accuracy at {_list(widths)} neurons (CIFAR-100 "
            "features, two children; `fpe results --table by-width`); little in small transformers of text, nothing in "
            "one of images",
        ),
        (
            "Why not just a wider layer?",
            f"a dense layer twice as wide gains more, with twice the weights: {_points(WIDE, widths[:3])} at "
            f"{_list(widths[:3])} neurons. The same sparse shape, trained from the start, is as good as a split: "
            f"{_points(FRESH, widths[:3])} (`fpe results --table controls`)",
        ),
        (
            "Which GPU, which model?",
            "NVIDIA GPUs of compute capability 8.0 or newer, and CPUs (`fpe doctor`, `fpe gpus`). "
            "`fpe.find_pairs(model)` says which layers of your model can be expanded (docs/models.md)",
        ),
        ("What does it cost on a GPU?", _gpus()),
        ("How much memory?", _memory()),
        ("What does it cost on a CPU?", _cpu()),
    ]
    return Table("Should I use it?", ("question", "answer"), rows)


def _list(numbers: Sequence[object]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _points(condition: str, widths: tuple[int, ...]) -> str:
    """Points over the dense network by width, with their intervals."""
    frame = against_control(committed(CIFAR100))
    frame = frame[still_shallow(frame) & (frame["condition"] == condition) & (frame["alpha"] == 2)]
    return ", ".join(interval(frame[frame["neurons"] == width]["points"], 1, "+") for width in widths)


def _gpus() -> str:
    layer = costs.LAYER
    roofs = [PUBLISHED[key] for key in SHOWN_GPUS]
    found = {roof.name: {row["structure"]: row for row in _inference(verdict.predict(layer, roof))} for roof in roofs}
    held = [f"{rows_in_words(by[RANDOM]['holds_to'])} ({name})" for name, by in found.items()]
    slowest = max((ratio, m) for by in found.values() for m, ratio in by[RANDOM]["ratio"].items())[1]
    random, block = (max(by[kind]["ratio"][slowest] for by in found.values()) for kind in (RANDOM, BLOCK))
    basis = (
        "predicted; measured rows are in docs/benchmarks.md" if costs.measured() else "predicted, nothing is measured"
    )
    return (
        f"a {layer.n} x {layer.k} layer with random masks takes at most 10 % more time than its dense parent for up to "
        f"{_list(held)} rows in a batch; at {slowest} rows it takes up to {random:.2f} times as long, with "
        f"blocks up to {block:.2f} times ({basis}; `fpe verdict` says it for your layer and GPU)"
    )


def _inference(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (row for row in rows if row["workload"] == "inference")


def _memory() -> str:
    rows = {name: sum(parts.values()) for name, parts in costs.memory_rows().items()}
    return (
        f"{rows['ours, labels']:.3f} times the parent's in training with Adam; {rows['wide dense']:.3f} times for the "
        "dense layer of the same function (`fpe results --table memory`)"
    )


def _cpu() -> str:
    """Costs on a CPU: of one layer that is larger than the caches, where memory counts, and of small networks."""
    large = [row for row in measure.compared(Results.read(COMMITTED / "cpu/here.jsonl")) if row["M"] in FEW]
    first = large[0]
    large = [row for row in large if (row["N"], row["K"], row["alpha"]) == (first["N"], first["K"], first["alpha"])]
    of = {name: _list([f"{row[f'over {name}']:.2f}" for row in large]) for name in ("parent", "wide")}
    said = []
    for what, rows in Results.read(COMMITTED / "cpu/latency-models.jsonl").frame.groupby("pass", sort=False):
        ratios = rows["ratio"].astype(float)
        said.append(
            f"{what} {float(np.exp(np.log(ratios).mean())):.2f} times ({ratios.min():.2f} to {ratios.max():.2f})"
        )
    return (
        f"measured: a {first['N']} x {first['K']} layer takes {of['parent']} times as long as its dense parent and "
        f"{of['wide']} times as long as the wide dense layer at {_list([row['M'] for row in large])} rows "
        f"(`fpe results --table here`; `fpe here` measures your CPU). Small networks, compared with the "
        f"wide dense ones they equal: {', '.join(said)} (`fpe results --table models-cpu`)"
    )
