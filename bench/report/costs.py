"""The report's section on GPU costs: measured if ``bench/results`` has a GPU's rows, else predicted and simulated.

The caption of every figure says which. The results of a GPU are in a folder named after it, with the files of
``fpe gpu``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fpe.kernels.model import INFERENCE, TRAINING, best, crossover, layer_candidates
from fpe.kernels.roofs import ASSUMED, PUBLISHED, Roof
from fpe.kernels.structures import BLOCK, RANDOM, SEEDED, STRUCTURES, TWO_FOUR

from ..costs import memory, verdict
from ..costs.verdict import Layer
from ..latency.problems import Case, Problem
from ..latency.providers import OURS, PEERS, PROVIDERS
from ..results import COMMITTED, Results
from ..studies.drawing import BARS, below, figure, svg
from ..table import Table

LAYER = Layer()
"""The layer that is drawn: the second layer of an 8B language model's MLP, which ``fpe gpu`` measures first."""
SHOWN_GPU = "h200"
"""The GPU whose published roof is used if nothing was measured."""
GPUS = ("a100", "a6000", "4090", "h100", "h200", "b200", "5090")
ROWS = tuple(2**e for e in range(15))
COLOURS: dict[str, str] = {**dict.fromkeys(STRUCTURES, "#e8590c")}
COLOURS |= {RANDOM: "#2a7de1", TWO_FOUR: "#2f9e44", BLOCK: "#9c36b5", "parent": "#212529", "wide": "#868e96"}


@dataclass(frozen=True)
class Measured:
    """A GPU's committed results.

    Attributes:
        folder: Where they are.
        latency: Rows of the steps ``latency`` and ``sweep``.
        roof: The roof that was measured on the GPU.
    """

    folder: Path
    latency: Results
    roof: Roof

    @property
    def source(self) -> str:
        """Provenance, for captions."""
        p = self.latency.provenance
        versions = ", ".join(f"{name} {p[name]}" for name in ("torch", "triton", "driver") if name in p)
        return f"Measured on {self.latency.origin} with {versions}; bench/results/{self.folder.name}/."

    def rows(self, step: str) -> list[dict[str, Any]]:
        """Rows of another step; empty if it was not run."""
        path = self.folder / f"{step}.jsonl"
        return Results.read(path).rows if path.exists() else []


def measured(root: Path = COMMITTED) -> Measured | None:
    """The committed results of a GPU that has :data:`LAYER`, the last by name; ``None`` where there are none."""
    for path in sorted(root.glob("*/latency.jsonl"), reverse=True):
        results, roof = Results.read(path), path.parent / "roof.json"
        if roof.is_file() and not results.settings.get("dry_run") and verdict.has(LAYER, results):
            return Measured(path.parent, results, Roof.read(roof))
    return None


def roof_shown(device: Measured | None) -> Roof:
    """The measured roof, or the published one of :data:`SHOWN_GPU`."""
    return device.roof if device else PUBLISHED[SHOWN_GPU]


def verdict_rows(layer: Layer, device: Measured | None) -> list[dict[str, Any]]:
    """The verdict's rows, measured or predicted."""
    if device:
        return verdict.measured(layer, device.latency)
    return verdict.predict(layer, roof_shown(None), rows=ROWS)


# Tables.


def crossover_table(layers: Sequence[Layer] = (LAYER, Layer(LAYER.n, LAYER.k, 4))) -> Table:
    """Up to which batch an expanded layer costs at most 10 or 50 % more than its parent; predicted, by GPU."""
    rows = []
    for key in GPUS:
        roof = PUBLISHED[key]
        for layer in layers:
            for structure in layer.structures():
                cells = [
                    verdict.rows_in_words(crossover(passes, layer.sizes(structure), roof, tolerance))
                    for passes in (INFERENCE, TRAINING)
                    for tolerance in (0.10, 0.50)
                ]
                rows.append((f"{roof.name}, alpha = {layer.alpha}", structure, *cells))
    title = (
        f"Rows up to which an expanded {layers[0].n} x {layers[0].k} layer costs its parent's time; predicted, {BASIS}"
    )
    columns = ("GPU", "structure", "inference +10%", "+50%", "training +10%", "+50%")
    return Table(title, columns, rows)


BASIS = "not measured: published roofs, assumed shares of them"


def verdict_summary(device: Measured | None = None) -> Table:
    """The verdict on :data:`LAYER`: measured, beside the prediction, if ``device`` is given; else predicted."""
    rows, roof = verdict_rows(LAYER, device), roof_shown(device)
    if device:
        return verdict.compared_table(LAYER, rows, device.latency, roof, 0.10)
    return verdict.verdict_table(LAYER, verdict.predict(LAYER, roof), roof, 0.10)


def roofs_table() -> Table:
    """The published roofs of the GPUs that are shown, with the FLOPs for each byte."""
    rows = [
        (
            roof.name,
            f"{roof.arch / 10:.1f}",
            f"{roof.bandwidth / 1e9:.0f}",
            f"{roof.flops['bf16'] / 1e12:.0f}",
            f"{roof.flops['tf32'] / 1e12:.0f}",
            f"{roof.flops['bf16'] / roof.bandwidth:.0f}",
            f"{roof.l2 / 2**20:.0f}",
        )
        for roof in (PUBLISHED[key] for key in GPUS)
    ]
    columns = ("GPU", "capability", "GB/s", "16-bit TFLOP/s", "TF32 TFLOP/s", "FLOP/byte", "L2 MiB")
    return Table("Roofs as published by the vendor, dense; not measured (`fpe gpus`: all)", columns, rows)


def shares_table(roof: Roof) -> Table:
    """Which share of a roof each implementation is assumed or was measured to reach."""
    fitted = {name: share != ASSUMED[name] for name, share in roof.shares.items()}
    rows = [
        (f"{name}{', measured' * fitted[name]}", f"{s.bandwidth:.0%}", f"{s.arithmetic:.0%}")
        for name, s in roof.shares.items()
    ]
    reach = (
        f"a copy, a GEMM; of the {roof.source} figures",
        f"{roof.reach.bandwidth:.0%}",
        f"{roof.reach.arithmetic:.0%}",
    )
    title = f"Shares of the roof, assumed{' unless marked' * any(fitted.values())}"
    return Table(title, ("implementation", "bandwidth", "arithmetic"), [reach, *rows])


def peers_table(device: Measured | None) -> Table | None:
    """Forward times of ours and of the peers over the parent's; ``None`` if nothing was measured."""
    if device is None:
        return None
    times: dict[tuple, dict[str, float]] = {}
    for row in device.latency.rows:
        if "milliseconds" in row and row["pass"] == "forward" and row["level"] == "op":
            key = f"{row['N']}x{row['K']}", row["structure"], row["alpha"], row["dtype"], row["M"]
            times.setdefault(key, {})[row["provider"]] = row["milliseconds"]
    rows = []
    for key, by in times.items():
        ours = min((t for who, t in by.items() if who.startswith(OURS)), default=None)
        if ours is None or "parent" not in by:
            continue
        peers = [f"{by[who] / by['parent']:.2f}" if who in by else "-" for who in ("wide", *PEERS)]
        rows.append((*(str(part) for part in key), f"{1e3 * by['parent']:.1f}", f"{ours / by['parent']:.2f}", *peers))
    columns = ("layer", "structure", "alpha", "dtype", "M", "parent us", "ours", "wide", *PEERS)
    return Table("Forward, time over the parent's", columns, rows)


def energy_table(device: Measured | None) -> Table | None:
    """Energy of a forward of the parent, the wide layer and ours; ``None`` if it was not measured."""
    joules: dict[tuple, dict[str, float]] = {}
    for row in device.rows("energy") if device else []:
        if "joules" in row:
            key = f"{row['N']}x{row['K']}", row["structure"], row["alpha"], row["dtype"], row["M"]
            joules.setdefault(key, {})[row["provider"]] = row["joules"]
    who = ("parent", "wide", "fpe/auto")
    rows = []
    for key, by in joules.items():
        if set(who) <= set(by):
            over = [f"{by[name] / by['parent']:.2f}" for name in who[1:]]
            rows.append((*(str(part) for part in key), f"{1e3 * by['parent']:.3g}", *over))
    columns = ("layer", "structure", "alpha", "dtype", "M", "parent mJ", "wide over parent", "ours over parent")
    return Table("Energy of a forward by the device's own counter", columns, rows) if rows else None


def memory_table() -> Table:
    """Memory of one layer in training, over its parent's total: counted by running it."""
    rows = []
    for name, columns in memory_rows().items():
        rows.append((name, *(f"{columns[part]:.3f}" for part in MEMORY), f"{sum(columns.values()):.3f}"))
    m, n, k = MEMORY_SIZE
    title = f"Memory of a {n} x {k} bf16 layer in training with Adam, {m} rows, over its parent's total"
    return Table(title, ("layer", *MEMORY, "total"), rows)


TRACED = {"block": "64x64", "kept": 1.0}
"""Which of the traced layers is shown."""


def traffic_table(device: Measured | None) -> Table:
    """Bytes of each pass of :data:`LAYER` in blocks: compulsory, traced through a simulated L2, counted on a GPU."""
    path = COMMITTED / "lab/traffic.jsonl"
    same = {"N": LAYER.n, "K": LAYER.k, "alpha": 2}
    traced = {(r["op"], r["M"]): r for r in Results.read(path).rows if {**same, **TRACED}.items() <= r.items()}
    counted = {
        (r["pass"], r["M"]): (r["dram_read"] + r["dram_write"]) / 1e6
        for r in (device.rows("traffic") if device else [])
        if "dram_read" in r and {**same, "structure": "block"}.items() <= r.items() and r["provider"].startswith(OURS)
    }
    rows = []
    for (op, m), row in traced.items():
        least, seen = row["compulsory"] / 1e6, counted.get((op, m))
        shown = ("-", "-") if seen is None else (f"{seen:.1f}", f"{seen / least:.3f}")
        rows.append((op, f"{m}", f"{least:.1f}", f"{row['dram'] / 1e6:.1f}", f"{row['ratio']:.3f}", *shown))
    columns = ("pass", "M", "compulsory", "traced", "over compulsory", "counted", "over compulsory")
    return Table(f"DRAM bytes in MB of the {LAYER.n} x {LAYER.k} layer in blocks, alpha = 2", columns, rows)


MEMORY = ("parameters", "index", "gradients", "Adam", "activations")
MEMORY_SIZE = (64, 512, 1024)


def memory_rows() -> dict[str, dict[str, float]]:
    """Parts of each layer's memory over the parent's total. Sizes are exact and the same on every device."""
    m, n, k = MEMORY_SIZE
    shown = {
        "parent": ("parent", "random"),
        "wide dense": ("wide", "random"),
        "masked, wide": ("masked", "random"),
        "ours, labels": ("fpe/eager", "random"),
        "ours, blocks": ("fpe/eager", "block"),
    }
    found = {}
    for name, (provider, structure) in shown.items():
        problem = Problem.make(Case(m, n, k, structure=structure), "cpu")
        c = memory.columns_on(PROVIDERS[provider].build(problem, False), problem.x)
        parts = ("parameter_bytes", "index_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
        found[name] = dict(zip(MEMORY, (float(c[part] or 0) for part in parts), strict=True))
    total = sum(found["parent"].values())
    return {name: {part: size / total for part, size in parts.items()} for name, parts in found.items()}


# Figures.


def ratio_lines(rows: Sequence[Mapping[str, Any]], yardstick: str, title: str) -> Figure:
    """Time over a yardstick's by batch size, a line for each structure: inference above, training below.

    Args:
        rows: Of a verdict.
        yardstick: ``"ratio"`` (the parent) or ``"wide"``.
        title: Of both panels.
    """
    made, axes = figure(5.4, 5.8, rows=2)
    for axis, workload in zip(axes, ("inference", "training"), strict=True):
        for row in rows:
            if row["workload"] == workload and row[yardstick]:
                axis.plot(
                    list(row[yardstick]),
                    list(row[yardstick].values()),
                    "o--" if row["structure"] == SEEDED else "o-",  # it coincides with others
                    markersize=3,
                    linewidth=2,
                    color=COLOURS[row["structure"]],
                    label=row["structure"],
                )
        over = "the parent's" if yardstick == "ratio" else "the wide dense layer's"
        axis.axhline(1, color="#212529", linewidth=1, linestyle="--", label=over.removesuffix("'s"))
        if yardstick == "ratio":
            axis.axhline(1.1, color="#868e96", linewidth=1, linestyle=":", label="+10 %")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(ylabel=f"time over {over}", title=f"{title}, {workload}")
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("rows of activations M")
    below(made, 3)
    made.suptitle(f"{LAYER.n} x {LAYER.k}, alpha = {LAYER.alpha}, {LAYER.dtype}", fontsize=11)
    return made


def ratio_figure(device: Measured | None) -> Figure:
    """:func:`ratio_lines` of :data:`LAYER` over its parent."""
    return ratio_lines(verdict_rows(LAYER, device), "ratio", f"{roof_shown(device).name}, {_kind(device)}")


def _kind(device: Measured | None) -> str:
    return "measured" if device else "predicted"


def roofline(device: Measured | None, layer: Layer = LAYER) -> Figure:
    """Useful FLOP/s by useful FLOPs a byte: the roof, and each structure's forward from one row to thousands."""
    roof = roof_shown(device)
    made, (axis,) = figure(6.8, 3.8)
    bandwidth = roof.bandwidth * roof.reach.bandwidth
    peak = roof.flops[layer.dtype] * roof.reach.arithmetic
    x = np.logspace(-0.5, 4, 200)
    axis.plot(x, np.minimum(bandwidth * x, peak) / 1e12, color="#adb5bd", linewidth=4, label="roof")
    for name in ("parent", *layer.structures()):
        points = _measured_points(name, device, layer) if device else _predicted_points(name, roof, layer)
        if points:
            colour, marker = COLOURS[name], "o" if device else "."
            axis.plot(*zip(*points, strict=True), marker, linestyle="-", linewidth=1, color=colour, label=name)
        if name == "parent" and not device:
            for m, point in list(zip(ROWS, points, strict=True))[::3]:  # below the slope, above the flat part
                place = {"xytext": (5, -11)} if m <= 64 else {"xytext": (0, 7), "ha": "center"}
                axis.annotate(f"M {m}", point, textcoords="offset points", fontsize=8, **place)
    axis.set_xscale("log")
    axis.set_yscale("log")
    title = f"{roof.name}, {layer.n} x {layer.k}, {_kind(device)}"
    axis.set(xlabel="useful FLOPs a compulsory byte", ylabel="useful TFLOP/s", title=title)
    axis.legend(frameon=False, loc="lower right")
    return made


def _predicted_points(name: str, roof: Roof, layer: Layer) -> list[tuple[float, float]]:
    points = []
    for m in ROWS:
        structure = RANDOM if name == "parent" else name
        (found,) = layer_candidates(INFERENCE, layer.sizes(structure, m), roof)
        shown = next(c for c in found if c.name == "parent") if name == "parent" else best(found)
        useful = 2 * m * layer.n * layer.k
        points.append((useful / shown.bytes, useful / shown.seconds / 1e12))
    return points


def _measured_points(name: str, device: Measured, layer: Layer) -> list[tuple[float, float]]:
    fastest: dict[int, tuple[float, float, float]] = {}
    for row in device.latency.rows:
        alike = "bytes" in row and (row["N"], row["K"], row["alpha"]) == (layer.n, layer.k, layer.alpha)
        wanted = row["provider"] == name if name == "parent" else row["provider"].startswith(OURS)
        if not (alike and wanted and row["pass"] == "forward" and row["dtype"] == layer.dtype and row["level"] == "op"):
            continue
        if name in ("parent", row["structure"]):
            point = row["milliseconds"], row["flops"] / row["bytes"], row["flops"] / row["milliseconds"] / 1e9
            fastest[row["M"]] = min(point, fastest.get(row["M"], point))
    return [fastest[m][1:] for m in sorted(fastest)]


def bandwidth_bars(device: Measured) -> Figure:
    """Share of the measured copy bandwidth that each provider reaches on one small batch."""
    made, (axis,) = figure(6.8, 3.4)
    reached: dict[str, float] = {}
    for row in device.latency.rows:
        alike = "bytes" in row and (row["N"], row["K"], row["M"], row["alpha"]) == (LAYER.n, LAYER.k, 16, 2)
        if alike and row["pass"] == "forward" and row["level"] == "op" and row["dtype"] == "bf16":
            name = (
                row["provider"] if row["provider"] in ("parent", "wide") else f"{row['provider']}, {row['structure']}"
            )
            reached[name] = row["bytes"] / row["milliseconds"] * 1e3 / device.roof.bandwidth
    axis.barh(list(reached)[::-1], list(reached.values())[::-1], color=BARS[1])
    axis.axvline(1, color="#212529", linewidth=1, linestyle="--")
    axis.set(xlabel="compulsory bytes a second over the copy bandwidth", title=f"{LAYER.n} x {LAYER.k}, 16 rows")
    return made


def traffic_bars(device: Measured | None) -> Figure:
    """Bytes of the forward, dX and dW of one layer: compulsory, through a simulated L2, and by counters."""
    made, (axis,) = figure(7.6, 3.6)
    m = 64
    bars: list[tuple[str, float, str]] = []
    for label, structure, name in (
        ("parent", "random", "parent"),
        ("wide dense", "random", "wide dense"),
        ("masked dense", "random", "masked dense"),
        ("labels", "random", "packed labels"),
        ("blocks", "block", "blocks"),
    ):
        passes = layer_candidates(TRAINING, LAYER.sizes(structure, m), PUBLISHED[SHOWN_GPU])
        bars.append((f"{label}, compulsory", sum(c.bytes for p in passes for c in p if c.name == name), BARS[1]))
    path = COMMITTED / "lab/traffic.jsonl"
    same = {"M": m, "N": LAYER.n, "K": LAYER.k, "alpha": 2}
    rows = Results.read(path).rows if path.exists() else []
    traced = [r for r in rows if {**same, **TRACED}.items() <= r.items()]
    if traced:
        bars.append(("blocks, traced", sum(r["dram"] for r in traced), "#9c36b5"))
    counted: dict[str, float] = {}
    for row in device.rows("traffic") if device else []:
        if "dram_read" in row and same.items() <= row.items():
            name = row["provider"] if row["provider"] in ("parent", "wide") else row["structure"]
            counted[name] = counted.get(name, 0.0) + row["dram_read"] + row["dram_write"]
    bars += [(f"{name}, counted", size, "#e8590c") for name, size in counted.items()]
    names, values, colours = zip(*reversed(bars), strict=True)
    axis.barh(names, [value / 1e6 for value in values], color=colours)
    axis.set(xlabel="MB, forward + dX + dW", title=f"{LAYER.n} x {LAYER.k}, alpha = 2, {m} rows")
    return made


def memory_bars() -> Figure:
    """Memory in training by layer and part, over the parent's total."""
    made, (axis,) = figure(7.2, 3.0)
    rows = memory_rows()
    left = np.zeros(len(rows))
    for part, colour in zip(MEMORY, (BARS[0], "#e8590c", *BARS[1:]), strict=True):
        values = np.array([row[part] for row in rows.values()])
        axis.barh(list(rows), values, left=left, color=colour, label=part)
        left += values
    axis.invert_yaxis()
    axis.axvline(1, color="#212529", linewidth=1, linestyle="--", zorder=0)
    axis.set(xlabel="bytes over the parent's", title="In training with Adam")
    axis.legend(frameon=False, loc="lower right", fontsize=8)
    return made


def section(device: Measured | None = None) -> dict[str, Any]:
    """What the template needs: drawings with captions, tables, and two sentences."""
    device = device or measured()
    rows, roof = verdict_rows(LAYER, device), roof_shown(device)
    judged = rows if device else verdict.predict(LAYER, roof)  # as `fpe verdict` says it
    source = device.source if device else f"{roof.basis[0].upper()}{roof.basis[1:]}. No GPU has been measured yet."
    name = device.latency.provenance["device"] if device else roof.name
    drawings = [
        (ratio_figure(device), f"Time of the expanded layer over its dense parent's. {source}"),
        (
            ratio_lines(rows, "wide", f"{roof.name}, {_kind(device)}"),
            f"Time of the expanded layer over that of the wide dense layer, which computes the same. {source}",
        ),
        (roofline(device), f"The grey line is what a copy and a large matrix product reach. {source}"),
        (traffic_bars(device), _traffic_caption(device)),
        (memory_bars(), "Bytes of tensors, counted by running each layer once; peak memory was not measured."),
    ]
    if device:
        drawings.insert(3, (bandwidth_bars(device), f"Achieved bandwidth. {source}"))
    return {
        "sentences": verdict.sentences(LAYER, judged, name, "measured" if device else roof.basis, 0.10).splitlines(),
        "drawings": [(svg(drawn, f"cost{i}", caption), caption) for i, (drawn, caption) in enumerate(drawings)],
        "tables": [
            *(verdict_summary(device), memory_table()),
            *(t for t in (peers_table(device), energy_table(device)) if t),
        ],
        "details": [crossover_table(), traffic_table(device), roofs_table(), shares_table(roof)],
        "assumptions": verdict.assumptions(roof),
    }


def _traffic_caption(device: Measured | None) -> str:
    counted = f"Counted: by Nsight Compute. {device.source}" if device else "Nothing was counted on a GPU."
    return (
        "Compulsory: each operand and result once, from the formats' definitions. Traced: the kernels' own accesses "
        f"through a simulated L2 (bench/results/lab/traffic.jsonl). {counted}"
    )
