"""The report: one HTML page with the case studies, the costs and the committed results."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import torch
from torch import nn

import fpe

from ..costs.ledger import layer_ledger
from ..here import draw, measure
from ..results import Results, provenance
from ..studies import boolean, boolean_drawn, vision
from ..studies.drawing import palette, svg
from ..studies.intervals import interval
from ..table import Table
from . import answers, costs, figures, summary
from .committed import FIGURES, LLM_LAYER, STUDIES, TABLES

T = TypeVar("T")

SHOWN_FIGURES = (
    *("traffic", "budget", "hidden", "widths", "vision-sweep"),
    *("boolean-sweep", "boolean-heatmap", "boolean-features"),
)
"""Committed figures on the page, by name."""
PLACED = ("boolean", "boolean-sensitivity", "by-width", "traffic", "compiled")
"""Committed tables with places of their own on the page, by name; all other tables of studies are in one list."""

CAPTIONS = {
    "here": "Time over the dense parent's, 20th to 80th percentile; dotted: as the cost model predicts it.",
    "boolean_curves": "Test accuracy by epoch, mean and range over trials. After the split a new optimizer trains the "
    "same weights.",
    "boolean_accuracy": "Test accuracy: a dot is a trial, the bar is their mean. Dashed: the published figures.",
    "boolean_weights": "First-layer weights of one trial. Grey: the neuron has no such edge.",
    "boolean_gram": "Gram matrices of the same weights. Colour off the diagonal blocks is interference of clauses.",
    "vision": "Test accuracy on real data: a dot is a trial. The dotted line is the dense network trained for as many "
    "epochs.",
    "budget": "The policies that gain keep the output layer nearly whole; the structure of the masks hardly matters.",
    "hidden": "In a pair with as many outputs as inputs, giving every output edge to one child gains most.",
    "widths": "Gain by width and alpha; dotted: children that keep related inputs together (Gram).",
    "vision_sweep": "Accuracy at equal weights, when to split, the neurons' cosine, and the expansion factor.",
    "boolean_sweep": "The Boolean task by clauses and by neurons; bands are 95 % intervals.",
    "boolean_heatmap": "The Boolean task for all numbers of clauses and neurons.",
    "boolean_features": "What goes with the gain on the Boolean task: a dot is a network.",
    "ledger": "Non-zero weights of both layers, labelled with the layer's size, for each policy.",
    "formats": "Bytes of a layer by format, counted from the formats' definitions, not measured. Dashed: the dense "
    "parent.",
    "traffic": "Simulated DRAM bytes of an expanded block layer. Dashed: what its dense parent must move at least.",
}
"""What each figure of the page shows, for its readers and for screen readers."""

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
        quick: Whether to run only a few steps of everything, to see that it runs.
        quiet: Whether to show no progress bars.

    Returns:
        The page, the results it was drawn from, and the tables of the studies.
    """
    case = boolean.run(boolean.QUICK if quick else BOOLEAN_DEMO, seed, device, quiet)
    real_choices = vision.default_choices()
    real = vision.run(replace(real_choices, epochs=1, trials=2) if quick else real_choices, seed, device, quiet)
    here = None if measure.why_not() else measure.run(quick, rounds=1 if quick else 2, seed=seed)[1]
    for results in (case.results, case.curves, real, *([here] if here else ())):
        results.write(output / f"report-{results.study}.jsonl")  # the studies' own files are longer runs

    ledgers = _ledgers(real, seed)
    tables = [boolean_drawn.table(case.results), vision.table(real)]
    tables += [summary.ledger(ledgers["dense"], after, name) for name, after in ledgers.items() if name != "dense"]
    tables.append(summary.formats(*LLM_LAYER))
    page = output / "report.html"
    page.write_text(_render(case, real, ledgers, tables, here))
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


def _render(
    case: boolean.BooleanStudy, real: Results, ledgers: dict[str, Any], tables: list[Table], here: Results | None
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    drawn = {
        **{f"boolean_{name}": figure for name, figure in boolean_drawn.figures(case).items()},
        "vision": vision.accuracy_figure(real),
        "ledger": figures.ledger_bars(ledgers),
        "formats": figures.format_bars(*LLM_LAYER),
    }
    if here:
        drawn["here"] = draw.ratio_figure(here)
    drawn |= {name.replace("-", "_"): made for name in SHOWN_FIGURES if (made := _if_there(FIGURES[name]))}
    return environment.get_template("page.html.j2").render(
        figures={name: svg(figure, name, CAPTIONS[name]) for name, figure in drawn.items()},
        captions=CAPTIONS,
        answers=answers.should_i(),
        here=[draw.table(here), draw.model_table(here), draw.crossover_table(here)] if here else [],
        here_says=draw.sentence(here) if here else f"Not measured: {measure.why_not()}.",
        boolean=tables[0],
        vision=tables[1],
        ledgers=tables[2:-1],
        formats=tables[-1],
        committed={name.replace("-", "_"): _if_there(TABLES[name]) for name in PLACED},
        studies=[(name, table) for name in STUDIES if name not in PLACED and (table := _if_there(STUDIES[name]))],
        choices=case.results.settings,
        real=real.settings,
        headline=_headline(case.results, real),
        costs=costs.section(),
        provenance=provenance(),
        palette=palette(),
    )


def _if_there(draw: Callable[[], T]) -> T | None:
    """A committed table or figure; ``None`` where the results are not installed."""
    try:
        return draw()
    except FileNotFoundError:
        return None


def _headline(case: Results, real: Results) -> list[tuple[str, str]]:
    """What this run found: pairs of a figure and what it is; gains have 95 % intervals."""
    found = []
    dense, data = "dense-continued", f"{real.settings['data']}, {real.settings['neurons']} neurons, random masks"
    for results, expanded, what in ((case, "clause", "Boolean task, clauses kept together"), (real, "random", data)):
        by = results.frame.set_index("trial").groupby("condition")
        gain = by.get_group(expanded)["test_accuracy"] - by.get_group(dense)["test_accuracy"]
        found.append(
            (f"{interval(gain, 1, '+')} points", f"{what}: accuracy over the dense network, {len(gain)} trials")
        )
        same = by["nonzeros"].first()
        says = f"non-zero weights before and after the split, {what.partition(',')[0]}"
        found.append((f"{same[dense]} and {same[expanded]}", says))
    return found
