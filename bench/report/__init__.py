"""The report: the case studies, the ledgers, one self-contained page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn

import fpe

from .. import summary
from ..lab import traffic
from ..ledger import layer_ledger
from ..results import COMMITTED, Results, provenance
from ..studies import boolean, tables, vision
from ..summary import Table
from . import costs, figures, study_figures

BOOLEAN_DEMO = replace(boolean.Choices(), epochs=100)
"""The case study at a length that two cores finish in a minute or two; the committed results have the full one."""

LLM_LAYER = (14336, 4096)
"""Output and input features of the layer whose bytes are shown (an 8B language model's MLP)."""


def build(
    output: Path, seed: int = 0, device: str = "cpu", quick: bool = False, quiet: bool = False
) -> tuple[Path, list[Results], list[Table]]:
    """Runs what the report needs and writes ``report.html`` and the raw rows into a folder.

    Args:
        output: The folder.
        seed: Seed of all randomness.
        device: Where networks are trained.
        quick: A few steps of everything, to see that it runs.
        quiet: No progress bars.

    Returns:
        The page, the results it was drawn from, and the tables of the studies.
    """
    case = boolean.run(boolean.QUICK if quick else BOOLEAN_DEMO, seed, device, quiet)
    real_choices = vision.default_choices()
    real = vision.run(replace(real_choices, epochs=1, trials=2) if quick else real_choices, seed, device, quiet)
    for results in (case.results, case.curves, real):
        results.write(output / f"{results.study}.jsonl")

    ledgers = _ledgers(real, seed)
    tables = [summary.boolean(case.results), summary.vision(real)]
    tables += [summary.ledger(ledgers["dense"], after, name) for name, after in ledgers.items() if name != "dense"]
    tables.append(summary.formats(*LLM_LAYER))
    page = output / "report.html"
    page.write_text(_render(case, real, ledgers, tables))
    return page, [case.results, real], tables[:2]


def _ledgers(real: Results, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Ledgers of the real network's shape, dense and expanded under every policy."""
    settings = real.settings
    data = vision.load(settings["data"])
    features, classes, neurons = data.x.shape[1], int(data.y.max()) + 1, settings["neurons"]
    dense = nn.Sequential(nn.Linear(features, neurons), nn.ReLU(), nn.Linear(neurons, classes))
    ledgers = {"dense": layer_ledger(dense)}
    for name, options in {
        "magnitude": {"resparsify": "magnitude"},
        "input": {"resparsify": "input"},
        "block 4x16, input": {"structure": "block", "block": (4, 16), "resparsify": "input"},
        "partition": {"resparsify": "partition"},
    }.items():
        generator = torch.Generator().manual_seed(seed)
        wide = fpe.expand(dense, settings["alpha"], generator=generator, **options)  # type: ignore[arg-type]
        ledgers[name] = layer_ledger(wide)
    return ledgers


def _render(case: boolean.BooleanStudy, real: Results, ledgers: dict[str, Any], tables: list[Table]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    drawn = {
        **{f"boolean_{name}": figure for name, figure in figures.boolean_figures(case).items()},
        "vision": figures.vision_accuracy(real),
        "ledger": figures.ledger_bars(ledgers),
        "formats": figures.format_bars(*LLM_LAYER),
    }
    full, sensitivity, traced, compiled = (
        Results.read(path) if (path := COMMITTED / f"{name}.jsonl").exists() else None
        for name in ("studies/boolean", "studies/boolean-sensitivity", "lab/traffic", "lab/compile")
    )
    if traced is not None:
        drawn["traffic"] = figures.traffic_lines(traced, *LLM_LAYER)
    sweeps = _committed_sweeps()
    drawn.update(sweeps["figures"])
    return environment.get_template("page.html.j2").render(
        figures={name: figures.svg(figure) for name, figure in drawn.items()},
        boolean=tables[0],
        vision=tables[1],
        ledgers=tables[2:-1],
        formats=tables[-1],
        full=full and summary.boolean(full),
        sensitivity=sensitivity and summary.sensitivity(sensitivity),
        traffic=traced and traffic.table(traced),
        compiled=compiled and summary.compiled(compiled),
        sweeps=sweeps["tables"],
        choices=case.results.settings,
        real=real.settings,
        headline=_headline(case.results, real),
        costs=costs.section(),
        provenance=provenance(),
    )


def _committed_sweeps() -> dict[str, Any]:
    """Figures and tables of the committed sweeps."""
    found: dict[str, Any] = {"figures": {}, "tables": []}
    cifar100, boolean_rows = (
        COMMITTED / f"studies/{name}.jsonl" for name in ("mlp-cifar100_lite2_512", "boolean-sweep")
    )
    if cifar100.exists():
        results = Results.read(cifar100)
        found["figures"]["budget"] = study_figures.budget(results)
        found["figures"]["hidden"] = study_figures.hidden(results)
        found["tables"] += [tables.by_width(results), tables.two_four(results), tables.rewiring(results)]
    if boolean_rows.exists():
        found["figures"]["boolean_sweep"] = study_figures.boolean_sweep_lines(Results.read(boolean_rows))
    return found


def _headline(case: Results, real: Results) -> dict[str, str]:
    """Mean accuracies that the page's first lines quote."""
    boolean_means = case.frame.groupby("condition")["test_accuracy"].mean()
    real_means = real.frame.groupby("condition")["test_accuracy"].mean()
    return {
        "boolean_dense": f"{boolean_means['dense-continued']:.1f}",
        "boolean_clause": f"{boolean_means['clause']:.1f}",
        "real_dense": f"{real_means['dense-continued']:.1f}",
        "real_random": f"{real_means['random']:.1f}",
    }
