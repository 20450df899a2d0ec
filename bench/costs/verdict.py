"""``fpe explain`` and ``fpe verdict``: the cost model on one operation, and on the paper's claim for a layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from fpe.kernels.model import (
    INFERENCE,
    MAX_ROWS,
    PASSES,
    TRAINING,
    Sizes,
    best,
    candidates,
    crossover,
    layer_candidates,
    seconds_of,
)
from fpe.kernels.roofs import ASSUMED, Roof, roof_named
from fpe.kernels.structures import RANDOM, admitted

from ..latency.providers import OURS
from ..results import Results
from ..table import Table

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
        kept: Share of its entries that exist, where these alone are stored; none where all do.
    """

    n: int = 4096
    k: int = 14336
    alpha: int = 2
    dtype: str = "bf16"
    block: tuple[int, int] = (64, 64)
    kept: float | None = None

    def __post_init__(self) -> None:
        if self.alpha == 1 and self.kept is None:
            raise ValueError("a layer of one child is its parent: expected alpha from 2 on, or a share that is kept")

    def structures(self) -> tuple[str, ...]:
        """The structures that such a layer can have."""
        return admitted(self.alpha) if self.kept is None else (RANDOM,)

    def sizes(self, structure: str, m: int = 1) -> Sizes:
        """It as the cost model takes it."""
        return Sizes(m, self.n, self.k, self.alpha, structure, self.dtype, self.block, self.kept)

    def __str__(self) -> str:
        kept = "" if self.kept is None else f", {self.kept:.0%} of its entries kept"
        return f"{self.n} x {self.k} layer, alpha = {self.alpha}, {self.dtype}{kept}"


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
        structure: Of :data:`~fpe.kernels.structures.STRUCTURES`.
        m: Rows of activations.
        roof: Of the device.
        name: ``"forward"``, ``"dX"`` or ``"dW"``.

    Raises:
        ValueError: The model does not take such an argument.
    """
    op, sizes = PASSES[name](layer.sizes(structure, m))
    found = candidates(op, sizes, roof, transposed=name == "dX")
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
        f"Assumed unless marked: at most {roof.reach.bandwidth:.0%} of the {roof.source} bandwidth and "
        f"{roof.reach.arithmetic:.0%} of its arithmetic can be reached. Of that, each implementation reaches: {shares}."
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
        for workload, passes in WORKLOADS.items():
            at = {m: layer_candidates(passes, layer.sizes(structure, m), roof) for m in rows}
            found.append(
                {
                    "structure": structure,
                    "workload": workload,
                    "holds_to": crossover(passes, layer.sizes(structure), roof, tolerance),
                    "ratio": {m: seconds_of(c) / seconds_of(c, "parent") for m, c in at.items()},
                    "wide": {m: seconds_of(c) / seconds_of(c, "wide dense") for m, c in at.items()},
                    "runs_as": {m: list(dict.fromkeys(best(x).name for x in c)) for m, c in at.items()},
                }
            )
    return found


def measured(layer: Layer, results: Results, tolerance: float = 0.10) -> list[dict[str, Any]]:
    """The verdict of a GPU's own times: rows as of :func:`predict`, for the batch sizes that were measured.

    ``ratio`` is the time of the package's fastest provider over the parent's in the same run; ``holds_to`` the largest
    batch measured up to which every one measured is within the tolerance.

    Raises:
        ValueError: These are no latency rows of a GPU, or none of such a layer; rows of kept values are not taken.
    """
    if layer.kept is not None:
        raise ValueError("expected a layer that stores all entries: no times of kept values are measured")
    if results.study not in ("latency", "sweep"):
        raise ValueError(f"expected rows of the step latency or sweep of fpe gpu, got those of {results.study!r}")
    if results.settings.get("dry_run"):
        raise ValueError("expected a GPU's rows, got those of a dry run on a CPU")
    times = _times(layer, results)
    found = []
    for structure in layer.structures():
        for workload, name in (("inference", "forward"), ("training", "forward+backward")):
            at = {m: t for (s, p, m), t in sorted(times.items()) if (s, p) == (structure, name)}
            able = {m: [who for who in t if who.startswith(OURS)] for m, t in at.items() if "parent" in t}
            ours = {m: min(names, key=at[m].__getitem__) for m, names in able.items() if names}
            ratio = {m: at[m][who] / at[m]["parent"] for m, who in ours.items()}
            if not ratio:
                continue
            held = [m for m, _ in takewhile(lambda pair: pair[1] <= 1 + tolerance, ratio.items())]
            found.append(
                {
                    "structure": structure,
                    "workload": workload,
                    "holds_to": held[-1] if held else 0,
                    "ratio": ratio,
                    "wide": {m: at[m][ours[m]] / at[m]["wide"] for m in ratio if "wide" in at[m]},
                    "runs_as": {m: [ours[m]] for m in ratio},
                }
            )
    if not found:
        there = sorted(
            {f"{r['N']}x{r['K']} alpha {r['alpha']} {r['dtype']}" for r in results.rows if "milliseconds" in r}
        )
        raise ValueError(f"expected times of a {layer}; there are {', '.join(there) or 'none'}")
    return found


def has(layer: Layer, results: Results) -> bool:
    """Whether results hold times of the parent and of the package for a layer's forward."""
    times = (t for (_, name, _), t in _times(layer, results).items() if name == "forward")
    return any("parent" in t and any(who.startswith(OURS) for who in t) for t in times)


def _times(layer: Layer, results: Results) -> dict[tuple[str, str, int], dict[str, float]]:
    """Milliseconds by provider, for each structure, pass and batch size of a layer."""
    block, sizes = f"{layer.block[0]}x{layer.block[1]}", (layer.n, layer.k, layer.alpha, layer.dtype)
    times: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in results.rows:
        alike = "milliseconds" in row and (row["N"], row["K"], row["alpha"], row["dtype"]) == sizes
        if alike and row["level"] == "op" and row["block"] in ("", block):
            times.setdefault((row["structure"], row["pass"], row["M"]), {})[row["provider"]] = row["milliseconds"]
    return times


def compared_table(
    layer: Layer, rows: Sequence[dict[str, Any]], results: Results, roof: Roof, tolerance: float
) -> Table:
    """Measured ratios beside predicted ones, and how far the prediction is off."""
    body = []
    for row in rows:
        passes, structure = WORKLOADS[row["workload"]], row["structure"]
        for m, ratio in row["ratio"].items():
            found = layer_candidates(passes, layer.sizes(structure, m), roof)
            predicted = seconds_of(found) / seconds_of(found, "parent")
            first = m == next(iter(row["ratio"]))
            limits = (row["holds_to"], crossover(passes, layer.sizes(structure), roof, tolerance)) if first else ()
            held = tuple(map(rows_in_words, limits)) or ("", "")
            over = f"{row['wide'][m]:.3f}" if m in row["wide"] else "-"
            cells = (
                f"{m}",
                row["runs_as"][m][0],
                f"{ratio:.3f}",
                f"{predicted:.3f}",
                f"{predicted / ratio - 1:+.0%}",
                over,
            )
            body.append((structure, row["workload"], *held, *cells))
    columns = ("structure", "workload", f"{tolerance:+.0%} up to", "predicted", "M", "fastest", "measured", "predicted")
    title = f"Time over the dense parent's of a {layer}; measured on {results.origin}, beside the model"
    return Table(title, (*columns, "error", "over wide"), body)


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
    for workload in WORKLOADS:
        row = next(row for row in predicted if row["workload"] == workload)
        rows.append(("wide dense", workload, "-", *(f"{row['ratio'][m] / row['wide'][m]:.2f}" for m in sizes)))
    return Table(f"Time over the dense parent's of a {layer}; {roof.basis}", columns, rows)


def sentences(layer: Layer, rows: Sequence[dict[str, Any]], name: str, basis: str, tolerance: float) -> str:
    """Where the claim holds, and what to use where it does not: a sentence a line.

    Args:
        layer: Sizes.
        rows: Of :func:`predict` or :func:`measured`.
        name: Of the GPU.
        basis: What the figures rest on.
        tolerance: What counts as equal.
    """
    lines = [
        f"On the {name} ({basis}) a {layer}, costs at most {tolerance:.0%} more time than its dense parent up to "
        "this many rows in a batch:"
    ]
    for workload in WORKLOADS:
        held = ", ".join(
            f"{row['structure']} {rows_in_words(row['holds_to'])}" for row in rows if row["workload"] == workload
        )
        lines.append(f"  {workload}: {held or 'not measured'}")
    serving = [row for row in rows if row["workload"] == "inference"] or list(rows)
    large = min(max(row["ratio"]) for row in serving)
    ordered = sorted(serving, key=lambda row: row["ratio"][large])
    if all(row["holds_to"] >= MAX_ROWS for row in serving):
        lines.append("That holds at every batch size tried: take any structure.")
    else:
        above = "; ".join(
            f"{row['structure']} {row['ratio'][large]:.2f} ({' + '.join(row['runs_as'][large])})" for row in ordered
        )
        advice = f"With more rows take structure {ordered[0]['structure']!r}: at" if len(ordered) > 1 else "At"
        lines.append(f"{advice} {large} rows a forward costs, in units of its parent's time, {above}.")
    return "\n".join([*lines, _to_dense(serving)])


def _to_dense(rows: Sequence[dict[str, Any]]) -> str:
    """Where the wide dense layer is faster than the expanded layer for inference: a sentence."""
    slower: dict[int, list[str]] = {}
    for row in rows:
        for m, wide in row["wide"].items():
            if round(wide, 2) > 1:
                slower.setdefault(m, []).append(f"{1 / wide:.2f} of {row['structure']}'s time")
    if slower:
        cases = "; ".join(f"at {m} rows it takes {', '.join(slower[m])}" for m in sorted(slower))
        return f"Use the wide dense layer, fpe.to_dense(model), where it is faster: {cases}."
    if any(row["wide"] for row in rows):
        return "The wide dense layer, fpe.to_dense(model), is faster at none of the batch sizes shown."
    return "The wide dense layer was not measured."


def rows_in_words(m: int) -> str:
    """A crossover as text."""
    return "none" if m == 0 else f"≥ {MAX_ROWS}" if m >= MAX_ROWS else str(m)
