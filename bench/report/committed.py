"""The tables and figures that are drawn from committed results, by name, for the documents and the report."""

from collections.abc import Callable

from matplotlib.figure import Figure

from ..costs import ledger
from ..gpu.cli import NAMES, plan_table, planning
from ..here import draw
from ..lab import survey, traffic
from ..lab.ptx import execute, mutate
from ..latency import whole
from ..results import COMMITTED, Results
from ..studies import every
from ..table import Table
from . import answers, costs, figures, summary

LLM_LAYER = (14336, 4096)
"""Output and input features of the layer whose bytes are shown (an 8B language model's MLP)."""

STUDIES: dict[str, Callable[[], Table]] = {
    name: draw for study in every().values() for name, draw in study.tables.items()
}
TABLES: dict[str, Callable[[], Table]] = {
    **STUDIES,
    "should-i": answers.should_i,
    "formats": lambda: summary.formats(*LLM_LAYER),
    "storage": ledger.storage,
    "traffic": lambda: traffic.table(_read("lab/traffic")),
    "models-cpu": lambda: whole.table(_read("cpu/latency-models")),
    "here": lambda: draw.table(_read("cpu/here")),
    "here-model": lambda: draw.model_table(_read("cpu/here")),
    "here-crossover": lambda: draw.crossover_table(_read("cpu/here")),
    "verdict": lambda: costs.verdict_summary(costs.measured()),
    "crossover": lambda: costs.crossover_table(),
    "gpu-plan": lambda: plan_table(planning(), NAMES, 9 * 60),
    "roofs": lambda: costs.roofs_table(),
    "shares": lambda: costs.shares_table(costs.roof_shown(costs.measured())),
    "memory": lambda: costs.memory_table(),
    "ladder": lambda: summary.ladder(_read("lab/ladder")),
    "kept-ladder": lambda: summary.ladder(_read("lab/ladder"), kept=True),
    "hazards": lambda: survey.by_version(_read("lab/hazards")),
    "hazards-compared": lambda: survey.compared(_read("lab/hazards"), "3.7.1"),
    "unpacking": lambda: summary.unpacking(_read("lab/compile")),
    "mlp": lambda: summary.fused(_read("lab/compile")),
    "seeded": lambda: summary.seeded(_read("lab/compile")),
    "seeded-traffic": lambda: summary.seeded_traffic(_read("lab/traffic-seeded")),
    "bitmap-compiled": lambda: summary.compiled(_read("lab/bitmap")),
    "compiled": lambda: summary.compiled(_read("lab/compile")),
    "semi-structured-compiled": lambda: summary.compiled(_read("lab/semi-structured")),
    "semi-structured-traffic": lambda: traffic.table(_read("lab/traffic-semi-structured")),
    "semi-structured-rates": summary.sparse_rates,
    "executed": lambda: execute.table(execute.together(_read("lab/execute"), _read("lab/execute-bitmap"))),
    "kept-traffic": lambda: summary.kept_traffic(_read("lab/traffic-bitmap")),
    "kept-instructions": lambda: summary.kept_instructions(_read("lab/bitmap"), _read("lab/wavefronts")),
    "versions": lambda: summary.versions(_read("versions")),
    "mutation": lambda: mutate.table(_read("lab/mutation")),
}
FIGURES: dict[str, Callable[[], Figure]] = {
    **{name: draw for study in every().values() for name, draw in study.figures.items()},
    "traffic": lambda: figures.traffic_lines(_read("lab/traffic"), *LLM_LAYER),
    "ratio": lambda: costs.ratio_figure(costs.measured()),
    "roofline": lambda: costs.roofline(costs.measured()),
    "memory": lambda: costs.memory_bars(),
    "here": lambda: draw.ratio_figure(_read("cpu/here")),
}


def _read(name: str) -> Results:
    return Results.read(COMMITTED / f"{name}.jsonl")
