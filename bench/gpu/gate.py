"""The correctness gate: every operation and layer on the device, against float64 truth.

Products are held to the bound that ``accuracy.py`` derives from their arithmetic; what is no single product (the fused
MLP) may err twice as much as PyTorch in the same dtype. Memory that ``torch.empty`` hands out holds NaN meanwhile, so
that an element which no program writes is seen; every call is made twice and must give the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from fpe.kernels import UnsupportedError

from .. import accuracy
from ..families.check import Check
from ..latency.problems import DTYPES
from ..latency.suite import float32_as
from ..latency.truth import poisoned
from .lost import raise_if_lost


def compare(check: Check, dtype: str, backend: str, device: str = "cpu") -> dict[str, Any]:
    """Runs a check on a device and judges it.

    Returns:
        A row: ``check``, ``family``, ``op``, ``dtype``, ``backend``; ``status``: ``"ok"``, ``"wrong"``, ``"absent"``
        (the backend says that it does not take this call) or ``"error"``; ``error`` over the error allowed, of the
        worst result, at most 1 where all is well; and a ``reason`` where it is not.

    Raises:
        LostError: The device no longer answers.
    """
    row = {"check": check.name, "family": check.family, "op": check.op, "dtype": dtype, "backend": backend}
    with float32_as(dtype), poisoned():
        try:
            ours, again = (check.run(lambda t: t.to(device, DTYPES[dtype]), backend) for _ in range(2))
            worst = _worst(check, ours, dtype, backend, device)
            same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        except Exception as error:
            raise_if_lost(error)
            refused = isinstance(error, (UnsupportedError, torch.OutOfMemoryError))
            return {**row, "status": "absent" if refused else "error", "reason": first_line(error)}
    if not worst <= 1:
        return {**row, "status": "wrong", "error": worst, "reason": f"{worst:.3g} times the error allowed"}
    if not same:
        return {**row, "status": "wrong", "error": worst, "reason": "another run gave other bits"}
    return {**row, "status": "ok", "error": worst}


def first_line(error: Exception) -> str:
    """What an error says, on one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _worst(check: Check, ours: list[Tensor], dtype: str, backend: str, device: str) -> float:
    """The largest of the results' errors over what each is allowed."""

    def stored(t: Tensor) -> Tensor:
        return t.to(device, DTYPES[dtype])

    truth = check.run(lambda t: stored(t).double(), "eager")
    if check.by_yardstick:
        yardstick = check.run(stored, "eager")
        found = [
            accuracy.excess_of_triad(*three, tf32=dtype == "tf32") for three in zip(ours, yardstick, truth, strict=True)
        ]
        return max(found, default=0.0)
    spread = [t.sqrt() for t in check.run(lambda t: stored(t).double().square(), "eager")]
    terms = check.run(lambda t: (stored(t) != 0).double(), "eager")
    by_torch = backend not in accuracy.OWN or not check.op  # a layer may add its bias to what was stored already
    every = zip(ours, truth, spread, terms, strict=True)
    return max((accuracy.excess(*four, dtype, by_torch) for four in every), default=0.0)
