"""The latency suite: who is wrong gets no time, plans and their commands, and the same cases under pytest-benchmark."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support import ROOT, BadCall, readable_id
from torch import Tensor, nn

import fpe
from fpe.bench.cli import cli
from fpe.bench.cli import costs as cost_cli
from fpe.bench.latency import providers, shapes, suite
from fpe.bench.latency.problems import Case, Problem
from fpe.bench.latency.providers import PROVIDERS, Provider
from fpe.bench.results import Results
from fpe.bench.table import Table
from fpe.kernels.structures import STRUCTURES

SMALL = Case(7, 48, 64, 2, "random", "fp32", (16, 32))
FAST = {"seconds": 0.0, "rounds": (2, 2)}

# Rows.


def test_rows_hold_times_and_the_models_columns() -> None:
    able = providers.find(("parent", "fpe/auto", "fpe/eager", "torch BSR"))
    rows = suite.measure(SMALL, able, "cpu", **FAST)
    absent = [row for row in rows if row.get("status")]
    assert [(r["provider"], r["status"]) for r in absent] == [("torch BSR", "absent")]
    assert "random" in absent[0]["reason"] and "milliseconds" not in absent[0]
    timed = {(r["pass"], r["provider"]): r for r in rows if "milliseconds" in r}
    assert len(timed) == 4 * 3
    for (name, _), row in timed.items():
        assert 0 < row["low"] <= row["milliseconds"] <= row["high"] and row["samples"] == 2
        assert row["flops"] == 2 * 7 * 48 * 64 * (3 if name == "forward+backward" else 1)
    parent = timed["dX", "parent"]
    assert parent["bytes"] == 4 * (48 * 64 + 7 * 48 + 7 * 64)
    assert parent["implementation"] == "parent" and "implementation" not in timed["dX", "fpe/auto"]
    assert "parameter_bytes" in timed["forward+backward", "parent"] and "parameter_bytes" not in parent


class Scaled(nn.Module):
    """A layer that is one per cent off."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(1.01 * weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_a_wrong_provider_gets_no_time() -> None:
    wrong = Provider("off", lambda p, bias: Scaled(p.wide))
    rows = suite.measure(SMALL, [wrong, PROVIDERS["wide"]], "cpu", passes=("forward",), **FAST)
    assert [r.get("status") for r in rows if r["provider"] == "off"] == ["wrong"]
    assert "forward is off by" in rows[0]["reason"]
    assert [r["provider"] for r in rows if "milliseconds" in r] == ["wide"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_successor_runs_by_the_backend_that_its_provider_names(structure: str) -> None:
    made = Problem.make(replace(SMALL, structure=structure), "cpu")
    for name in ("eager", "auto", "triton"):
        layer = suite.successor(made, PROVIDERS[f"fpe/{name}"])
        assert isinstance(layer, fpe.layers.ExpandedLinear) and layer.backend == name


@pytest.mark.parametrize("level", ["op", "merge"])
@pytest.mark.parametrize(("structure", "alpha"), [("random", 3), ("2:4", 2), ("block", 2)])
def test_every_pass_is_checked(structure: str, alpha: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right passes are timed with their error; gradients that are off, or were never written, are red alone."""
    case = Case(7, 48, 64, alpha, structure, "fp32", (16, 32))
    ours = [PROVIDERS[name] for name in ("wide", "masked", "fpe/eager")]
    rows = suite.measure(case, ours, "cpu", level, ("forward", "dX", "dW"), **FAST)
    assert len(rows) == 9 and all(0 < r["error"] <= 1 for r in rows)
    real = torch.autograd.grad
    for change in (lambda t: 1.001 * t, torch.empty_like):
        monkeypatch.setattr(torch.autograd, "grad", lambda *a, _change=change, **k: [_change(t) for t in real(*a, **k)])
        rows = suite.measure(case, ours, "cpu", level, ("forward", "dX", "dW"), **FAST)
        assert {r["of_pass"] for r in rows if r.get("status") == "wrong"} == {"dX", "dW"}
        assert {r["pass"] for r in rows if "milliseconds" in r} == {"forward"}


def test_a_complaint_of_ours_is_an_error_and_a_refusal_is_not() -> None:
    def raises(error: Exception) -> Provider:
        class Refusing(Scaled):
            def forward(self, x: Tensor) -> Tensor:
                raise error

        return Provider("fpe/x", lambda p, bias: Refusing(p.wide))

    for error, status in ((ValueError("a bug"), "error"), (fpe.kernels.UnsupportedError("too small"), "absent")):
        (row,) = suite.measure(SMALL, [raises(error)], "cpu", passes=("forward",), **FAST)
        assert row["status"] == status


class Broken(Scaled):
    """A layer whose backward fails."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad or torch.is_grad_enabled():
            raise KeyError("no such kernel")
        return nn.functional.linear(x, self.weight / 1.01)


def test_who_fails_in_one_pass_is_timed_in_the_others() -> None:
    ours = Provider("fpe/broken", lambda p, bias: Broken(p.wide))
    peer = Provider("peer", lambda p, bias: Broken(p.wide))
    rows = suite.measure(SMALL, [ours, peer, PROVIDERS["wide"]], "cpu", passes=("forward", "dX"), **FAST)
    assert [(r["pass"], r["provider"]) for r in rows if "milliseconds" in r] == [
        ("forward", "fpe/broken"), ("forward", "peer"), ("forward", "wide"), ("dX", "wide"),
    ]  # fmt: skip
    assert [(r["provider"], r["status"], r["of_pass"]) for r in rows if "status" in r] == [
        ("fpe/broken", "error", "dX"), ("peer", "absent", "dX"),
    ]  # fmt: skip
    assert "no such kernel" in rows[3]["reason"]


@pytest.mark.parametrize("name", ["fpe/lost", "peer"])
def test_a_lost_device_ends_the_measurement(name: str) -> None:
    def lose(problem: Problem, bias: bool) -> nn.Module:
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        suite.measure(SMALL, [Provider(name, lose)], "cpu", **FAST)


def test_float32_precision_is_as_the_dtype_says_and_restored() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    for dtype, wanted in (("tf32", True), ("fp32", False)):
        with suite.float32_as(dtype):
            assert torch.backends.cuda.matmul.allow_tf32 is wanted
        assert torch.backends.cuda.matmul.allow_tf32 is before


# Plans and shapes.


def test_plans_leave_out_what_cannot_be() -> None:
    cases = list(suite.Plan(((8, 16), (8, 18)), (1, 2), alphas=(2, 4)).cases())
    assert {(c.k, c.alpha) for c in cases if c.structure == "2:4"} == {(16, 2)}
    assert len(cases) == 2 * (4 * len(STRUCTURES) - 3) and len(set(cases)) == len(cases)


def test_shape_sets_are_the_published_ones() -> None:
    assert len(shapes.SETS["llm"]) == len(set(shapes.SETS["llm"])) == 31
    assert set(shapes.SETS["headline"]) <= set(shapes.SETS["llm"])
    assert shapes.find("12x34") == ((12, 34),) and shapes.ROWS[0] == 1 and shapes.ROWS[-1] == 16384


BAD = (
    BadCall("provider", lambda: providers.find(("parent", "magic")), ValueError, ("fpe/auto", "magic")),
    BadCall("shape", lambda: shapes.find("12by3"), ValueError, ("4096x14336", "llm", "'12by3'")),
    BadCall("zero", lambda: shapes.find("0x3"), ValueError, ("'0x3'",)),
    BadCall("level", lambda: suite.measure(SMALL, [], "cpu", "network"), ValueError, ("mlp", "'network'")),
    BadCall("pass", lambda: suite.measure(SMALL, [], "cpu", "op", ("up",)), ValueError, ("dX", "'up'")),
)


@pytest.mark.parametrize("bad", BAD, ids=readable_id)
def test_bad_calls(bad: BadCall) -> None:
    bad.check()


def test_the_latency_command_times_and_writes_rows(tmp_path: Path) -> None:
    arguments = ["latency", "--shape", "8x64", "--m", "3", "--structure", "random", "--seconds", "0"]
    arguments += [
        "--provider",
        "parent",
        "--provider",
        "fpe/eager",
        "--provider",
        "torch BSR",
        "--output",
        str(tmp_path),
    ]
    columns = ["--column", "over parent", "--column", "GB/s"]
    done = CliRunner().invoke(cli, [*arguments, *columns], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "torch BSR is absent: it has no structure 'random'" in done.output
    rows = Results.read(tmp_path / "latency.jsonl").rows
    timed = {(row["pass"], row["provider"]): row for row in rows if "milliseconds" in row}
    assert len(timed) == 4 * 2 and all(row["dtype"] == "fp32" for row in timed.values())
    table = cost_cli.latency_table(Results.read(tmp_path / "latency.jsonl"), ("over parent", "GB/s"))
    ours, parent = timed["dX", "fpe/eager"], timed["dX", "parent"]
    (cells,) = (row for row in table.rows if row[3:5] == ("dX", "fpe/eager"))
    assert cells[5] == f"{ours['milliseconds'] / parent['milliseconds']:.3f}"
    assert cells[6] == f"{ours['bytes'] / ours['milliseconds'] / 1e6:.4g}"
    printed = CliRunner().invoke(cli, [*arguments, "--json"])
    assert len([json.loads(line) for line in printed.stdout.splitlines()]) == len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4by5"], "got '4by5'"),
        (["--provider", "magic"], "'magic' is not one of"),
        (["--column", "speed"], "'speed' is not one of"),
        (["--pass", "up"], "got 'up'"),
        (["--level", "step", "--pass", "dX"], "got 'dX'"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_latency_names_what_it_cannot_do(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cli, ["latency", *arguments])
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output


def test_a_table_prints_without_any_library() -> None:
    text = str(Table("T", ("a", "bb"), [("long", "1"), ("x", "22")]))
    assert text.splitlines() == ["T", "a     bb", "long   1", "x     22"]


# Under pytest-benchmark.


def test_pytest_benchmark_names_every_case(tmp_path: Path) -> None:
    """One case through the plug-in itself: its name, its group and the columns that its JSON carries."""
    out = tmp_path / "out.json"
    chosen = "test_latency[block-M1-384x512-fp32-dX-fpe/eager]"
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"bench/latency/test_latency.py::{chosen}",
        "--benchmark-only",
        "-p",
        "no:xdist",
    ]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of xdist
    done = subprocess.run(
        [*command, f"--benchmark-json={out}"], cwd=ROOT, env=alone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())["benchmarks"]
    assert found["name"] == chosen and found["group"] == "block-M1-384x512-fp32 dX"
    assert found["extra_info"]["provider"] == "fpe/eager" and found["stats"]["rounds"] == 5
