"""The kernels that Numba compiles for CPUs: against float64 truth, from threads and forks, and without Numba."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Barrier, get_ident

import pytest
import torch
from click.testing import CliRunner
from support import ROOT, assert_as_accurate, changed_fields, guarded, readable_id, seeded
from torch import Tensor

import fpe
from fpe.bench.cli import cli
from fpe.bench.cli.doctor import _devices
from fpe.bench.here import measure
from fpe.bench.results import Results
from fpe.kernels import (
    HOLE,
    BlockLayout,
    PackedLabels,
    UnsupportedError,
    block_matmul,
    block_matmul_eager,
    block_matmul_t,
    block_matmul_t_eager,
    cpu,
    here,
    merge_matmul,
    merge_matmul_eager,
    split_matmul,
    split_matmul_eager,
)
from fpe.layers import MergeLinear, SplitLinear, dense_form

FOLDER = here.folder
"""The function itself: while tests run, another stands in its place."""
PATIENCE = 60
"""Seconds after which a thread that does not come fails a test; nothing depends on how long one takes."""

needs_numba = pytest.mark.skipif(not cpu.numba_installed(), reason="Numba is not installed")


@dataclass(frozen=True)
class Case:
    """A product with a weight ``[n, k]`` as it is stored; ``turned`` takes its transpose."""

    merge: bool = False
    alpha: int = 2
    m: int = 1
    dtype: torch.dtype = torch.float32
    turned: bool = False
    n: int = 37
    k: int = 300
    plain: bool = False
    activation: str | None = None

    @property
    def id(self) -> str:
        return changed_fields(self) or "default"

    def operands(self) -> tuple[Tensor, Tensor, Tensor | PackedLabels, Tensor]:
        """Activations, weight and labels as the operation takes them, and a bias."""
        table = torch.randint(self.alpha + 1, (self.n, self.k), generator=seeded(1)).to(torch.uint8)
        table[table == self.alpha] = HOLE
        w = guarded(self.n, self.k, seed=2) * (table != HOLE)
        labels: Tensor | PackedLabels = table if self.plain else PackedLabels.pack(table, self.alpha)
        if self.turned:
            w, labels = w.T, labels.T
        n, k = w.shape
        x = torch.randn(*((self.m, self.alpha, k) if self.merge else (self.m, k)), generator=seeded(3)).double()
        bias = torch.randn(*((n,) if self.merge else (self.alpha, n)), generator=seeded(4)).double()
        return x.to(self.dtype), w.to(self.dtype), labels, bias.to(self.dtype)

    def ours(self) -> Tensor:
        x, w, labels, bias = self.operands()
        if self.merge:
            return merge_matmul(x, w, labels, bias, self.activation, backend="cpu")
        return split_matmul(x, w, labels, self.alpha, bias, self.activation, backend="cpu")

    def twin(self, dtype: torch.dtype) -> Tensor:
        x, w, labels, bias = self.operands()
        x, w, bias = (t.to(dtype) for t in (x, w, bias))
        if self.merge:
            return merge_matmul_eager(x, w, labels, bias, self.activation)
        return split_matmul_eager(x, w, labels, self.alpha, bias, self.activation)


CASES = (
    Case(),
    Case(alpha=3, m=5, turned=True),
    Case(merge=True, alpha=8, m=2),
    Case(merge=True, turned=True),
    Case(alpha=4, dtype=torch.bfloat16, activation="gelu"),
    Case(merge=True, m=5, dtype=torch.bfloat16, turned=True),
    Case(m=2, dtype=torch.float16, turned=True),
    Case(merge=True, alpha=5, dtype=torch.float16),
    Case(n=3, k=7),
    Case(n=50, k=2176, activation="relu"),
    Case(plain=True),
    Case(alpha=3, m=5, turned=True, n=1, k=128),
)
LABELS = CASES[0]


@needs_numba
@pytest.mark.parametrize("case", CASES, ids=readable_id)
def test_triad(case: Case) -> None:
    assert_as_accurate(case.ours(), case.twin(case.dtype), case.twin(torch.float64))


@needs_numba
@pytest.mark.parametrize("size", [0, 1, 2], ids=["m", "n", "k"])
def test_nothing_to_multiply(size: int) -> None:
    sizes = [2, 3, 4]
    sizes[size] = 0
    case = Case(m=sizes[0], n=sizes[1], k=sizes[2])
    assert torch.equal(case.ours(), case.twin(torch.float32))


@needs_numba
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_with_its_child(value: float) -> None:
    x, w, labels, _ = LABELS.operands()
    assert isinstance(labels, PackedLabels)
    n, k = (labels.unpack() < 2).nonzero()[77].tolist()
    w[n, k] = value
    y = split_matmul(x, w, labels, 2, backend="cpu")
    expected = split_matmul_eager(x, w, labels, 2)
    assert torch.equal(y.isfinite(), expected.isfinite()) and int((~y.isfinite()).sum()) == 1


@needs_numba
@pytest.mark.parametrize(
    ("shape", "block", "m", "dtype"),
    [
        ((33, 30), (7, 8), 1, torch.float32),
        ((20, 170), (5, 80), 2, torch.float16),
        ((65, 200), (16, 64), 5, torch.float32),
        ((33, 40), (5, 16), 1, torch.bfloat16),
    ],
    ids=str,
)
def test_blocks(shape: tuple[int, int], block: tuple[int, int], m: int, dtype: torch.dtype) -> None:
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    layout = BlockLayout.from_mask(torch.rand(grid, generator=seeded()) > 0.4, shape, block)
    values = torch.randn(layout.values_shape, generator=seeded(1)).to(dtype)
    x, dy = (torch.randn(m, size, generator=seeded(2)).to(dtype) for size in (shape[1], shape[0]))
    for ours, twin, data in (
        (block_matmul, block_matmul_eager, x),
        (block_matmul_t, block_matmul_t_eager, dy),
    ):
        mine = ours(data, values, layout, backend="cpu")
        assert_as_accurate(mine, twin(data, values, layout), twin(data.double(), values.double(), layout))


# Threads and processes


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch takes two, and so do the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_numba
def test_the_number_of_threads_changes_nothing(two_threads: None) -> None:
    case, results = Case(n=200), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(case.ours())
    assert torch.equal(*results)


@needs_numba
def test_calls_from_several_threads_at_once(two_threads: None) -> None:
    case, barrier = Case(n=200), Barrier(3, timeout=PATIENCE)
    wanted = case.ours()

    def call() -> bool:
        barrier.wait()
        return torch.get_num_threads() == 2 and all(torch.equal(case.ours(), wanted) for _ in range(20))

    with ThreadPoolExecutor(3) as pool:
        assert all([pool.submit(call) for _ in range(3)][i].result() for i in range(3))


def test_two_threads_take_pieces(two_threads: None) -> None:
    """Each waits for the other in its first piece, so that one alone would not get past it."""
    done, threads, barrier = [], set(), Barrier(2, timeout=PATIENCE)

    def work(start: int, stop: int) -> None:
        if get_ident() not in threads:
            threads.add(get_ident())
            barrier.wait()
        done.extend(range(start, stop))

    cpu.shared_out(work, 65, 16)
    assert sorted(done) == list(range(65)) and len(threads) == 2


@pytest.mark.parametrize("own", [True, False], ids=["caller", "helper"])
def test_an_error_in_a_piece_is_raised(own: bool, two_threads: None) -> None:
    caller, barrier = get_ident(), Barrier(2, timeout=PATIENCE)

    def work(start: int, stop: int) -> None:
        if start < 2:
            barrier.wait()
            if (get_ident() == caller) == own:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cpu.shared_out(work, 8, 1)


class Pending(Future):
    """What a pool gives that has no thread free."""

    def result(self, timeout: float | None = None) -> None:
        raise AssertionError("the caller waits for a thread that has not begun")


class Pool:
    """A pool that starts nothing, as one that others keep busy, or that refuses, as the interpreter exits."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses

    def submit(self, work: object) -> Future:
        if self.refuses:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        return Pending()


@pytest.mark.parametrize("refuses", [True, False], ids=["refuses", "busy"])
@pytest.mark.parametrize(("size", "unit"), [(2, 1), (7, 2), (64, 16), (65, 16)])
def test_a_caller_gets_done_alone(
    size: int, unit: int, refuses: bool, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_pool", lambda process: Pool(refuses))
    done: list[int] = []
    cpu.shared_out(lambda start, stop: done.extend(range(start, stop)), size, unit)
    assert done == list(range(size))


FORKS = """
import atexit, os, signal, sys, threading
import torch
from fpe.kernels import PackedLabels, split_matmul
torch.set_num_threads(2)
x, w = torch.ones(1, 128), torch.ones(64, 128)
labels = PackedLabels.pack(torch.zeros(64, 128, dtype=torch.uint8), 2)

def right(where):
    good = split_matmul(x, w, labels, 2, backend="cpu").sum().item() == 64 * 128
    print(where, "right" if good else "wrong", flush=True)

right("parent")
child = os.fork()
if not child:
    signal.alarm(60)  # the system ends it, should it hang
    right("child")
    print("threads", len([t for t in threading.enumerate() if t.name.startswith("fpe-cpu")]), flush=True)
    os._exit(0)
print("status", os.waitpid(child, 0)[1], flush=True)
right("parent again")
atexit.register(right, "at exit")
"""


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_forked_children_and_the_end_of_a_process() -> None:
    """A child starts threads of its own; as the interpreter exits no thread starts, and the caller works alone."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS], cwd=ROOT / "tests", capture_output=True, text=True
    )
    said = ["parent right", "child right", "threads 1", "status 0", "parent again right", "at exit right"]
    assert done.stdout.splitlines() == said, done.stderr


# Around the kernels


@needs_numba
def test_gradients_are_those_of_the_twin() -> None:
    x, w, labels, bias = LABELS.operands()
    grads = []
    for backend, dtype in (("cpu", x.dtype), ("eager", x.dtype), ("eager", torch.float64)):
        own = [t.detach().to(dtype).requires_grad_() for t in (x, w, bias)]
        y = split_matmul(own[0], own[1], labels, 2, own[2], backend=backend)
        grads.append(torch.autograd.grad(y.square().sum(), own))
    for ours, twins, truth in zip(*grads, strict=True):
        assert_as_accurate(ours, twins, truth)


@needs_numba
def test_a_compiled_call_is_the_same() -> None:
    x, w, labels, bias = LABELS.operands()
    torch._dynamo.reset()
    call = torch.compile(
        lambda x: split_matmul(x, w, labels, 2, bias, backend="cpu"), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(call(x), LABELS.ours())


@needs_numba
def test_what_it_does_not_take() -> None:
    x, w, labels, _ = LABELS.operands()
    with pytest.raises(UnsupportedError, match="it takes float16, bfloat16 and float32, got"):
        split_matmul(x.double(), w.double(), labels, 2, backend="cpu")
    with pytest.raises(UnsupportedError, match="it takes up to 8 children, got 9"):
        split_matmul(x, w, torch.zeros(w.shape, dtype=torch.uint8), 9, backend="cpu")
    with pytest.raises(UnsupportedError, match="it needs tensors on a CPU, they are on meta"):
        split_matmul(x.to("meta"), w.to("meta"), labels, 2, backend="cpu")


WITHOUT = """
import sys
sys.modules["numba"] = None  # as Python has a module that cannot be imported
import torch
from fpe.kernels import UnsupportedError, split_matmul, split_matmul_eager
x, w, labels = torch.ones(1, 2048), torch.ones(2048, 2048), torch.zeros(2048, 2048, dtype=torch.uint8)
assert torch.equal(split_matmul(x, w, labels, 2), split_matmul_eager(x, w, labels, 2))
try:
    split_matmul(x, w, labels, 2, backend="cpu")
except UnsupportedError as error:
    print(error)
"""


def test_without_numba_the_twin_serves_and_the_backend_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT / "tests", capture_output=True, text=True, check=True
    )
    assert "'cpu' cannot run here: Numba is not installed; pip install 'fixed-parameter-expansion[cpu]'" in done.stdout


# What is chosen, and what is known of the machine


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


@needs_numba
def test_auto_takes_it_where_it_is_predicted_to_win(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, labels, bias = LABELS.operands()
    answers = []
    for wins in (True, False):
        monkeypatch.setattr("fpe.kernels.dispatch.labels_win", lambda *call, wins=wins: wins)
        answers.append(split_matmul(x, w, labels, 2, bias))
    assert torch.equal(answers[0], LABELS.ours()) and torch.equal(answers[1], LABELS.twin(torch.float32))
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


# What is measured on a machine


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
