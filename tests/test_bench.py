"""Ledgers, documents, the report, and the list of commands."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import ROOT, seeded
from torch import nn

import fpe
from fpe.bench.cli import cli
from fpe.bench.costs import ledger
from fpe.bench.report import documents
from fpe.bench.results import Results
from fpe.bench.studies import vision
from fpe.bench.studies.drawing import BARS
from fpe.kernels.cpu import numba_installed
from fpe.kernels.model import bytes_by_format


@pytest.fixture
def cli_runner() -> CliRunner:
    return CliRunner()


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
    for name, text in documents.downloads().items():
        assert (ROOT / name).read_text() == text, f"{name}: run make docs"


def test_documents_refuse_an_unknown_table() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        documents.fill("<!-- table: nonsense -->\n<!-- end -->")


# The command line.


def test_help_names_every_command(cli_runner: CliRunner) -> None:
    text = cli_runner.invoke(cli, ["--help"]).output
    commands = ("study", "report", "results", "docs", "lab", "tune", "gpu", "explain", "verdict")
    assert all(name in text for name in commands)
    assert "99.4" in cli_runner.invoke(cli, ["study", "boolean", "--help"]).output


def test_report_is_one_self_contained_page(cli_runner: CliRunner, tmp_path: Path) -> None:
    done = cli_runner.invoke(cli, ["report", "--quick", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "report.html" in done.output and "random" in done.output
    page = re.sub(r"base64,[\w+/=\s]*", "", (tmp_path / "report.html").read_text())  # pictures may spell anything
    assert page.count("<svg") == 20 + numba_installed()  # what this machine's CPU was measured to do
    assert "src=" not in page and "<link" not in page and "nan" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and {f"#{name}" for name in ids} >= set(re.findall(r'href="(#[\w-]+)"', page))
    figures = re.findall(r"<svg ([^>]*)>(.{9})", page)
    assert all('role="img"' in head and title.startswith("<title>") for head, title in figures)
    assert page.count("<text") > 100 and len(re.findall(r"<th\b", page)) == page.count('scope="') and "…" not in page
    rows = Results.read(tmp_path / "report-vision.jsonl")
    shown = vision.table(rows)
    assert shown.rows[-1][1] in page
    (gain,) = (row["points"] for row in shown.records() if row["condition"] == "random")
    assert f"<b>{gain} points</b>" in page  # what the page says first is what the table and the terminal say


DRAWN = sorted((ROOT / "docs/figures").glob("*.svg"))


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.stem)
def test_colours_of_a_figure_follow_the_page(path: Path) -> None:
    bars = rf'<path d="[^"]*"[^>]* style="fill: ({"|".join(BARS)})"/>'
    fixed = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", re.sub(bars, "", path.read_text())))
    assert fixed <= {"#111111", "#ffffff"}  # numbers on the cells of a heat map


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune"], "needs a CUDA device"),
        (["study", "nothing"], "No such command"),
        (["study", "boolean", "--trials", "0"], "--trials"),
        (["study", "boolean", "--device", "nowhere"], "cannot be used here"),
        (["study", "vision", "--data", "missing.npz"], "missing.npz"),
        (["results", "missing.jsonl"], "is neither a file nor one of"),
    ],
)
def test_bad_arguments_are_named(cli_runner: CliRunner, arguments: list[str], message: str) -> None:
    done = cli_runner.invoke(cli, arguments)
    assert done.exit_code != 0 and message in done.output
