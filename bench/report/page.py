"""The report's page: the case studies, the ledgers, all in one file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import torch
from torch import nn

import fpe

from ..costs.ledger import layer_ledger
from ..results import Results, provenance
from ..studies import boolean, boolean_drawn, vision
from ..studies.drawing import svg
from ..table import Table
from . import costs, figures, summary
from .committed import FIGURES, LLM_LAYER, STUDIES, TABLES

T = TypeVar("T")

SHOWN_FIGURES = (
    *("traffic", "budget", "hidden", "widths", "vision-sweep"),
    *("boolean-sweep", "boolean-heatmap", "boolean-features"),
)
"""Committed figures on the page, by name."""
PLACED = ("boolean", "boolean-sensitivity", "by-width", "traffic", "compiled")
"""Committed tables that stand at places of their own on the page, by name; those of all studies follow one another."""

BOOLEAN_DEMO = replace(boolean.Choices(), epochs=100)
"""The case study at a length that two cores finish in a minute or two; the committed results have the full one."""


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
        results.write(output / f"report-{results.study}.jsonl")  # the studies' own files are longer runs

    ledgers = _ledgers(real, seed)
    tables = [boolean_drawn.table(case.results), vision.table(real)]
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
        **{f"boolean_{name}": figure for name, figure in boolean_drawn.figures(case).items()},
        "vision": vision.accuracy_figure(real),
        "ledger": figures.ledger_bars(ledgers),
        "formats": figures.format_bars(*LLM_LAYER),
    }
    drawn |= {name.replace("-", "_"): made for name in SHOWN_FIGURES if (made := _if_there(FIGURES[name]))}
    return environment.get_template("page.html.j2").render(
        figures={name: svg(figure) for name, figure in drawn.items()},
        boolean=tables[0],
        vision=tables[1],
        ledgers=tables[2:-1],
        formats=tables[-1],
        committed={name.replace("-", "_"): _if_there(TABLES[name]) for name in PLACED},
        studies=[table for name in STUDIES if name not in PLACED and (table := _if_there(STUDIES[name]))],
        choices=case.results.settings,
        real=real.settings,
        headline=_headline(case.results, real),
        costs=costs.section(),
        provenance=provenance(),
    )


def _if_there(draw: Callable[[], T]) -> T | None:
    """A committed table or figure; nothing where the results are not installed."""
    try:
        return draw()
    except FileNotFoundError:
        return None


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
