"""Everything fits a terminal of 80 columns: help and tables of every command, with no text left out."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fpe.bench.cli import COMMANDS, cli
from fpe.bench.gpu.cli import main as gpu
from fpe.bench.table import Table

WIDTH = 80


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli, arguments, env={"COLUMNS": str(WIDTH)})
    assert done.exit_code == 0, done.output
    return done.stdout


def too_wide(text: str) -> list[str]:
    """Lines that do not fit; a path is never broken, so that it can be copied."""
    return [line for line in text.splitlines() if len(line) > WIDTH and "/" not in line]


def every_command(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield words
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from every_command(found, (*words, name))


@pytest.mark.parametrize("words", [w for w in every_command(cli) if w != ("gpu",)], ids=" ".join)
def test_help_fits(words: tuple[str, ...]) -> None:
    text = run(*words, "--help")
    assert not [line for line in text.splitlines() if len(line) > WIDTH]


def test_help_of_gpu_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    with pytest.raises(SystemExit):
        gpu(["--help"])
    assert not too_wide(capsys.readouterr().out)


LATENCY = ("latency", "--m", "1", "--shape", "32x64", "--seconds", "0")
SHOWING = (
    ("doctor",),
    ("gpus",),
    ("verdict",),
    ("verdict", "--gpu", "rtx4090", "--shape", "32x784", "--alpha", "8"),
    ("explain",),
    ("explain", "--pass", "dX", "--structure", "2:4"),
    ("results",),
    ("results", "boolean"),
    ("results", "lab/traffic"),
    ("results", "transformer-text"),
    (*LATENCY, "--provider", "fpe/auto", "--provider", "fpe/eager", "--provider", "parent", "--structure", "random"),
)
"""Commands that print a table within seconds."""


@pytest.mark.parametrize("arguments", SHOWING, ids=" ".join)
def test_tables_fit_and_nothing_is_cut(arguments: tuple[str, ...], tmp_path: Path) -> None:
    output = ("--output", str(tmp_path)) if arguments[0] == "latency" else ()
    text = run(*arguments, *output)
    assert text and not too_wide(text) and "…" not in text
    rows = [json.loads(line) for line in run(*arguments, *output, "--json").splitlines()]
    read = list(csv.DictReader(io.StringIO(run(*arguments, *output, "--csv"))))
    assert rows and len(read) == len(rows) and set(read[0]) == {name for row in rows for name in row}


def test_the_plan_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert gpu(["--plan"]) == 0
    text = capsys.readouterr().out
    assert not too_wide(text) and "…" not in text
    assert gpu(["--plan", "--csv", "--only", "roof"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["step"] == "roof"
    assert gpu(["--csv"]) == 1 and "--plan" in capsys.readouterr().err


def test_latency_tells_auto_from_eager(tmp_path: Path) -> None:
    providers = [word for name in ("fpe/auto", "fpe/eager", "parent") for word in ("--provider", name)]
    text = run(*LATENCY, *providers, "--pass", "forward", "--structure", "random", "--output", str(tmp_path))
    lines = [line.split() for line in text.splitlines()]
    assert {"fpe/auto", "fpe/eager", "parent"} <= {word for line in lines for word in line}
    assert "fpe/eager: the definition" in text


def test_every_command_that_prints_rows_prints_them_as_csv_and_json() -> None:
    context = click.Context(cli)
    silent = {"docs", "gpu", "lab", "study", "features"}  # groups, files, and a parser of its own
    for words in every_command(cli):
        command: click.Command = cli
        for word in words:
            assert isinstance(command, click.Group)
            found = command.get_command(context, word)
            assert found is not None
            command = found
        options = {name for p in command.params for name in p.opts}
        assert not words or words[-1] in silent or {"--json", "--csv"} <= options, words


def test_bare_groups_print_their_help() -> None:
    assert all(name in run() for name in COMMANDS)
    assert "vision-sweep" in run("study") and "hazards" in run("lab")


# The layout itself.


words = st.text("abcdefgh/_+ 0123456789.±", min_size=0, max_size=40).map(str.strip)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    columns = draw(st.integers(1, 9))
    row = st.tuples(*[words] * columns)
    return Table(draw(words), draw(row), draw(st.lists(row, max_size=6)))


@settings(max_examples=150, deadline=None)
@given(tables(), st.integers(45, 120))
def test_no_line_is_wider_than_asked_and_no_character_is_lost(table: Table, width: int) -> None:
    text = table.fitted(width)
    assert all(len(line) <= width for line in text.splitlines())
    for cell in (cell for row in table.rows for cell in row):
        assert not set(cell.replace(" ", "")) - set(text)


def test_what_every_row_says_is_said_once() -> None:
    rows = [("dense", "bf16", "1" * 30), ("random", "bf16", "2" * 30)]
    text = Table("Times", ("condition", "dtype of operands", "n" * 30), rows).fitted(50)
    assert "All rows: dtype of operands bf16" in text and text.count("bf16") == 1
    assert str(Table("Times", ("a", "b"), [("x", "1")])) == "Times\na  b\nx  1"


def test_columns_that_do_not_fit_are_continued_below_with_their_rows() -> None:
    columns = ("name", *(f"measurement{i}" for i in range(8)))
    rows = [(f"row{j}", *(f"{j}{i}" * 8 for i in range(8))) for j in range(3)]
    text = Table("Wide", columns, rows).fitted(80)
    assert text.count("row1") == 2 and all(cell in text for row in rows for cell in row)
