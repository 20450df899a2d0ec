"""``fpe gpu`` on a machine without one: the gate sees what is wrong, runs are cut and go on, the plan is walked."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from support import ROOT
from torch import Tensor

from fpe.bench.device import child, gate, roof, steps
from fpe.bench.device.cli import headline, main
from fpe.bench.results import Results
from fpe.kernels.model import PUBLISHED, Roof, Share, layer_candidates
from fpe.kernels.partition import config
from fpe.kernels.tables import parse

# The gate.


def check(change: Callable[[Tensor], Tensor], wanted: str = "triton") -> gate.Check:
    """A check of a small product whose implementation is changed where a backend insists."""

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(16, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        return [change(a @ b) if backend == wanted else a @ b]

    return gate.Check("product", "test", run)


def nudged(y: Tensor, by: float) -> Tensor:
    return y + by * y.abs().max()


def nan(y: Tensor) -> Tensor:
    y = y.clone()
    y[3, 4] = float("nan")
    return y


def refuse(y: Tensor) -> Tensor:
    raise ValueError("it needs a GPU\nand luck")


def crash(y: Tensor) -> Tensor:
    raise RuntimeError("out of resource")


def lose(y: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        (lambda y: y, "ok", ""),
        (lambda y: nudged(y, 0.01), "wrong", "times the error allowed"),
        (nan, "wrong", "inf"),
        (lambda y: y[:-1], "wrong", "inf"),
        (lambda y: y + 1e-6 * torch.rand_like(y), "wrong", "other bits"),
        (lambda y: torch.empty_like(y), "wrong", "inf"),  # memory that nobody wrote
        (refuse, "absent", "it needs a GPU"),
        (crash, "error", "out of resource"),
    ],
    ids=["right", "off", "nan", "shape", "random", "unwritten", "refused", "crash"],
)
def test_the_gate_judges(change: Callable, status: str, reason: str) -> None:
    row = gate.compare(check(change), "fp32", "triton")
    assert row["status"] == status and reason in row.get("reason", "")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_lost_device_is_no_result() -> None:
    with pytest.raises(RuntimeError, match="CUDA error"):
        gate.compare(check(lose), "fp32", "triton")


def test_the_gate_allows_twice_the_yardsticks_error() -> None:
    """The yardstick in bfloat16 errs by its own rounding; as bad is right, ten times is not."""
    coarse = gate.Check("c", "t", lambda dtype, backend: [torch.tensor([1.0, 1 / 3], dtype=torch.float64).to(dtype)])
    assert gate.compare(coarse, "bf16", "triton")["status"] == "ok"
    worse = gate.Check("w", "t", lambda d, b: [torch.tensor([1.0, 0.36 if b == "triton" else 1 / 3]).to(d)])
    assert gate.compare(worse, "bf16", "triton")["status"] == "wrong"


def test_real_checks_are_green_under_the_interpreter_and_red_where_a_kernel_is_broken() -> None:
    found = {c.name: c for c in gate.checks("cpu", few=True)}
    blocks = [c for c in found.values() if c.family == "block"]
    assert {c.family for c in found.values()} == {"partition", "block", "layers", "semi_structured", "mlp"}
    assert [gate.compare(c, "fp32", "triton")["status"] for c in blocks] == ["ok", "ok"]
    from fpe.kernels.block import triton as module

    real = module.block_matmul_triton
    with patch.object(module, "block_matmul_triton", lambda *a, **k: 1.001 * real(*a, **k)):
        from fpe.kernels import ops

        ops._implementation.cache_clear()
        broken = gate.compare(blocks[0], "fp32", "triton")
    ops._implementation.cache_clear()
    assert broken["status"] == "wrong" and broken["error"] > 1


def test_every_check_runs_in_every_dtype_on_the_eager_twin() -> None:
    rows = [gate.compare(c, d, "eager") for c in gate.checks("cpu", few=True) for d in ("bf16", "fp16", "fp32", "tf32")]
    assert {row["status"] for row in rows} == {"ok"}


# Steps: kept, skipped, cut, refused.


def step(units: dict[str, Callable[[], list[dict]]], share: float = 1.0) -> steps.Step:
    return steps.Step("latency", lambda context: iter(units.items()), share, "")


def context(folder: Path, seconds: float = 60) -> steps.Context:
    return steps.Context("cpu", folder, time.monotonic() + seconds, say=lambda line: None)


def test_units_are_kept_and_not_run_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def unit(name: str) -> Callable[[], list[dict]]:
        return lambda: ran.append(name) or [{"x": name}, {"x": name}]  # type: ignore[func-returns-value]

    steps.run(step({"a": unit("a")}), context(tmp_path), 60)
    steps.run(step({"a": unit("a"), "b": unit("b")}), context(tmp_path), 60)
    assert ran == ["a", "b"]
    assert [(r["key"], r["x"]) for r in Results.read(tmp_path / "latency.jsonl").rows] == [
        ("a", "a"), ("a", "a"), ("b", "b"), ("b", "b"),
    ]  # fmt: skip


def test_no_unit_begins_after_its_time(tmp_path: Path) -> None:
    said: list[str] = []
    late = context(tmp_path, seconds=-1)
    late.say = said.append
    steps.run(step({"a": lambda: [{"x": 1}]}), late, 60)
    assert Results.read(tmp_path / "latency.jsonl").rows == [] and "1 left" in said[-1]

    def slow() -> list[dict]:
        time.sleep(0.05)
        return [{"x": 1}]

    steps.run(step({"a": slow, "b": slow}, share=0.01), context(tmp_path), budget=1.0)
    assert [row["key"] for row in Results.read(tmp_path / "latency.jsonl").rows] == ["a"]


def test_an_error_is_a_row_and_a_lost_device_the_end(tmp_path: Path) -> None:
    def fail(message: str) -> Callable[[], list[dict]]:
        def unit() -> list[dict]:
            raise RuntimeError(message)

        return unit

    shared = context(tmp_path)
    steps.run(step({"a": fail("out of memory"), "b": lambda: [{"x": 1}]}), shared, 60)
    rows = Results.read(tmp_path / "latency.jsonl").rows
    assert [(r["key"], r.get("status")) for r in rows] == [("a", "error"), ("b", None)]
    assert shared.problems == ["latency: a: out of memory"]
    with pytest.raises(steps.LostError, match="run the command again"):
        steps.run(step({"c": fail("CUDA error: launch failure"), "d": lambda: [{"x": 1}]}), shared, 60)
    assert [r["key"] for r in Results.read(tmp_path / "latency.jsonl").rows] == ["a", "b", "c"]


def test_no_room_is_no_error(tmp_path: Path) -> None:
    def unit() -> list[dict]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much\nand more")

    shared = context(tmp_path)
    steps.run(step({"a": unit}), shared, 60)
    (row,) = Results.read(tmp_path / "latency.jsonl").rows
    assert row["status"] == "absent" and row["reason"].startswith("CUDA out of memory") and not shared.problems


def test_a_cut_gate_has_seen_every_family() -> None:
    first = list(islice(gate.checks("cpu"), 9))
    assert {check.family for check in first} == {"partition", "block", "layers", "semi_structured", "mlp"}
    assert len({check.name for check in gate.checks("cpu")}) == len(list(gate.checks("cpu"))) > 100


def test_the_tuner_fills_a_table_that_the_chooser_reads_and_goes_on(tmp_path: Path) -> None:
    """Under the interpreter, where the tests run, a dry run tunes one job for show."""
    Results("gate", {}, [{"key": "x", "status": "ok"}]).write(tmp_path / "gate.jsonl")
    shared = context(tmp_path)
    tuner = next(s for s in steps.STEPS if s.name == "tune")
    steps.run(tuner, shared, 60)
    (row,) = Results.read(tmp_path / "tune.jsonl").rows
    (entry,) = parse(json.loads((tmp_path / "partition_sm80.json").read_text()), config.Config)
    assert row["config"] == asdict(entry.config) and not shared.problems
    said: list[str] = []
    shared.say = said.append
    steps.run(tuner, shared, 60)
    assert said[-1].startswith("tune: 0 done, 1 were there")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "run the step 'gate' first"),
        ([{"key": "x", "status": "absent"}], "run the step 'gate' first"),
        (
            [{"key": "x", "status": "ok"}, {"key": "y", "status": "wrong"}],
            "1 of 2 correctness checks are red, first 'y'",
        ),
        ([{"key": "x", "status": "ok"}], None),
    ],
)
def test_nothing_is_timed_behind_a_red_gate(tmp_path: Path, rows: list[dict], says: str | None) -> None:
    Results("gate", {}, rows).write(tmp_path / "gate.jsonl")
    units = steps.STEPS[2].units(context(tmp_path))
    if says is None:
        assert next(units)[0].startswith("op 3 ")
        return
    with pytest.raises(steps.RedError, match=says):
        next(units)


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
    sizes = ("block", m, 14336, 4096, 2, "bf16", PUBLISHED["h200"], (64, 64))
    (found,) = layer_candidates(("forward",), *sizes)
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


def test_fitted_shares_join_the_roof_and_the_next_fit_begins_anew(tmp_path: Path) -> None:
    shared = context(tmp_path)
    shared.device = "cuda"
    given = {"name": "x", "arch": 90, "bandwidth": 4e12, "flops": {"bf16": 7e14}, "l2": 6e7, "integer": 1.6e13}
    (tmp_path / "roof.json").write_text(json.dumps(given))
    Results("latency", {}, [latency_row("blocks", 16, 2.0)]).write(tmp_path / "latency.jsonl")
    for _ in range(2):
        steps.fit_shares(shared)
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
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, "gpu", "--dry-run", "--output", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dry run: no GPU figures" in done.stdout
    found = {path.stem: Results.read(path) for path in tmp_path.glob("*.jsonl")}
    assert set(found) == {s.name for s in steps.STEPS}
    assert all(results.settings == {"device": "CPU, dry run", "dry_run": True} for results in found.values())
    assert {row["status"] for row in found["gate"].rows} == {"ok"}
    timed = [row for row in found["latency"].rows if "milliseconds" in row]
    assert {row["structure"] for row in timed} == {"random", "2:4", "block"}
    assert {row["pass"] for row in timed} == {"forward", "dX", "dW", "forward+backward"}
    assert {row["level"] for row in found["training"].rows} == {"layer", "mlp", "step"}
    assert {row["status"] for name in ("traffic", "sanitize", "tune") for row in found[name].rows} == {"absent"}
    assert Roof.read(tmp_path / "roof.json").source == "measured"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 1, "needs a CUDA device"),
        (["--dry-run", "--providers", "magic"], 1, "provider must be one of"),
        (["--dry-run", "--only", "magic"], 2, "invalid choice"),
        (["--dry-run", "--budget", "-3"], 2, "positive number of seconds, got -3"),
        (["--dry-run", "--only", "latency"], 1, "run the step 'gate' first"),
    ],
    ids=["no GPU", "provider", "step", "budget", "gate"],
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
    (tmp_path / "gate.jsonl").open("a").write('{"key": "y", "sta')
    assert main(["--dry-run", "--only", "gate", "--output", str(tmp_path)]) == 1
    assert "gate.jsonl: line 3 is cut" in capsys.readouterr().err


def test_a_red_gate_leaves_the_watched_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = {"device": "CPU, dry run", "dry_run": True}
    Results("gate", header, [{"key": "x", "status": "wrong", "reason": "off"}]).write(tmp_path / "gate.jsonl")
    assert main(["--dry-run", "--only", "latency", "sanitize", "--output", str(tmp_path)]) == 1
    assert "1 of 1 correctness checks are red, first 'x'" in capsys.readouterr().err
    assert {row["tool"] for row in Results.read(tmp_path / "sanitize.jsonl").rows} == {"memcheck", "racecheck"}
    assert Results.read(tmp_path / "latency.jsonl").rows == []


def test_the_headline_sets_the_fastest_of_ours_beside_both_yardsticks() -> None:
    def row(provider: str, time: float, **other: object) -> dict:
        case = {"N": 8, "K": 4, "alpha": 2, "structure": "block", "M": 1, "pass": "forward", "level": "op"}
        return {**case, "provider": provider, "milliseconds": time, **other}

    rows = [row("parent", 2.0), row("wide", 4.0), row("fpe/auto", 3.0), row("fpe/triton", 1.0), row("fpe/x", 0.1, M=2)]
    (cells,) = headline(rows).rows
    assert cells == ("8x4", "2", "block", "1", "fpe/triton", "1000.0", "0.500", "0.250")


def test_packed_labels_and_plain_ones_are_checked() -> None:
    found = {check.name: check for check in gate.checks("cpu") if check.family == "partition"}
    packed = [name for name in found if name.endswith("packed")]
    assert len(packed) * 2 == len(found) and {name.removesuffix(" packed") for name in packed} < {*found}
    for op in ("split_matmul", "merge_matmul", "partition_grad"):
        assert gate.compare(found[f"{op} 17x70x90 alpha 3 strided packed"], "bf16", "triton")["status"] == "ok"


@pytest.mark.parametrize(
    "name", ["expanded_mlp 33x70-13-33 alpha 2 merged", "semi_structured_matmul 17x70x88, 2 children"]
)
def test_the_other_families_pass_under_the_interpreter(name: str) -> None:
    (check,) = (check for check in gate.checks("cpu") if check.name == name)
    assert gate.compare(check, "bf16", "triton")["status"] == "ok"
