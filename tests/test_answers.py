"""What the report and README answer first, beside the commands that they name: one figure, one spelling."""

import json
import re
from itertools import product

import newcomer
import pytest
from click.testing import CliRunner

from fpe.bench.cli import cli
from fpe.bench.report import answers, costs
from fpe.bench.report.costs import LAYER


def rows_of(*arguments: str) -> list[dict]:
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def table(name: str) -> dict[str, dict]:
    """A table as ``fpe results`` prints it, by its first column; of equal ones the first."""
    rows = rows_of("results", "--table", name)
    first = next(iter(rows[0]))
    return {row[first]: row for row in reversed(rows)}


@pytest.fixture(scope="module")
def answered() -> dict[str, str]:
    return {row["question"]: row["answer"] for row in rows_of("results", "--table", "should-i")}


def listed(cells: list[str]) -> str:
    return f"{', '.join(cells[:-1])} and {cells[-1]}"


def test_every_answer_of_figures_names_the_command_that_prints_them(answered: dict[str, str]) -> None:
    named = {name for text in answered.values() for name in re.findall(r"`fpe results --table ([\w-]+)`", text)}
    assert {f"fpe results --table {name}" for name in named} == set(newcomer.ANSWERS)
    assert all("`fpe " in text for text in answered.values())


def test_gains_are_those_of_the_tables(answered: dict[str, str]) -> None:
    split, others = table("by-width"), table("controls")
    widths = [f"{n} neurons" for n in (4, 8, 16, 32, 64)]
    assert ", ".join(split["random input, alpha = 2"][w] for w in widths) in answered["What does it gain?"]
    for name in ("wide dense", "fresh weights"):
        own = others[f"{name}, alpha = 2"]
        assert ", ".join(own[w] for w in widths[:3]) in answered["Why not just a wider layer?"]


def test_the_cost_on_a_gpu_is_the_verdict_s(answered: dict[str, str]) -> None:
    text = answered["What does it cost on a GPU?"]
    worst: dict[tuple[str, str], float] = {}
    for key in answers.SHOWN_GPUS:
        rows = rows_of("verdict", "--gpu", key, "--shape", f"{LAYER.n}x{LAYER.k}")
        serving = {row["structure"]: row for row in rows if row["workload"] == "inference"}
        assert f"{serving['random']['holds_to']} ({serving['random']['gpu']})" in text
        for kind, m in product(("random", "block"), serving["random"]["ratio"]):
            worst[kind, m] = max(worst.get((kind, m), 0.0), serving[kind]["ratio"][m])
    m = max((ratio, m) for (kind, m), ratio in worst.items() if kind == "random")[1]
    assert f"at {m} rows it takes up to {worst['random', m]:.2f} times as long" in text
    assert f"with blocks up to {worst['block', m]:.2f} times" in text


def test_memory_is_that_of_the_table(answered: dict[str, str]) -> None:
    found = re.findall(r"[\d.]+(?= times)", answered["How much memory?"])
    parts = table("memory")
    assert found == [parts["ours, labels"]["total"], parts["wide dense"]["total"]]


def test_the_cost_on_a_cpu_is_that_of_the_tables(answered: dict[str, str]) -> None:
    text = answered["What does it cost on a CPU?"]
    rows = rows_of("results", "--table", "here")
    few = [row for row in rows if row["layer, alpha"] == "14336 x 4096, 2" and row["rows"] in ("1", "4", "16")]
    for column in ("of parent", "of wide"):
        assert f"{listed([row[column] for row in few])} times as long as" in text
    models = rows_of("results", "--table", "models-cpu")
    for what in ("inference", "step"):
        cells = [float(row[column]) for row in models for column in row if column.startswith(what)]
        assert re.search(rf"{what} [\d.]+ times \({min(cells):.2f} to {max(cells):.2f}\)", text)


def test_the_report_s_sentences_are_those_of_the_verdict() -> None:
    done = CliRunner().invoke(cli, ["verdict"], env={"COLUMNS": "4000"})
    assert done.exit_code == 0 and costs.measured() is None
    for sentence in costs.section()["sentences"]:
        assert sentence in done.stdout
