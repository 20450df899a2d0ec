"""What is timed on a GPU, on a double of its stream: clocks of a host and of a device that runs what was queued."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fpe.bench.latency import test_latency, timing
from fpe.bench.latency.timing import Timing, flusher, interleaved

CLOCK = 2e6
"""Cycles a millisecond."""


@dataclass
class Stream:
    """One stream of a device, and its host's clock; milliseconds.

    Attributes:
        host: The host's clock.
        free: When the device has done what is queued.
        depth: Kernels that may be queued before the host has to wait.
        queued: When each of those that were queued ends.
        done: What was called, in order.
    """

    host: float = 0.0
    free: float = 0.0
    depth: int = 1000
    queued: list[float] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def launch(self, takes: float, costs: float = 0.01) -> None:
        """Queues a kernel."""
        self.host += costs
        pending = [end for end in self.queued if end > self.host]
        if len(pending) >= self.depth:
            self.host = pending[-self.depth]
        self.free = max(self.free, self.host) + takes
        self.queued = [*pending, self.free]

    def synchronize(self) -> None:
        self.done.append("synchronize")
        self.host = max(self.host, self.free)

    def sleep(self, cycles: int) -> None:
        self.done.append("hold")
        self.launch(cycles / CLOCK)

    def flush(self) -> None:
        self.done.append("flush")
        self.launch(0.1)

    def call(self, kernels: int, takes: float, costs: float = 0.01, waits: bool = False) -> Callable[[], None]:
        """A call of several kernels."""

        def made() -> None:
            self.done.append("call")
            for _ in range(kernels):
                self.launch(takes, costs)
            if waits:
                self.host = max(self.host, self.free)

        return made


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    made = Stream()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            made.done.append("event")
            self.at = max(made.host, made.free)

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(timing, "flusher", lambda device: made.flush)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.host / 1e3)
    return made


def taken(stream: Stream, call: Callable[[], None], rounds: int = 5) -> Timing:
    return interleaved({"call": call}, "cuda", 0.0, (rounds, rounds))["call"]


def test_a_turn_is_a_call_on_an_idle_device_and_one_behind_a_hold(stream: Stream) -> None:
    taken(stream, stream.call(1, 1.0))
    turn = ["flush", "synchronize", "event", "call", "event", "synchronize"]
    turn += ["flush", "hold", "event", "call", "event", "synchronize"]
    assert stream.done[-3 * len(turn) :] == 3 * turn


def test_what_the_host_launches_slowly_is_timed_as_the_device_runs_it(stream: Stream) -> None:
    """Twenty kernels of 5 microseconds, a launch costs 40: the device needs 100, a user without graphs sees 805."""
    found = taken(stream, stream.call(20, 0.005, costs=0.04))
    assert found.median == pytest.approx(0.1)
    assert found.host == pytest.approx(0.8) and found.eager == pytest.approx(0.805)
    assert found.hold == pytest.approx(1.2) and found.exposed == 0
    assert "note" not in found.columns()


def test_large_calls_are_the_same_either_way(stream: Stream) -> None:
    found = taken(stream, stream.call(1, 7.0))
    assert found.median == pytest.approx(7.0) and found.eager == pytest.approx(7.0, abs=0.02)


def test_the_hosts_time_is_not_that_of_a_full_queue(stream: Stream) -> None:
    """Of kernels of 1 ms twelve may be queued: a hundred calls without waiting for the device would each take its 3."""
    stream.depth = 12
    assert taken(stream, stream.call(3, 1.0), rounds=100).host == pytest.approx(0.03)


def test_a_call_that_outlasts_its_hold_says_so(stream: Stream) -> None:
    """One that synchronizes waits for the hold's end, whatever its length."""
    found = taken(stream, stream.call(4, 0.5, waits=True))
    assert found.exposed == found.samples == 5
    assert found.columns()["note"] == "the host outlasted the hold in 5 of 5 samples: an upper bound"


def test_a_slow_turn_of_the_host_is_exposed_alone(stream: Stream) -> None:
    turns = iter(range(1000))

    def call() -> None:
        slow = next(turns) == 11  # two to warm up, two to estimate, then pairs: the held call of the fourth turn
        for _ in range(10):
            stream.launch(0.001, 0.5 if slow else 0.01)

    found = taken(stream, call)
    assert found.exposed == 1 and found.median == pytest.approx(0.01)


def test_calls_take_turns_on_a_device_too(stream: Stream) -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name) or stream.launch(1.0)) for name in ("a", "b")}
    interleaved(calls, "cuda", 0.0, (2, 2))
    assert order[-8:] == ["a", "a", "b", "b", "b", "b", "a", "a"]


def test_cycles_are_those_of_the_second_wait(stream: Stream) -> None:
    assert timing.cycles_per_millisecond() == pytest.approx(CLOCK, rel=0.01)  # a launch of the first is seen
    assert stream.done.count("hold") == 2


# On a CPU, by its clock.


class Wall:
    """The clock of a machine that does nothing else: calls take what they say, milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.done = 0.0, list[str]()
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now / 1e3)
        monkeypatch.setattr(timing, "flusher", lambda device: lambda: self.pass_("flush", 0.5))

    def pass_(self, name: str, takes: float) -> None:
        self.done.append(name)
        self.now += takes

    def call(self, name: str, takes: float) -> Callable[[], None]:
        return lambda: self.pass_(name, takes)


def test_calls_take_turns_and_times_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Wall(monkeypatch)
    calls = {"slow": wall.call("slow", 10.0), "fast": wall.call("fast", 0.1)}
    taken = interleaved(calls, "cpu", 0.0, (4, 4))
    turns = ["slow", "fast", "fast", "slow"] * 2
    assert wall.done[-16:] == [name for turn in turns for name in ("flush", turn)]
    assert {name: taken[name].median for name in calls} == pytest.approx({"slow": 10.0, "fast": 0.1})
    assert taken["slow"].samples == 4 and taken["slow"].eager == taken["slow"].host == taken["slow"].median


def test_time_to_spend_sets_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample and the flush before it take 5 ms."""
    wall = Wall(monkeypatch)

    def samples(seconds: float) -> int:
        return interleaved({"call": wall.call("call", 4.5)}, "cpu", seconds, (2, 50))["call"].samples

    assert [samples(seconds) for seconds in (0.0, 0.0501, 0.2001, 9.0)] == [2, 10, 40, 50]


# The clock of pytest-benchmark.


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


# Flushes.


class Traffic(TorchDispatchMode):
    """Bytes that operations read, and bytes that they write, one entry each."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []
        self.written: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.read.append(sum(t.nbytes for t in args if isinstance(t, Tensor)))
        self.written.append(result.nbytes if isinstance(result, Tensor) else 0)
        return result


def test_a_flush_reads_all_of_its_buffer_and_writes_a_number() -> None:
    flush = flusher("cpu")
    with Traffic() as seen:
        flush()
    assert sum(seen.read) >= timing.FLUSH_CPU and sum(seen.written) <= 8
