"""The tables and the figure of ``fpe here``, drawn from its rows."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fpe.kernels.here import ROWS, CpuRoof, predict

from ..results import Results
from ..studies.drawing import below, doubling, figure
from ..table import Table
from .measure import compared, crossovers, errors

BUSY = 1.0
"""Threads that other work keeps busy, from which on times are not to be relied on."""


def _layer(row: dict[str, Any]) -> tuple[str, str]:
    """The first cells of a point."""
    return f"{row['N']} x {row['K']}, {row['alpha']}", str(row["M"])


def table(results: Results) -> Table:
    """Every point: times and ratios."""
    ratios = ("over parent", "over wide", "blocks over parent", "bitmap over dense", "seeded over labels")
    columns: tuple[str, ...] = ("layer, alpha", "rows", "parent", "wide", "ours", "of parent", "of wide")
    columns += ("blocks of parent", "bitmap of dense", "seed of labels")
    body = [
        (
            *_layer(row),
            *(f"{row['milliseconds'][name]:.3g}" for name in ("parent", "wide", "ours")),
            *("-" if np.isnan(row[name]) else f"{row[name]:.2f}" for name in ratios),
        )
        for row in compared(results)
    ]
    load = results.settings["load"]
    among = "" if load is None else f", other work keeping {load:.1f} threads busy as it began"
    return Table(f"Milliseconds in float32, medians of one run on {results.origin}{among}", columns, body)


def model_table(results: Results) -> Table:
    """Every point: whose the parent's product is, how ours spreads, its bandwidth, and by how much the model errs."""
    judged = ("parent", "wide", "ours", "ours, bitmap", "ours, seeded")
    columns: tuple[str, ...] = ("layer, alpha", "rows", "parent by", "ours, 20-80 %", "of copy")
    columns += ("parent", "wide", "ours", "bitmap", "seed")
    body = [
        (
            *_layer(row),
            row["parent is"],
            "{:.3g}-{:.3g}".format(*row["spread"]["ours"]),
            f"{row['share of copy']:.0%}",
            *(f"{row['error'][name]:+.0%}" if name in row["error"] else "-" for name in judged),
        )
        for row in compared(results)
    ]
    return Table("Ours in milliseconds and in copy bandwidth, and the errors of the model", columns, body)


def verdict_rows(n: int, k: int, alpha: int, roof: CpuRoof, tolerance: float) -> list[dict[str, Any]]:
    """What a layer is predicted to cost on a measured CPU: milliseconds at each number of rows, in float32."""
    rows = []
    for m in ROWS:
        predicted = {name: 1e3 * seconds for name, seconds in predict(m, n, k, alpha, roof).items() if name != "twin"}
        ratio = predicted["ours"] / predicted["parent"]
        rows.append({"M": m, **predicted, "over_parent": ratio, "holds": ratio <= 1 + tolerance})
    return rows


def verdict_table(n: int, k: int, alpha: int, roof: CpuRoof, tolerance: float) -> Table:
    """:func:`verdict_rows`, as it is read."""
    body = [
        (
            str(row["M"]),
            *(f"{row[name]:.3g}" for name in ("parent", "wide", "ours")),
            f"{row['over_parent']:.2f}",
            "yes" if row["holds"] else "no",
        )
        for row in verdict_rows(n, k, alpha, roof, tolerance)
    ]
    columns = ("rows", "parent", "wide", "ours", "of parent", f"within {tolerance:.0%}")
    title = f"Milliseconds of a {n} x {k} layer, alpha = {alpha}, float32, predicted from the roof of {roof.name}"
    return Table(f"{title}, {roof.threads} threads, measured", columns, body)


def crossover_table(results: Results) -> Table:
    """Up to how many rows a layer costs what its parent costs, measured beside predicted."""
    body = [
        (f"{row['N']} x {row['K']}, {row['alpha']}", str(row["measured"]), str(row["predicted"]))
        for row in crossovers(results)
    ]
    title = "The most rows, of those measured, at which the layer costs at most 1.1 of its dense parent"
    return Table(title, ("layer, alpha", "measured", "predicted"), body)


def sentence(results: Results) -> str:
    """The roof, and how far the model is from the times, in words."""
    s, off = results.settings, abs(errors(results))
    threads = f"{s['threads']} thread{'s' * (s['threads'] > 1)}"
    return (
        f"{s['cpu']}, {threads}: copies at {s['copy'] / 1e9:.1f} GB/s, multiplies float32 matrices at "
        f"{s['flops'] / 1e9:.0f} GFLOP/s. Up to 16 rows the model errs by {off.mean():.0%} on average, by "
        f"{off.max():.0%} at most."
    )


def disturbed(results: Results) -> str:
    """What to do where other work ran beside the measurement; nothing where little did."""
    load = results.settings["load"] or 0.0
    return (
        f"Other work kept {load:.1f} threads busy as it began. Measure again when little else runs: until then "
        "backend='auto' may choose what is slower."
        if load >= BUSY
        else ""
    )


def ratio_figure(results: Results) -> Figure:
    """Time over the dense parent's by rows of activations: ours and the wide layer, measured and predicted."""
    rows = compared(results)
    layers = list(dict.fromkeys((row["N"], row["K"], row["alpha"]) for row in rows))
    made, axes = figure(2.8 * len(layers), 3.6, len(layers))
    for axis, (n, k, alpha) in zip(axes, layers, strict=True):
        own = [row for row in rows if (row["N"], row["K"], row["alpha"]) == (n, k, alpha)]
        m = [row["M"] for row in own]
        for name, label, colour in (("wide", "wide dense", "#8a8f98"), ("ours", "expanded", "#2a7de1")):
            measured = [row["milliseconds"][name] / row["milliseconds"]["parent"] for row in own]
            low, high = ([row["spread"][name][i] / row["milliseconds"]["parent"] for row in own] for i in (0, 1))
            predicted = [row["predicted"][name] / row["predicted"]["parent"] for row in own]
            axis.plot(m, measured, "o-", color=colour, linewidth=2, markersize=5, label=label)
            axis.fill_between(m, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(m, predicted, ":", color=colour, label=f"{label}, predicted")
        axis.axhline(1, color="#212529", linewidth=1, linestyle="--", label="dense parent")
        doubling(axis)
        axis.set_ylim(bottom=0)
        axis.set(title=f"{n} x {k}, alpha = {alpha}", xlabel="rows of activations")
    axes[0].set_ylabel("time over the dense parent's")
    below(made, 2 * len(layers) - 1)
    return made
