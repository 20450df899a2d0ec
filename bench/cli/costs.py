"""The commands on cost: ``fpe explain``, ``fpe verdict``, ``fpe gpus``, ``fpe latency`` and ``fpe gpu``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ...kernels.gpus import GPUS
from ...kernels.here import ALPHAS, roof_here
from ...kernels.model import PASSES
from ...kernels.roofs import ITEMSIZE, Roof
from ...kernels.structures import STRUCTURES
from ..costs import verdict
from ..here import draw
from ..latency import shapes, suite, whole
from ..latency.providers import PROVIDERS, find
from ..results import Results
from ..table import Table
from .options import (
    ROWS_HELP,
    SHAPE_HELP,
    STRUCTURE_HELP,
    Number,
    Shapes,
    alpha_option,
    block_option,
    dtype_option,
    output_option,
    rows_options,
    shape_option,
)
from .output import NOTHING_WRITTEN, finish, print_rows, print_table, print_text, stopping
from .progress import progress


def sized(command: Callable) -> Callable:
    """Adds the options that name a layer and a GPU."""
    for option in (
        click.option(
            "--gpu", help="A name from `fpe gpus`, or a roof in a JSON file.  [default: the GPU at hand, or h200]"
        ),
        block_option(),
        dtype_option(ITEMSIZE),
        click.option(
            "--kept",
            type=Number(0, 1),
            help="Share of the entries that exist, if only these are stored, with a bitmap; with --alpha 1 for "
            "a layer of any mask.  [default: all are stored]",
        ),
        alpha_option(1),
        shape_option((4096, 14336), "4096x14336"),
    ):
        command = option(command)
    return command


def _roof(gpu: str | None) -> Roof:
    at_hand = torch.cuda.get_device_name() if torch.cuda.is_available() else "h200"
    try:
        return verdict.find_roof(gpu or at_hand)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--gpu'") from error


@click.command("explain")
@click.option("--m", type=click.IntRange(1), default=1, show_default=True, help=ROWS_HELP)
@click.option("--structure", type=click.Choice(STRUCTURES), default="random", show_default=True, help=STRUCTURE_HELP)
@click.option("--pass", "name", type=click.Choice(list(PASSES), case_sensitive=False), default="forward",
              show_default=True, help="Pass of the layer.")  # fmt: skip
@rows_options
@sized
def explain_command(
    m: int, structure: str, name: str, form: str | None, gpu: str | None, shape: tuple[int, int], **layer: Any
) -> None:
    """Say which implementation runs an expanded layer, what each would cost, and why (predicted)."""
    roof = _roof(gpu)
    try:
        table = verdict.explain(verdict.Layer(*shape, **layer), structure, m, roof, name)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if form:
        print_rows(table.records(), form)
        return
    print_table(table)
    print_text(verdict.assumptions(roof))


@click.command("verdict")
@click.option(
    "--tolerance",
    type=Number(0),
    default=0.10,
    show_default=True,
    help="Share of extra time that still counts as equal.",
)
@rows_options
@click.option(
    "--measured",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file latency.jsonl of fpe gpu.",
)
@sized
def verdict_command(
    tolerance: float,
    gpu: str | None,
    path: Path | None,
    form: str | None,
    shape: tuple[int, int],
    **layer: Any,
) -> None:
    """Say up to which batch size an expanded layer costs as much as its dense parent, and what to use above it.

    `--gpu here` means this machine's CPU, in float32. Run `fpe here` first, which measures it.
    """
    if gpu == "here":
        _verdict_here(shape, layer["alpha"], tolerance, form)
        return
    try:
        sizes = verdict.Layer(*shape, **layer)
        results = Results.read(path) if path else None
        roof = _roof(gpu or (_roof_beside(path, results) if path and results else None))
        rows = verdict.measured(sizes, results, tolerance) if results else verdict.predict(sizes, roof, tolerance)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    name, basis = (results.provenance["device"], f"measured, {path}") if results else (roof.name, roof.basis)
    if form:
        print_rows([{"gpu": name, "basis": basis, **row} for row in rows], form)
        return
    print_text(f"{verdict.sentences(sizes, rows, name, basis, tolerance)}\n\n")
    if results:
        print_table(verdict.compared_table(sizes, rows, results, roof, tolerance))
    else:
        print_table(verdict.verdict_table(sizes, rows, roof, tolerance))
    print_text(verdict.assumptions(roof))


def _verdict_here(shape: tuple[int, int], alpha: int, tolerance: float, form: str | None) -> None:
    """Prints the verdict on this machine's CPU.

    Raises:
        click.UsageError: Its roof was not measured, or an option is given that this verdict does not have.
    """
    given = click.get_current_context()
    for name, allowed in (("dtype", ("fp32",)), ("block", ()), ("kept", ()), ("path", ())):
        asked = given.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if asked and given.params[name] not in allowed:
            raise click.UsageError(
                "--gpu here predicts stored labels in float32: it takes no other --dtype, --block, --kept or --measured"
            )
    if not 2 <= alpha <= ALPHAS[-1]:
        raise click.UsageError(f"--gpu here knows 2 to {ALPHAS[-1]} children, got {alpha}")
    roof = roof_here()
    if roof is None:
        raise click.UsageError("this machine's CPU was not measured with its present number of threads: run `fpe here`")
    if form:
        print_rows([{"cpu": roof.name, **row} for row in draw.verdict_rows(*shape, alpha, roof, tolerance)], form)
        return
    print_table(draw.verdict_table(*shape, alpha, roof, tolerance))


@click.command("gpus")
@rows_options
def gpus_command(form: str | None) -> None:
    """Print the GPUs that --gpu knows, by the name it takes.

    For another GPU, or for measured figures, give --gpu a roof: a JSON file with name, arch, bandwidth, flops, l2 and
    integer. `fpe gpu --only roof` measures one, and docs/benchmarks.md shows how to write one.
    """
    if form:
        print_rows([{"key": key, **gpu._asdict()} for key, gpu in GPUS.items()], form)
        return
    columns = ("--gpu", "GPU", "capability", "GB/s", "16-bit TFLOP/s", "float32 TFLOP/s", "L2 MB", "SMs")
    rows = [
        (key, g.name, f"{g.arch / 10}", f"{g.bandwidth:g}", f"{g.tensor:g}", f"{g.fp32:g}", f"{g.l2:g}", f"{g.sms}")
        for key, g in GPUS.items()
    ]
    print_table(Table("GPUs as their vendor publishes them, dense, float32 sums; not measured", columns, rows))


def _roof_beside(path: Path, results: Results) -> str:
    """The path of the roof that was measured with a results file, or the name of the device."""
    beside = path.with_name("roof.json")
    return str(beside) if beside.is_file() else results.provenance["device"]


@click.command("gpu", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def gpu_command(arguments: tuple[str, ...]) -> None:
    """Measure everything that needs a GPU, in minutes: correctness first, then times (--help says more)."""
    from ..gpu.cli import main

    raise SystemExit(main(arguments))


COLUMNS = ("ms", "low", "high", "over parent", "over wide", "host_milliseconds", "bytes", "GB/s", "flops")
"""Columns of a latency table besides those that name the row."""


@click.command("latency")
@click.option(
    "--shape",
    "names",
    type=Shapes(),
    metavar="NxK",
    multiple=True,
    help=f"{SHAPE_HELP}, or one of {', '.join(shapes.SETS)}.  [default: paper; headline on CUDA]",
)
@click.option("--m", "rows", type=click.IntRange(1), multiple=True, help=f"{ROWS_HELP}  [default: 1, 64]")
@click.option(
    "--structure",
    "structures",
    type=click.Choice(STRUCTURES),
    multiple=True,
    help=f"{STRUCTURE_HELP}  [default: all]",
)
@click.option(
    "--provider",
    "who",
    type=click.Choice(list(PROVIDERS)),
    multiple=True,
    metavar="NAME",
    help=f"Any of {', '.join(PROVIDERS)}.  [default: all]",
)
@click.option(
    "--level", type=click.Choice((*suite.LEVELS, "model")), default="op", show_default=True, help="What is timed."
)
@click.option("--pass", "passes", multiple=True, help="Pass of the layer.  [default: all that the level has]")
@alpha_option()
@dtype_option(ITEMSIZE, None, "  [default: fp32; bf16 on CUDA]")
@block_option()
@click.option(
    "--column",
    "columns",
    type=click.Choice(COLUMNS),
    multiple=True,
    metavar="NAME",
    help=f"Columns to print: {', '.join(COLUMNS)}.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="A PyTorch device.  [default: cuda where there is one]"
)
@click.option("--seconds", type=Number(0), default=0.3, show_default=True, help="Seconds for each pass.")
@rows_options
@output_option()
def latency_command(
    names: tuple[tuple[tuple[int, int], ...], ...],
    rows: tuple[int, ...],
    structures: tuple[str, ...],
    who: tuple[str, ...],
    level: str,
    passes: tuple[str, ...],
    alpha: int,
    dtype: str | None,
    block: tuple[int, int],
    columns: tuple[str, ...],
    device: str | None,
    seconds: float,
    form: str | None,
    output: Path,
) -> None:
    """Time expanded layers beside the parent, the wide dense layer and peers, here and now.

    --level model times whole models on a CPU beside their fpe.to_dense form. It takes only the options --m, --alpha,
    --seconds, --json and --output.
    """
    if level == "model":
        if names or structures or who or passes or dtype or columns or device == "cuda":
            raise click.UsageError("--level model takes --m, --alpha, --seconds, --json and --output alone")
        _time_models(rows or whole.ROWS, alpha, seconds, form, output)
        return
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise click.BadParameter("PyTorch sees no CUDA device", param_hint="'--device'")
    place = device or ("cuda" if cuda else "cpu")
    gpu = place == "cuda"
    chosen = tuple(shape for several in names or [shapes.SETS["headline" if gpu else "paper"]] for shape in several)
    providers = find(who)
    try:
        suite.check_passes(level, passes)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--pass'") from error
    kinds = structures or STRUCTURES
    plan = suite.Plan(chosen, rows or (1, 64), kinds, (alpha,), (dtype or ("bf16" if gpu else "fp32"),), block)
    found = Results("latency", {"device": place, "level": level, "dry_run": not gpu}, [])
    with stopping(NOTHING_WRITTEN):
        cases = list(plan.cases())
        for case in progress(cases, "Timing", len(cases), quiet=bool(form)):
            found.rows.extend(suite.measure(case, providers, place, level, passes, seconds))
    finish(found, output / "latency.jsonl", latency_table(found, columns or COLUMNS[:5]), form)
    if not form:
        present = {row["provider"] for row in found.rows if "milliseconds" in row}
        print_text("\n".join([*(f"{p.name}: {p.about}." for p in providers if p.name in present), *untimed(found)]))


def _time_models(rows: tuple[int, ...], alpha: int, seconds: float, form: str | None, output: Path) -> None:
    cases = whole.cases(rows=rows, alpha=alpha)
    found = Results("latency-models", {"threads": 1, "seconds": seconds}, [])
    with stopping(NOTHING_WRITTEN):
        for case in progress(cases, "Timing", len(cases), quiet=bool(form)):
            found.rows.extend(whole.measure(case, seconds))
    finish(found, output / "latency-models.jsonl", whole.table(found), form)


def latency_table(results: Results, columns: tuple[str, ...] = COLUMNS[:5]) -> Table:
    """Times by case, pass and provider.

    Args:
        results: Of the latency suite.
        columns: Of :data:`COLUMNS`.
    """
    timed = [row for row in results.rows if "milliseconds" in row]
    times = {(*_case(row), row["provider"]): row["milliseconds"] for row in timed}

    def cell(row: dict[str, Any], column: str) -> str:
        if column.startswith("over "):
            base = times.get((*_case(row), column.removeprefix("over ")))
            return "-" if base is None else f"{row['milliseconds'] / base:.3f}"
        if column == "GB/s":
            return f"{row['bytes'] / row['milliseconds'] / 1e6:.4g}" if "bytes" in row else "-"
        value = row.get("milliseconds" if column == "ms" else column)
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    body = [
        (
            f"{row['N']}x{row['K']}",
            row["structure"],
            str(row["M"]),
            row["pass"],
            row["provider"],
            *(cell(row, column) for column in columns),
        )
        for row in timed
    ]
    title = f"Latency, level {results.settings.get('level', '-')}, {results.provenance['device']}"
    return Table(title, ("layer", "structure", "M", "pass", "provider", *columns), body)


def untimed(results: Results) -> list[str]:
    """Which providers were not timed, and why: a line for each."""
    rows = (row for row in results.rows if "milliseconds" not in row)
    return list(dict.fromkeys(f"{row['provider']} is {row['status']}: {row['reason']}" for row in rows))


def _case(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("pass", "M", "N", "K", "alpha", "structure", "block", "dtype"))
