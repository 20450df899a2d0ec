"""What `fpe here` measures on a CPU, what is kept of it for this machine, and what is chosen by it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from cpu_cases import Case, needs_numba
from support import assert_as_accurate, seeded
from torch import Tensor

import fpe
from fpe.bench.cli import cli
from fpe.bench.cli.doctor import _devices
from fpe.bench.here import measure
from fpe.bench.results import Results
from fpe.kernels import here, split_matmul
from fpe.layers import MergeLinear, SplitLinear, dense_form

FOLDER = here.folder
"""The function itself: while tests run, another stands in its place."""

ROOF = here.CpuRoof(
    here.cpu_name(),
    1,
    torch.__version__,
    copy=10e9,
    read=8e9,
    flops=50e9,
    cache=4 << 20,
    call=200e-6,
    rates={
        "compiled": (5e-11, 1.5e-10, 5e-10, 1.2e-9, 4.8e-9),
        "torch": (6e-11, 2e-10, 5e-10, 1.2e-9, 4.8e-9),
        "labels 2": (1e-10, 2e-10, 8e-10, 3.2e-9, 1.3e-8),
        "labels 4": (1.6e-10, 4e-10, 1.6e-9, 6.4e-9, 2.6e-8),
        "labels 8": (3.2e-10, 1.2e-9, 4.8e-9, 1.9e-8, 7.7e-8),
    },
)
"""Of a machine that there is not."""
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
    assert not here.labels_win(*LARGE, "twin") and not here.labels_win(*LARGE, "wide")
    here.write(ROOF)
    assert here.labels_win(*LARGE, "twin") and here.labels_win(*LARGE, "wide")
    here.write(replace(ROOF, call=10.0))
    assert not here.labels_win(*LARGE, "twin")
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
    assert here.labels_win(*LARGE, "twin") and not here.labels_win(*call, "twin")


def test_rates_between_those_measured() -> None:
    assert ROOF.rate("torch", 4) == pytest.approx(ROOF.rates["torch"][1])
    assert ROOF.rates["torch"][1] < ROOF.rate("torch", 8) < ROOF.rates["torch"][2]
    assert ROOF.rate("torch", 512) == 2 * ROOF.rates["torch"][-1]
    assert ROOF.labels(4, 1) == pytest.approx(ROOF.rates["labels 4"][0])
    assert ROOF.labels(2, 16) < ROOF.labels(3, 16) < ROOF.labels(4, 16) < ROOF.labels(6, 16) < ROOF.labels(8, 16)


def test_memory_counts_beyond_the_cache_alone() -> None:
    inside, beyond = here.predict(1, 256, 256, 2, ROOF), here.predict(1, 8192, 4096, 2, ROOF)
    weights = 256 * 256
    assert inside["parent"] == pytest.approx(weights * ROOF.rate("torch", 1))  # less than a call of the compiled one
    weights = 8192 * 4096
    assert beyond["parent"] == pytest.approx(ROOF.call + weights * ROOF.rate("compiled", 1) + 4 * weights / ROOF.read)
    assert beyond["ours"] < beyond["wide"] < beyond["twin"]


@needs_numba
def test_auto_takes_it_where_it_is_predicted_to_win(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    x, w, labels, bias = case.operands()
    answers = []
    for wins in (True, False):
        monkeypatch.setattr("fpe.kernels.dispatch.labels_win", lambda *call, wins=wins: wins)
        answers.append(split_matmul(x, w, labels, 2, bias))
    assert torch.equal(answers[0], case.ours()) and torch.equal(answers[1], case.twin(torch.float32))
    assert not torch.equal(*answers)


@needs_numba
@pytest.mark.parametrize("merge", [False, True], ids=["split", "merge"])
def test_a_layer_takes_it_where_the_roof_says_so(merge: bool, fresh: Path) -> None:
    """It keeps no dense weight then; with gradients, in bfloat16 or where the roof says otherwise it is as ever."""
    partition = fpe.Partition(torch.randint(2, (64, 48), generator=seeded(), dtype=torch.uint8), 2)
    layer = (MergeLinear if merge else SplitLinear)(partition)
    x = torch.randn(3, layer.in_features, generator=seeded(1))
    with torch.no_grad():
        expected = fpe.to_dense(layer)(x)
        truth = fpe.to_dense(layer).double()(x.double())
    free = replace(ROOF, call=0.0, rates={n: (0.0 if "labels" in n else 1.0,) * 5 for n in ROOF.rates})

    def keeps_dense(x: Tensor = x, grad: bool = False) -> bool:
        dense_form.forget(layer)
        with torch.set_grad_enabled(grad):
            layer(x)
        return layer in dense_form._WEIGHTS

    assert keeps_dense()
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
    here.write(replace(free, call=1e6))
    assert keeps_dense()
    layer.to(torch.bfloat16)
    here.write(free)
    assert keeps_dense(x.bfloat16())


@needs_numba
def test_here_measures_every_provider_and_keeps_nothing_of_a_quick_run(fresh: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["here", "--quick", "--rounds", "2", "--json", "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = {"parent, torch", "parent, compiled", "ours", "ours, blocks", "wide"}
    assert {(row["provider"], row["M"]) for row in rows} == {(name, m) for name in names for m in (1, 4)}
    for row in rows:
        assert 0 < row["fastest"] <= row["low"] <= row["milliseconds"] <= row["high"] and row["samples"] >= 2
    sizes = {row["provider"]: row["bytes"] for row in rows}
    assert sizes["wide"] == 2 * sizes["parent, torch"] == 2 * 4 * 256 * 384
    assert sizes["ours"] == sizes["parent, torch"] + 256 * 384 // 8
    results = Results.read(tmp_path / "out/here.jsonl")
    assert results.rows == [{k: v for k, v in row.items() if k != "study"} for row in rows]
    assert not list(fresh.glob("fixed*")) and here.roof_here() is None
    assert measure.roof_of(results).rates.keys() == {"torch", "compiled", "labels 2"}


@needs_numba
@pytest.mark.parametrize("name", ["ours", "parent, compiled", "ours, blocks"])
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
