"""When to split and when to stop: signs of a dense run, criteria on them, and training that ends by validation."""

from dataclasses import asdict

import pandas as pd
import pytest
import torch
from support import seeded
from torch import nn

from fpe.bench.results import Results
from fpe.bench.studies import converged, moment, transformer
from fpe.bench.studies.conditions import CONTINUED
from fpe.bench.studies.moment import LOSS, RANKS, SPLIT, Cell
from fpe.bench.studies.protocol import Data
from fpe.bench.studies.stack import Stack
from fpe.bench.studies.transformer import PARTITION


def test_signs_are_the_loss_and_the_order_of_the_magnitudes() -> None:
    x, y = torch.randn(30, 4, generator=seeded(1)), torch.randint(3, (30,), generator=seeded(2))
    stack = Stack([nn.Linear(4, 3) for _ in range(2)])
    signs = moment.Signs(Data(x, y, x, y), steps=2)
    signs(1, stack, {})
    assert not signs.loss
    weight = torch.arange(1.0, 13).view(3, 4)
    for step, (first, second) in enumerate(((weight, weight), (weight * -2, 13 - weight)), 1):
        with torch.no_grad():
            stack.parameters["weight"].copy_(torch.stack([first, second]))
        signs(2 * step, stack, {})
    assert signs.ranks == [pytest.approx([1, -1])]
    nats = [nn.functional.cross_entropy(model(x), y).item() for model in stack.models()]
    assert signs.loss[-1] == pytest.approx([one / torch.log(torch.tensor(2.0)).item() for one in nats], rel=1e-5)


def test_a_criterion_fires_after_the_first_epoch_at_which_it_holds() -> None:
    row = pd.Series({"loss": [10.0, 9.5, 8.0, 7.0, 6.9], "ranks": [0.5, 0.9, 0.8, 0.95]})
    assert moment.fired(row, RANKS, 0.85) == 3 and moment.fired(row, RANKS, 0.4) == 2
    assert moment.fired(row, LOSS, 0.9) == 4, "15.8 % in the third epoch is the steepest, 12.5 % follow"
    assert moment.fired(row, LOSS, 0.5) == 5
    assert moment.fired(row, RANKS, 0.99) == moment.fired(row, LOSS, 0.05) == moment.TOTAL


def test_a_network_is_split_at_the_first_moment_tried_after_its_criterion_holds() -> None:
    tried = (0, 10, moment.AFTER, 40)
    rows = [
        {**asdict(Cell(SPLIT, before, moment.TOTAL - before)), "trial": trial, "validation_accuracy": 0.0}
        | {"test_accuracy": 60.0 - before + trial}
        for before in tried
        for trial in range(2)
    ]
    ranks = [[0.0] * 8 + [1.0], [0.0] * 9 + [1.0]]  # settled after 10 and after 11 epochs
    rows += [
        {**asdict(Cell(CONTINUED, 0, moment.TOTAL)), "trial": trial, "loss": [1.0] * 50, "ranks": ranks[trial]}
        for trial in range(2)
    ]
    drawn = moment.criteria([Results("moment", {"data": "d", "trials": 2}, rows[::-1], {})])
    assert len(drawn.rows) == 8
    (shown,) = (row for row in drawn.rows if row[1] == f"{RANKS} 0.998")
    assert [cell.split(" ")[0] for cell in (shown[2], shown[4], *shown[5:])] == ["17.5", "43.0", "-17.50", "+7.50"]


def test_training_ends_once_validation_has_not_improved_for_a_while_at_the_last_step_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    falling = iter([3.0, 2.0, 2.1, 1.9999, 1.5, 1.6, 1.7, 1.4, 1.3, 1.4, 1.4])
    monkeypatch.setattr(transformer, "measured", lambda stack, x, y: ([next(falling)] * 2, [0.0] * 2))
    monkeypatch.setattr(converged, "PATIENCE", 2)
    x = torch.eye(2)
    stack = Stack([nn.Linear(2, 2) for _ in range(2)])
    watch = converged.Plateau(Data(x, x, x, x, x, x), every=3)
    shares = []
    for step, _ in enumerate(watch.until(iter([(x, x)] * 60)), 1):
        watch(step, stack, {})
        shares.append(watch.share)
    assert len(shares) == 3 * 11 and watch.done, "two looks without a fall, three times"
    assert shares[2::3] == [1, 1, 1, *[1 / converged.CUT] * 3, *[1 / converged.CUT**2] * 4, 1 / converged.CUT**3]
    assert watch.least.tolist() == pytest.approx([1.3] * 2) and watch.at.tolist() == [27] * 2


def test_the_second_round_goes_on_from_the_first() -> None:
    settings = converged.Settings(data="digits", trials=2, epochs=1, tokens=64)
    rows = {
        cell: converged.run_cell(cell, settings) for cell in (converged.Cell(CONTINUED, 1), converged.Cell(PARTITION))
    }
    first, split = rows.values()
    assert [row["validation_bits"] for row in split] != [row["validation_bits"] for row in first]
    assert all(after["curve"][0] < before["curve"][0] for before, after in zip(first, split, strict=True))
    assert first[0]["nonzeros"] == split[0]["nonzeros"] and first[0]["steps"] == 100 and not first[0]["stopped"]


def test_a_round_is_compared_with_the_dense_model_of_its_size_trial_by_trial() -> None:
    made = [(cell, trial) for cell in converged.cells() for trial in (3 * cell.group, 3 * cell.group + 1)]
    bits = {CONTINUED: 2.0, PARTITION: 1.5}
    rows = [
        {
            **asdict(cell),
            "trial": trial,
            "test_bits": bits.get(cell.condition, 1.0) + 0.1 * trial + (cell.size == "usual") - 0.25 * cell.rounds,
            "test_accuracy": 50.0,
            "validation_bits": 1.0,
            "nonzeros": 7,
            "steps": 200 + cell.group,
            "stopped": cell.condition != PARTITION,
        }
        for cell, trial in made
    ]
    results = Results("converged", {"data": "d", "width": 32}, rows[::-1], {})
    drawn = converged.table(results, converged.cells())
    assert len(drawn.rows) == 16
    shown = {row[:2]: row for row in drawn.rows}
    for size in transformer.SIZES:
        assert shown[size, CONTINUED][7] == "-" and shown[size, "dense"][7] == "+0.2500 ± 0.0000"
        assert shown[size, "partition"][7] == "-0.5000 ± 0.0000" and shown[size, "partition"][3] == "4"
        assert shown[size, "partition"][4].endswith(", cut off") and "cut off" not in shown[size, "ranking"][4]


def test_a_usual_model_begins_as_one() -> None:
    settings = converged.Settings(data="digits", trials=1, epochs=1, tokens=64)
    narrow, usual = (
        converged.run_cell(converged.Cell(CONTINUED, 1, size=size), settings) for size in transformer.SIZES
    )
    assert narrow[0]["nonzeros"] < usual[0]["nonzeros"] and (narrow[0]["size"], usual[0]["size"]) == ("narrow", "usual")
