"""The page on cost: predicted and said to be so without a GPU, drawn from its results where there are some."""

import json
from pathlib import Path

import jinja2
import pytest

from fpe.bench.latency.problems import Case
from fpe.bench.report import costs, documents
from fpe.bench.results import Results
from fpe.kernels.model import INFERENCE, bytes_by_format, crossover, layer_candidates, seconds_of
from fpe.kernels.roofs import PUBLISHED
from fpe.kernels.structures import STRUCTURES

H200 = {"device": "NVIDIA H200", "commit": "abc1234", "torch": "2.11", "triton": "3.6"}


def row(provider: str, structure: str, m: int, milliseconds: float, pass_: str = "forward") -> dict:
    case = Case(m, costs.LAYER.n, costs.LAYER.k, structure=structure, block=(64, 64))
    known = {"bytes": 1e8, "flops": 1e9} if provider != "masked" else {"flops": 1e9}
    return {"level": "op", "pass": pass_, "provider": provider, **case.row(), "milliseconds": milliseconds, **known}


def commit(folder: Path, dry: bool = False) -> Path:
    """A results folder as fpe gpu leaves it: blocks at 1.5, labels at 1.2 of the parent."""
    rows = [
        row(provider, structure, m, time * (3 if pass_ != "forward" else 1), pass_)
        for structure, ours in (("random", 1.2), ("block", 1.5))
        for m in (1, 16, 64)
        for pass_ in ("forward", "forward+backward")
        for provider, time in (("parent", 1.0), ("wide", 2.0), ("fpe/triton", ours), ("fpe/auto", 9.0), ("masked", 6.0))
    ]
    rows.append({"level": "op", "provider": "torch BSR", "status": "absent", "reason": "none", **Case(1, 8, 8).row()})
    Results("latency", {"dry_run": dry}, rows, H200).write(folder / "latency.jsonl")
    counted = {"M": 64, "N": costs.LAYER.n, "K": costs.LAYER.k, "alpha": 2, "structure": "block", "pass": "forward"}
    traffic = [{**counted, "provider": "fpe/auto", "dram_read": 2e8, "dram_write": 1e8}]
    Results("traffic", {"dry_run": dry}, traffic, H200).write(folder / "traffic.jsonl")
    roof = {"name": "NVIDIA H200", "arch": 90, "bandwidth": 4e12, "flops": {"bf16": 7e14}, "l2": 6e7, "integer": 1.6e13}
    (folder / "roof.json").write_text(json.dumps(roof))
    return folder


def rendered(section: dict) -> str:
    loader = jinja2.FileSystemLoader(Path(costs.__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("costs.html.j2").render(costs=section)


def test_without_results_everything_is_said_to_be_predicted(tmp_path: Path) -> None:
    assert costs.measured(tmp_path) is None
    page = rendered(costs.section())
    assert page.count("<svg") == 5 and "No GPU has been measured yet" in page
    assert "Measured on" not in page and "predicted, not measured" in page.lower()
    assert costs.peers_table(None) is None


def test_with_results_they_are_drawn_with_their_provenance(tmp_path: Path) -> None:
    commit(tmp_path / "nvidia-h200")
    device = costs.measured(tmp_path)
    assert device is not None and device.roof.bandwidth == 4e12
    page = rendered(costs.section(device))
    assert page.count("<svg") == 6 and "No GPU has been measured" not in page
    assert page.count("Measured on NVIDIA H200 at commit abc1234 with torch 2.11, triton 3.6") >= 4
    assert "random 1.20 (fpe/triton)" in page and "block 1.50 (fpe/triton)" in page


def test_a_dry_run_is_never_taken_for_a_gpu(tmp_path: Path) -> None:
    commit(tmp_path / "cpu", dry=True)
    assert costs.measured(tmp_path) is None


def test_results_without_the_layer_are_not_drawn(tmp_path: Path) -> None:
    folder = commit(tmp_path / "z")
    assert costs.measured(tmp_path) is not None
    results = Results.read(folder / "latency.jsonl")
    alone = [r for r in results.rows if not r["provider"].startswith("fpe")]
    Results("latency", results.settings, alone, H200).write(folder / "latency.jsonl")
    assert costs.measured(tmp_path) is None


def test_peers_stand_beside_ours_over_the_parent(tmp_path: Path) -> None:
    table = costs.peers_table(costs.measured(commit(tmp_path / "x").parent))
    assert table is not None and len(table.rows) == 6
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert (cells["ours"], cells["wide"], cells["masked"], cells["torch BSR"]) == ("1.20", "2.00", "6.00", "-")


def test_measured_points_of_the_roofline_are_our_fastest(tmp_path: Path) -> None:
    device = costs.measured(commit(tmp_path / "x").parent)
    assert device is not None
    points = costs._measured_points("block", device, costs.LAYER)
    assert points == [pytest.approx((10.0, 1e9 / 1.5e-3 / 1e12))] * 3


def test_predicted_points_lie_under_the_roof_and_on_the_model() -> None:
    roof = PUBLISHED["h200"]
    (m1, *_) = costs._predicted_points("parent", roof, costs.LAYER)
    n, k = costs.LAYER.n, costs.LAYER.k
    assert m1[0] == pytest.approx(2 * n * k / (2 * (n * k + n + k)))
    for intensity, rate in costs._predicted_points("block", roof, costs.LAYER):
        assert rate * 1e12 <= min(roof.bandwidth * intensity, roof.flops["bf16"])


def test_crossovers_of_the_table_are_the_models() -> None:
    table = costs.crossover_table()
    cells = next(row for row in table.rows if row[:2] == ("H200, alpha = 2", "block"))
    assert (
        cells[2] == str(crossover(INFERENCE, costs.LAYER.sizes("block"), PUBLISHED["h200"], tolerance=0.10))
        and "not measured" in table.title
    )
    assert len(table.rows) == len(costs.GPUS) * (2 * len(STRUCTURES) - 1)  # 2:4 is for two children


def test_memory_is_within_the_bar_for_blocks_and_counts_labels() -> None:
    rows = {name: sum(parts.values()) for name, parts in costs.memory_rows().items()}
    assert rows["parent"] == pytest.approx(1) and rows["ours, blocks"] <= 1.07
    assert rows["ours, blocks"] < rows["ours, labels"] < rows["wide dense"] < rows["masked, wide"]


def test_ratios_drawn_are_those_of_the_model() -> None:
    rows = costs.verdict_rows(costs.LAYER, None)
    random = next(row for row in rows if row["structure"] == "random" and row["workload"] == "inference")
    found = layer_candidates(INFERENCE, costs.LAYER.sizes("random", 16), PUBLISHED["h200"])
    assert random["ratio"][16] == pytest.approx(seconds_of(found) / seconds_of(found, "parent"))
    drawn = costs.ratio_lines(rows, "ratio", "t").axes[0].get_lines()[0]
    assert list(drawn.get_ydata()) == list(random["ratio"].values())


def test_traffic_bars_are_compulsory_traced_and_counted(tmp_path: Path) -> None:
    device = costs.measured(commit(tmp_path / "x").parent)
    axis = costs.traffic_bars(device).axes[0]
    bars = {t.get_text(): b.get_width() for t, b in zip(axis.get_yticklabels(), axis.patches, strict=True)}
    assert bars["block, counted"] == pytest.approx(300)
    n, k = costs.LAYER.n, costs.LAYER.k
    forward = 2 * 64 * (2 * n + k)
    sizes = [bytes_by_format(*shape, 2)["blocks"] for shape in ((n, k), (k, n), (n, k))]
    assert bars["blocks, compulsory"] == pytest.approx((sum(sizes) + 3 * forward) / 1e6)
    assert bars["blocks, compulsory"] < bars["blocks, traced"] < 1.1 * bars["blocks, compulsory"]
    assert "block, counted" not in [t.get_text() for t in costs.traffic_bars(None).axes[0].get_yticklabels()]


def test_traffic_table_sets_counters_beside_the_trace(tmp_path: Path) -> None:
    device = costs.measured(commit(tmp_path / "x").parent)
    table = costs.traffic_table(device)
    (forward,) = (row for row in table.rows if row[:2] == ("forward", "64"))
    assert forward[5] == "300.0" and forward[6] == f"{300 / float(forward[2]):.3f}"
    assert 1 <= float(forward[4]) <= 1.05 and float(forward[3]) >= float(forward[2])
    assert all(row[5:] == ("-", "-") for row in costs.traffic_table(None).rows)


def test_every_place_of_the_documents_has_a_table() -> None:
    text = (documents.ROOT / "docs/benchmarks.md").read_text()
    assert all(f"<!-- table: {name} -->" in text for name in ("verdict", "crossover", "roofs", "shares", "memory"))
