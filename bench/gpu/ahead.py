"""Compiles a tuner's candidates ahead of their launches, in processes of their own: the device waits for no compiler.

The launchers run on meta tensors while their launches are caught, as in ``fpe lab compile``. Binaries go to Triton's
cache, where the launch on the device finds them. What a compiler refuses, or what needs more shared memory than the
device has, is known before anything is launched.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import get_context
from typing import Any

import torch

from fpe.kernels.device import Device

Compile = Callable[[Any, Any, Device, bool], str]


def compile_candidate(job: Any, config: Any, device: Device, tf32: bool) -> str:
    """Compiles one candidate.

    Args:
        job: A job of the tuner.
        config: Its candidate.
        device: To compile for.
        tf32: Whether PyTorch's float32 matmuls may use TF32.

    Returns:
        Why it cannot run, in words; nothing where it can, and its binary is in Triton's cache.
    """
    from ..lab.compile import catching

    torch.backends.cuda.matmul.allow_tf32 = tf32
    launch, _, _ = job.setup("meta")
    try:
        with catching(device.arch, lambda kernel, key: False) as caught:
            launch(config=config)
    except Exception as error:  # a compiler's: whatever it is, this candidate is of no use
        return f"it does not compile: {type(error).__name__}"
    need = max(compiled.metadata.shared for compiled, _ in caught)
    return f"it needs {need} bytes of shared memory of {device.shared}" if need > device.shared else ""


class Ahead(AbstractContextManager):
    """A pool of compilers, and what they found.

    Args:
        device: To compile for.
        workers: Processes; one a core when none is given; with 0 nothing is compiled ahead, and everything may run.
        compile: What a process does.
    """

    def __init__(self, device: Device, workers: int | None = None, compile: Compile = compile_candidate) -> None:
        self._device, self._compile = device, compile
        self._workers = os.cpu_count() or 1 if workers is None else workers
        self._pool = self._fresh()
        self._found: dict[tuple[Any, Any], Future[str]] = {}

    def _fresh(self) -> ProcessPoolExecutor | None:
        return ProcessPoolExecutor(self._workers, mp_context=get_context("spawn")) if self._workers else None

    def begin(self, job: Any, configs: Iterable[Any]) -> None:
        """Has candidates compiled that are not yet; returns at once."""
        for config in configs if self._pool else ():
            if (job, config) not in self._found:
                self._found[job, config] = self._submit(job, config)

    def _submit(self, job: Any, config: Any) -> Future[str]:
        assert self._pool is not None
        tf32 = torch.backends.cuda.matmul.allow_tf32
        try:
            return self._pool.submit(self._compile, job, config, self._device, tf32)
        except BrokenExecutor as error:  # a compiler has died since: whoever asks for this candidate sees to it
            dead: Future[str] = Future()
            dead.set_exception(error)
            return dead

    def why_not(self, job: Any, config: Any) -> str:
        """Why a candidate cannot run, in words; nothing where it can. Waits until it is compiled."""
        if self._pool is None:
            return ""
        self.begin(job, [config])
        try:
            return self._found[job, config].result()
        except BrokenExecutor:
            return self._alone(job, config)

    def _alone(self, job: Any, config: Any) -> str:
        """Compiles one candidate in a new pool: a compiler's death ends its whole pool, whichever candidate it was."""
        kept = {key: found for key, found in self._found.items() if found.done() and not found.exception()}
        lost = [key for key in self._found if key not in kept and key != (job, config)]
        self._pool = self._fresh()
        answer = self._submit(job, config)
        try:
            answer.result()
        except BrokenExecutor:
            answer, self._pool = Future(), self._fresh()
            answer.set_result("its compiler died")
        self._found = kept | {(job, config): answer} | {key: self._submit(*key) for key in lost}
        return answer.result()

    def __exit__(self, *error: object) -> None:
        """Drops what is not begun yet."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
