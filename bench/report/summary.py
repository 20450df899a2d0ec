"""Tables drawn from raw rows, for the terminal and for the page."""

import re

from fpe.kernels.gpus import ARCHITECTURES, GPUS
from fpe.kernels.model import bytes_by_format, relative
from fpe.kernels.structures import SEEDED_CHILDREN

from ..results import Results
from ..table import Table


def formats(n: int, k: int, alphas: tuple[int, ...] = (2, 4, 8)) -> Table:
    """Bytes of one layer by storage format, over the dense parent."""
    columns = [relative(bytes_by_format(n, k, alpha)) for alpha in alphas]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(f"{c[name]:.3f}" if name in c else "-" for c in columns)) for name in names]
    title = f"Bytes of a {n} x {k} layer at 16 bits, over its dense parent's"
    return Table(title, ("format", *(f"alpha = {alpha}" for alpha in alphas)), rows)


def ledger(before: list[dict], after: list[dict], name: str) -> Table:
    """Weights of each layer before and after."""
    rows = [
        (
            f"{old['layer']}: {old['kind']} → {new['kind']}",
            f"{old['out']} x {old['in']}",
            f"{new['out']} x {new['in']}",
            f"{old['nonzeros']}",
            f"{new['nonzeros']}",
            f"{new['stored']}",
            f"{old['biases']} → {new['biases']}",
        )
        for old, new in zip(before, after, strict=True)
    ]
    totals = [sum(row[key] for row in side) for side, key in ((before, "nonzeros"), (after, "nonzeros"))]
    stored, biases = sum(r["stored"] for r in after), [sum(r["biases"] for r in side) for side in (before, after)]
    rows.append(("total", "", "", f"{totals[0]}", f"{totals[1]}", f"{stored}", f"{biases[0]} → {biases[1]}"))
    columns = ("layer", "dense", "expanded", "weights", "non-zeros", "stored", "biases")
    return Table(f"Non-zero ledger: {name}", columns, rows)


def compile_times(results: Results) -> Table:
    """How long binaries took to compile, by kernel."""
    rows = []
    for kernel, group in _by(results, "kernel"):
        taken = group["compile_seconds"]
        failed = int((group["status"] != "ok").sum())
        rows.append((kernel, f"{len(group)}", f"{failed}", f"{taken.median():.2f}", f"{taken.sum():.1f}"))
    title = f"{len(results.rows)} binaries for sm_{results.settings['arch']}, Triton {results.settings['triton']}"
    return Table(title, ("kernel", "binaries", "failed", "median s", "all s"), rows)


def versions(results: Results) -> Table:
    """Which versions of Python, PyTorch and Triton were tried, and what came of it."""
    body = [
        (
            *(row[name] for name in ("python", "torch", "triton", "numpy")),
            str(row["modules"]),
            *("{} of {}".format(*row[arch]) for arch in ("sm_80", "sm_90")),
            "passes" if row["dry_run"] else "fails",
            f"{row['processor_seconds']:.0f} s",
        )
        for row in results.rows
    ]
    columns = ("Python", "PyTorch", "Triton", "NumPy", "modules imported", "compiled for sm_80", "for sm_90")
    return Table("Versions that were tried", (*columns, "dry run", "processor time"), body)


def compiled(results: Results) -> Table:
    """What the offline compiler found, over all binaries of a kernel and architecture."""
    rows: list[tuple[str, ...]] = []
    for (kernel, arch), group in results.frame.groupby(["kernel", "arch"], sort=False):
        spills = group[["spill_stores", "spill_loads", "stack", "local"]].sum(axis=1)
        matrix = sorted({re.match(r"\w+(\.SP)?", name)[0] for names in group["matrix"] for name in names})  # type: ignore[index]
        rows.append(
            (
                f"{str(kernel).strip('_')}, sm_{arch}",
                f"{len(group)}",
                f"{group['registers'].max()}",
                f"{spills.max()}",
                f"{group['shared'].max()}",
                f"{group['programs_per_sm'].min()}",
                ", ".join(matrix) or "-",
                f"{sum(bool(c) for c in group['complaints'])}",
            )
        )
    columns = (
        "kernel",
        "binaries",
        "registers",
        "spilled bytes",
        "shared bytes",
        "programs/SM",
        "matrix",
        "complaints",
    )
    settings = results.settings
    return Table(f"Compiled by Triton {settings['triton']}, the worst of each kernel and architecture", columns, rows)


def ladder(results: Results, kept: bool = False) -> Table:
    """Instructions for each weight, or each position of kept values, by step of the ladder and architecture."""
    body = [
        (
            row["rung"],
            f"sm_{row['arch']}",
            f"{row['instructions_per_weight']:.1f}",
            f"{row['shared_per_weight']:.2f}",
            str(row["registers"]),
            str(row["spilled"]),
            row["how"],
        )
        for row in results.rows
        if row["children"] == (1 if kept else 2)
    ]
    n, k, m = results.settings["kept_tile" if kept else "tile"]
    of, what = ("position", "one child") if kept else ("weight", "alpha = 2")
    version = results.settings["triton"]
    title = f"Machine instructions a {of} and lane, {what}, tile {n} x {k} by {m} rows, Triton {version}"
    return Table(title, ("rung", "arch", f"instr./{of}", f"shared mem./{of}", "registers", "spilled", "how"), body)


def unpacking(results: Results, architectures: tuple[int, ...] = (80, 90), dtype: str = "bf16") -> Table:
    """Machine instructions that the partition kernels spend on a weight in decoding, by operation and children."""
    found: dict[tuple[str, int], dict[int, str]] = {}
    for row in results.rows:
        made = "seeded" in row["case"]
        if (
            row["kernel"].startswith("multiply_")
            and row["dtype"] == dtype
            and row["case"].endswith("-m16")
            and not made
        ):
            cells = found.setdefault((row["op"], row["alpha"]), {})
            cells.setdefault(row["arch"], f"{row['instructions_per_weight']:.1f} ({row['registers']} registers)")
    body = [(op, str(alpha), *(cells.get(arch, "-") for arch in architectures)) for (op, alpha), cells in found.items()]
    columns = ("operation", "children", *(f"sm_{arch}" for arch in architectures))
    return Table(
        f"Instructions a weight and lane, {dtype}, 16 rows, Triton {results.settings['triton']}", columns, body
    )


def fused(results: Results, architectures: tuple[int, ...] = (80, 90), dtype: str = "bf16") -> Table:
    """Instructions for each weight in the main loop of an expanded MLP in one launch, by rows and children."""
    rows = [row for row in results.rows if row["op"] == "mlp" and row["dtype"] == dtype]
    cases = dict.fromkeys(row["case"] for row in rows)
    body = []
    for case in cases:
        of = {row["arch"]: row for row in rows if row["case"] == case}
        costs = [
            f"{of[arch]['instructions_per_weight']:.1f} ({of[arch]['registers']} registers)" for arch in architectures
        ]
        kernel = "tiles" if of[architectures[0]]["kernel"] == "_expanded_mlp" else "direct"
        body.append((case.split("-m")[-1].split("-")[0], str(of[architectures[0]]["alpha"]), kernel, *costs))
    columns = ("rows", "children", "kernel", *(f"sm_{arch}" for arch in architectures))
    title = f"Instructions a weight and lane of the first matrix, {dtype}, Triton {results.settings['triton']}"
    return Table(title, columns, body)


def seeded_traffic(results: Results) -> Table:
    """DRAM bytes with labels of a seed over the dense parent's: of weights, also of activations, also of split sums."""
    found: dict[tuple[str, int], dict[int, list[tuple[float, float, float]]]] = {}
    for row in results.rows:
        if not row["op"].endswith("dW"):
            merged = row["op"].startswith("merged")
            narrow, children = (row["N"], row["K"]) if merged else (row["K"], row["N"])
            inputs = row["alpha"] * children if merged == row["op"].endswith("forward") else narrow
            size = 2 * row["N"] * row["K"]  # of the parent's weights, bfloat16
            weights = (row["read"] - 2 * row["M"] * inputs) / size
            cells = found.setdefault((row["op"], row["alpha"]), {})
            ratios = (weights, row["compulsory"] / row["parent"], row["dram"] / row["parent"])
            cells.setdefault(row["M"], []).append(ratios)
    batches = sorted({row["M"] for row in results.rows})
    body = [
        (op, str(alpha), *(f"{value:.3f}" for m in batches for value in map(max, zip(*cells[m], strict=True))))
        for (op, alpha), cells in found.items()
    ]
    kinds = ("weights and index", "and activations", "and split sums")
    columns = (f"{m} row{'s' * (m > 1)}: {kind}" for m in batches for kind in kinds)
    shapes = " and ".join(dict.fromkeys(f"{row['N']}x{row['K']}" for row in results.rows))
    return Table(
        f"Simulated DRAM bytes over the dense parent's, bfloat16, the worse of {shapes}",
        ("operation", "children", *columns),
        body,
    )


def seeded(results: Results, architectures: tuple[int, ...] = (80, 90)) -> Table:
    """Machine instructions on a weight in decoding, with labels made of a seed and with labels loaded."""
    found: dict[tuple[str, int], dict[tuple[int, bool], float]] = {}
    for row in results.rows:
        if (
            row["kernel"].startswith("multiply_")
            and row["case"].endswith("bf16-m16")
            and row["alpha"] in SEEDED_CHILDREN
        ):
            cells = found.setdefault((row["op"], row["alpha"]), {})
            cells[row["arch"], "seeded" in row["case"]] = row["instructions_per_weight"]
    body = [
        (op, str(alpha), *(f"{cells[arch, made]:.2f}" for arch in architectures for made in (True, False)))
        for (op, alpha), cells in found.items()
    ]
    columns = (f"sm_{arch}, {kind}" for arch in architectures for kind in ("seed", "bits"))
    return Table(
        f"Instructions a weight and lane, bf16, 16 rows, Triton {results.settings['triton']}",
        ("operation", "children", *columns),
        body,
    )


def wavefronts(results: Results) -> Table:
    """Passes of L1 and of shared memory by architecture and density."""
    rows = [
        (f"sm_{row['arch']}", f"{row['density']:g}", f"{row['global']:.2f}", f"{row['shared']:.2f}")
        for row in results.rows
    ]
    title = f"Wavefronts a position and lane of kept values, one child, {results.settings['rows']} rows"
    return Table(title, ("architecture", "density", "L1", "shared memory"), rows)


def kept_traffic(results: Results) -> Table:
    """DRAM bytes over the least, of products of kept values: the worst of a layer's operations."""
    worst: dict[tuple[str, ...], dict[int, float]] = {}
    for row in results.rows:
        key = (f"{row['N']} x {row['K']}", f"{row['alpha']}", f"{row['kept']:g}")
        cells = worst.setdefault(key, {})
        cells[row["M"]] = max(cells.get(row["M"], 0.0), row["ratio"])
    sizes = sorted({row["M"] for row in results.rows})
    rows = [(*key, *(f"{cells[m]:.3f}" for m in sizes)) for key, cells in worst.items()]
    columns = ("layer", "children", "kept", *(f"M {m}" for m in sizes))
    s = results.settings
    title = f"DRAM bytes over the least, the worst operation; simulated: sm_{s['arch']}, {s['l2'] / 1e6:.0f} MB of L2"
    return Table(title, columns, rows)


BUDGETED = {80: "a100", 86: "a6000", 89: "4090", 90: "h200"}
"""The GPU of each architecture whose budget is shown."""


def kept_instructions(compiled: Results, passes: Results) -> Table:
    """Instructions and memory passes for each non-zero by density, beside what the device has time for."""
    spent = {
        row["arch"]: row["instructions_per_weight"]
        for row in compiled.rows
        if row["case"] == "kept_split-alpha1-bf16-m16" and row["matrix"]
    }
    rows = []
    for row in passes.rows:
        gpu, share = GPUS[BUDGETED[row["arch"]]], row["density"]
        # 128 lanes of a multiprocessor issue while a 16-bit value arrives; one wavefront passes for four instructions.
        budget = 128 * gpu.sms * gpu.clock * 2 / gpu.bandwidth
        passed = row["global"] + row["shared"]
        rows.append(
            (
                f"{gpu.name}, sm_{row['arch']}",
                f"{share:g}",
                f"{spent[row['arch']]:.1f}",
                f"{spent[row['arch']] / share:.0f}",
                f"{budget:.0f}",
                f"{passed:.1f}",
                f"{passed / share:.0f}",
                f"{budget / 4:.0f}",
            )
        )
    columns = (
        *("device", "density", "instr./position", "instr./non-zero", "budget"),
        *("wavefronts/position", "wavefronts/non-zero", "budget"),
    )
    title = f"split_matmul on kept values, one child, bf16, {passes.settings['rows']} rows, Triton"
    return Table(f"{title} {compiled.settings['triton']}; compiled and executed, not timed", columns, rows)


def _by(results: Results, column: str) -> list:
    return [(str(name), group) for name, group in results.frame.groupby(column, sort=False)]


def sparse_rates() -> Table:
    """What sparse tensor cores can gain over the wide dense layer where arithmetic bounds it: predicted bounds."""
    rows = []
    for arch in ARCHITECTURES.values():
        gpu, share = GPUS[arch.example], arch.measured_warp_mma
        bound = None if share is None else 2 * share
        rows.append(
            (
                f"{gpu.name}, sm_{arch.arch}",
                f"{gpu.tensor:g}",
                "-" if share is None else f"{share:.1%}",
                "-" if bound is None else f"{bound:.2f}",
                f"{arch.matrix}.sp",
                "2.00",
                "-" if bound is None else f"{2 / bound:.2f}",
            )
        )
    columns = (
        "device",
        "dense TFLOP/s",
        "share by mma",
        "bound by mma.sp",
        "own instruction",
        "its bound",
        "left to gain",
    )
    title = "Predicted from published rates, not measured: the most that 2:4 can gain over the wide dense layer"
    return Table(title, columns, rows)
