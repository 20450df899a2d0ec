"""The kernels that Numba compiles for CPUs: against float64 truth, from threads and forks, and without Numba."""

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from support import ROOT, assert_as_accurate, changed_fields, guarded, readable_id, seeded
from torch import Tensor

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


@needs_numba
def test_the_number_of_threads_changes_nothing() -> None:
    before, case = torch.get_num_threads(), Case(n=200)
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(case.ours())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@needs_numba
def test_calls_from_several_threads_at_once() -> None:
    case, barrier = Case(n=200), Barrier(3)
    wanted = case.ours()

    def call() -> Tensor:
        barrier.wait()
        return case.ours()

    with ThreadPoolExecutor(3) as pool:
        for found in [pool.submit(call) for _ in range(3)]:
            assert torch.equal(found.result(), wanted)


def _in_a_fork(answer, x: Tensor, w: Tensor, labels: PackedLabels) -> None:
    answer.send(split_matmul(x, w, labels, 2, backend="cpu").tolist())


@needs_numba
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_that_forked_has_threads_of_its_own() -> None:
    """The child calls nothing else: PyTorch's own threads do not survive a fork."""
    before, (x, w, labels, _) = torch.get_num_threads(), Case(n=200, k=100).operands()
    assert isinstance(labels, PackedLabels)
    w = w.contiguous()
    try:
        torch.set_num_threads(2)
        wanted = split_matmul(x, w, labels, 2, backend="cpu")
        context = multiprocessing.get_context("fork")
        mine, its = context.Pipe()
        child = context.Process(target=_in_a_fork, args=(its, x, w, labels), daemon=True)
        child.start()
        its.close()  # so that a child that dies ends the wait
        assert mine.poll(120), "the child hangs"
        found = mine.recv()
        child.join()
    finally:
        torch.set_num_threads(before)
    assert child.exitcode == 0 and found == wanted.tolist()


def test_an_error_in_a_piece_is_raised() -> None:
    def work(start: int, stop: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cpu.shared_out(work, 64, 1)


@pytest.mark.parametrize(("size", "unit"), [(1, 1), (7, 2), (64, 16), (65, 16)])
def test_every_piece_is_worked_on_once(size: int, unit: int) -> None:
    done: list[int] = []
    cpu.shared_out(lambda start, stop: done.extend(range(start, stop)), size, unit)
    assert sorted(done) == list(range(size))


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


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kept in (here._read, here._predicted):
        kept.cache_clear()
    yield tmp_path
    for kept in (here._read, here._predicted):
        kept.cache_clear()


def test_a_roof_is_kept_for_this_machine(fresh: Path) -> None:
    assert here.roof_here() == here.DEFAULT
    roof = replace(here.DEFAULT, name=here.cpu_name(), measured=True, call=1.0)
    assert here.write(roof).is_relative_to(fresh)
    assert here.roof_here() == roof
    here.path_here().write_text("{")
    here._read.cache_clear()
    assert here.roof_here() == here.DEFAULT
    here.path_here().write_text(json.dumps({**asdict(roof), "unknown": 1}))
    here._read.cache_clear()
    assert here.roof_here() == here.DEFAULT


def test_a_kept_roof_decides(fresh: Path) -> None:
    sizes = (1, 4096, 4096, 2, 4)
    assert here.labels_win(*sizes, "twin") and here.labels_win(*sizes, "wide")
    here.write(replace(here.DEFAULT, call=10.0))
    assert not here.labels_win(*sizes, "twin")


def test_small_layers_and_large_batches_are_not_for_it(fresh: Path) -> None:
    assert not here.labels_win(1, 64, 64, 2, 4, "twin")
    assert not here.labels_win(256, 4096, 4096, 2, 4, "wide")
    assert not here.labels_win(0, 4096, 4096, 2, 4, "twin")


@needs_numba
def test_auto_takes_it_where_it_is_predicted_to_win(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, labels, bias = LABELS.operands()
    answers = []
    for wins in (True, False):
        monkeypatch.setattr("fpe.kernels.dispatch.labels_win", lambda *call, wins=wins: wins)
        answers.append(split_matmul(x, w, labels, 2, bias))
    assert torch.equal(answers[0], LABELS.ours()) and torch.equal(answers[1], LABELS.twin(torch.float32))
    assert not torch.equal(*answers)


def test_rates_between_those_measured() -> None:
    roof = here.DEFAULT
    assert roof.rate("dense", 4) == pytest.approx(roof.rates["dense"][1])
    assert roof.rates["dense"][1] < roof.rate("dense", 8) < roof.rates["dense"][2]
    assert roof.rate("dense", 512) == 2 * roof.rates["dense"][-1]
    assert roof.labels(4, 1) == pytest.approx(roof.rates["labels 4"][0])
    assert roof.labels(2, 16) < roof.labels(3, 16) < roof.labels(4, 16) < roof.labels(6, 16) < roof.labels(8, 16)


def test_memory_counts_beyond_the_cache_alone() -> None:
    roof = here.DEFAULT
    inside, beyond = here.predict(1, 256, 256, 2, roof), here.predict(1, 8192, 4096, 2, roof)
    weights = 256 * 256
    assert inside["parent"] == pytest.approx(weights * roof.rate("dense", 1))
    weights = 8192 * 4096
    assert beyond["parent"] == pytest.approx(weights * roof.rate("dense", 1) + 4 * weights / roof.read)
    assert beyond["ours"] < beyond["wide"] < beyond["twin"]
