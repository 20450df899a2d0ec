"""Everything fits a terminal of 80 columns: help and tables of every command, with no text left out."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fpe.bench import table as layout
from fpe.bench.cli import COMMANDS, cli
from fpe.bench.costs import verdict
from fpe.bench.gpu.cli import headline
from fpe.bench.gpu.cli import main as gpu
from fpe.bench.here import draw
from fpe.bench.lab import compile as compiler
from fpe.bench.lab import survey, traffic
from fpe.bench.lab.ptx import execute, mutate
from fpe.bench.latency import whole
from fpe.bench.report import summary
from fpe.bench.results import COMMITTED, Results
from fpe.bench.studies import every, vision
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


ALL = tuple(every_command(cli))


@pytest.mark.parametrize("words", [w for w in ALL if w != ("gpu",)], ids=" ".join)
def test_help_fits_and_nothing_is_cut(words: tuple[str, ...]) -> None:
    text = run(*words, "--help")
    assert not [line for line in text.splitlines() if len(line) > WIDTH]
    assert not [line for line in text.splitlines() if line.rstrip().endswith("...") and "[OPTIONS]" not in line]


def test_help_of_gpu_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    with pytest.raises(SystemExit):
        gpu(["--help"])
    assert not too_wide(capsys.readouterr().out)


LATENCY = ("latency", "--m", "1", "--shape", "32x64", "--seconds", "0")
NAMES = [str(path.relative_to(COMMITTED).with_suffix("")) for path in sorted(COMMITTED.rglob("*.jsonl"))]
SHOWING = (
    ("doctor",),
    ("gpus",),
    ("verdict",),
    ("verdict", "--gpu", "rtx4090", "--shape", "32x784", "--alpha", "8"),
    ("explain",),
    ("explain", "--pass", "dX", "--structure", "2:4"),
    ("results",),
    *(("results", name) for name in NAMES),
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


def vision_table() -> Table:
    row = {"test_accuracy": 0.5, "cosine_similarity": 0.1, "neurons": 64, "nonzeros": 26432}
    conditions = ("dense", *vision.CONDITIONS)
    rows = [{"trial": t, "condition": name, **row} for t in range(3) for name in conditions]
    settings = {"data": "fashion-mnist", "neurons": 32, "alpha": 2, "epochs": 25, "trials": 3}
    return vision.table(Results("vision", settings, rows))


def measured_table() -> Table:
    """What ``fpe verdict --measured`` prints of a file of ``fpe gpu``."""
    times = {"parent": 1.0, "wide": 2.0, "fpe/sparse_tensor_core": 1.07}
    case = {"N": 4096, "K": 14336, "alpha": 2, "dtype": "bf16", "level": "op", "block": ""}
    rows = [
        {**case, "structure": kind, "pass": name, "M": m, "provider": who, "milliseconds": time}
        for kind in ("random", "2:4")
        for name in ("forward", "forward+backward")
        for m in (1, 16, 64)
        for who, time in times.items()
    ]
    results = Results("latency", {}, rows, {"device": "NVIDIA H200", "commit": "0123456", "date": "2026-11-20"})
    layer = verdict.Layer()
    roof = verdict.find_roof("h200")
    return verdict.compared_table(layer, verdict.measured(layer, results), results, roof, 0.1)


def headline_table() -> Table:
    case = {"N": 14336, "K": 4096, "alpha": 2, "structure": "random", "M": 1, "pass": "forward", "level": "merge"}
    times = {"parent": 1.0, "wide": 2.0, "fpe/sparse_tensor_core": 1.07}
    return headline([{**case, "provider": who, "milliseconds": time} for who, time in times.items()], dry=True)


def of(name: str, drawn: Callable[[Results], Table], **default: object) -> Callable[[], Table]:
    """A table of committed rows, each with what rows of an older commit lack."""

    def made() -> Table:
        results = Results.read(COMMITTED / f"{name}.jsonl")
        results.rows[:] = [{**default, **row} for row in results.rows]
        return drawn(results)

    return made


PRINTED: dict[tuple[str, ...], tuple[Callable[[], Table], ...]] = {
    ("here",): tuple(of("cpu/here", drawn) for drawn in (draw.table, draw.model_table, draw.crossover_table)),
    ("latency",): (of("cpu/latency-models", whole.table),),
    ("verdict",): (measured_table,),
    ("gpu",): (headline_table,),
    ("report",): (vision_table, every()["boolean"].tables["boolean"]),
    ("lab", "compile"): (
        of("lab/compile", partial(compiler.table, show_all=False), in_flight_l2=None),
        of("lab/semi-structured", summary.compiled),
    ),
    ("lab", "execute"): (of("lab/execute", execute.table), of("lab/execute", execute.complaints)),
    ("lab", "hazards"): (of("lab/hazards", survey.table),),
    ("lab", "headline"): (of("lab/headline-compile", summary.compile_times),),
    ("lab", "ladder"): (of("lab/ladder", summary.ladder), of("lab/ladder", partial(summary.ladder, kept=True))),
    ("lab", "mutate"): (of("lab/mutation", mutate.table),),
    ("lab", "traffic"): (of("lab/traffic", traffic.table), of("lab/traffic-seeded", traffic.table)),
    ("lab", "wavefronts"): (of("lab/wavefronts", summary.wavefronts),),
    ("study", "vision"): (vision_table,),
    **{("study", name): tuple(study.tables.values()) for name, study in every().items() if study.tables},
}
"""The tables of commands that take minutes, from committed rows or from rows made up."""
NO_TABLE = (("docs",), ("study", "features"), ("tune",))
"""Commands that print paths alone."""


@pytest.mark.parametrize("words", PRINTED, ids=" ".join)
def test_tables_of_long_commands_fit_and_nothing_is_cut(words: tuple[str, ...]) -> None:
    for drawn in PRINTED[words]:
        table = drawn()
        lines = table.fitted(WIDTH).splitlines()
        assert not [line for line in lines if len(line) > WIDTH], words
        shown = "\n".join(lines)
        assert table.columns and all(part in shown for name in table.columns for part in layout._parts(name))


def test_every_command_is_shown_above() -> None:
    groups = {words[:-1] for words in ALL if words}
    shown = {*((words[0],) for words in SHOWING), *PRINTED, *NO_TABLE}
    assert shown == {words for words in ALL if words not in groups}


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


def test_names_and_units_stay_whole_while_there_is_a_space_to_break_at() -> None:
    rows = [("rivals-cifar100quarter_lite2_512", f"a CPU of {i} cores, a GPU of none, and 24 GiB") for i in (1, 2)]
    text = Table("Files", ("name of the file", "TFLOP/s or why there are none of them at all"), rows).fitted(60)
    assert text.count("rivals-cifar100quarter_lite2_512") == 2 and "TFLOP/s" in text
    assert "alpha = 2" in Table("Masks", ("which",), [("random magnitude, alpha = 2",)]).fitted(26)
    assert re.search(r"^3\.11\.7$", Table("T", ("version",), [("3.11.7",)]).fitted(60), re.MULTILINE)


def test_columns_that_do_not_fit_are_continued_below_with_their_rows() -> None:
    columns = ("name", *(f"measurement{i}" for i in range(8)))
    rows = [(f"row{j}", *(f"{j}{i}" * 8 for i in range(8))) for j in range(3)]
    text = Table("Wide", columns, rows).fitted(80)
    assert text.count("row1") == 2 and all(cell in text for row in rows for cell in row)
