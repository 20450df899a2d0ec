"""``fpe gpu`` on a machine without one: runs are cut and go on, the plan is walked and kept, archives are merged."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from support import ROOT

from fpe.bench.families import FAMILIES
from fpe.bench.gpu import archive, blocks, child, plan, roof, steps
from fpe.bench.gpu.checks import checks
from fpe.bench.gpu.cli import headline, main
from fpe.bench.gpu.lost import LostError
from fpe.bench.latency.problems import Case
from fpe.bench.results import COMMITTED, Results
from fpe.kernels.model import Sizes, layer_candidates
from fpe.kernels.partition import config
from fpe.kernels.roofs import PUBLISHED, Roof, Share
from fpe.kernels.tables import parse

# Steps: kept, skipped, cut, tried again.


def step(units: dict[str, Callable[[], list[dict]]], share: float = 1.0, seconds: float = 0.0) -> steps.Step:
    listed = [steps.Unit(key, work, seconds) for key, work in units.items()]
    return steps.Step("latency", lambda context: iter(listed), "", share)


def context(folder: Path, seconds: float = 60, name: str = "1") -> steps.Context:
    return steps.Context("cpu", folder, time.monotonic() + seconds, name, say=lambda line: None)


def test_units_are_kept_and_not_run_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def unit(name: str) -> Callable[[], list[dict]]:
        return lambda: ran.append(name) or [{"x": name}, {"x": name}]  # type: ignore[func-returns-value]

    steps.run(step({"a": unit("a")}), context(tmp_path), 60)
    steps.run(step({"a": unit("a"), "b": unit("b")}), context(tmp_path, name="2"), 60)
    assert ran == ["a", "b"]
    assert [(r["key"], r["x"], r["run"]) for r in Results.read(tmp_path / "latency.jsonl").rows] == [
        ("a", "a", "1"), ("a", "a", "1"), ("b", "b", "2"), ("b", "b", "2"),
    ]  # fmt: skip


@pytest.mark.parametrize("status", ["wrong", "error", "blocked"])
def test_what_is_red_is_tried_again_by_the_next_run_alone(tmp_path: Path, status: str) -> None:
    given: list[dict] = [{"status": status, "reason": "off"}, {"milliseconds": 1.0}]
    ran: list[int] = []

    def unit() -> list[dict]:
        ran.append(len(ran))
        return given

    plan = step({"a": unit, "b": lambda: [{"x": 1}]})
    for _ in range(2):
        steps.run(plan, context(tmp_path), 60)
    assert len(ran) == 1
    given = [{"milliseconds": 2.0}]
    steps.run(plan, context(tmp_path, name="2"), 60)
    rows = Results.read(tmp_path / "latency.jsonl").rows
    assert [(r["key"], r.get("milliseconds")) for r in rows] == [("b", None), ("a", 2.0)]


def test_no_unit_begins_that_would_end_too_late(tmp_path: Path) -> None:
    said: list[str] = []
    late = context(tmp_path, seconds=-1)
    late.say = said.append
    steps.run(step({"a": lambda: [{"x": 1}]}), late, 60)
    steps.run(step({"b": lambda: [{"x": 1}]}, seconds=70), context(tmp_path), 60)
    assert Results.read(tmp_path / "latency.jsonl").rows == [] and "1 left" in said[-1]

    now = [0.0]

    def slow() -> list[dict]:
        now[0] += 0.05
        return [{"x": 1}]

    ticking = replace(context(tmp_path), clock=lambda: now[0])
    steps.run(step({"a": slow, "b": slow}, share=0.01), ticking, budget=1.0)
    assert [row["key"] for row in Results.read(tmp_path / "latency.jsonl").rows] == ["a"]


def test_an_error_is_a_row_and_a_lost_device_the_end_of_the_process(tmp_path: Path) -> None:
    def fail(message: str) -> Callable[[], list[dict]]:
        def unit() -> list[dict]:
            raise RuntimeError(message)

        return unit

    shared = context(tmp_path)
    steps.run(step({"a": fail("out of resource"), "b": lambda: [{"x": 1}]}), shared, 60)
    rows = Results.read(tmp_path / "latency.jsonl").rows
    assert [(r["key"], r.get("status")) for r in rows] == [("a", "error"), ("b", None)]
    assert steps.red(shared, ("latency", "gate")) == ["latency: a: out of resource"]
    lost = step({"c": fail("CUDA error: launch failure"), "d": lambda: [{"x": 1}]})
    with pytest.raises(LostError, match="launch failure"):
        steps.run(lost, shared, 60)
    assert [r["key"] for r in Results.read(tmp_path / "latency.jsonl").rows] == ["a", "b", "c"]
    steps.run(lost, shared, 60)  # as the next process of the same run does
    assert [r["key"] for r in Results.read(tmp_path / "latency.jsonl").rows] == ["a", "b", "c", "d"]


def test_no_room_is_no_error(tmp_path: Path) -> None:
    def unit() -> list[dict]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much\nand more")

    shared = context(tmp_path)
    steps.run(step({"a": unit}), shared, 60)
    (row,) = Results.read(tmp_path / "latency.jsonl").rows
    assert row["status"] == "absent" and row["reason"].startswith("CUDA out of memory")
    assert not steps.red(shared, ("latency",))


def test_a_cut_gate_has_seen_every_family() -> None:
    first = list(islice(checks(), 9))
    assert {check.family for check in first} == set(FAMILIES)
    assert len({check.name for check in checks()}) == len(list(checks())) > 100


def test_the_tuner_fills_a_table_that_the_chooser_reads_and_goes_on(tmp_path: Path) -> None:
    """Under the interpreter, where the tests run, a dry run tunes one job for show."""
    shared = context(tmp_path)
    tuner = next(s for s in plan.STEPS if s.name == "tune")
    steps.run(tuner, shared, 60)
    (row,) = Results.read(tmp_path / "tune.jsonl").rows
    (entry,) = parse(json.loads((tmp_path / "partition_sm80.json").read_text()), config.Config)
    assert row["config"] == asdict(entry.config) and not steps.red(shared, ("tune",))
    said: list[str] = []
    shared.say = said.append
    steps.run(tuner, shared, 60)
    assert said[-1].startswith("tune: 0 done, 1 were there")


@pytest.mark.parametrize(
    ("check", "provider", "pass_", "structure", "level", "blocked"),
    [
        ({}, "fpe/triton", "forward", "random", "op", True),
        ({}, "fpe/triton", "dX", "random", "op", False),  # another operation
        ({}, "fpe/triton", "dX", "random", "merge", True),  # dX of a merge is a split
        ({}, "fpe/triton", "step", "random", "step", True),
        ({}, "fpe/auto", "forward", "random", "op", False),
        ({}, "parent", "forward", "random", "op", False),
        ({}, "fpe/triton", "forward", "2:4", "op", False),
        ({}, "fpe/triton", "forward", "2:4", "mlp", True),  # its second layer is a merge that dX splits
        ({"op": ""}, "fpe/triton", "dW", "random", "op", True),  # a layer: all of its family
        ({"dtype": "fp32"}, "fpe/triton", "forward", "random", "op", False),
        ({"status": "ok"}, "fpe/triton", "forward", "random", "op", False),
    ],
)
def test_red_blocks_its_own_family_dtype_backend_and_operation(
    check: dict, provider: str, pass_: str, structure: str, level: str, blocked: bool
) -> None:
    red = {"check": "c", "family": "partition", "op": "split_matmul", "dtype": "bf16", "backend": "triton"}
    skip = blocks.skip_red(
        [{**red, "status": "wrong", "reason": "off", **check}], Case(1, 8, 8, structure=structure), level
    )
    assert bool(skip(provider, pass_)) == blocked


def test_a_blocked_provider_gets_a_row_and_no_time(tmp_path: Path) -> None:
    red = {"check": "c", "family": "partition", "op": "split_matmul", "dtype": "fp32", "backend": "eager"}
    Results("gate", {}, [{"key": "c", **red, "status": "wrong", "reason": "off"}]).write(tmp_path / "gate.jsonl")
    shared = context(tmp_path)
    unit = next(unit for unit in plan.STEPS[1].units(shared) if "random" in unit.key)
    rows = unit.work()
    found = [(r["provider"], r["of_pass"]) for r in rows if r.get("status") == "blocked"]
    assert found == [("fpe/eager", "forward"), ("fpe/eager", "forward+backward")]
    assert ("fpe/eager", "dX") in {(r["provider"], r.get("pass")) for r in rows if "milliseconds" in r}


# The plan.


def planned(minutes: float, names: tuple[str, ...] = ()) -> list[plan.Promise]:
    made = steps.Context("cuda", Path(), 0.0, provenance={"device": "NVIDIA H200"}, arch=90, jobs=16)
    return plan.promised(made, names or tuple(s.name for s in plan.STEPS), 60 * minutes, 8.0)


def test_every_time_of_compiling_belongs_to_a_launch_of_the_plan() -> None:
    """By the launch's name: otherwise the plan would take the mean of all for it."""
    made = steps.Context("cuda", Path(), 9 * 60, provenance={"device": "NVIDIA H200"}, arch=90)
    known = {row["launch"] for row in Results.read(COMMITTED / "lab/headline-compile.jsonl").rows}
    assert known <= {launch.name for launch in plan.kernels_first(made)}


def test_the_headline_comes_within_four_minutes_of_nine() -> None:
    found = planned(9)
    headline = [p for p in found if p.step.name in ("compile", "latency")]
    assert all(p.end is not None and p.end <= 240 for p in headline)
    keys = " | ".join(p.unit.key for p in headline)
    for m, n, k in ((m, *shape) for m in (1, 16, 64, 256, 1024, 8192) for shape in ((4096, 14336), (14336, 4096))):
        for alpha, structure in ((2, "random"), (2, "2:4"), (2, "block"), (4, "random"), (4, "block")):
            both = " forward+backward" * (alpha == 2)
            assert f"op forward dX dW{both} {m} {n} {k} {alpha} {structure} " in keys
            assert structure == "2:4" or f"merge forward dX {m} {n} {k} {alpha} {structure} " in keys
    who = {p.name for p in plan.who_is_timed(steps.Context("cuda", Path(), 0.0))}
    assert {"parent", "wide", "fpe/triton", "fpe/sparse_tensor_core", "fpe/torch", "fpe/auto"} <= who
    done = {p.step.name for p in found} - {p.step.name for p in found if p.end is None}
    assert {"compile", "latency", "decode", "training", "gate"} <= done  # whole
    assert [p.step.name for p in found if p.end is not None][-1] in ("neighbours", "tune", "sweep")


@pytest.mark.parametrize(("minutes", "slower"), [(5.0, 1.0), (5.0, 1.25), (9.0, 1.0)])
def test_what_a_plan_promises_is_on_disk_by_then(tmp_path: Path, minutes: float, slower: float) -> None:
    """The steps as they run, every unit taking as long as is expected of it, or a quarter more."""
    now, names = [8.0], tuple(s.name for s in plan.STEPS)
    made = {"device": "NVIDIA H200"}
    shared = steps.Context("cuda", tmp_path, 60 * minutes, provenance=made, arch=90, jobs=16, clock=lambda: now[0])
    shared.say = lambda line: None
    for real in plan.STEPS:

        def timed(context: steps.Context, real: steps.Step = real) -> Iterator[steps.Unit]:
            for unit in real.units(context):

                def work(unit: steps.Unit = unit) -> list[dict]:
                    now[0] += slower * unit.seconds
                    return [{"ended": now[0]}]

                yield replace(unit, work=work)

        steps.run(replace(real, units=timed), shared, 60 * minutes)
    done = {(name, row["key"]): row["ended"] for name in names for row in shared.rows(name)}
    promised = {(p.step.name, p.unit.key): p.end for p in planned(minutes) if p.end is not None}
    if slower == 1.0:
        assert done == pytest.approx(promised)
    first = {key for key in promised if key[0] in ("compile", "latency")}
    assert len(first) > 100 and first <= set(done) and max(done[key] for key in first) <= 240
    assert max(done.values()) <= 60 * minutes + 30


def test_the_plan_is_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plan", "--minutes", "9"]) == 0
    said = capsys.readouterr().out
    assert "9 minutes, NVIDIA H200, 16 cores: expected by the cost model, not measured" in said
    begun = [line.split()[0] for line in said.splitlines()[2:] if not line.startswith(" ")]
    assert begun == [s.name for s in plan.STEPS]


# What other tools say.

NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","elementwise linspace_cuda_out","dram__bytes_read.sum","byte","99"
"0","elementwise linspace_cuda_out","dram__bytes_write.sum","byte","99"
"1","_multiply","dram__bytes_read.sum","byte","1,000"
"1","_multiply","dram__bytes_write.sum","byte","10"
"2","_reduce","dram__bytes_read.sum","byte","5"
"2","_reduce","dram__bytes_write.sum","byte","6"
"3","elementwise linspace_cuda_out","dram__bytes_read.sum","byte","99"
"4","_outer","dram__bytes_read.sum","byte","7"
"""


def test_ncu_output_becomes_rows() -> None:
    calls = [{"pass": "forward"}, {"pass": "dX"}, {"pass": "dW"}]
    assert child.read_traffic(NCU, calls) == [
        {"pass": "forward", "dram_read": 1005.0, "dram_write": 16.0, "kernels": 2},
        {"pass": "dX", "dram_read": 7.0, "dram_write": 0.0, "kernels": 1},
    ]
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        child.read_traffic("==ERROR== ERR_NVGPUCTRPERM", calls)


def test_watched_calls_are_named_in_their_order() -> None:
    rows = list(child.watched())
    assert len(rows) == len(child.traffic_cases()) * len(child.WATCHED) * len(child.PASSES)
    assert rows[0]["provider"] == "parent" and rows[0]["pass"] == "forward" and rows[0]["M"] == 1


# Roofs.


def test_a_measured_roof_is_one_that_the_model_reads() -> None:
    with patch.object(roof, "interleaved", lambda calls, *a, **k: {n: type("T", (), {"median": 2.0}) for n in calls}):
        found = roof.measure("cpu")
    made = Roof.of(json.loads(json.dumps(found)))
    assert made.bandwidth == 2 * (1 << 24) / 2e-3 and made.flops["bf16"] == 2 * 256**3 / 2e-3
    assert made.source == "measured" and made.reach == Share(1, 1)


def latency_row(name: str, m: int, slower: float, share: float = 1.0, **more: object) -> dict:
    """A row that took ``slower`` times what the model predicts for the H200."""
    case = {"structure": "block", "M": m, "N": 14336, "K": 4096, "alpha": 2, "dtype": "bf16", "block": "64x64"}
    (found,) = layer_candidates(("forward",), Sizes(m, 14336, 4096, structure="block"), PUBLISHED["h200"])
    seconds = next(c.seconds for c in found if c.name == name)
    measured = {"milliseconds": 1e3 * seconds * slower, "implementation": name, "pass": "forward", "level": "op"}
    return {"provider": name, **case, **measured, **more}


def test_shares_are_fitted_to_what_was_measured() -> None:
    """Half as fast as predicted in the middle of three decode sizes, a quarter faster at a large one."""
    assumed = PUBLISHED["h200"].shares["blocks"]
    rows = [latency_row("blocks", m, slower) for m, slower in ((16, 1.2), (32, 2.0), (64, 4.0))]
    rows += [latency_row("blocks", 8192, 0.8), {"provider": "x", "status": "absent", "reason": "-"}]
    rows += [latency_row("parent", 1, 1.0, milliseconds=0.001), latency_row("wide dense", 1, 9.0, **{"pass": "step"})]
    fitted = roof.fit(rows, PUBLISHED["h200"])
    assert fitted == {"blocks": [round(assumed.bandwidth / 2, 4), round(assumed.arithmetic / 0.8, 4)]}


def test_a_share_that_is_hardly_one_is_a_positive_number() -> None:
    """As of a device that stood still: a roof's file with a share of zero could not be read again."""
    ((bandwidth, _),) = roof.fit([latency_row("blocks", 16, 1e6)], PUBLISHED["h200"]).values()
    assert bandwidth == pytest.approx(PUBLISHED["h200"].shares["blocks"].bandwidth / 1e6, rel=1e-3)


def test_fitted_shares_join_the_roof_and_the_next_fit_begins_anew(tmp_path: Path) -> None:
    shared = context(tmp_path)
    shared.device = "cuda"
    given = {"name": "x", "arch": 90, "bandwidth": 4e12, "flops": {"bf16": 7e14}, "l2": 6e7, "integer": 1.6e13}
    (tmp_path / "roof.json").write_text(json.dumps(given))
    Results("latency", {}, [latency_row("blocks", 16, 2.0)]).write(tmp_path / "latency.jsonl")
    for _ in range(2):
        plan.fit_shares(shared)
        first = Roof.read(tmp_path / "roof.json")
        assert first.bandwidth == 4e12 and first.shares["parent"] == PUBLISHED["h200"].shares["parent"]
        assert first.shares["blocks"].bandwidth == pytest.approx(4.32 / 4 * 0.9 / 2, rel=0.1)


# The command.

WITHOUT = """
import sys
for name in ("click", "rich", "jinja2", "tabulate", "joblib", "sklearn", "safetensors", "tilelens", "hypothesis"):
    sys.modules[name] = None
from fpe.bench.__main__ import main
main()
"""


def test_the_whole_plan_is_walked_without_a_gpu_or_the_extras(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        WITHOUT,
        "gpu",
        "--dry-run",
        "--output",
        str(tmp_path),
        "--rows",
        str(tmp_path),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dry run: no GPU figures" in done.stdout
    found = {path.stem: Results.read(path) for path in tmp_path.glob("*.jsonl")}
    assert set(found) == {*(s.name for s in plan.STEPS), "runs"}
    assert all(results.settings == {"device": "CPU, dry run", "dry_run": True} for results in found.values())
    assert {row["status"] for row in found["gate"].rows} == {"ok"}
    timed = [row for row in found["latency"].rows if "milliseconds" in row]
    assert {row["structure"] for row in timed} == set(plan.MEASURED)
    decoded = {row["structure"] for row in found["decode"].rows if row.get("provider") == "parent"}
    assert decoded == {"random", "seeded", "block"}
    assert {(row["level"], row["pass"]) for row in timed} == {
        ("op", "forward"), ("op", "dX"), ("op", "dW"), ("op", "forward+backward"),
        ("merge", "forward"), ("merge", "dX"),
    }  # fmt: skip
    assert {row["level"] for row in found["training"].rows} == {"layer", "mlp", "step"}
    absent = ("compile", "compile-gate", "traffic", "sanitize", "tune")
    assert {row["status"] for name in absent for row in found[name].rows} == {"absent"}
    assert {*archive.read(tmp_path / archive.NAME)} == {*(f"{name}.jsonl" for name in found), "roof.json"}
    assert Roof.read(tmp_path / "roof.json").source == "measured"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 1, "needs a CUDA device"),
        (["--dry-run", "--provider", "magic"], 1, "provider must be one of"),
        (["--dry-run", "--only", "magic"], 2, "invalid choice"),
        (["--dry-run", "--minutes", "-3"], 2, "positive number of minutes, got -3"),
        (["--merge", "nothing.tar.gz"], 1, "expected an archive of results"),
    ],
    ids=["no GPU", "provider", "step", "minutes", "archive"],
)
def test_bad_arguments_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str
) -> None:
    try:
        got = main([*arguments, "--output", str(tmp_path / "out")])
    except SystemExit as stop:
        got = stop.code  # type: ignore[assignment]
    assert got == status and says in capsys.readouterr().err


def test_a_damaged_file_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Results("gate", {"device": "CPU, dry run", "dry_run": True}, [{"key": "x", "status": "ok"}]).write(
        tmp_path / "gate.jsonl"
    )
    (tmp_path / "gate.jsonl").open("a").write('{"key": "y", "sta\n')
    assert main(["--dry-run", "--only", "gate", "--output", str(tmp_path), "--rows", str(tmp_path)]) == 1
    assert "gate.jsonl: line 3 is cut" in capsys.readouterr().err


def test_the_headline_sets_the_fastest_of_ours_beside_both_yardsticks() -> None:
    def row(provider: str, time: float, **other: object) -> dict:
        case = {"N": 8, "K": 4, "alpha": 2, "structure": "block", "M": 1, "pass": "forward", "level": "op"}
        return {**case, "provider": provider, "milliseconds": time, **other}

    rows = [row("parent", 2.0), row("wide", 4.0), row("fpe/auto", 3.0), row("fpe/triton", 1.0), row("fpe/x", 0.1, M=2)]
    (cells,) = headline(rows).rows
    assert cells == ("8x4", "2", "block", "1", "fpe/triton", "1000.0", "0.500", "0.250")
