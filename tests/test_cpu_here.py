"""What `fpe here` measures on a CPU, what is kept of it for this machine, and what is chosen by it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from cpu_cases import Case, needs_numba
from support import assert_as_accurate, seeded
from torch import Tensor

import fpe
from fpe.bench.cli import cli
from fpe.bench.cli.doctor import _devices
from fpe.bench.here import draw, measure
from fpe.bench.results import Results
from fpe.kernels import HOLE, cpu, here, split_matmul
from fpe.layers import MaskedLinear, MergeLinear, SplitLinear, dense_form

FOLDER = here.folder
"""The function itself: while tests run, another stands in its place."""

RATES = {
    "compiled": (1e-10, 3e-10, 1e-9, 2.4e-9, 1e-8),
    "torch": (6e-11, 2e-10, 5e-10, 1.2e-9, 4.8e-9),
    "kept": (1.4e-10, 4e-10, 1.1e-9, 2.5e-9, 1.1e-8),
    "seeded": (2.4e-10, 5e-10, 1.8e-9, 7e-9, 2.8e-8),
    "labels 2": (2e-10, 4e-10, 1.6e-9, 6.4e-9, 2.6e-8),
    "labels 4": (3.2e-10, 8e-10, 3.2e-9, 1.3e-8, 5.2e-8),
    "labels 8": (6.4e-10, 2.4e-9, 9.6e-9, 3.8e-8, 1.5e-7),
}
ROOF = here.CpuRoof(
    here.cpu_name(),
    2,
    torch.__version__,
    copy=10e9,
    read=8e9,
    flops=50e9,
    cache=4 << 20,
    calls={"torch": 5e-6, "kernels": 200e-6},
    rates=RATES,
    beyond=dict.fromkeys(RATES, (1e-10, 5e-11, 0.0)),
)
"""Of a machine that there is not."""
STORED: dict[str, dict[str, Any]] = {"labels": {}, "seeded": {"seeded": True}, "kept": {"density": 0.25}}
LARGE = (1, 4096, 4096, 2, torch.float32)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and nothing remembered."""
    monkeypatch.setattr(here, "folder", lambda: tmp_path)
    for kept in (here._read, here._predicted):
        kept.cache_clear()
    yield tmp_path
    for kept in (here._read, here._predicted):
        kept.cache_clear()


def test_no_test_sees_what_was_measured_on_this_machine() -> None:
    assert here.folder() != FOLDER() and here.roof_here() is None


def test_a_roof_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert FOLDER() == tmp_path / "fixed-parameter-expansion"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FOLDER() == tmp_path / ".cache/fixed-parameter-expansion"


@needs_numba
def test_a_roof_is_kept_for_this_machine(fresh: Path) -> None:
    assert here.write(ROOF).is_relative_to(fresh)
    assert here.roof_here() == ROOF
    for damaged in ("{", json.dumps({**asdict(ROOF), "unknown": 1})):
        here.path_here().write_text(damaged)
        here._read.cache_clear()
        assert here.roof_here() is None


@needs_numba
def test_nothing_wins_unless_a_roof_says_so(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not here.kernel_wins(*LARGE, "twin") and not here.kernel_wins(*LARGE, "wide")
    here.write(ROOF)
    assert here.kernel_wins(*LARGE, "twin") and here.kernel_wins(*LARGE, "wide")
    here.write(replace(ROOF, calls={"torch": 0.0, "kernels": 10.0}))
    assert not here.kernel_wins(*LARGE, "twin")
    here.write(ROOF)
    assert here.roof_here() is not None
    here._read.cache_clear()
    monkeypatch.setattr(here, "numba_installed", lambda: False)
    assert here.roof_here() is None


@needs_numba
@pytest.mark.parametrize(
    "call",
    [
        (1, 64, 64, 2, torch.float32),
        (256, 4096, 4096, 2, torch.float32),
        (0, 4096, 4096, 2, torch.float32),
        (1, 4096, 4096, 2, torch.bfloat16),
        (1, 4096, 4096, 16, torch.float32),
    ],
    ids=["small", "many rows", "no row", "rates unknown", "children unknown"],
)
def test_what_does_not_win(call: tuple[int, int, int, int, torch.dtype], fresh: Path) -> None:
    here.write(replace(ROOF, rates={**ROOF.rates, "labels 8": (0.0,) * 5}))
    assert here.kernel_wins(*LARGE, "twin") and not here.kernel_wins(*call, "twin")


def test_rates_between_those_measured() -> None:
    """Of a layer inside the cache whose work two threads share."""
    weights = 1 << 21

    def kernel(alpha: int, m: int) -> float:
        return ROOF.labels(alpha, m, weights, 1) - ROOF.calls["kernels"]

    def torch_(m: int) -> float:
        return (ROOF.seconds("torch", m, weights, 1) - ROOF.calls["torch"]) / weights

    assert [torch_(m) for m in (4, 512)] == pytest.approx([ROOF.rates["torch"][1], 2 * ROOF.rates["torch"][-1]])
    assert ROOF.rates["torch"][1] < torch_(8) < ROOF.rates["torch"][2]
    assert kernel(4, 1) == pytest.approx(weights * ROOF.rates["labels 4"][0] / 2)
    assert kernel(2, 16) < kernel(3, 16) < kernel(4, 16) < kernel(6, 16) < kernel(8, 16)
    assert kernel(6, 16) == pytest.approx((kernel(4, 16) + kernel(8, 16)) / 2)


def test_one_thread_does_what_is_not_worth_two() -> None:
    few, many = (ROOF.seconds("kept", 1, weights, 1) for weights in (cpu.WORTH, 2 * cpu.WORTH))
    assert few == pytest.approx(many)
    assert few - ROOF.calls["kernels"] == pytest.approx(cpu.WORTH * ROOF.rates["kept"][0])


def test_memory_counts_beyond_the_cache_alone() -> None:
    size = int(ROOF.cache)
    more = {m: ROOF.seconds("torch", m, 1, size + 1) - ROOF.seconds("torch", m, 1, size) for m in (1, 2, 4, 8, 16, 64)}
    assert [more[m] / (size + 1) for m in (1, 4)] == pytest.approx(ROOF.beyond["torch"][:2])
    assert more[1] > more[2] > more[4] > more[8] > more[16] == more[64] == 0


def test_what_is_predicted_of_each_storage() -> None:
    """A layer beyond the cache, of one row: bytes and threads as they are, rates as they were measured."""
    n, k = 8192, 4096
    weights = n * k
    found = {name: here.predict(1, n, k, 2, ROOF, **options) for name, options in STORED.items()}
    call, rates, byte = ROOF.calls["kernels"], ROOF.rates, ROOF.beyond["torch"][0]
    labels = call + weights * rates["labels 2"][0] / 2
    placing = weights * (rates["kept"][0] - rates["compiled"][0]) / 2
    assert found["labels"]["ours"] == pytest.approx(labels + (4 + 1 / 8) * weights * byte)
    making = weights * (rates["seeded"][0] - rates["labels 2"][0]) / 2
    assert found["seeded"]["ours"] == pytest.approx(labels + making + 4 * weights * byte)
    assert found["kept"]["ours"] == pytest.approx(labels + placing + (1 + 1 / 8 + 1.125 / 8) * weights * byte)
    dense = ROOF.calls["torch"] + weights * rates["torch"][0] + 4 * weights * byte
    compiled = call + weights * rates["compiled"][0] / 2 + 4 * weights * byte
    assert found["labels"]["parent"] == pytest.approx(compiled) and compiled < dense
    assert found["labels"]["ours"] < found["labels"]["wide"] < found["labels"]["twin"]
    only = here.predict(1, n, k, 1, ROOF, density=0.5)["ours"]
    assert only == pytest.approx(call + weights * rates["kept"][0] / 2 + (2 + 1.125 / 8) * weights * byte)


@needs_numba
def test_auto_takes_it_where_it_is_predicted_to_win(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    x, w, labels, bias = case.operands()
    answers = []
    for wins in (True, False):
        monkeypatch.setattr("fpe.kernels.dispatch.kernel_wins", lambda *call, wins=wins: wins)
        answers.append(split_matmul(x, w, labels, 2, bias))
    assert torch.equal(answers[0], case.ours()) and torch.equal(answers[1], case.twin(torch.float32))
    assert not torch.equal(*answers)


@needs_numba
@pytest.mark.parametrize("kind", [SplitLinear, MergeLinear, MaskedLinear])
@pytest.mark.parametrize("holes", [False, True], ids=["labels", "kept"])
def test_a_layer_takes_it_where_the_roof_says_so(holes: bool, kind: type, fresh: Path) -> None:
    """It keeps no dense weight then; with gradients, in bfloat16 or where the roof says otherwise it is as ever."""
    table = torch.randint(2 + holes, (64, 48), generator=seeded(), dtype=torch.uint8)
    if kind is MaskedLinear:
        layer, holes = MaskedLinear(table == 0), True
    else:
        layer = kind(fpe.Partition(table.masked_fill(table == 2, HOLE), 2))
    x = torch.randn(3, layer.in_features, generator=seeded(1))
    with torch.no_grad():
        expected = fpe.to_dense(layer)(x)
        truth = fpe.to_dense(layer).double()(x.double())
    free = replace(
        ROOF,
        calls=dict.fromkeys(ROOF.calls, 0.0),
        rates={name: (float(name == "torch"),) * 5 for name in ROOF.rates},
    )

    def keeps_dense(x: Tensor = x, grad: bool = False) -> bool:
        dense_form.forget(layer)
        with torch.set_grad_enabled(grad):
            layer(x)
        return layer in dense_form._WEIGHTS

    assert keeps_dense() and (layer.bitmap is not None) == holes
    here.write(free)
    with torch.no_grad():
        used = layer(x)
    assert_as_accurate(used, expected, truth)
    assert not keeps_dense()
    layer.requires_grad_(False)
    assert not keeps_dense(grad=True) and keeps_dense(x.clone().requires_grad_(), grad=True)
    layer.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert keeps_dense()
    here.write(replace(free, calls={"torch": 0.0, "kernels": 1e6}))
    assert keeps_dense()
    layer.to(torch.bfloat16)
    here.write(free)
    assert keeps_dense(x.bfloat16())


@needs_numba
def test_here_measures_every_provider_and_keeps_nothing_of_a_quick_run(fresh: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["here", "--quick", "--rounds", "2", "--json", "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = {"parent, torch", "parent, compiled", "ours", "ours, blocks", "ours, seeded", "ours, bitmap", "wide"}
    assert {(row["provider"], row["M"]) for row in rows} == {(name, m) for name in names for m in (1, 4)}
    for row in rows:
        assert 0 < row["fastest"] <= row["low"] <= row["milliseconds"] <= row["high"] and row["samples"] >= 2
    sizes = {row["provider"]: row["bytes"] for row in rows}
    assert sizes["wide"] == 2 * sizes["parent, torch"] == 2 * 4 * 256 * 384
    assert sizes["ours"] == sizes["ours, seeded"] + 256 * 384 // 8 == sizes["parent, torch"] + 256 * 384 // 8
    assert sizes["ours, bitmap"] == 256 * 384 * (2 + 1.125 / 8)
    results = Results.read(tmp_path / "out/here.jsonl")
    assert results.rows == [{k: v for k, v in row.items() if k != "study"} for row in rows]
    assert not list(fresh.glob("fixed*")) and here.roof_here() is None
    assert measure.roof_of(results).rates.keys() == {"torch", "compiled", "kept", "seeded", "labels 2"}


@pytest.mark.parametrize(("load", "says"), [(None, ""), (0.6, ""), (3.21, "Other work kept 3.2 threads busy")])
def test_here_says_that_other_work_disturbed_it(load: float | None, says: str) -> None:
    told = draw.disturbed(Results("here", {"load": load}, [], {}))
    assert told.startswith(says) and bool(told) == bool(says)


@needs_numba
@pytest.mark.parametrize("name", ["ours", "parent, compiled", "ours, blocks", "ours, seeded", "ours, bitmap"])
def test_here_times_no_kernel_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = measure.Layer.calls
    monkeypatch.setattr(
        measure.Layer, "calls", lambda self, x: {**right(self, x), name: lambda: right(self, x)[name]() * 1.001}
    )
    with pytest.raises(RuntimeError, match=f"{name} is wrong by"):
        measure.check((2,))


@needs_numba
def test_the_verdict_on_this_machine(fresh: Path) -> None:
    asked = ["verdict", "--gpu", "here", "--shape", "4096x8192", "--json"]
    assert "run `fpe here`" in CliRunner().invoke(cli, asked).output
    assert [found.state for found in _devices() if "roof" in found.name] == ["no"]
    here.write(ROOF)
    assert [found.says for found in _devices() if "roof" in found.name] == ["measured: reads weights at 8.0 GB/s"]
    rows = [json.loads(line) for line in CliRunner().invoke(cli, asked).stdout.splitlines()]
    predicted = here.predict(4, 4096, 8192, 2, ROOF)
    assert [row["M"] for row in rows] == list(here.ROWS)
    assert rows[1]["over_parent"] == pytest.approx(predicted["ours"] / predicted["parent"])
    assert [row["holds"] for row in rows] == [row["over_parent"] <= 1.1 for row in rows]
    assert "no other --dtype" in CliRunner().invoke(cli, [*asked, "--dtype", "bf16"]).output
    assert "2 to 8 children, got 9" in CliRunner().invoke(cli, [*asked, "--alpha", "9"]).output
    text = CliRunner().invoke(cli, asked[:-1], env={"COLUMNS": "80"}).stdout
    assert "float32, predicted" in text and max(map(len, text.splitlines())) <= 80
