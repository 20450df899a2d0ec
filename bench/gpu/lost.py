"""Telling a call that failed from a device that is gone: after an illegal access nothing runs any more."""

import torch

SIGNS = ("CUDA error", "Triton Error [CUDA]", "CUDA driver error", "CUBLAS_STATUS_EXECUTION_FAILED")
"""How PyTorch, Triton and the libraries begin what a device says."""


class LostError(RuntimeError):
    """The device no longer answers this process; another one may find it well again."""


def raise_if_lost(error: Exception) -> None:
    """Raises :class:`LostError` where an error comes from a device that does not answer any more.

    A launch that a driver refuses says the same words as one that broke everything; so the device is asked.
    """
    said = str(error)
    if isinstance(error, LostError):
        raise error
    if any(sign in said for sign in SIGNS) and not _answers():
        raise LostError(said.strip().partition("\n")[0]) from error


def _answers() -> bool:
    try:
        torch.cuda.synchronize()
        return torch.ones(1, device="cuda").item() == 1
    except (RuntimeError, AssertionError):  # the latter from a build without CUDA
        return False
