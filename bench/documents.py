"""Tables and figures of the documents, drawn from committed results: nothing there is typed by hand.

A document holds marked places, ``<!-- table: boolean -->`` ... ``<!-- end -->``; :func:`refresh` fills them.
"""

import re
from collections.abc import Callable
from pathlib import Path

from . import summary
from .lab import semi_structured, traffic
from .report import LLM_LAYER, costs, figures, study_figures
from .results import COMMITTED, Results
from .studies import boolean_sweep, tables
from .studies.cli import STUDIES
from .summary import Table

ROOT = Path(__file__).resolve().parents[1]
"""The checkout; documents exist there alone, not in an installed package."""

DOCUMENTS = (
    "README.md",
    "docs/benchmarks.md",
    "docs/boolean.md",
    "docs/kernels.md",
    "docs/semi_structured.md",
    "docs/studies.md",
)

CIFAR100 = "studies/mlp-cifar100_lite2_512"
"""Results of the perceptrons on CIFAR-100 features."""

_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[], Table]] = {
    "boolean": lambda: summary.boolean(_read("studies/boolean")),
    "boolean-sensitivity": lambda: summary.sensitivity(_read("studies/boolean-sensitivity")),
    "vision": lambda: summary.vision(_read("studies/vision")),
    "budget": lambda: _of_study("budget", CIFAR100),
    "by-width": lambda: tables.by_width(_read(CIFAR100)),
    "paired": lambda: tables.paired(_read(CIFAR100)),
    "equivalent": lambda: tables.equivalent(_read(CIFAR100)),
    "two-four": lambda: tables.two_four(_read(CIFAR100)),
    "controls": lambda: _of_study("controls", CIFAR100),
    "vision-cifar100": lambda: _of_study("vision-sweep", CIFAR100),
    "deep": lambda: tables.deep(_read(CIFAR100)),
    "hidden": lambda: _of_study("hidden", CIFAR100),
    "rewiring": lambda: tables.rewiring(_read(CIFAR100)),
    "boolean-sweep": lambda: _of_study("boolean-sweep", "studies/boolean-sweep"),
    "boolean-regressions": lambda: boolean_sweep.regressions(_read("studies/boolean-sweep")),
    "transformer": lambda: _of_study("transformer", "studies/transformer"),
    "cnn": lambda: _of_study("cnn", "studies/cnn-cifar10"),
    "formats": lambda: summary.formats(*LLM_LAYER),
    "traffic": lambda: traffic.table(_read("lab/traffic")),
    "verdict": lambda: costs.verdict_summary(costs.measured()),
    "crossover": lambda: costs.crossover_table(),
    "roofs": lambda: costs.roofs_table(),
    "shares": lambda: costs.shares_table(costs.roof_shown(costs.measured())),
    "memory": lambda: costs.memory_table(),
    "ladder": lambda: summary.ladder(_read("lab/ladder")),
    "unpacking": lambda: summary.unpacking(_read("lab/compile")),
    "compiled": lambda: summary.compiled(_read("lab/compile")),
    "semi-structured-compiled": lambda: summary.compiled(_read("lab/semi-structured")),
    "semi-structured-rates": semi_structured.rates,
}
FIGURES = {
    "boolean-curves": lambda: figures.curves(_read("studies/boolean-curves")),
    "traffic": lambda: figures.traffic_lines(_read("lab/traffic"), *LLM_LAYER),
    "ratio": lambda: costs.ratio_figure(costs.measured()),
    "roofline": lambda: costs.roofline(costs.measured()),
    "memory": lambda: costs.memory_bars(),
    "boolean-sweep": lambda: study_figures.boolean_sweep_lines(_read("studies/boolean-sweep")),
    "widths": lambda: study_figures.widths([_read(CIFAR100)]),
    "budget": lambda: study_figures.budget(_read(CIFAR100)),
    "hidden": lambda: study_figures.hidden(_read(CIFAR100)),
    "boolean-accuracy": lambda: figures.boolean_accuracy(_read("studies/boolean")),
}


def fill(text: str) -> str:
    """A document's text with every marked place filled from the committed results.

    Raises:
        ValueError: A place names no table.
    """

    def replace(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in TABLES:
            raise ValueError(f"documents: expected one of {', '.join(TABLES)} in a place, got {name!r}")
        return f"{match.group(1)}{markdown(TABLES[name]())}{match.group(4)}"

    return _PLACE.sub(replace, text)


def refresh() -> list[Path]:
    """Fills the documents and draws their figures; returns what was written."""
    written = []
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(fill(path.read_text()))
        written.append(path)
    written += [figures.save(draw(), ROOT / "docs/figures" / f"{name}.svg") for name, draw in FIGURES.items()]
    return written


def markdown(table: Table) -> str:
    """The table in Markdown, its title above it."""
    alignment = ["---", *("---:" for _ in table.columns[1:])]
    lines = [table.columns, alignment, *table.rows]
    return f"*{table.title}*\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _of_study(name: str, rows: str) -> Table:
    """The table of a sweep."""
    (study,) = (study for study in STUDIES if study.name == name)
    return study.table(_read(rows), list(dict.fromkeys(study.cells())))


def _read(name: str) -> Results:
    return Results.read(COMMITTED / f"{name}.jsonl")
