"""What is drawn from committed results, by name: the documents' tables and figures, and the report's."""

from collections.abc import Callable

from matplotlib.figure import Figure

from ..gpu.cli import NAMES, plan_table, planning
from ..lab import semi_structured, survey, traffic
from ..lab.ptx import execute, mutate
from ..latency import whole
from ..results import COMMITTED, Results
from ..studies import boolean_sweep, catalogue, tables
from ..studies.cli import STUDIES
from ..table import Table
from . import costs, figures, study_figures, summary

LLM_LAYER = (14336, 4096)
"""Output and input features of the layer whose bytes are shown (an 8B language model's MLP)."""

CIFAR100 = "studies/mlp-cifar100_lite2_512"
"""Results of the perceptrons on CIFAR-100 features."""

FASHION = "studies/mlp-fashion-mnist"
"""Results of the perceptrons on Fashion-MNIST."""

TABLES: dict[str, Callable[[], Table]] = {
    "boolean": lambda: summary.boolean(_read("studies/boolean")),
    "boolean-sensitivity": lambda: summary.sensitivity(_read("studies/boolean-sensitivity")),
    "budget": lambda: tables.by_width(_read(CIFAR100), catalogue.budget()),
    "by-width": lambda: tables.by_width(_read(CIFAR100), tables.CHOICES),
    "paired": lambda: tables.paired(_read(CIFAR100)),
    "equivalent": lambda: tables.equivalent(_read(CIFAR100)),
    "two-four": lambda: tables.two_four(_read(CIFAR100)),
    "controls": lambda: tables.by_width(_read(CIFAR100), catalogue.controls()),
    "vision-cifar100": lambda: tables.by_width(_read(CIFAR100), catalogue.vision()),
    "vision-fashion": lambda: tables.by_width(_read(FASHION), catalogue.vision()),
    "deep": lambda: tables.deep(_read("studies/deep-cifar100_lite2_512")),
    "many-classes": lambda: tables.many_classes(_read("studies/mlp-wordnet1000_minilm_384")),
    "hidden": lambda: tables.by_width(_read(CIFAR100), catalogue.hidden()),
    "rewiring": lambda: tables.rewiring(_read(CIFAR100)),
    "boolean-sweep": lambda: _of_study("boolean-sweep", "studies/boolean-sweep"),
    "boolean-regressions": lambda: boolean_sweep.regressions(_read("studies/boolean-sweep")),
    "transformer": lambda: _of_study("transformer", "studies/transformer"),
    "cnn": lambda: _of_study("cnn", "studies/cnn-cifar10"),
    "formats": lambda: summary.formats(*LLM_LAYER),
    "traffic": lambda: traffic.table(_read("lab/traffic")),
    "models-cpu": lambda: whole.table(_read("cpu/latency-models")),
    "verdict": lambda: costs.verdict_summary(costs.measured()),
    "crossover": lambda: costs.crossover_table(),
    "gpu-plan": lambda: plan_table(planning(), NAMES, 9 * 60),
    "roofs": lambda: costs.roofs_table(),
    "shares": lambda: costs.shares_table(costs.roof_shown(costs.measured())),
    "memory": lambda: costs.memory_table(),
    "ladder": lambda: summary.ladder(_read("lab/ladder")),
    "hazards": lambda: survey.by_version(_read("lab/hazards")),
    "hazards-compared": lambda: survey.compared(_read("lab/hazards"), "3.7.1"),
    "unpacking": lambda: summary.unpacking(_read("lab/compile")),
    "compiled": lambda: summary.compiled(_read("lab/compile")),
    "semi-structured-compiled": lambda: summary.compiled(_read("lab/semi-structured")),
    "semi-structured-traffic": lambda: traffic.table(_read("lab/traffic-semi-structured")),
    "semi-structured-rates": semi_structured.rates,
    "executed": lambda: execute.table(_read("lab/execute")),
    "mutation": lambda: mutate.table(_read("lab/mutation")),
}
FIGURES: dict[str, Callable[[], Figure]] = {
    "boolean-curves": lambda: figures.curves(_read("studies/boolean-curves")),
    "traffic": lambda: figures.traffic_lines(_read("lab/traffic"), *LLM_LAYER),
    "ratio": lambda: costs.ratio_figure(costs.measured()),
    "roofline": lambda: costs.roofline(costs.measured()),
    "memory": lambda: costs.memory_bars(),
    "boolean-sweep": lambda: study_figures.boolean_sweep_lines(_read("studies/boolean-sweep")),
    "boolean-heatmap": lambda: study_figures.boolean_heatmap(_read("studies/boolean-sweep")),
    "boolean-features": lambda: study_figures.boolean_features(_read("studies/boolean-sweep")),
    "widths": lambda: study_figures.widths([_read(CIFAR100), _read(FASHION)]),
    "vision-sweep": lambda: study_figures.vision(_read(CIFAR100)),
    "budget": lambda: study_figures.budget(_read(CIFAR100)),
    "hidden": lambda: study_figures.hidden(_read(CIFAR100)),
    "boolean-accuracy": lambda: figures.boolean_accuracy(_read("studies/boolean")),
}


def _of_study(name: str, rows: str) -> Table:
    """The table of a sweep."""
    (study,) = (study for study in STUDIES if study.name == name)
    return study.table(_read(rows), list(dict.fromkeys(study.cells())))


def _read(name: str) -> Results:
    return Results.read(COMMITTED / f"{name}.jsonl")
