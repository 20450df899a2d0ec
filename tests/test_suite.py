"""The latency suite: what is timed is the layer's own function, who is wrong gets no time, memory by hand."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from support import ROOT, BadCall, readable_id
from torch import Tensor, nn

import fpe
from fpe.bench import cost_cli, memory, peers, providers, shapes, suite, test_latency, timing
from fpe.bench.cli import cli
from fpe.bench.problems import AbsentError, Case, Problem
from fpe.bench.providers import PROVIDERS, Provider
from fpe.bench.results import Results
from fpe.bench.table import Table
from fpe.kernels.structures import STRUCTURES

SMALL = Case(7, 48, 64, 2, "random", "fp32", (16, 32))
FAST = {"seconds": 0.0, "rounds": (2, 2)}


def problem(structure: str = "random", alpha: int = 2, **sizes: int) -> Problem:
    options = {"m": 7, "n": 48, "k": 64, **sizes}
    return Problem.make(Case(alpha=alpha, structure=structure, dtype="fp32", block=(16, 32), **options), "cpu")


# Problems and providers.


@pytest.mark.parametrize(("structure", "alpha"), [("random", 3), ("2:4", 2), ("block", 2), ("block", 4)])
def test_labels_have_their_structure(structure: str, alpha: int) -> None:
    made = problem(structure, alpha, k=128)
    made.partition.validate()
    assert made.partition.labels.unique().tolist() == list(range(alpha))
    again = problem(structure, alpha, k=128)
    assert torch.equal(made.partition.labels, again.partition.labels) and torch.equal(made.x, again.x)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("bias", [False, True])
def test_every_exact_provider_computes_the_expanded_layer(structure: str, bias: bool) -> None:
    made = problem(structure)
    truth = made.x.double() @ made.wide.double().T
    ran = []
    for provider in PROVIDERS.values():
        if not provider.exact or structure not in provider.structures:
            continue
        try:
            y = provider.build(made, bias)(made.x)
        except (AbsentError, RuntimeError, ValueError):
            continue
        assert torch.allclose(y.double(), truth, atol=1e-5), provider.name
        ran.append(provider.name)
    assert {"wide", "masked", "fpe/auto", "fpe/eager"} <= set(ran)


def fake_blksprs() -> SimpleNamespace:
    """The functions of blksprs that the adapter calls, on dense blocks: ``[batch, rows, columns]`` and its grid."""

    def grid(x: Tensor, block: int) -> Tensor:
        return x.unflatten(1, (-1, block)).unflatten(3, (-1, block)).transpose(2, 3)  # [1, R, C, b, b]

    def layout_of(x: Tensor, block: int) -> Tensor:
        return grid(x, block).ne(0).flatten(3).any(3).int()

    def to_sparse(x: Tensor, layout: Tensor, block: int, layout_cache: dict | None = None) -> Tensor:
        return grid(x, block)[layout.bool()]

    def to_dense(
        v: Tensor, layout: Tensor, block: int, fill_value: float = 0, layout_cache: dict | None = None
    ) -> Tensor:
        tiles = v.new_zeros(*layout.shape, block, block)
        tiles[layout.bool()] = v
        return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def matmul(x, layout_x, y, layout_y, layout_o, block, layout_cache=None):
        return to_sparse(to_dense(x, layout_x, block) @ to_dense(y, layout_y, block), layout_o, block)

    ops = SimpleNamespace(to_sparse=to_sparse, to_dense=to_dense, matmul=matmul)
    return SimpleNamespace(ops=ops, layouting=SimpleNamespace(build_sparsity_layout=layout_of), __spec__=object())


def test_the_blksprs_adapter_hands_over_the_layers_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Problem.make(Case(32, 48, 64, structure="block", dtype="fp32", block=(16, 16)), "cpu")
    with pytest.raises(AbsentError, match="not installed"):
        peers.blksprs(made, False)
    monkeypatch.setitem(sys.modules, "blksprs", fake_blksprs())
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    layer = peers.blksprs(made, False)
    assert int(layer.layout.sum()) == 3 * 4 and torch.allclose(layer(made.x), made.x @ made.wide.T, atol=1e-5)
    with pytest.raises(AbsentError, match="divide 7, 96 and 64"):
        peers.blksprs(Problem.make(Case(7, 48, 64, structure="block", dtype="fp32", block=(16, 16)), "cpu"), False)
    with pytest.raises(AbsentError, match="no bias"):
        peers.blksprs(made, True)


def test_the_parent_is_the_layer_before_its_expansion() -> None:
    made = problem()
    layer = PROVIDERS["parent"].build(made, False)
    assert torch.equal(layer.weight, made.weight)
    children = fpe.kernels.split_matmul(made.x, made.weight, made.partition.labels, 2)
    assert torch.allclose(layer(made.x), children.sum(1), atol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["parent", "wide", "masked", "fpe/eager"])
def test_passes_are_the_gradients_of_autograd(structure: str, name: str) -> None:
    made = problem(structure)
    module = PROVIDERS[name].build(made, False)
    x = made.x.clone().requires_grad_()
    y = module(x)
    dy = made.dy[:, : y.shape[1]]
    dx, dw = torch.autograd.grad(y, [x, *module.parameters()], dy)
    calls = {p: suite.call(made, module, p) for p in suite.PASSES["op"]}
    assert torch.equal(calls["forward"](), y.detach())  # type: ignore[misc]
    for _ in range(2):  # a call can be made again
        assert [torch.equal(a, b) for a, b in zip(calls["dX"](), [dx], strict=True)] == [True]  # type: ignore[misc]
        assert [torch.equal(a, b) for a, b in zip(calls["dW"](), [dw], strict=True)] == [True]  # type: ignore[misc]
        assert [torch.equal(a, b) for a, b in zip(calls["forward+backward"](), [dx, dw], strict=True)] == [True, True]  # type: ignore[misc]
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_mlps_of_all_providers_are_one_network(structure: str) -> None:
    made = problem(structure)
    built = {n: suite._build(made, PROVIDERS[n], "mlp") for n in ("wide", "masked", "fpe/eager", "parent")}
    merged = built["wide"][2].weight.detach()
    for name in ("masked", "fpe/eager"):
        second = built[name][2]
        assert int(second.kept().sum()) == made.weight.numel() == int((merged != 0).sum())
    assert [tuple(m.shape) for m in (built["parent"][0].weight, built["parent"][2].weight)] == [(48, 64), (64, 48)]
    before = built["fpe/eager"][0].wide_weight().clone()
    suite.call(made, built["fpe/eager"], "step")()  # type: ignore[misc]
    after = built["fpe/eager"][0].wide_weight()
    assert not torch.equal(before, after) and torch.equal(before != 0, after != 0)


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
    for name in ("eager", "auto", "triton"):
        layer = suite.successor(problem(structure), PROVIDERS[f"fpe/{name}"])
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


# Timing.


def test_calls_take_turns_and_times_are_theirs() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.01)

    taken = timing.interleaved({"slow": slow, "fast": lambda: order.append("fast")}, "cpu", 0.0, (4, 4))
    assert order[-8:] == ["slow", "fast", "fast", "slow"] * 2
    assert taken["slow"].median >= 10 > 5 > taken["fast"].median and taken["slow"].samples == 4


def test_time_to_spend_sets_the_samples() -> None:
    calls = {"call": lambda: time.sleep(0.005)}
    few, many = (timing.interleaved(calls, "cpu", s, (1, 50))["call"].samples for s in (0.02, 0.2))
    assert 1 <= few < many <= 50


def test_the_device_clock_counts_between_pairs_of_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 4.0, 100.0, 101.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = next(now)

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = test_latency.device_clock()
    assert [clock() for _ in range(4)] == pytest.approx([0.0, 0.004, 0.004, 0.005])


def test_pytest_benchmark_names_every_case(tmp_path: Path) -> None:
    """One case through the plug-in itself: its name, its group and the columns that its JSON carries."""
    out = tmp_path / "out.json"
    chosen = "test_latency[block-M1-384x512-fp32-dX-fpe/eager]"
    command = [sys.executable, "-m", "pytest", f"bench/test_latency.py::{chosen}", "--benchmark-only", "-p", "no:xdist"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of xdist
    done = subprocess.run(
        [*command, f"--benchmark-json={out}"], cwd=ROOT, env=alone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())["benchmarks"]
    assert found["name"] == chosen and found["group"] == "block-M1-384x512-fp32 dX"
    assert found["extra_info"]["provider"] == "fpe/eager" and found["stats"]["rounds"] == 5


# Memory.


def test_memory_is_what_the_formats_promise() -> None:
    made = problem(m=5)
    x, (m, n, k) = made.x, (5, 48, 64)
    parent, ours, masked = (PROVIDERS[name].build(made, False) for name in ("parent", "fpe/eager", "masked"))
    found = {name: memory.columns(layer, x) for name, layer in (("parent", parent), ("ours", ours), ("masked", masked))}
    assert found["parent"]["parameter_bytes"] == found["ours"]["parameter_bytes"] == 4 * n * k
    assert found["masked"]["parameter_bytes"] == 2 * 4 * n * k and found["masked"]["optimizer_bytes"] == 4 * 4 * n * k
    assert found["ours"]["gradient_bytes"] == 4 * n * k and found["ours"]["optimizer_bytes"] == 8 * n * k
    assert found["parent"]["activation_bytes"] == 4 * m * k
    assert found["masked"]["activation_bytes"] == 4 * m * k + 2 * 4 * n * k  # the masked copy of the wide weight
    assert found["parent"]["index_bytes"] == 0 < found["ours"]["index_bytes"] <= n * k
    assert found["ours"]["peak_bytes"] is None  # known on a GPU alone


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
        (["--provider", "magic"], "got magic"),
        (["--column", "speed"], "got 'speed'"),
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


# Results that are appended.


def test_appended_rows_are_whole_and_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = Results.resume(path, "s", {"a": (1, 2)})
    first.append(path, {"x": 1}, {"x": 2})
    again = Results.resume(path, "s", {"a": (1, 2)})
    again.append(path, {"x": 3})
    assert [row["x"] for row in Results.read(path).rows] == [1, 2, 3] == [row["x"] for row in again.rows]
    with pytest.raises(ValueError, match="move it away"):
        Results.resume(path, "s", {"a": (1, 3)})
    with pytest.raises(ValueError, match="expected rows of 't'"):
        Results.resume(path, "t", {"a": (1, 2)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: [*lines, '{"x": 4'], "line 4 is cut"),
        (lambda lines: [*lines, "[1]"], "line 4 is no row"),
        (lambda lines: [json.dumps({**json.loads(lines[0]), "schema": 0}), *lines[1:]], "schema 1, got 0"),
        (lambda lines: ['{"schema": 1}', *lines[1:]], "lacks study"),
        (lambda lines: ["[]"], "schema 1, got none"),
    ],
    ids=["cut", "list", "schema", "header", "no header"],
)
def test_damaged_results_are_named(tmp_path: Path, change, says: str) -> None:
    path = tmp_path / "r.jsonl"
    Results("s", {}, [{"x": 1}, {"x": 2}]).write(path)
    path.write_text("\n".join([*change(path.read_text().splitlines()), ""]))
    for read in (Results.read, lambda p: Results.resume(p, "s", {})):
        with pytest.raises(ValueError, match=r"r\.jsonl") as caught:
            read(path)
        assert says in str(caught.value)
