"""``fpe gpu`` on a device that is none: faults are red rows of their own, and the rest is measured and goes on."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT

from fpe.bench.costs.verdict import Layer
from fpe.bench.gpu import archive
from fpe.bench.gpu.cli import main
from fpe.bench.report import costs
from fpe.bench.results import Results
from fpe.kernels.roofs import Roof
from fpe.kernels.structures import STRUCTURES

PROGRAM = ROOT / "tests/fake_run.py"

FAULTS: tuple[dict[str, Any], ...] = (
    {"kind": "chain", "launcher": "split_matmul_triton", "dtype": "float32"},
    {"kind": "rounded", "launcher": "merge_matmul_triton", "dtype": "float32", "shape": (17, 2, 90)},
    {"kind": "wrong", "launcher": "partition_grad_triton", "shape": (3, 2, 96)},
    {"kind": "hang", "launcher": "semi_structured_grad_triton", "shape": (5, 2, 96)},
    {"kind": "illegal", "launcher": "block_grad_triton", "shape": (5, 256)},
    {"kind": "crash", "launcher": "semi_structured_matmul_sparse_tensor_core", "shape": (72, 128)},
)
"""The first is no fault: another order of the same sum, which the gate must allow."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the watching process asks: whether there is a GPU and how it is called."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA H200")


def run(folder: Path, faults: Sequence[dict[str, Any]], *more: str, plan: str = "small") -> int:
    """``fpe gpu`` whose measuring process has faults, and compiles its kernels."""
    program = (sys.executable, "-W", "ignore", str(PROGRAM), json.dumps(faults), plan)
    worker = ("env", "TRITON_INTERPRET=0", "OMP_NUM_THREADS=1", *program)
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
    off = {(r["check"], r["dtype"], r["backend"], r["status"]) for r in gate if r["status"] not in ("ok", "absent")}
    assert off == {("merge_matmul 17x70x90 alpha 2", "fp32", who, "wrong") for who in ("triton", "auto")}
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

    # Another machine goes on with the archive: it tries again what was red, and nothing else; what is green then takes
    # its place.
    before, other = {r["key"]: r["run"] for r in latency}, tmp_path / "other"
    assert run(other, (), *chosen, "--resume", str(tmp_path / archive.NAME)) == 0
    again = rows(other, "latency")
    assert {r["key"] for r in again if r["run"] != before[r["key"]]} == {unit for unit, *_ in red}
    assert not [r for r in again + rows(other, "gate") if r.get("status") in ("wrong", "error")]
    assert len(again) == len({(r["key"], r.get("pass", r.get("of_pass")), r["provider"]) for r in again})
    assert sorted(p.name for p in other.iterdir() if p.is_file()) == [archive.NAME, "summary.txt"]
    assert [r["commit"] for r in rows(other, "runs")] == ["abc", "abc"]
    assert capfd.readouterr().err.count("went wrong") == 1


HERE = """
import sys; sys.path.insert(0, "tests")
import torch; torch.set_num_threads(1)
from fake_device import fake_device
from fake_run import small_plan
"""


def in_a_process(code: str) -> str:
    """Runs code where kernels are compiled, not interpreted; returns what it prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", HERE + code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


WHOLE = """
from pathlib import Path
from test_fake_device import run
torch.cuda.is_available, torch.cuda.get_device_name = (lambda: True), (lambda *a: "NVIDIA H200")
sys.exit(run(Path(sys.argv[1]), (), plan="whole"))
"""
UNITS = {
    "compile": 1,
    "latency": 18,
    "roof": 1,
    "decode": 3,
    "training": 9,
    "energy": 2,
    "compile-gate": 4,
    "gate": 16,
    "neighbours": 2,
    "tune": 2,
    "traffic": 1,
    "sanitize": 2,
    "sweep": 53,
}
"""Of the whole plan on the fake device, by step."""


def kept(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows so far, by step."""
    return {path.stem: Results.read(path, cut=True).rows for path in (folder / "rows").glob("*.jsonl")}


def wait_for(what: Callable[[], object], seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def processes_of(folder: Path) -> list[str]:
    """Command lines that name a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(process.read_text())
    return [line for line in found if str(folder) in line]


@pytest.mark.usefixtures("cuda")
def test_a_killed_run_goes_on_and_every_step_brings_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", HERE + WHOLE, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as first:
        wait_for(lambda: len(kept(tmp_path).get("latency", ())) > 100)
        first.kill()  # what watches: no line of it runs any more
    wait_for(lambda: not processes_of(tmp_path))  # what measures is gone with it
    before = kept(tmp_path)
    assert set(before) == {"runs", "compile", "latency"} and len(before["runs"]) == 1

    assert run(tmp_path, (), plan="whole") == 0
    found = kept(tmp_path)
    assert {step: len({row["key"] for row in found[step]}) for step in UNITS} == UNITS
    for step, rows in before.items():
        assert found[step][: len(rows)] == rows
        assert not {row["key"] for row in rows} & {row["key"] for row in found[step][len(rows) :]}
    assert 100 < len(before["latency"]) < len(found["latency"])
    check_each_step(found)
    assert Roof.read(tmp_path / "rows/roof.json").arch == 90
    tables = {f"{family}_nvidia_h200.json" for family in ("partition", "block")}
    assert {*archive.read(tmp_path / archive.NAME)} == {*(f"{name}.jsonl" for name in found), "roof.json", *tables}

    archive.merge(tmp_path / archive.NAME, tmp_path / "results")
    monkeypatch.setattr(costs, "LAYER", Layer(96, 128))
    drawn = costs.measured(tmp_path / "results")
    assert drawn is not None and "; measured on NVIDIA H200 at commit " in costs.verdict_summary(drawn).title
    energy = costs.energy_table(drawn)
    assert energy is not None and [row[:5] for row in energy.rows] == [
        ("96x128", structure, "2", "bf16", "1") for structure in ("random", "block")
    ]


def check_each_step(found: dict[str, list[dict[str, Any]]]) -> None:
    """What the rows of each step hold."""

    def timed(step: str, *names: str) -> set[tuple[Any, ...]]:
        return {tuple(row[name] for name in names) for row in found[step] if row.get("milliseconds", 0) > 0}

    everyone = ("random", "2:4", "block")
    assert {(row["kernel"], row["status"]) for row in found["compile"]} == {
        (name, "ok") for name in ("multiply_rows", "multiply_columns", "_partition_outer")
    }
    passes = ("forward", "dX", "dW", "forward+backward")
    who = ("parent", "wide", "fpe/auto", "fpe/triton")
    assert timed("latency", "structure", "pass", "provider") >= {
        (s, p, w) for s in everyone for p in passes for w in who
    }
    (roof,) = found["roof"]
    assert set(roof["flops"]) == {"bf16", "fp16", "tf32", "fp32"} and min(roof["flops"].values()) > 0
    assert roof["bandwidth"] > 0 and roof["launch_seconds"] > 0
    seeds = {("seeded", "parent"), ("seeded", "fpe/triton")}
    assert timed("decode", "structure", "provider") == {(s, w) for s in ("random", "block") for w in who} | seeds
    levels = ("layer", "mlp", "step")
    assert timed("training", "level", "structure", "provider") >= {
        (level, s, w) for level in levels for s in ("random", "block") for w in who
    }
    assert all("peak_bytes" in row for row in found["training"] if row.get("pass") == "step")
    assert {(row["structure"], row["provider"]) for row in found["energy"]} == {
        (s, w) for s in ("random", "block") for w in who[:3]
    }
    assert all(row["joules"] > 0 and row["watts"] == pytest.approx(400, rel=0.001) for row in found["energy"])
    assert {row["dtype"] for row in found["compile-gate"] if row["binaries"] > 0} == {"bf16", "fp16", "tf32", "fp32"}
    assert {row["status"] for row in found["gate"]} == {"ok"}
    neighbours = found["neighbours"]
    assert Counter(row["family"] for row in neighbours if row["over_best"] >= 1) == {"partition": 6, "block": 6}
    assert Counter(row["family"] for row in neighbours if row["chosen"]) == {"partition": 1, "block": 1}
    assert [(row["family"], row["tried"], row["skipped"]) for row in found["tune"]] == [
        ("partition", 2, {}), ("block", 2, {}),
    ]  # fmt: skip
    assert {(row["status"], row["reason"]) for row in found["traffic"]} == {("absent", "ncu is not installed")}
    assert [(row["tool"], row["status"], row["reason"]) for row in found["sanitize"]] == [
        (tool, "absent", "compute-sanitizer is not installed") for tool in ("memcheck", "racecheck")
    ]
    assert {dtype for (dtype,) in timed("sweep", "dtype")} == {"bf16", "fp16", "tf32", "fp32"}
    assert timed("sweep", "alpha", "structure") == {
        (2, "random"),
        (2, "2:4"),
        (2, "block"),
        (8, "random"),
        (8, "block"),
    }


def test_the_pool_compiles_what_the_headline_launches() -> None:
    """Each case of a small headline, and of decoding: the launches on the device are those that were listed before."""
    out = in_a_process("""
import json
from pathlib import Path
from fpe.bench.latency import suite
from fpe.bench.gpu import plan, warm
from fpe.bench.gpu.steps import Context
from fpe.kernels.device import KNOWN
made = {"device": "NVIDIA H200"}
with small_plan():
    context = Context("cuda", Path(), 0.0, provenance=made, arch=90)
    parts = plan.headline(context) + plan.decode(context)
    listed = set(warm.binaries(plan.kernels_of(parts), 90, KNOWN[90]))
    with fake_device() as device:
        for cases, level, passes, names in parts:
            for case in cases:
                who = plan.find(("fpe/triton", "fpe/sparse_tensor_core"))
                suite.measure(case, who, "cuda", level, passes, 0.0, (1, 1))
launched = {(name, key) for name, key, _ in device.launched}
structures = {case.structure for cases, *_ in parts for case in cases}
unlisted = sorted({name for name, key in launched - listed})
print(json.dumps([sorted(structures), len(launched), unlisted, sorted({name for name, _ in launched})]))
""")
    structures, count, missing, names = json.loads(out)
    assert missing == [] and count > 20 and structures == sorted(STRUCTURES)
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


def test_the_launch_finds_what_the_pool_has_compiled(tmp_path: Path) -> None:
    """Two processes compile; the launches on the device then add nothing to Triton's cache, whatever a label's seed."""
    out = in_a_process(f"""
import json, os
from dataclasses import replace
from pathlib import Path
os.environ["TRITON_CACHE_DIR"] = {str(tmp_path)!r}
from fpe import kernels
from fpe.bench.families import partition
from fpe.bench.gpu import warm

def files():
    return sorted(str(path) for path in Path({str(tmp_path)!r}).rglob("*") if path.is_file())

todo = [partition.Case(op, "bf16", 3, 2, shape=(96, 128)) for op in ("split", "merge_t", "grad")]
todo += [replace(case, seeded=True) for case in todo]
rows = warm.compile_all(todo, 90, jobs=2)
before = files()
with fake_device(compiled=lambda name: True) as device:
    labels = (torch.arange(96 * 128).view(96, 128) % 2).byte()
    packed = kernels.PackedLabels.pack(labels, 2)
    x, w, dy = (torch.randn(size).bfloat16() for size in ((3, 128), (96, 128), (3, 2, 96)))
    made = [kernels.SeededLabels.of(seed, (96, 128), 2) for seed in (7, 33)]  # of 33 kernels get a multiple of 16
    for own in (packed, *made):
        kernels.split_matmul(x, w, own, 2, backend="triton")
        kernels.merge_matmul(dy, w.T, own.T, backend="triton")
        kernels.partition_grad(dy, x, own, backend="triton")
    launched = [name for name, _, _ in device.launched]
print(json.dumps([rows, launched, len(before), sorted({{*files()}} - {{*before}})]))
""")
    rows, launched, before, after = json.loads(out)
    assert [row["status"] for row in rows] == ["ok"] * 6  # of labels in bits, and of a seed
    kernels = {"_partition_outer", "multiply_columns", "multiply_rows"}
    assert Counter(row["kernel"] for row in rows) == dict.fromkeys(kernels, 2)
    assert Counter(launched) == dict.fromkeys(kernels, 2)  # one for all seeds
    assert before > 9 and not after


def test_a_candidate_without_room_is_skipped_and_the_others_are_tuned() -> None:
    """Shared memory is short by what the compiler says beforehand, and by what the launch says."""
    out = in_a_process("""
import json
from dataclasses import replace
from fake_run import InThisProcess
from fpe.bench.gpu import ahead, tune
from fpe.bench.gpu.tune_jobs import PartitionJob
from fpe.kernels.device import KNOWN
from unittest.mock import patch
job, found = PartitionJob(op="split_matmul", transposed=False, m=128, shape=(128, 128)), []
small = replace(KNOWN[90], shared=40_000)
with patch.object(ahead, "ProcessPoolExecutor", InThisProcess):
    for workers in (0, 1):
        with fake_device(compiled=lambda name: name.endswith("_partition_multiply"), shared=small.shared):
            entry, line = tune.tune(job, KNOWN[90], lambda call: 1.0, "cuda", 4, ahead.Ahead(small, workers))
            found.append([entry["tried"], entry["skipped"]])
print(json.dumps(found))
""")
    (tried, by_launch), (again, by_compiler) = json.loads(out)
    assert tried == again > 0 and tried + sum(by_launch.values()) == again + sum(by_compiler.values()) == 4
    assert set(by_launch) == {"it does not run: OutOfResources"}
    assert by_compiler and all("bytes of shared memory of 40000" in reason for reason in by_compiler)
