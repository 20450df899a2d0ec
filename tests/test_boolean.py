"""The case studies: the Boolean task and its formulas, how networks are trained, and the commands that run them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import seeded
from torch import nn

from fpe.bench.cli import cli
from fpe.bench.results import Results
from fpe.bench.studies import boolean, dnf, protocol, vision


@pytest.mark.parametrize("samples", [0, 1, 2, 7, 4000])
def test_dnf_labels_are_the_formulas_and_halves_balance(samples: int) -> None:
    x, y = dnf.make_dnf(samples, generator=seeded())
    assert x.shape == (samples, 32) and y.shape == (samples,)
    assert torch.equal(dnf.satisfies(x > 0.5, 8), y.bool())
    assert int(y.sum()) == samples // 2


def test_dnf_bits_stay_in_their_ranges_and_bounds() -> None:
    x, y = dnf.make_dnf(
        4000, clauses=5, literals=3, active=(5, 9), true_range=(0.8, 0.9), false_range=(0.1, 0.2), generator=seeded()
    )
    bits = x > 0.5
    assert bool((((x >= 0.8) & (x <= 0.9)) == bits).all()) and bool((((x >= 0.1) & (x <= 0.2)) == ~bits).all())
    positives = bits[y.bool()].sum(1)
    assert (int(positives.min()), int(positives.max())) == (5, 9)
    # A near miss loses one literal of each satisfied clause, so it can fall below the lower bound; none exceeds it.
    assert int(bits.sum(1).max()) <= 9 and int(bits[~y.bool()].sum(1).min()) < 5


def test_near_misses_lack_one_literal_of_a_clause() -> None:
    bits = dnf._satisfying(2000, 8, 4, (4, 16), seeded())
    broken = dnf._break_clauses(bits, 8, seeded(1))
    satisfied = bits.unflatten(1, (8, 4)).all(2)
    missing = (bits & ~broken).unflatten(1, (8, 4)).sum(2)
    assert torch.equal(missing, satisfied.long())
    assert not dnf.satisfies(broken, 8).any() and not (broken & ~bits).any()


def test_dnf_is_seeded() -> None:
    first, again, other = (dnf.make_dnf(100, generator=seeded(s))[0] for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": -1}, "samples >= 0"),
        ({"samples": 1, "clauses": 0}, "clauses"),
        ({"samples": 1, "active": (3, 16)}, "active"),
        ({"samples": 1, "active": (16, 4)}, "active"),
        ({"samples": 1, "active": (25, 32)}, "leaves every clause"),
    ],
)
def test_dnf_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dnf.make_dnf(**arguments)


def test_eight_dense_neurons_can_represent_the_formula() -> None:
    """What docs/boolean.md says of capacity: one neuron a clause classifies every sample."""
    x, y = dnf.make_dnf(5000, generator=seeded())
    clause = dnf.clause_of(8, 4)
    w1 = (clause == torch.arange(8)[:, None]).float()
    hidden = (x @ w1.T - 3.45).relu()
    assert torch.equal(hidden.sum(1) > 0, y.bool())


def test_fit_is_reproducible_and_applies_the_penalties() -> None:
    x, y = dnf.make_dnf(200, generator=seeded())
    problem = protocol.Data(x, y, x, y)

    def train(**penalties: float) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 1))
        return protocol.fit(model, problem, protocol.Training(8, 50, 1e-2, **penalties), 8, seeded())  # type: ignore[return-value]

    plain, again, l1, l2 = train(), train(), train(l1=0.1), train(l2=0.1)
    assert torch.equal(plain[0].weight, again[0].weight)
    for penalised in (l1, l2):
        assert penalised[0].weight.abs().sum() < plain[0].weight.abs().sum()


def test_accuracy_of_one_and_of_several_outputs() -> None:
    binary, many = nn.Linear(1, 1, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        binary.weight.fill_(1.0)
        many.weight.copy_(torch.eye(2))
    assert protocol.accuracy(binary, torch.tensor([[1.0], [-1.0], [2.0], [3.0]]), torch.tensor([1, 0, 0, 1])) == 75
    assert protocol.accuracy(many, torch.eye(2), torch.tensor([0, 0])) == 50


def test_boolean_trial_keeps_the_non_zeros() -> None:
    choices = replace(boolean.QUICK, epochs=1, samples=600, test_samples=200)
    rows = boolean.run_trial(choices, trial=0, seed=0)["rows"]
    assert [row["condition"] for row in rows] == list(boolean.CONDITIONS)
    assert {row["nonzeros"] for row in rows} == {8 * 32 + 8}
    assert [row["neurons"] for row in rows] == [8, 8, 16, 16]


def test_boolean_expansion_gains_as_published() -> None:
    """The effect itself, at a fraction of the protocol's length; margins are a third of the committed gains."""
    choices = replace(boolean.Choices(), epochs=40, samples=10_000, test_samples=4000)
    trials = [boolean.run_trial(choices, trial, seed=0)["rows"] for trial in range(2)]
    mean = {c: np.mean([t[i]["test_accuracy"] for t in trials]) for i, c in enumerate(boolean.CONDITIONS)}
    assert mean["clause"] > mean["dense-continued"] + 4


def test_boolean_command_writes_rows_and_figures(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["study", "boolean", "--quick", "--json", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    printed = [json.loads(line) for line in done.output.splitlines()]
    assert printed == [{"study": "boolean", **row} for row in Results.read(tmp_path / "boolean-quick.jsonl").rows]
    assert len(printed) == 2 * 4
    for name in ("curves", "accuracy", "gram", "weights"):
        assert (tmp_path / f"boolean-{name}-quick.svg").stat().st_size > 1000


def test_vision_command(tmp_path: Path) -> None:
    arguments = ["study", "vision", "--data", "digits", "--epochs", "1", "--trials", "1", "--output", str(tmp_path)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    rows = Results.read(tmp_path / "vision.jsonl").rows
    assert [row["condition"] for row in rows] == ["dense", *vision.CONDITIONS]
    assert len({row["nonzeros"] for row in rows}) == 1
