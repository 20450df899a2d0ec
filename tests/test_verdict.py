"""The commands on the cost model: what explains a choice, and verdicts, predicted and measured."""

import json
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import MEASURED_ROOF

from fpe.bench.cli import cli
from fpe.bench.costs import verdict
from fpe.bench.results import Results
from fpe.kernels import model
from fpe.kernels.model import Sizes, crossover, layer_candidates
from fpe.kernels.roofs import PUBLISHED, Roof
from fpe.kernels.structures import STRUCTURES


def test_commands_know_kept_values() -> None:
    shape = ["--shape", "4096x14336", "--gpu", "4090", "--kept", "0.5", "--json"]
    shown = CliRunner().invoke(cli, ["explain", "--m", "16", *shape])
    assert shown.exit_code == 0, shown.output
    rows = {row["candidate"]: row for row in map(json.loads, shown.output.splitlines())}
    assert [*rows] == ["parent", "wide dense", "masked dense", "kept values", "decompressed"]
    assert rows["kept values"]["why"] == "chosen: fastest"
    verdicts = CliRunner().invoke(cli, ["verdict", "--alpha", "1", *shape])
    rows = [json.loads(line) for line in verdicts.output.splitlines()]
    assert [(row["structure"], row["workload"]) for row in rows] == [("random", "inference"), ("random", "training")]
    assert all(row["holds_to"] == 64 and row["ratio"]["1"] < 0.7 for row in rows)
    for command in (["explain", "--alpha", "1"], ["verdict", "--alpha", "1"], ["explain", "--kept", "2"]):
        assert CliRunner().invoke(cli, command).exit_code == 2


def test_explain_prints_every_candidate_and_the_choice() -> None:
    done = CliRunner().invoke(cli, ["explain", "--m", "16", "--shape", "4096x4096"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    chosen = [line for line in done.output.splitlines() if "chosen" in line]
    assert len(chosen) == 1 and chosen[0].lstrip("│ ").startswith("packed")  # names wrap where the terminal is narrow
    assert all(name in done.output for name in ("parent", "wide", "masked", "torch.sparse", "assumed"))


def test_explain_turns_the_layer_for_dx() -> None:
    layer = verdict.Layer(n=64, k=256, block=(16, 128))
    table = verdict.explain(layer, "block", 7, PUBLISHED["h200"], "dX")
    formats = model.bytes_by_format(256, 64, 2, 2, (128, 16))["blocks"]
    blocks = next(row for row in table.rows if row[0] == "blocks")
    assert "merge_matmul" in table.title and blocks[3] == f"{(formats + 2 * 7 * (256 + 2 * 64)) / 1e6:.1f}"


def test_verdict_says_where_the_claim_holds() -> None:
    arguments = ["verdict", "--gpu", "a100", "--shape", "4096x14336", "--alpha", "2"]
    done = CliRunner().invoke(cli, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    held = crossover(model.INFERENCE, Sizes(1, 4096, 14336, structure="block"), PUBLISHED["a100"])
    assert f"block {held}" in done.output and "predicted, not measured" in done.output and "A100" in done.output
    rows = [json.loads(line) for line in CliRunner().invoke(cli, [*arguments, "--json"]).output.splitlines()]
    assert [(r["structure"], r["workload"]) for r in rows] == [
        (s, w) for s in STRUCTURES for w in ("inference", "training")
    ]
    assert all("predicted" in row["basis"] and math.isfinite(row["ratio"]["8192"]) for row in rows)


@pytest.mark.parametrize(
    ("shape", "wins"), [("4096x14336", ("random at 256 rows", "seeded at 256 rows")), ("32x784", ())]
)
def test_verdict_says_to_dense_where_that_wins(shape: str, wins: tuple[str, ...]) -> None:
    arguments = ["verdict", "--gpu", "rtx4090", "--shape", shape]
    text = " ".join(CliRunner().invoke(cli, arguments, env={"COLUMNS": "80"}).output.split())
    rows = [json.loads(line) for line in CliRunner().invoke(cli, [*arguments, "--json"]).output.splitlines()]
    slower = {f"{r['structure']} at {m} rows" for r in rows if r["workload"] == "inference"
              for m, ratio in r["wide"].items() if round(ratio, 2) > 1}  # fmt: skip
    assert set(wins) == slower
    said = "Use the wide dense layer, fpe.to_dense(model), where it is faster: at "
    assert (said in text) == bool(wins)
    for case in wins:
        structure, _, m, _ = case.split()
        assert re.search(rf"at {m} rows it takes [^;]*0\.\d\d of {structure}'s time", text)
    assert wins or "is faster at none of the batch sizes shown" in text
    assert ("holds at every batch size tried: take any structure" in text) == (shape == "32x784")


def times(structure: str, m: int, **milliseconds: float) -> list[dict]:
    case = {"N": 64, "K": 32, "alpha": 2, "dtype": "bf16", "structure": structure, "M": m, "level": "op"}
    block = "64x64" if structure == "block" else ""
    names = {"fpe_auto": "fpe/auto", "fpe_triton": "fpe/triton"}
    return [
        {**case, "block": block, "pass": "forward", "provider": names.get(who, who), "milliseconds": t}
        for who, t in milliseconds.items()
    ]


ROWS = [
    *times("random", 1, parent=1.0, wide=2.0, fpe_auto=1.2, fpe_triton=1.05),
    *({**row, "level": "layer"} for row in times("random", 1, fpe_auto=0.1)),
    *times("random", 16, parent=1.0, wide=2.0, fpe_triton=1.09),
    *times("random", 64, parent=1.0, wide=2.0, fpe_triton=1.5),
    *times("random", 256, parent=1.0, wide=2.0, fpe_triton=1.0),
    *times("block", 1, parent=1.0, wide=2.0, fpe_triton=1.5),
    *times("block", 256, parent=2.0, wide=4.0, fpe_triton=1.0),
]


def test_measured_verdict_takes_our_fastest_and_stops_at_the_first_failure(tmp_path: Path) -> None:
    results = Results(
        "latency", {"dry_run": False}, [*ROWS, {"provider": "torch BSR", "status": "absent", "reason": "-"}]
    )
    layer = verdict.Layer(64, 32)
    random, block = verdict.measured(layer, results)
    assert random["ratio"] == {1: 1.05, 16: 1.09, 64: 1.5, 256: 1.0} and random["holds_to"] == 16
    assert random["wide"][1] == 1.05 / 2 and random["runs_as"][1] == ["fpe/triton"]
    assert block["holds_to"] == 0 and block["ratio"][256] == 0.5
    path = results.write(tmp_path / "latency.jsonl")
    (tmp_path / "roof.json").write_text(json.dumps(MEASURED_ROOF))
    arguments = ["verdict", "--measured", str(path), "--shape", "64x32"]
    done = CliRunner().invoke(cli, arguments, env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.output
    assert "random 16, block none" in done.output and "block 0.50 (fpe/triton)" in done.output
    found = layer_candidates(model.INFERENCE, Sizes(16, 64, 32), Roof.of(MEASURED_ROOF))
    predicted = model.seconds_of(found) / model.seconds_of(found, "parent")
    (line,) = (line for line in done.output.splitlines() if " 1.090 " in line)
    assert f"{predicted:.3f}" in line and f"{predicted / 1.09 - 1:+.0%}" in line


@pytest.mark.parametrize(
    ("study", "settings", "rows", "says"),
    [
        ("latency", {}, [], "expected times of a 64 x 32 layer"),
        ("latency", {}, [{**row, "N": 65} for row in ROWS], "there are 65x32 alpha 2 bf16"),
        ("latency", {"dry_run": True}, ROWS, "dry run"),
        ("gate", {}, ROWS, "got those of 'gate'"),
    ],
    ids=["empty", "other layer", "dry run", "other step"],
)
def test_a_measured_verdict_needs_times_of_its_layer(
    tmp_path: Path, study: str, settings: dict, rows: list, says: str
) -> None:
    path = Results(study, settings, rows, {"device": "NVIDIA H200", "commit": "x"}).write(tmp_path / "r.jsonl")
    done = CliRunner().invoke(cli, ["verdict", "--measured", str(path), "--shape", "64x32"])
    assert done.exit_code != 0 and says in " ".join(done.output.split()) and "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verdict", "--measured", "missing.jsonl"], "missing.jsonl"),
        (["verdict", "--gpu", "6090"], "h200"),
        (["verdict", "--gpu", "missing.json"], "missing.json"),
        (["verdict", "--shape", "0x7"], "--shape"),
        (["explain", "--structure", "random", "--dtype", "int8"], "int8"),
        (["explain", "--structure", "2:4", "--alpha", "4"], "alpha = 2"),
        (["explain", "--pass", "sideways"], "sideways"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output


def test_where_there_is_one_structure_none_is_advised() -> None:
    told = CliRunner().invoke(cli, ["verdict", "--gpu", "h200", "--kept", "0.5"]).output
    assert "At 8192 rows a forward costs" in told and "take structure" not in told
