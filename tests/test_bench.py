"""The command line, the studies' plumbing, result files, ledgers and documents; nothing here trains for long."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import ROOT, seeded
from torch import nn

import fpe
from fpe.bench.cli import cli
from fpe.bench.costs import ledger
from fpe.bench.gpu import tune
from fpe.bench.report import documents, summary
from fpe.bench.results import Results
from fpe.bench.studies import boolean, data, dnf, protocol, vision
from fpe.kernels.block import config
from fpe.kernels.device import KNOWN
from fpe.kernels.model import bytes_by_format
from fpe.kernels.partition import config as partition_config
from fpe.kernels.tables import parse


@pytest.fixture
def cli_runner() -> CliRunner:
    return CliRunner()


# The Boolean task.


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


# Studies.


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


def test_features_round_trip_and_refusals(tmp_path: Path) -> None:
    arrays = {"X": np.ones((4, 3), np.float16), "y": np.arange(4), "Xt": np.zeros((2, 3)), "yt": np.arange(2)}
    np.savez(tmp_path / "f.npz", **arrays)
    loaded = data.load_features(tmp_path / "f.npz")
    assert loaded.x.dtype == torch.float32 and loaded.y.tolist() == [0, 1, 2, 3] and loaded.x_test.shape == (2, 3)
    np.savez(tmp_path / "short.npz", X=arrays["X"], y=arrays["y"], yt=arrays["yt"])
    with pytest.raises(ValueError, match=r"missing Xt$"):
        data.load_features(tmp_path / "short.npz")
    np.savez(tmp_path / "odd.npz", **{**arrays, "y": np.arange(3)})
    with pytest.raises(ValueError, match="expected X"):
        data.load_features(tmp_path / "odd.npz")


def test_features_without_a_test_set_are_divided_the_same_way_every_time(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", X=np.arange(70, dtype=np.float16)[:, None], y=np.arange(70))
    one, two = (data.load_features(tmp_path / "f.npz") for _ in range(2))
    assert len(one.y_test) == 10 and torch.equal(one.y_test, two.y_test)
    assert sorted([*one.y.tolist(), *one.y_test.tolist()]) == list(range(70))
    assert all(torch.equal(x[:, 0].long(), y) for x, y in ((one.x, one.y), (one.x_test, one.y_test)))
    assert one.y_test.diff().unique().numel() > 1  # shuffled: files are often sorted by class


def test_digits_are_a_real_set() -> None:
    digits = data.load_digits()
    assert (len(digits.x), len(digits.x_test), digits.x.shape[1]) == (1437, 360, 64)
    assert digits.x.min() >= 0 and digits.x.max() == 1 and set(digits.y.tolist()) == set(range(10))


# Result files.


def test_results_round_trip(tmp_path: Path) -> None:
    results = Results("s", {"a": (1, 2)}, [{"x": np.float32(0.5), "n": torch.tensor(3)}])
    back = Results.read(results.write(tmp_path / "deep" / "r.jsonl"))
    assert back.rows == [{"x": 0.5, "n": 3}] and back.settings == {"a": [1, 2]}
    assert set(back.provenance) >= {"device", "torch", "commit"}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "schema 1, got an empty file"),
        ('{"schema": 99}\n', "schema 1, got 99"),
        ('{"schema": 1, "study": "s", "settings": {}, "provenance": {}}\n{"x": 1', "line 2 is cut"),
    ],
)
def test_results_refuse_what_they_cannot_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Results.read(path)


# Ledgers.


@pytest.mark.parametrize("policy", ["magnitude", "input", "partition"])
def test_ledger_agrees_with_nonzeros(policy: str) -> None:
    dense = nn.Sequential(nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 5))
    wide = fpe.expand(dense, 2, resparsify=policy, generator=seeded())  # type: ignore[arg-type]
    for model in (dense, wide):
        assert sum(row["nonzeros"] for row in ledger.layer_ledger(model)) == fpe.nonzeros(model)
    rows = ledger.layer_ledger(wide)
    assert [row["out"] for row in rows] == [24, 5] and [row["biases"] for row in rows] == [24, 5]
    assert sum(row["stored"] + row["biases"] for row in rows) == sum(p.numel() for p in wide.parameters())


@pytest.mark.parametrize(("alpha", "label_bits"), [(2, 1), (3, 2), (4, 2), (8, 3)])
def test_bytes_by_format(alpha: int, label_bits: int) -> None:
    n, k = 128, 256
    sizes = bytes_by_format(n, k, alpha)
    assert sizes["parent (dense)"] == 2 * n * k
    assert sizes["wide (dense)"] == alpha * 2 * n * k
    assert sizes["partition labels"] == 2 * n * k + n * k * label_bits // 8
    assert sizes["wide + bitmap"] == 2 * n * k + alpha * n * k // 8
    assert sizes["CSR"] == 6 * n * k + 4 * (alpha * n + 1)
    assert sizes["blocks"] == 2 * n * k + 4 * 8 + 4 * (2 * alpha + 1)
    assert sizes.get("2:4") == (2 * n * k + n * k // 4 if alpha == 2 else None)


# Documents.


def test_documents_say_what_the_committed_results_say() -> None:
    for name in documents.DOCUMENTS:
        text = (ROOT / name).read_text()
        assert "<!-- table:" in text and documents.fill(text) == text, f"{name}: run make docs"


def test_documents_refuse_an_unknown_table() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        documents.fill("<!-- table: nonsense -->\n<!-- end -->")


# The command line.


def test_help_names_every_command(cli_runner: CliRunner) -> None:
    text = cli_runner.invoke(cli, ["--help"]).output
    commands = ("study", "report", "results", "docs", "lab", "tune", "gpu", "explain", "verdict")
    assert all(name in text for name in commands)
    assert "99.4" in cli_runner.invoke(cli, ["study", "boolean", "--help"]).output


def test_boolean_command_writes_rows_and_figures(cli_runner: CliRunner, tmp_path: Path) -> None:
    done = cli_runner.invoke(cli, ["study", "boolean", "--quick", "--json", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    printed = [json.loads(line) for line in done.output.splitlines()]
    assert printed == [{"study": "boolean", **row} for row in Results.read(tmp_path / "boolean-quick.jsonl").rows]
    assert len(printed) == 2 * 4
    for name in ("curves", "accuracy", "gram", "weights"):
        assert (tmp_path / f"boolean-{name}-quick.svg").stat().st_size > 1000


def test_vision_command(cli_runner: CliRunner, tmp_path: Path) -> None:
    arguments = ["study", "vision", "--data", "digits", "--epochs", "1", "--trials", "1", "--output", str(tmp_path)]
    done = cli_runner.invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    rows = Results.read(tmp_path / "vision.jsonl").rows
    assert [row["condition"] for row in rows] == ["dense", *vision.CONDITIONS]
    assert len({row["nonzeros"] for row in rows}) == 1


def test_report_is_one_self_contained_page(cli_runner: CliRunner, tmp_path: Path) -> None:
    done = cli_runner.invoke(cli, ["report", "--quick", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "report.html" in done.output and "random" in done.output
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 20 and "src=" not in page and "<link" not in page and "nan" not in page
    rows = Results.read(tmp_path / "report-vision.jsonl")
    assert summary.vision(rows).rows[-1][1] in page


def test_tuner_walks_its_plan_and_writes_a_table_that_the_chooser_reads(cli_runner: CliRunner, tmp_path: Path) -> None:
    done = cli_runner.invoke(cli, ["tune", "--dry-run", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    table = json.loads((tmp_path / "block_sm80.json").read_text())
    entries = parse(table, config.Config)
    assert sorted(entry.where["op"] for entry in entries) == ["block_grad", "block_matmul", "block_matmul"]
    labels = parse(json.loads((tmp_path / "partition_sm80.json").read_text()), partition_config.Config)
    assert len({(e.where["op"], e.where["transposed"]) for e in labels}) == 6
    with patch.object(partition_config, "tuned", return_value=labels):
        problem = partition_config.Problem("split_matmul", 5, 999, 999, False, 2, 4)
        (entry,) = (e for e in labels if e.fits(problem))
        assert partition_config.choose(problem, KNOWN[80]) == entry.config
        assert partition_config.choose(replace(problem, alpha=4), KNOWN[80]) != entry.config
    assert {"device", "torch", "commit"} <= set(table["provenance"])


def test_tuner_discards_what_is_wrong_and_keeps_the_fastest() -> None:
    job = tune.small(tune.jobs())[0]
    times = iter([3.0, 1.0, 2.0])
    entry, _ = tune.tune(job, KNOWN[80], lambda call: next(times), "cpu", 3)
    tried = [job.choose(job.setup("cpu")[2], KNOWN[80])]
    assert entry["milliseconds"] == 1.0 and entry["rule_milliseconds"] == 3.0
    assert entry["config"] != asdict(tried[0])
    with patch("fpe.bench.accuracy.excess", lambda *a: 2.0), pytest.raises(RuntimeError, match="agrees"):
        tune.tune(job, KNOWN[80], lambda call: 0.0, "cpu", 3)


def test_tuner_draws_what_it_has_no_time_for() -> None:
    """A limit takes candidates from the whole list, not its beginning, the same ones each time."""
    job = tune.small(tune.jobs())[0]
    seen: list[list[dict]] = [[], []]
    for tried in seen:
        launch, eager, problem = job.setup("cpu")

        def noting(config: tune.Config, launch=launch, tried=tried) -> torch.Tensor:
            tried.append(asdict(config))
            return launch(config=config)

        with patch.object(type(job), "setup", lambda *args, n=noting, e=eager, p=problem: (n, e, p)):
            tune.tune(job, KNOWN[80], lambda call: 0.0, "cpu", 6)
    everything = [asdict(c) for c in job.candidates(problem, KNOWN[80])]
    places = [everything.index(c) for c in seen[0][1:]]
    assert seen[0] == seen[1] and len(places) == 5 and max(places) > len(everything) / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune"], "needs a CUDA device"),
        (["study", "nothing"], "No such command"),
        (["study", "boolean", "--trials", "0"], "--trials"),
        (["study", "boolean", "--device", "nowhere"], "cannot be used here"),
        (["study", "vision", "--data", "missing.npz"], "missing.npz"),
        (["results", "missing.jsonl"], "does not exist"),
    ],
)
def test_bad_arguments_are_named(cli_runner: CliRunner, arguments: list[str], message: str) -> None:
    done = cli_runner.invoke(cli, arguments)
    assert done.exit_code != 0 and message in done.output
