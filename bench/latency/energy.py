"""Joules of a call: from the counter that an NVIDIA GPU keeps of all the energy that it has taken.

The counter moves a few times in a tenth of a second: a call is repeated for a second, and time counts from one of its
moves to another. All of the device's power is in it, what it takes when idle too. Calls follow each other without a
pause or a flush: what fits the L2 stays there.
"""

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from .problems import AbsentError
from .timing import Call


class Reading(NamedTuple):
    """What the counter shows.

    Attributes:
        seconds: Of the host's clock, taken with the counter: a host that is interrupted between the two would charge a
            call for more or less than its own time.
        joules: That the device has taken since some time in the past.
    """

    seconds: float
    joules: float


Counter = Callable[[], Reading]
BATCH = 0.02
"""Seconds of calls, roughly, between two readings."""
PATIENCE = 5.0
"""Seconds in which the counter has to move."""


class Energy(NamedTuple):
    """What a call takes.

    Attributes:
        joules: Of one call.
        watts: Mean power of the device meanwhile.
        calls: Over how many of them.
        seconds: In how long.
    """

    joules: float
    watts: float
    calls: int
    seconds: float

    def columns(self) -> dict[str, Any]:
        """As a results file has them; ``energy_milliseconds`` is the time from one call to the next."""
        return {
            "joules": self.joules,
            "watts": self.watts,
            "energy_calls": self.calls,
            "energy_milliseconds": 1e3 * self.seconds / self.calls,
        }


def spent(
    calls: Mapping[str, Call], device: str = "cuda", seconds: float = 1.0, read: Counter | None = None
) -> dict[str, Energy]:
    """Energy of calls, one after the other.

    Args:
        calls: What to repeat, by name.
        device: ``"cuda"``, or ``"cuda:1"``.
        seconds: To repeat each.
        read: The device's counter; NVML's where none is given.

    Raises:
        AbsentError: The device's energy cannot be read; the message says why.
    """
    read = read or nvml_counter(device)
    return {name: _of(call, read, seconds) for name, call in calls.items()}


def nvml_counter(device: str = "cuda") -> Counter:
    """The counter of a device by NVML, of package ``nvidia-ml-py``.

    Raises:
        AbsentError: It is no CUDA device, the package is not installed, or the driver does not tell.
    """
    if torch.device(device).type != "cuda":
        raise AbsentError(f"only a CUDA device counts its energy, got {device!r}")
    if find_spec("pynvml") is None:
        raise AbsentError("nvidia-ml-py is not installed")
    nvml = import_module("pynvml")
    try:
        nvml.nvmlInit()
        # By its UUID: NVML counts devices that CUDA_VISIBLE_DEVICES hides too.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(torch.device(device)).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        raise AbsentError(f"NVML does not tell this device's energy: {error}") from error

    def read() -> Reading:
        joules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        return Reading(time.perf_counter(), joules)

    return read


def _of(call: Call, read: Counter, seconds: float) -> Energy:
    """One call's energy, from a move of the counter to the first one after ``seconds``."""
    count = 0

    def repeat(times: int) -> float:
        nonlocal count
        for _ in range(times):
            call()
        torch.cuda.synchronize()
        count += times
        return time.perf_counter()

    start = repeat(2)
    batch = max(1, round(BATCH / max(repeat(1) - start, 1e-9)))
    begun = _next_move(lambda: repeat(batch), read)
    count = 0
    while repeat(batch) - begun.seconds < seconds:
        pass
    ended = _next_move(lambda: repeat(batch), read)
    taken, joules = ended.seconds - begun.seconds, ended.joules - begun.joules
    return Energy(joules / count, joules / taken, count, taken)


def _next_move(step: Callable[[], object], read: Counter) -> Reading:
    """Repeats a step until the counter moves; returns what it shows then."""
    first = now = read()
    while now.joules == first.joules:
        if now.seconds - first.seconds > PATIENCE:
            raise AbsentError(f"the energy counter did not move in {PATIENCE} seconds")
        step()
        now = read()
    return now
