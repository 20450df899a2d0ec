"""Guards on what no GPU is needed for: bytes moved, machine code, ratios in pairs. No absolute times."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from fpe.bench.families.accesses import OPS
from fpe.bench.lab import traffic
from fpe.bench.latency import providers, suite, timing
from fpe.bench.latency.problems import Case, Problem
from fpe.bench.results import COMMITTED, Results
from fpe.kernels.device import KNOWN

# Bytes.


@pytest.mark.parametrize(("m", "bound"), [(1, 1.02), (16, 1.2)])
@pytest.mark.parametrize("op", OPS)
def test_small_batches_move_little_more_than_they_must(op: str, m: int, bound: float) -> None:
    case = traffic.Case(m, 2048, 1024, structure="block")
    row = traffic.measure(op, case, traffic.layer(case))
    assert 1 <= row["ratio"] <= bound


def test_committed_traffic_of_large_layers_is_within_the_bar() -> None:
    rows = [r for r in Results.read(COMMITTED / "lab/traffic.jsonl").rows if r["M"] <= 64 and r["alpha"] > 1]
    blocks = [row["ratio"] for row in rows if row["block"] != "none"]
    assert len(blocks) >= 18 and max(blocks) <= 1.05
    for m, bar in ((1, 1.02), (16, 1.02), (64, 1.04)):
        labels = [row["ratio"] for row in rows if row["block"] == "none" and row["M"] == m]
        assert len(labels) >= 12 and max(labels) <= bar, m


# Machine code: of today's kernels beside the committed rows.


def test_committed_decode_kernels_keep_their_bars() -> None:
    """Instructions a weight, merge beside split, bytes in flight where two children leave the registers for them."""
    rows = {
        (row["op"], row["alpha"]): row
        for row in Results.read(COMMITTED / "lab/compile.jsonl").rows
        if row["kernel"].startswith("multiply_")
        and row["arch"] == 90
        and row["case"].endswith("bf16-m16")
        and "seeded" not in row["case"]
    }
    for end, bars in (("", {2: 3.4, 4: 6.1, 8: 11.8}), ("_t", {2: 4.0, 4: 6.8, 8: 12.8})):
        for alpha, bar in bars.items():
            split, merge = rows[f"split{end}", alpha], rows[f"merge{end}", alpha]
            assert max(split["instructions_per_weight"], merge["instructions_per_weight"]) <= bar, (end, alpha)
            if (
                split["tile"].split("x")[0] == merge["tile"].split("x")[0]
            ):  # eight children: split_t takes 8 rows at once
                assert merge["instructions_per_weight"] <= 1.15 * split["instructions_per_weight"], (end, alpha)
            assert split["loop_shared"] == merge["loop_shared"] == 0
    assert min(row["in_flight_l2"] for row in rows.values()) >= 40 << 10


def test_labels_of_a_seed_cost_fewer_instructions_than_labels_in_memory() -> None:
    rows = {
        (row["arch"], row["op"], row["alpha"], "seeded" in row["case"]): row["instructions_per_weight"]
        for row in Results.read(COMMITTED / "lab/compile.jsonl").rows
        if row["kernel"].startswith("multiply_") and row["case"].endswith("bf16-m16")
    }
    seeded = [key for key in rows if key[-1]]
    assert {key[:3] for key in seeded} == {
        (arch, op, alpha)
        for arch in KNOWN for op in ("split", "merge", "split_t", "merge_t") for alpha in (2, 4, 8)
    }  # fmt: skip
    assert all(rows[key] < rows[(*key[:3], False)] for key in seeded)


def test_registers_and_instructions_a_byte_have_not_grown(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fpe.bench", "lab", "compile", "--quick", "--arch", "90", "--jobs", "1", "--json"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    committed: dict[tuple, list[dict]] = {}
    for row in Results.read(COMMITTED / "lab/compile.jsonl").rows:
        committed.setdefault(alike(row), []).append(row)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    compared = [(row, before) for row in rows if (before := committed.get(alike(row)))]
    assert len(compared) >= 3, done.stderr
    for row, before in compared:
        assert row["registers"] <= 1.25 * max(r["registers"] for r in before), row["case"]
        assert row["instructions_per_byte"] <= 1.25 * max(r["instructions_per_byte"] for r in before), row["case"]


def alike(row: dict) -> tuple:
    """What two binaries must share to be compared."""
    return tuple(str(row.get(name)) for name in ("kernel", "arch", "op", "block", "dtype", "block_m", "split"))


# Latency, in pairs within one run, by the thread's own clock: what else the machine does is not counted.


@pytest.mark.parametrize(
    ("structure", "yardstick", "bound"), [("random", "masked", 5.0), ("2:4", "masked", 5.0), ("block", "wide", 8.0)]
)
def test_eager_layers_stay_near_their_yardstick(
    structure: str, yardstick: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing.time, "perf_counter", time.thread_time)
    case = Case(64, 768, 1024, structure=structure, dtype="fp32", block=(64, 64))
    rows = suite.measure(
        case, providers.find((yardstick, "fpe/eager")), "cpu", "op", ("forward", "forward+backward"), rounds=(5, 5)
    )
    times = {(row["pass"], row["provider"]): row["low"] for row in rows}
    for name in ("forward", "forward+backward"):
        assert times[name, "fpe/eager"] <= bound * times[name, yardstick], times


# Operations: nothing runs that a pass does not ask for.


class Recorder(TorchDispatchMode):
    """Notes the package's operations as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fpe":
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("structure", "forward", "dx", "dw"),
    [
        ("random", "split_matmul", "merge_matmul", "partition_grad"),
        ("block", "block_matmul", "block_matmul_t", "block_grad"),
    ],
)
def test_a_pass_runs_its_own_operation_alone(structure: str, forward: str, dx: str, dw: str) -> None:
    made = Problem.make(Case(3, 16, 32, structure=structure, dtype="fp32", block=(16, 16)), "cpu")
    module = providers.PROVIDERS["fpe/eager"].build(made, False)
    for name, wanted in (("forward", [forward]), ("dX", [dx]), ("dW", [dw]), ("forward+backward", [forward, dx, dw])):
        call = suite.call(made, module, name)
        with Recorder() as recorder:
            call()  # type: ignore[misc]
        assert sorted(recorder.seen) == sorted(wanted), name
