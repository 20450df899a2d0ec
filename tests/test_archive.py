"""Archives of ``fpe gpu``: merged into the committed results, gone on with, and what documents then draw from them."""

import json
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest

from fpe.bench.gpu import archive
from fpe.bench.gpu.cli import main
from fpe.bench.gpu.steps import Context, keep
from fpe.bench.latency.problems import Case
from fpe.bench.report import costs, documents
from fpe.bench.results import Results
from fpe.kernels.roofs import PUBLISHED

ROOF = PUBLISHED["h200"]
DAYS = {"abc": "2026-11-20", "def": "2026-11-21"}
"""Of commits."""


def archived(folder: Path, commit: str, rows: dict[str, list[dict]], device: str = "NVIDIA H200") -> Path:
    """An archive as a run leaves it, by the functions that write one: rows by step, each with its key."""
    made = {"device": device, "commit": commit, "date": DAYS[commit], "torch": "2.11", "triton": "3.6"}
    context = Context("cuda", folder, 0.0, f"run of {commit}", lambda line: None, provenance=made)
    folder.mkdir(parents=True)
    for step, given in {**rows, "runs": [{"key": context.run, **made}]}.items():
        results = context.results(step)
        for row in given:
            keep(context, results, row["key"], [{k: v for k, v in row.items() if k != "key"}], 0.1)
    roof = {"name": device, "arch": 90, "bandwidth": ROOF.bandwidth / 2, "flops": dict(ROOF.flops), "l2": ROOF.l2}
    roof |= {"integer": ROOF.integer, "shares": {"blocks": [0.81, 0.71]}}
    (folder / "roof.json").write_text(json.dumps(roof))
    return archive.pack(folder, folder / archive.NAME)


def test_an_archive_joins_the_committed_results(tmp_path: Path) -> None:
    """Units that are measured again give way; the header names the commits and days of the rows that are there."""
    root = tmp_path / "results"
    archive.merge(archived(tmp_path / "1", "abc", {"latency": [{"key": "a", "x": 1}, {"key": "b", "x": 1}]}), root)
    second = archived(tmp_path / "2", "def", {"latency": [{"key": "b", "x": 2}, {"key": "c", "x": 2}]})
    written = archive.merge(second, root)
    assert [path.relative_to(root).as_posix() for path in written] == [
        "nvidia-h200/latency.jsonl", "nvidia-h200/runs.jsonl", "nvidia-h200/roof.json",
    ]  # fmt: skip
    merged = Results.read(written[0])
    assert [(r["key"], r["x"]) for r in merged.rows] == [("a", 1), ("b", 2), ("c", 2)]
    assert merged.origin == "NVIDIA H200 at commit abc, def, 2026-11-20, 2026-11-21"
    everything = archived(tmp_path / "3", "def", {"latency": [{"key": k, "x": 3} for k in "abc"]})
    assert Results.read(archive.merge(everything, root)[0]).origin == "NVIDIA H200 at commit def, 2026-11-21"
    assert [row["commit"] for row in Results.read(written[1]).rows] == ["abc", "def"]


def test_only_what_a_gpu_measured_is_merged(tmp_path: Path) -> None:
    dry, root = tmp_path / "dry", tmp_path / "results"
    Results("latency", {"device": "NVIDIA H200", "dry_run": True}, [{"key": "a"}]).write(dry / "latency.jsonl")
    with pytest.raises(ValueError, match="dry run"):
        archive.merge(archive.pack(dry, tmp_path / archive.NAME), root)
    nobody = archived(tmp_path / "1", "abc", {"latency": [{"key": "a"}]}).parent
    (nobody / "runs.jsonl").unlink()
    with pytest.raises(ValueError, match=r"every run in runs\.jsonl, which lacks run of abc"):
        archive.merge(archive.pack(nobody, nobody / archive.NAME), root)
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(ValueError, match="expected an archive"):
        archive.merge(tmp_path / "text", root)
    odd = tmp_path / "odd.tar.gz"
    with tarfile.open(odd, "w:gz") as file:
        file.add(tmp_path / "text", "../text")
    with pytest.raises(ValueError, match=r"found '\.\./text'"):
        archive.merge(odd, root)
    assert not root.exists()


def test_another_machine_goes_on_with_an_archive(tmp_path: Path) -> None:
    packed, folder = archived(tmp_path / "1", "abc", {"latency": [{"key": "a", "x": 1}]}), tmp_path / "rows"
    archive.unpack(packed, folder)
    assert [(row["key"], row["x"]) for row in Results.read(folder / "latency.jsonl").rows] == [("a", 1)]
    with pytest.raises(ValueError, match="name an empty folder"):
        archive.unpack(packed, folder)


# What documents draw.

TIMES = {"parent": 1.0, "wide": 2.0, "fpe/triton": 1.07, "fpe/auto": 1.31}
SOURCE = "NVIDIA H200 at commit abc, 2026-11-20"


def measured() -> dict[str, list[dict]]:
    """Rows of the layer that is drawn: latency, and joules in the same proportion."""
    latency, energy, n, k = [], [], costs.LAYER.n, costs.LAYER.k
    for m, structure in ((m, s) for m in (1, 16, 64) for s in ("random", "2:4", "block")):
        case = Case(m, n, k, structure=structure, block=(64, 64)).row()
        for provider, time in TIMES.items():
            row = {"level": "op", "provider": provider, **case}
            for name in ("forward", "forward+backward"):
                found = {"milliseconds": time, "flops": 2.0 * m * n * k, "bytes": 2.0 * n * k, "error": 0.5}
                latency.append({"key": f"{m} {structure} {name} {provider}", **row, "pass": name, **found})
            if provider != "fpe/triton":
                key = f"{m} {structure} {provider}"
                energy.append({"key": key, **row, "pass": "forward", "joules": 0.4 * time, "watts": 400.0})
    return {"latency": latency, "energy": energy}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the documents, and results to which the command has merged an archive."""
    root, results = tmp_path / "checkout", tmp_path / "results"
    for name in documents.DOCUMENTS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(documents.ROOT / name, root / name)
    monkeypatch.setattr(archive, "merge", partial(archive.merge, root=results))
    assert main(["--merge", str(archived(tmp_path / "1", "abc", measured()))]) == 0
    monkeypatch.setattr(documents, "ROOT", root)
    monkeypatch.setattr(costs, "measured", partial(costs.measured, results))
    return root


def test_documents_draw_what_was_merged(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict, its figure, the roofline and the shares; what is of other results stays as it is."""
    before = {name: (checkout / name).read_text() for name in documents.DOCUMENTS}
    monkeypatch.setattr(documents, "FIGURES", {n: documents.FIGURES[n] for n in ("ratio", "roofline")})
    documents.refresh()
    after = {name: (checkout / name).read_text() for name in documents.DOCUMENTS}
    assert [name for name in documents.DOCUMENTS if before[name] != after[name]] == ["README.md", "docs/benchmarks.md"]
    places = {m.group(2): m.group(3) for m in documents._PLACE.finditer(after["docs/benchmarks.md"])}
    earlier = {m.group(2): m.group(3) for m in documents._PLACE.finditer(before["docs/benchmarks.md"])}
    assert {name for name in places if places[name] != earlier[name]} == {"verdict", "shares"}
    verdict = places["verdict"]
    assert f"measured on {SOURCE}, beside the model" in verdict and "not measured" not in verdict
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in verdict.splitlines() if line.startswith("|")]
    rows = [dict(zip(range(len(line)), line, strict=True)) for line in lines[2:]]
    assert len(rows) == 3 * 2 * 3 and {(row[5], row[6], row[9]) for row in rows} == {("fpe/triton", "1.070", "0.535")}
    assert {row[2] for row in rows if row[2]} == {"64"}  # the largest batch that was measured
    assert "| blocks, measured | 81% | 71% |" in places["shares"] and "assumed unless marked" in places["shares"]
    for name in ("ratio", "roofline"):
        drawn = (checkout / f"docs/figures/{name}.svg").read_text()
        assert "measured" in drawn and "predicted" not in drawn


def test_the_report_draws_what_was_merged(checkout: Path) -> None:
    section = costs.section()
    assert sum(f"Measured on {SOURCE} with torch 2.11, triton 3.6" in caption for _, caption in section["drawings"]) > 3
    energy = next(table for table in section["tables"] if table.title.startswith("Energy"))
    assert len(energy.rows) == 3 * 3 and {row[5:] for row in energy.rows} == {("400", "2.00", "1.31")}
    peers = next(table for table in section["tables"] if table.title.startswith("Forward"))
    ours, wide = (peers.columns.index(name) for name in ("ours", "wide"))
    assert {(row[ours], row[wide]) for row in peers.rows} == {("1.07", "2.00")}
