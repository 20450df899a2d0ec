"""Joules of a call, with a double of the device's counter and of NVML."""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from fpe.bench.latency import energy
from fpe.bench.latency.problems import AbsentError


class Board:
    """A device that draws a constant power, and a counter that moves at its own pace; seconds and joules."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, watts: float = 400.0, pace: float = 0.1) -> None:
        self.now, self.queued, self.watts, self.pace = 0.37, 0.0, watts, pace
        monkeypatch.setattr(energy.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def synchronize(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0

    def call(self, seconds: float) -> Callable[[], None]:
        def made() -> None:
            self.queued += seconds

        return made

    def read(self) -> float:
        return self.now // self.pace * self.pace * self.watts


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
    assert energy.nvml_counter("cuda")() == 5000.0


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
