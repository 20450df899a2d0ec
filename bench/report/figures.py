"""Figures of what a layer stores and moves: each a function from raw rows or sizes to a matplotlib figure."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from fpe.kernels.model import bytes_by_format, relative

from ..results import Results
from ..studies.drawing import BARS, figure


def ledger_bars(ledgers: Mapping[str, list[dict]]) -> Figure:
    """Non-zero weights of each layer, before and after: all bars have the same length."""
    made, (axis,) = figure(6.8, 0.4 * len(ledgers) + 1.2)
    for y, rows in enumerate(reversed(list(ledgers.values()))):
        left = 0
        for i, row in enumerate(rows):
            axis.barh(y, row["nonzeros"], left=left, color=BARS[i % len(BARS)])
            left += row["nonzeros"]
        sizes = " + ".join(f"{row['nonzeros']} of {row['out']} x {row['in']}" for row in rows)
        axis.annotate(sizes, (left, y), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(ledgers)), list(ledgers)[::-1])
    axis.set(xlabel="non-zero weights, layer by layer", title="Nothing was added")
    return made


def format_bars(n: int, k: int, alphas: tuple[int, ...] = (2, 4, 8)) -> Figure:
    """Bytes of one layer by storage format, over the dense parent."""
    made, (axis,) = figure(6.8, 3.6)
    table = {alpha: relative(bytes_by_format(n, k, alpha)) for alpha in alphas}
    names = [name for name in table[alphas[0]] if name != "parent (dense)"]
    height = 0.8 / len(alphas)
    for i, (alpha, colour) in enumerate(zip(alphas, BARS[2::-1], strict=True)):
        for y, name in enumerate(reversed(names)):
            if name not in table[alpha]:
                continue
            place = y + 0.4 - (i + 0.5) * height
            axis.barh(place, table[alpha][name], height * 0.92, color=colour, label=f"alpha = {alpha}" * (y == 0))
            axis.text(table[alpha][name] + 0.06, place, f"{table[alpha][name]:.2f}", va="center", fontsize=8)
    axis.axvline(1, color="#212529", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.set(xlabel="bytes over the dense parent's, 16-bit weights", title=f"A {n} x {k} layer, stored")
    axis.legend(frameon=False, loc="center right")
    return made


def traffic_lines(results: Results, n: int, k: int) -> Figure:
    """Simulated DRAM bytes of one block layer by batch size, over the least that its dense parent must move."""
    made, (axis,) = figure(6.8, 3.6)
    frame = results.frame
    frame = frame[(frame["N"] == n) & (frame["K"] == k) & (frame["alpha"] > 1) & (frame["block"] != "none")]
    colours = {"forward": "#2a7de1", "dX": "#e8590c", "dW": "#2f9e44"}
    for op, rows in frame.groupby("op", sort=False):
        shown = rows.sort_values("M")
        places = range(len(shown))
        axis.plot(places, shown["dram"] / shown["parent"], "o-", color=colours[str(op)], linewidth=2, label=str(op))
    wide = frame[frame["op"] == "forward"].sort_values("M")
    places = range(len(wide))
    axis.plot(places, wide["wide"] / wide["parent"], ":", color="#868e96", label="wide dense, forward, least")
    axis.axhline(1, color="#212529", linewidth=1, linestyle="--", label="dense parent, least")
    axis.set_xticks(places, [str(m) for m in wide["M"]])
    axis.set(xlabel="rows of activations M", ylabel="DRAM bytes over the parent's least", title=f"{n} x {k}, alpha = 2")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False)
    return made
