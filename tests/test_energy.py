"""Joules of a call, with a double of the device's counter and of NVML."""

import sys
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import pytest
import torch

from fpe.bench.latency import energy
from fpe.bench.latency.problems import AbsentError


class Board:
    """A device that draws a constant power, and a counter that moves at its own pace; seconds and joules.

    ``pauses`` of the host stand between the end of its calls and each reading.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, watts: float = 400.0, pace: float = 0.1, pauses: Iterable[float] = ()
    ) -> None:
        self.now, self.queued, self.watts, self.pace = 0.37, 0.0, watts, pace
        self.pauses = iter(pauses)
        monkeypatch.setattr(energy.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def synchronize(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0

    def call(self, seconds: float) -> Callable[[], None]:
        def made() -> None:
            self.queued += seconds

        return made

    def read(self) -> energy.Reading:
        self.now += next(self.pauses, 0.0)
        return energy.Reading(self.now, self.now // self.pace * self.pace * self.watts)


def test_joules_are_power_times_time_for_long_and_short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(monkeypatch)
    calls = {"short": board.call(20e-6), "long": board.call(0.03)}
    found = energy.spent(calls, read=board.read)
    for name, seconds in (("short", 20e-6), ("long", 0.03)):
        assert found[name].joules == pytest.approx(400 * seconds, rel=0.04)
        assert found[name].watts == pytest.approx(400, rel=0.04)
        assert found[name].columns()["energy_milliseconds"] == pytest.approx(1e3 * seconds)
        assert 1 <= found[name].seconds < 1.3
    assert found["short"].calls > 1000 * found["long"].calls


def test_what_was_taken_before_the_counter_moved_is_not_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that moves twice a second: reading it at once would be off by up to half."""
    board = Board(monkeypatch, pace=0.5)
    assert energy.spent({"a": board.call(0.001)}, read=board.read)["a"].joules == pytest.approx(0.4, rel=0.04)


def test_a_host_that_is_interrupted_before_a_reading_counts_that_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end for a quarter of a second: the counter goes on, and so must the clock."""
    board = Board(monkeypatch, pace=0.001, pauses=[0.0, 0.0, 0.0, 0.25])
    found = energy.spent({"a": board.call(0.01)}, read=board.read)["a"]
    assert found.watts == pytest.approx(400, rel=0.004) and found.seconds > 1.25


def test_a_counter_that_stands_still_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(monkeypatch, watts=0.0)
    with pytest.raises(AbsentError, match="did not move in 5"):
        energy.spent({"a": board.call(0.001)}, read=board.read)


class NvmlError(Exception):
    pass


class Nvml:
    """The functions of NVML that are called, of one board; which it knows by its UUID."""

    NVMLError = NvmlError

    def __init__(self, refuses: str = "") -> None:
        self.refuses, self.begun = refuses, False

    def nvmlInit(self) -> None:  # noqa: N802
        self.begun = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert self.begun
        if uuid != "GPU-1234":
            raise NvmlError(f"no device {uuid}")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle"
        if self.refuses:
            raise NvmlError(self.refuses)
        return 5_000_000  # millijoules


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Callable[[Nvml, str], None]:
    def use(nvml: Nvml, uuid: str = "1234") -> None:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(energy, "find_spec", lambda name: object())
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))

    return use


def test_the_counter_is_nvmls_in_joules(board: Callable) -> None:
    board(Nvml())
    before, reading, after = time.perf_counter(), energy.nvml_counter("cuda")(), time.perf_counter()
    assert reading.joules == 5000.0 and before <= reading.seconds <= after


@pytest.mark.parametrize(
    ("nvml", "uuid", "says"),
    [(Nvml("Not Supported"), "1234", "Not Supported"), (Nvml(), "99", "no device GPU-99")],
    ids=["driver", "partition"],
)
def test_a_driver_that_does_not_tell_is_named(nvml: Nvml, uuid: str, says: str, board: Callable) -> None:
    board(nvml, uuid)
    with pytest.raises(AbsentError, match=f"does not tell this device's energy: {says}"):
        energy.spent({})


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AbsentError, match="only a CUDA device counts its energy, got 'cpu'"):
        energy.spent({}, "cpu")
    monkeypatch.setattr(energy, "find_spec", lambda name: None)
    with pytest.raises(AbsentError, match="nvidia-ml-py is not installed"):
        energy.spent({})
