"""The commands on cost: ``fpe explain``, ``fpe verdict``, ``fpe latency`` and ``fpe gpu``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from ...kernels.model import PASSES
from ...kernels.roofs import ITEMSIZE, Roof
from ...kernels.structures import STRUCTURES
from ..costs import verdict
from ..latency import shapes, suite, whole
from ..latency.providers import PROVIDERS, find
from ..results import Results
from ..table import Table
from .options import json_option, output_option
from .output import NOTHING_WRITTEN, console, finish, print_table, stopping
from .progress import progress


def sized(command: Callable) -> Callable:
    """The options that name a layer and a GPU."""
    for option in (
        click.option("--gpu", help="A GPU's name or a measured roof's JSON file.  [default: the one at hand, or h200]"),
        click.option("--block", type=(click.IntRange(1), click.IntRange(1)), default=(64, 64), show_default=True),
        click.option("--dtype", type=click.Choice(list(ITEMSIZE)), default="bf16", show_default=True),
        click.option("--alpha", type=click.IntRange(1), default=2, show_default=True, help="Children per parent."),
        click.option("--k", type=click.IntRange(1), default=14336, show_default=True, help="Input features."),
        click.option("--n", type=click.IntRange(1), default=4096, show_default=True, help="Parent's output features."),
    ):
        command = option(command)
    return command


def _roof(gpu: str | None) -> Roof:
    at_hand = torch.cuda.get_device_name() if torch.cuda.is_available() else "h200"
    try:
        return verdict.find_roof(gpu or at_hand)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--gpu") from error


@click.command("explain")
@click.option("--m", type=click.IntRange(1), default=1, show_default=True, help="Rows of activations.")
@click.option("--structure", type=click.Choice(STRUCTURES), default="random", show_default=True)
@click.option("--op", "name", type=click.Choice(list(PASSES)), default="forward", show_default=True, help="Pass.")
@sized
def explain_command(m: int, structure: str, name: str, gpu: str | None, **layer: Any) -> None:
    """Say which implementation runs an expanded layer, what each would cost, and why (predicted)."""
    roof = _roof(gpu)
    try:
        table = verdict.explain(verdict.Layer(**layer), structure, m, roof, name)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    print_table(table)
    console.print(verdict.assumptions(roof))


@click.command("verdict")
@click.option("--tolerance", type=click.FloatRange(0), default=0.10, show_default=True, help="What counts as equal.")
@json_option
@click.option(
    "--measured", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="latency.jsonl of fpe gpu."
)
@sized
def verdict_command(tolerance: float, gpu: str | None, path: Path | None, as_json: bool, **layer: Any) -> None:
    """Say up to which batch size an expanded layer costs what its dense parent costs, and what to use above."""
    sizes = verdict.Layer(**layer)
    try:
        results = Results.read(path) if path else None
        roof = _roof(gpu or (_roof_beside(path, results) if path and results else None))
        rows = verdict.measured(sizes, results, tolerance) if results else verdict.predict(sizes, roof, tolerance)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    name, basis = (results.provenance["device"], f"measured, {path}") if results else (roof.name, roof.basis)
    if as_json:
        for row in rows:
            click.echo(json.dumps({"gpu": name, "basis": basis, **row}))
        return
    console.print(verdict.sentences(sizes, rows, name, basis, tolerance))
    if results:
        print_table(verdict.compared_table(sizes, rows, results, roof, tolerance))
    else:
        print_table(verdict.verdict_table(sizes, rows, roof, tolerance))
    console.print(verdict.assumptions(roof))


def _roof_beside(path: Path, results: Results) -> str:
    """The roof measured with a results file, or the name of the device that it is of."""
    beside = path.with_name("roof.json")
    return str(beside) if beside.is_file() else results.provenance["device"]


@click.command("gpu", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def gpu_command(arguments: tuple[str, ...]) -> None:
    """Measure everything that needs a GPU, in minutes: correctness first, then times (--help says more)."""
    from ..gpu.cli import main

    raise SystemExit(main(arguments))


COLUMNS = ("milliseconds", "low", "high", "over parent", "over wide", "host_milliseconds", "bytes", "GB/s", "flops")
"""Columns of a latency table besides those that name the row."""


@click.command("latency")
@click.option(
    "--shape", "names", multiple=True, help="N x K of the parent, or a set.  [default: paper; headline on CUDA]"
)
@click.option("--m", "rows", type=click.IntRange(1), multiple=True, help="Rows of activations.  [default: 1, 64]")
@click.option("--structure", "structures", type=click.Choice(STRUCTURES), multiple=True, help="[default: all]")
@click.option("--provider", "who", multiple=True, help=f"Of {', '.join(PROVIDERS)}.  [default: all]")
@click.option(
    "--level", type=click.Choice((*suite.LEVELS, "model")), default="op", show_default=True, help="What is timed."
)
@click.option("--pass", "passes", multiple=True, help="Of the level's.  [default: all]")
@click.option("--alpha", type=click.IntRange(2), default=2, show_default=True, help="Children per parent.")
@click.option("--dtype", type=click.Choice(list(ITEMSIZE)), help="[default: fp32; bf16 on CUDA]")
@click.option("--block", type=(click.IntRange(1), click.IntRange(1)), default=(64, 64), show_default=True)
@click.option("--column", "columns", multiple=True, help=f"To print, of {', '.join(COLUMNS)}.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--seconds", type=click.FloatRange(0), default=0.3, show_default=True, help="To spend on each pass.")
@json_option
@output_option()
def latency_command(
    names: tuple[str, ...],
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
    as_json: bool,
    output: Path,
) -> None:
    """Time expanded layers beside the parent, the wide dense layer and peers, here and now.

    With --level model whole models on a CPU, beside what fpe.to_dense makes of them; of the other options it takes
    --m, --alpha, --seconds, --json and --output.
    """
    if level == "model":
        if names or structures or who or passes or dtype or columns or device == "cuda":
            raise click.UsageError("--level model takes --m, --alpha, --seconds, --json and --output alone")
        _time_models(rows or whole.ROWS, alpha, seconds, as_json, output)
        return
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise click.BadParameter("PyTorch sees no CUDA device", param_hint="--device")
    place = device or ("cuda" if cuda else "cpu")
    gpu = place == "cuda"
    try:
        unknown = sorted(set(columns) - set(COLUMNS))
        if unknown:
            raise ValueError(f"column must be one of {', '.join(COLUMNS)}, got {unknown[0]!r}")
        chosen = tuple(shape for name in names or (["headline"] if gpu else ["paper"]) for shape in shapes.find(name))
        providers = find(who)
        suite.check_passes(level, passes)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    kinds = structures or STRUCTURES
    plan = suite.Plan(chosen, rows or (1, 64), kinds, (alpha,), (dtype or ("bf16" if gpu else "fp32"),), block)
    found = Results("latency", {"device": place, "level": level, "dry_run": not gpu}, [])
    with stopping(NOTHING_WRITTEN):
        cases = list(plan.cases())
        for case in progress(cases, "Timing", len(cases), quiet=as_json):
            found.rows.extend(suite.measure(case, providers, place, level, passes, seconds))
    finish(found, output / "latency.jsonl", latency_table(found, columns or COLUMNS[:5]), as_json)
    if not as_json:
        for line in untimed(found):
            console.print(line, highlight=False)


def _time_models(rows: tuple[int, ...], alpha: int, seconds: float, as_json: bool, output: Path) -> None:
    cases = whole.cases(rows=rows, alpha=alpha)
    found = Results("latency-models", {"threads": 1, "seconds": seconds}, [])
    with stopping(NOTHING_WRITTEN):
        for case in progress(cases, "Timing", len(cases), quiet=as_json):
            found.rows.extend(whole.measure(case, seconds))
    finish(found, output / "latency-models.jsonl", whole.table(found), as_json)


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
        value = row.get(column)
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
    """Who got no time, and why: a line each."""
    rows = (row for row in results.rows if "milliseconds" not in row)
    return list(dict.fromkeys(f"{row['provider']} is {row['status']}: {row['reason']}" for row in rows))


def _case(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("pass", "M", "N", "K", "alpha", "structure", "block", "dtype"))
