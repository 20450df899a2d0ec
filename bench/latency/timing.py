"""How long calls take: side by side in one run, caches cold, medians and 20th to 80th percentiles.

Triton's ``do_bench`` times one call at a time; clocks and temperatures drift between them. Here the calls of a case
take turns, each from a cache that was just filled with something else.

On a GPU a turn makes the call twice. First on an idle device: that gives the time in which the host makes the call, and
the time that a user without CUDA graphs sees. Then behind a kernel that only waits, half as long again as the host
needs: when the wait is over the whole call is queued, so that the time between the events around it is the device's
own. Both end with a synchronization, so that the host never waits for room in a queue while its time is taken.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

Call = Callable[[], object]
FLUSH = 512 << 20
"""Bytes read before a call on a GPU: four times the largest L2."""
FLUSH_CPU = 8 << 20
HOLD = 1.5
"""For how many times the host's time the device is held back."""
SHORTEST_HOLD = 0.02
"""Milliseconds for which it is held at least."""


class Timing(NamedTuple):
    """Milliseconds of a call.

    Attributes:
        median: Of the device's own time, over all samples; on a CPU of the wall clock's.
        low: 20th percentile.
        high: 80th percentile.
        samples: How many.
        host: Median of the time in which the host made the call on an idle device, launches included; on a CPU the
            time itself.
        eager: Median of the time from an idle device to the end of the call's last kernel: what a user without CUDA
            graphs sees. On a CPU the time itself.
        hold: Median of the time for which the device was held back while the host made the call; 0 on a CPU.
        exposed: In how many samples the host took longer than that, so that its time is part of the device's.
    """

    median: float
    low: float
    high: float
    samples: int
    host: float
    eager: float
    hold: float = 0.0
    exposed: int = 0

    def columns(self) -> dict[str, Any]:
        """As a results file has them; a row of which samples are exposed is an upper bound, and says so."""
        columns: dict[str, Any] = {
            "milliseconds": self.median,
            "low": self.low,
            "high": self.high,
            "samples": self.samples,
            "host_milliseconds": self.host,
            "eager_milliseconds": self.eager,
            "hold_milliseconds": self.hold,
            "exposed_samples": self.exposed,
        }
        if self.exposed:
            columns["note"] = f"the host outlasted the hold in {self.exposed} of {self.samples} samples: an upper bound"
        return columns


class Sample(NamedTuple):
    """Milliseconds of one turn of a call; the names are those of :class:`Timing`."""

    taken: float
    host: float
    eager: float
    hold: float = 0.0
    exposed: bool = False


def interleaved(
    calls: Mapping[str, Call], device: str, seconds: float = 1.0, rounds: tuple[int, int] = (5, 100)
) -> dict[str, Timing]:
    """Times calls in turns.

    Args:
        calls: What to time, by name.
        device: ``"cuda"`` (events) or ``"cpu"`` (wall clock).
        seconds: To spend on all of them, roughly.
        rounds: At least and at most so many samples of each.

    Returns:
        A :class:`Timing` by name.
    """
    cuda = device.startswith("cuda")
    flush = flusher(device)
    for call in calls.values():  # compiles kernels, loads modules, fills allocators
        call()
        call()
    if cuda:
        torch.cuda.synchronize()
        cycles = cycles_per_millisecond()

    def sample(call: Call) -> Sample:
        return on_device(call, flush, cycles) if cuda else on_host(call, flush)

    start = time.perf_counter()
    for call in calls.values():
        sample(call)
    once = time.perf_counter() - start
    count = int(min(max(seconds / max(once, 1e-9), rounds[0]), rounds[1]))

    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(count):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(sample(calls[name]))
    return {name: _summary(samples[name]) for name in names}


def flusher(device: str) -> Call:
    """What empties the caches of a device of everything that a call will read.

    It only reads. Memory that is written stays in L2 until something takes its place: the next call would have to write
    it back first, and would be charged for it.
    """
    size = FLUSH if device.startswith("cuda") else FLUSH_CPU
    buffer = torch.zeros(size // 4, device=device)
    least = buffer.new_empty(())
    return lambda: torch.amin(buffer, 0, out=least)


def on_host(call: Call, flush: Call) -> Sample:
    """One turn by the wall clock."""
    flush()
    start = time.perf_counter()
    call()
    taken = 1e3 * (time.perf_counter() - start)
    return Sample(taken, taken, taken)


def on_device(call: Call, flush: Call, cycles: float) -> Sample:
    """One turn on a GPU: on an idle device, then behind a hold.

    Args:
        call: What to time.
        flush: Of :func:`flusher`.
        cycles: Of :func:`cycles_per_millisecond`.
    """
    flush()
    torch.cuda.synchronize()
    eager, host = _between_events(call)
    torch.cuda.synchronize()
    hold = max(HOLD * host, SHORTEST_HOLD)
    flush()
    torch.cuda._sleep(int(hold * cycles))
    held, made = _between_events(call)
    torch.cuda.synchronize()
    return Sample(held[0].elapsed_time(held[1]), host, eager[0].elapsed_time(eager[1]), hold, made > hold)


def _between_events(call: Call) -> tuple[tuple[Any, Any], float]:
    """Makes a call between two events; returns them, and the milliseconds in which the host made it."""
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    start = time.perf_counter()
    call()
    passed = 1e3 * (time.perf_counter() - start)
    ended.record()
    return (begun, ended), passed


def cycles_per_millisecond(cycles: int = 4_000_000) -> float:
    """The clock that ``torch.cuda._sleep`` counts, measured: the second of two waits, as clocks rise in the first."""
    for _ in range(2):
        (begun, ended), _ = _between_events(lambda: torch.cuda._sleep(cycles))
        torch.cuda.synchronize()
    return cycles / begun.elapsed_time(ended)


def _summary(samples: list[Sample]) -> Timing:
    low, median, high = (float(q) for q in np.quantile([s.taken for s in samples], (0.2, 0.5, 0.8)))
    host, eager, hold = (float(np.median([getattr(s, name) for s in samples])) for name in ("host", "eager", "hold"))
    return Timing(median, low, high, len(samples), host, eager, hold, sum(s.exposed for s in samples))
