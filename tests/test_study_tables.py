"""The studies' tables: intervals, gains over the control of the same trial, published figures beside ours."""

import re
from collections.abc import Callable
from dataclasses import asdict

import pytest
from support import ROOT

from fpe.bench.results import Results
from fpe.bench.studies import conditions, intervals, tables
from fpe.bench.studies import mlp as mlp_study
from fpe.bench.table import Table


def test_when_to_expand_is_one_screen_whose_claims_name_sections_that_there_are() -> None:
    text = (ROOT / "docs/when.md").read_text()
    assert text.count("\n") <= 45 and max(map(len, text.splitlines())) <= 130
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/studies.md").read_text(), re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    defined = dict(re.findall(r"^\[(\w+)\]: studies\.md#(\S+)$", text, re.M))
    claims = re.split(r"\n- ", text[: text.index("\n[")])[1:]
    assert anchors.issuperset(defined.values())
    assert all(re.search(r"\(\[\w+\]\)", claim) for claim in claims), "a claim without its table"
    assert set(re.findall(r"\(\[(\w+)\]\)", text)) == set(defined)


def test_intervals_are_students() -> None:
    assert intervals.interval([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"
    assert intervals.interval([1.25], 1, "+") == "+1.2"


def test_gains_are_paired_with_the_control_of_the_same_shape() -> None:
    cell = {"neurons": 4, "layers": 2, "around": 0, "alpha": 2}
    rows = [
        {**cell, "condition": condition, "trial": trial, "test_accuracy": value, "neurons": neurons}
        for neurons in (4, 8)
        for condition, values in ((conditions.CONTINUED, (50, 60)), ("random magnitude", (55, 63)))
        for trial, value in enumerate(v + neurons for v in values)
    ]
    joined = tables.against_control(Results("mlp", {}, rows[::-1], {}))
    gained = joined[joined["condition"] == "random magnitude"].sort_values(["neurons", "trial"])
    assert gained["points"].tolist() == [5, 3, 5, 3]
    assert gained["relative"].tolist() == pytest.approx([500 / 54, 300 / 64, 500 / 58, 300 / 68])


def test_conditions_are_compared_trial_by_trial() -> None:
    cell = {"neurons": 4, "layers": 2, "around": 0, "alpha": 2, "rewire": "", "split": 0.5}
    names = {name: i for i, name in enumerate(sorted({name for pair in tables.PAIRED for name in pair}))}
    rows = [
        {**cell, "condition": name, "trial": trial, "test_accuracy": 10 * trial + i}
        for name, i in names.items()
        for trial in range(3)
    ]
    rows.append({**rows[0], "condition": "random input", "split": 0.1, "test_accuracy": 0})
    drawn = tables.paired(Results("mlp", {"data": "d", "epochs": 1, "trials": 3}, rows[::-1], {}))
    shown = {row[0]: row[1] for row in drawn.rows}
    assert len(shown) == len(tables.PAIRED)
    for ours, theirs in tables.PAIRED:
        assert shown[f"{ours} - {theirs}, alpha = 2"] == f"{names[ours] - names[theirs]:+.2f} ± 0.00"


def test_a_table_by_width_has_a_row_for_each_condition() -> None:
    cells = [
        mlp_study.Cell(condition, neurons, alpha)
        for condition, alpha in ((conditions.CONTINUED, 2), ("random input", 2), ("random input", 4))
        for neurons in (8, 4)
    ]
    values = {conditions.CONTINUED: 50, "random input": 53}
    rows = [
        {**asdict(cell), "trial": trial, "test_accuracy": values[cell.condition] + cell.alpha * trial}
        for cell in cells[:-1]
        for trial in range(2)
    ]
    rows.append({**rows[-1], "layers": 5, "test_accuracy": 0})
    drawn = tables.by_width(Results("mlp", {"data": "d", "epochs": 1, "trials": 2}, rows, {}), cells)
    assert drawn.columns[1:] == ("4 neurons", "8 neurons")
    assert [(row[0], *(cell.split(" ")[0] for cell in row[1:])) for row in drawn.rows] == [
        ("dense-continued, %", "51.0", "51.0"),
        ("random input, alpha = 2", "+3.0", "+3.0"),
        ("random input, alpha = 4", "-", "+4.0"),
    ]


@pytest.mark.parametrize(("draw", "paper"), [(tables.deep, "+28.0"), (tables.many_classes, "+0.9")])
def test_deep_networks_stand_beside_the_published(draw: Callable[[Results], Table], paper: str) -> None:
    neurons = 4 if draw is tables.deep else 6
    accuracies = {conditions.CONTINUED: (10, 20), "random magnitude": (11, 22), "random auto": (12, 24)}
    rows = [
        {**asdict(mlp_study.Cell(condition, neurons, layers=layers)), "trial": trial, "test_accuracy": value * share}
        for layers, share in ((5, 1), (2, 9))
        for condition, values in accuracies.items()
        for trial, value in enumerate(values)
    ]
    (row,) = draw(Results("mlp", {"data": "d", "epochs": 1, "trials": 2}, rows, {})).rows
    assert paper in row
    ours = [cell for cell in row if cell.startswith("+") and "±" in cell]
    expected = ["+10.0 ± 0.0", "+20.0 ± 0.0"] if draw is tables.deep else ["+1.50 ± 6.35", "+3.00 ± 12.71"]
    expected.append("+1.50 ± 6.35")  # one policy over the other
    assert ours == expected


def test_a_split_is_worth_the_dense_network_that_does_as_well() -> None:
    cell = {"layers": 2, "around": 0, "alpha": 2, "rewire": "", "split": 0.5, "trial": 0}
    dense = [{**cell, "condition": conditions.CONTINUED, "neurons": 4**i, "test_accuracy": 10 * i} for i in range(4)]
    wide = [{**cell, "condition": "random magnitude", "neurons": n, "test_accuracy": a} for n, a in ((4, 15), (16, 40))]
    drawn = tables.equivalent(Results("mlp", {"data": "d", "epochs": 1, "trials": 1}, [*wide, *dense], {}))
    assert drawn.rows == [("4", "2", "15.0", "8.0", "2.00")]
