"""``fpe gpu`` on a device that is none: faults are red rows of their own, and the rest is measured and goes on."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT

from fpe.bench.device.cli import main
from fpe.bench.results import Results

PROGRAM = ROOT / "tests/fake_device.py"

FAULTS: tuple[dict[str, Any], ...] = (
    {"kind": "chain", "launcher": "split_matmul_triton", "dtype": "float32"},
    {"kind": "wrong", "launcher": "partition_grad_triton", "shape": (3, 2, 96)},
    {"kind": "hang", "launcher": "semi_structured_grad_triton", "shape": (5, 2, 96)},
    {"kind": "illegal", "launcher": "block_grad_triton", "shape": (5, 256)},
    {"kind": "crash", "launcher": "semi_structured_matmul_sparse_tensor_core", "shape": (72, 128)},
)
"""The first is no fault: another order of the same sum, which the gate must allow."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the watching process asks: whether there is a GPU and how it is called. What measures starts compiled."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA H200")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(folder: Path, faults: Sequence[dict[str, Any]], *more: str) -> int:
    """``fpe gpu`` whose measuring process has faults."""
    worker = (sys.executable, "-W", "ignore", str(PROGRAM), json.dumps(faults))
    return main(["--output", str(folder), "--rows", str(folder / "rows"), "--jobs", "1", *more], worker)


def rows(folder: Path, step: str) -> list[dict[str, Any]]:
    return Results.read(folder / "rows" / f"{step}.jsonl").rows


@pytest.mark.usefixtures("cuda")
def test_each_fault_is_one_red_row_and_everything_else_is_timed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--only", "latency", "gate", "--commit", "abc")
    assert run(tmp_path, FAULTS, *chosen) == 1
    latency, gate = rows(tmp_path, "latency"), rows(tmp_path, "gate")
    bad = [r for r in latency if r.get("status") in ("wrong", "error")]
    red = {(r["key"], r.get("provider"), r["status"]): r["reason"] for r in bad}
    key = "op forward dX dW forward+backward {} 96 128 2 {} {} bf16".format
    assert set(red) == {
        (key(3, "random", ""), "fpe/triton", "wrong"),
        (key(3, "random", ""), "fpe/auto", "wrong"),  # it runs the same kernel
        (key(5, "2:4", ""), None, "error"),
        (key(5, "block", "64x64"), None, "error"),
        (key(72, "2:4", ""), None, "error"),
    }
    assert len(bad) == len(red)
    said = " ".join(red.values())
    for words in ("times the error allowed", "it hangs", "illegal memory access", "its process died (SIGSEGV)"):
        assert words in said
    assert {r["status"] for r in gate} <= {"ok", "absent"}  # the chain of additions among them
    assert any(r["dtype"] == "fp32" and "split_matmul" in r["check"] and r["status"] == "ok" for r in gate)

    timed = Counter((r["key"], r["provider"]) for r in latency if "milliseconds" in r)
    units = {r["key"] for r in latency}
    for unit in units - {key(5, "2:4", ""), key(5, "block", "64x64"), key(72, "2:4", "")}:
        passes = 2 if unit.startswith("merge") else 3 + ("forward+backward" in unit)
        for who in ("parent", "wide", "fpe/auto", "fpe/triton"):
            missing = unit == key(3, "random", "") and who.startswith("fpe/")
            assert timed[unit, who] == passes - missing, (unit, who)
    two_four = [r for r in latency if r["key"] == key(3, "2:4", "") and "milliseconds" in r]
    assert {"fpe/sparse_tensor_core", "fpe/torch", "fpe/triton"} <= {r["provider"] for r in two_four}
    compared = [r for r in two_four if r["provider"].startswith("fpe/") and r["pass"] != "forward+backward"]
    assert compared and all(r["error"] <= 1 for r in compared)

    # Another run tries again what was red, and nothing else; what is green then takes its place.
    before = {r["key"]: r["run"] for r in latency}
    assert run(tmp_path, (), *chosen) == 0
    again = rows(tmp_path, "latency")
    assert {r["key"] for r in again if r["run"] != before[r["key"]]} == {unit for unit, *_ in red}
    assert not [r for r in again if r.get("status") in ("wrong", "error")]
    assert len(again) == len({(r["key"], r.get("pass", r.get("of_pass")), r["provider"]) for r in again})
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["fpe-gpu.tar.gz", "summary.txt"]
    assert [r["commit"] for r in rows(tmp_path, "runs")] == ["abc", "abc"]
    assert capfd.readouterr().err.count("went wrong") == 1


HERE = """
import sys; sys.path.insert(0, "tests")
import torch; torch.set_num_threads(1)
from fake_device import fake_device, small_plan
"""


def in_a_process(code: str) -> str:
    """Runs code where kernels are compiled, not interpreted; returns what it prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", HERE + code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pool_compiles_what_the_headline_launches() -> None:
    """Each case of a small headline: the launches on the device are those that were listed beforehand."""
    out = in_a_process("""
import json
from pathlib import Path
from fpe.bench import suite
from fpe.bench.device import plan, warm
from fpe.bench.device.steps import Context
from fpe.kernels.device import KNOWN
made = {"device": "NVIDIA H200"}
with small_plan():
    context = Context("cuda", Path(), 0.0, provenance=made, arch=90)
    listed = set(warm.binaries(plan.kernels_of(plan.headline(context)), 90, KNOWN[90]))
    with fake_device() as device:
        for cases, level, passes, names in plan.headline(context):
            for case in cases:
                who = plan.find(("fpe/triton", "fpe/sparse_tensor_core"))
                suite.measure(case, who, "cuda", level, passes, 0.0, (1, 1))
launched = {(name, key) for name, key, _ in device.launched}
print(json.dumps([len(launched), sorted({name for name, key in launched - listed}), sorted({n for n, _ in launched})]))
""")
    count, missing, names = json.loads(out)
    assert missing == [] and count > 20
    families = {"_partition_multiply", "_partition_outer", "_block_multiply", "_block_outer", "multiply", "_outer"}
    assert families | {"multiply_rows", "multiply_columns"} <= set(names)


def test_a_device_that_refuses_says_so() -> None:
    """Shared memory, capture, streams: by Triton's own launch code and the package's launchers."""
    out = in_a_process("""
import json, triton
from fpe import kernels
from fpe.kernels.partition.config import Config
from fpe.kernels.partition.triton import split_matmul_triton
said = {}
labels = (torch.arange(64 * 64).view(64, 64) % 2).byte()
x, w = torch.randn(16, 64), torch.randn(64, 64)
with fake_device(compiled=lambda name: name.endswith("_partition_multiply"), shared=4096) as device:
    packed = kernels.PackedLabels.pack(labels, 2)
    try:
        split_matmul_triton(x.half(), w.half(), packed, 2, config=Config(16, 64, 64, 1, 8, 4, 4))
    except triton.OutOfResources as error:
        said["shared"] = str(error)
with fake_device() as device:
    packed = kernels.PackedLabels.pack(labels, 2)
    z = torch.stack([x, x], 1)
    for graph in range(2):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            kernels.split_matmul(x.half(), w.half(), packed, 2, backend="triton")
            kernels.split_matmul(x.half(), w.half(), labels, 2, backend="triton")
            kernels.merge_matmul(z.half(), w.half(), packed, backend="triton")
            kernels.partition_grad(z.half(), x.half(), packed, backend="triton")
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                said["capture"] = str(error)
    before = len(device.launched)
    for stream in (0, 7):
        with torch.cuda.stream(stream):
            kernels.split_matmul(x.half(), w.half(), packed, 2, backend="triton")
    said["streams"] = [stream for _, _, stream in device.launched[before:]]
print(json.dumps(said))
""")
    said = json.loads(out)
    assert "shared memory, Required: " in said["shared"] and "Hardware limit: 4096" in said["shared"]
    assert "not permitted when stream is capturing" in said["capture"]
    assert set(said["streams"]) == {0, 7}
