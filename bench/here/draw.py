"""The tables and the figure of ``fpe here``, drawn from its rows."""

from matplotlib.figure import Figure

from ..results import Results
from ..studies.drawing import doubling, figure
from ..table import Table
from .measure import compared, crossovers, errors

COLUMNS = (
    *("layer, alpha", "rows", "parent ms", "wide ms", "ours ms", "20-80 %", "over parent", "over wide"),
    *("blocks over parent", "of copy bandwidth", "model: parent", "wide", "ours"),
)


def table(results: Results) -> Table:
    """Every point: times, ratios, and by how much the model errs."""
    body = [
        (
            f"{row['N']} x {row['K']}, {row['alpha']}",
            str(row["M"]),
            f"{row['milliseconds']['parent']:.3g} ({row['parent is']})",
            f"{row['milliseconds']['wide']:.3g}",
            f"{row['milliseconds']['ours']:.3g}",
            "{:.3g}-{:.3g}".format(*row["spread"]["ours"]),
            f"{row['over parent']:.2f}",
            f"{row['over wide']:.2f}",
            f"{row['blocks over parent']:.2f}",
            f"{row['share of copy']:.0%}",
            *(f"{row['error'][name]:+.0%}" for name in ("parent", "wide", "ours")),
        )
        for row in compared(results)
    ]
    return Table(f"float32, medians of one interleaved run on {results.origin}", COLUMNS, body)


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
    return (
        f"{s['cpu']}, {s['threads']} threads: copies at {s['copy'] / 1e9:.1f} GB/s, multiplies float32 matrices at "
        f"{s['flops'] / 1e9:.0f} GFLOP/s. Up to 16 rows the model errs by {off.mean():.0%} on average, by "
        f"{off.max():.0%} at most."
    )


def ratio_figure(results: Results) -> Figure:
    """Time over the dense parent's by rows of activations: ours and the wide layer, measured and predicted."""
    rows = compared(results)
    layers = list(dict.fromkeys((row["N"], row["K"], row["alpha"]) for row in rows))
    made, axes = figure(3.6 * len(layers), 3.4, len(layers))
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
        axis.axhline(1, color="#212529", linewidth=1, linestyle="--")
        doubling(axis)
        axis.set_ylim(bottom=0)
        axis.set(title=f"{n} x {k}, alpha = {alpha}", xlabel="rows of activations")
    axes[0].set_ylabel("time over the dense parent's")
    axes[0].legend(frameon=False, fontsize=8)
    return made
