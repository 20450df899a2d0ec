"""The CPU kernels from several threads, in forked children and at the end of a process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier, get_ident

import pytest
import torch
from cpu_cases import Case, needs_numba
from support import ROOT

from fpe.kernels import cpu

PATIENCE = 60
"""Seconds after which a thread that does not come fails a test; nothing depends on how long one takes."""


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch takes two, and so do the kernels, however little there is to do."""
    monkeypatch.setattr(cpu, "WORTH", 1)
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

    cpu.shared_out(work, 65, 16, 2)
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
        cpu.shared_out(work, 8, 1, 2)


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


def test_little_work_wakes_no_thread(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "WORTH", 100)
    assert [cpu.threads_for(products) for products in (0, 99, 199, 200, 10**9)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("refuses", [True, False], ids=["refuses", "busy"])
@pytest.mark.parametrize(("size", "unit"), [(2, 1), (7, 2), (64, 16), (65, 16)])
def test_a_caller_gets_done_alone(
    size: int, unit: int, refuses: bool, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_pool", lambda process: Pool(refuses))
    done: list[int] = []
    cpu.shared_out(lambda start, stop: done.extend(range(start, stop)), size, unit, 2)
    assert done == list(range(size))


FORKS = """
import atexit, os, signal, sys, threading
import torch
from fpe.kernels import PackedLabels, cpu, split_matmul
torch.set_num_threads(2)
cpu.WORTH = 1  # two threads for next to nothing
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
