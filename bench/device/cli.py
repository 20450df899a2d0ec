"""The command line of ``fpe gpu``, on the standard library's parser: a GPU machine may lack the one of the others."""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..providers import OURS, PROVIDERS, find
from ..results import Results
from ..table import Table
from .steps import STEPS, Context, LostError, RedError, fit_shares, run


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="fpe gpu",
        description="Measure everything that a GPU is needed for: correctness first, then times. Rows are appended as "
        "they come, so that a cut run leaves results and the same command goes on with it.",
        epilog="steps, in order: " + "; ".join(f"{step.name} ({step.help})" for step in STEPS),
    )
    made.add_argument("--budget", type=_seconds, default=540.0, metavar="SECONDS", help="begin nothing after [540]")
    made.add_argument("--only", nargs="+", choices=[s.name for s in STEPS], metavar="STEP", help="these steps alone")
    made.add_argument("--providers", nargs="+", metavar="NAME", help=f"of {', '.join(PROVIDERS)} [all]")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="of the results [out/gpu/<device>]")
    made.add_argument("--dry-run", action="store_true", help="walk the plan on the CPU, small and eager")
    return made


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the plan; returns the exit status: 0, or 1 where something was red or stood in the way."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it for equal bits, as the gate does
    if not options.dry_run and not torch.cuda.is_available():
        return _fail("it needs a CUDA device, and PyTorch sees none; --dry-run walks the plan on the CPU")
    device = "cpu" if options.dry_run else "cuda"
    slug = "dry-run" if options.dry_run else torch.cuda.get_device_name().lower().replace(" ", "-")
    context = Context(device, options.output or Path("out/gpu") / slug, time.monotonic() + options.budget)
    try:
        context.providers = tuple(provider.name for provider in find(tuple(options.providers or ())))
        context.providers = context.providers if options.providers else ()
        context.output.mkdir(parents=True, exist_ok=True)
        for step in STEPS:
            if step.name in (options.only or [step.name]):
                try:
                    run(step, context, options.budget)
                except RedError as error:  # what only times is left out; the sanitizer may say more
                    context.problems.append(f"{step.name}: {error}")
        fit_shares(context)
    except (ValueError, OSError, LostError) as error:
        _print_summary(context)
        return _fail(str(error))
    _print_summary(context)
    if context.problems:
        return _fail(f"{len(context.problems)} went wrong, first {context.problems[0]}")
    return 0


def _fail(message: str) -> int:
    print(f"fpe gpu: {message}", file=sys.stderr)
    return 1


def _print_summary(context: Context) -> None:
    """The short table: ours over the parent's time, by structure and batch size."""
    path = context.path("latency")
    rows = Results.read(path).rows if path.exists() else []
    if rows:
        print(f"\n{headline(rows, context.dry)}")


def headline(rows: list[dict], dry: bool = False) -> Table:
    """Forward times of the first shape's layers over the parent's and the wide dense layer's.

    Args:
        rows: Of the latency step.
        dry: Whether they come from a dry run, which the title then says.
    """
    timed = [r for r in rows if r.get("milliseconds") and r["pass"] == "forward" and r["level"] == "op"]
    cells = []
    for case in dict.fromkeys((r["N"], r["K"], r["alpha"], r["structure"], r["M"]) for r in timed):
        group = {r["provider"]: r for r in timed if (r["N"], r["K"], r["alpha"], r["structure"], r["M"]) == case}
        ours = min((r for n, r in group.items() if n.startswith(OURS)), key=lambda r: r["milliseconds"], default=None)
        if ours is None or not {"parent", "wide"} <= set(group):
            continue
        n, k, alpha, structure, m = case
        over = [f"{ours['milliseconds'] / group[name]['milliseconds']:.3f}" for name in ("parent", "wide")]
        shown = (f"{n}x{k}", f"{alpha}", structure, f"{m}", ours["provider"], f"{1e3 * ours['milliseconds']:.1f}")
        cells.append((*shown, *over))
    title = "Forward, measured" + (" on the CPU in a dry run: no GPU figures" if dry else "")
    return Table(title, ("layer", "alpha", "structure", "M", "fastest", "us", "over parent", "over wide"), cells)
