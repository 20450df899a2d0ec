"""``fpe explain`` and ``fpe verdict``: the cost model on one operation, and on the paper's claim for a layer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpe.kernels.model import (
    ASSUMED,
    INFERENCE,
    MAX_ROWS,
    PASSES,
    STRUCTURES,
    TRAINING,
    Roof,
    best,
    candidates,
    crossover,
    layer_candidates,
    roof_named,
    seconds_of,
)

from .summary import Table

ROWS = (1, 16, 64, 256, 1024, 8192)
"""Batch sizes whose ratios a verdict shows."""
WORKLOADS = {"inference": INFERENCE, "training": TRAINING}


@dataclass(frozen=True)
class Layer:
    """An expanded layer to be judged.

    Attributes:
        n: Output features of the parent.
        k: Input features.
        alpha: Children per parent.
        dtype: ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"fp32"``.
        block: ``(bn, bk)`` of its block structure.
    """

    n: int = 4096
    k: int = 14336
    alpha: int = 2
    dtype: str = "bf16"
    block: tuple[int, int] = (64, 64)

    def structures(self) -> tuple[str, ...]:
        """The structures that such a layer can have."""
        return tuple(s for s in STRUCTURES if s != "2:4" or self.alpha == 2)

    def __str__(self) -> str:
        return f"{self.n} x {self.k} layer, alpha = {self.alpha}, {self.dtype}"


def find_roof(gpu: str) -> Roof:
    """The roof of a GPU by name, or the measured one in a JSON file.

    Raises:
        ValueError: No such GPU is known, or the file is no roof.
    """
    path = Path(gpu)
    return Roof.read(path) if path.suffix == ".json" and path.is_file() else roof_named(gpu)


def explain(layer: Layer, structure: str, m: int, roof: Roof, name: str = "forward") -> Table:
    """The candidates of one pass, what each is predicted to cost, and why one was chosen.

    Args:
        layer: Sizes.
        structure: ``"random"``, ``"2:4"`` or ``"block"``.
        m: Rows of activations.
        roof: Of the device.
        name: ``"forward"``, ``"dX"`` or ``"dW"``.

    Raises:
        ValueError: The model does not take such an argument.
    """
    op, rows, columns = PASSES[name](layer.n, layer.k)
    block = layer.block[::-1] if name == "dX" else layer.block
    found = candidates(
        op, structure, m, rows, columns, layer.alpha, layer.dtype, roof, block if structure == "block" else None
    )
    winner = best(found)
    parent = next(c for c in found if c.name == "parent")
    body = [
        (
            c.name,
            f"{c.seconds * 1e6:.1f}",
            f"{c.seconds / parent.seconds:.2f}",
            f"{c.bytes / 1e6:.1f}",
            f"{c.flops / 1e9:.2f}",
            c.limited_by,
            "chosen: fastest" if c is winner else c.reason_not or "slower",
        )
        for c in found
    ]
    title = f"{name} ({op}) of a {layer}, {structure}, {m} rows; {roof.basis}"
    return Table(title, ("candidate", "us", "over parent", "MB", "GFLOP", "limited by", "why"), body)


def assumptions(roof: Roof) -> str:
    """The shares that a prediction rests on, in a sentence."""
    shares = ", ".join(
        f"{name} {share.bandwidth:.0%} / {share.arithmetic:.0%}{'' if share == ASSUMED[name] else ' (measured)'}"
        for name, share in roof.shares.items()
    )
    return (
        f"Assumed unless marked: {roof.reach.bandwidth:.0%} of the {roof.source} bandwidth and "
        f"{roof.reach.arithmetic:.0%} of its arithmetic can be reached at all, and of that each implementation "
        f"reaches: {shares}."
    )


def predict(layer: Layer, roof: Roof, tolerance: float = 0.10, rows: Sequence[int] = ROWS) -> list[dict[str, Any]]:
    """The model's verdict: a row for each structure and workload.

    Returns:
        Rows with ``structure``, ``workload``, ``holds_to`` (the largest batch up to which the layer costs at most
        ``1 + tolerance`` times its parent), and by batch size ``ratio`` (time over the parent's), ``wide`` (over the
        wide dense layer's) and ``runs_as``.

    Raises:
        ValueError: The model does not take such a layer.
    """
    found = []
    for structure in layer.structures():
        block = layer.block if structure == "block" else None
        sizes = (layer.n, layer.k, layer.alpha, layer.dtype, roof, block)
        for workload, passes in WORKLOADS.items():
            at = {m: layer_candidates(passes, structure, m, *sizes) for m in rows}
            found.append(
                {
                    "structure": structure,
                    "workload": workload,
                    "holds_to": crossover(passes, structure, *sizes, tolerance),
                    "ratio": {m: seconds_of(c) / seconds_of(c, "parent") for m, c in at.items()},
                    "wide": {m: seconds_of(c) / seconds_of(c, "wide dense") for m, c in at.items()},
                    "runs_as": {m: list(dict.fromkeys(best(x).name for x in c)) for m, c in at.items()},
                }
            )
    return found


def verdict_table(layer: Layer, predicted: Sequence[dict[str, Any]], roof: Roof, tolerance: float) -> Table:
    """Time over the parent's by structure, workload and batch size, and up to which batch the claim holds."""
    sizes = list(predicted[0]["ratio"])
    columns = ("structure", "workload", f"{tolerance:+.0%} up to", *(f"M {m}" for m in sizes))
    rows = [
        (
            row["structure"],
            row["workload"],
            rows_in_words(row["holds_to"]),
            *(f"{row['ratio'][m]:.2f}" for m in sizes),
        )
        for row in predicted
    ]
    return Table(f"Time over the dense parent's of a {layer}; {roof.basis}", columns, rows)


def sentences(layer: Layer, predicted: Sequence[dict[str, Any]], roof: Roof, tolerance: float) -> str:
    """Where the claim holds, and what to use where it does not: two sentences."""
    held = {w: _list((r["structure"], r["holds_to"]) for r in predicted if r["workload"] == w) for w in WORKLOADS}
    serving = [row for row in predicted if row["workload"] == "inference"]
    large = max(serving[0]["ratio"])
    ordered = sorted(serving, key=lambda row: row["ratio"][large])
    above = "; ".join(
        f"{row['structure']} {row['ratio'][large]:.2f} ({' + '.join(row['runs_as'][large])})" for row in ordered
    )
    return (
        f"On the {roof.name} ({roof.basis}), a {layer}, costs at most {tolerance:.0%} more than its parent up to these "
        f"rows in a batch: for inference {held['inference']}; for training {held['training']}. Above, take structure "
        f"{ordered[0]['structure']!r}: at {large} rows the forward costs, in units of the parent's time, {above}."
    )


def rows_in_words(m: int) -> str:
    """A crossover as text."""
    return "none" if m == 0 else f"{MAX_ROWS} (as tried)" if m >= MAX_ROWS else str(m)


def _list(pairs: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {rows_in_words(m)}" for name, m in pairs)
