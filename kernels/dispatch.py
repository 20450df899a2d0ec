"""Which implementation runs an operation: a pure choice, never a silent fallback."""

BACKENDS = ("auto", "eager")


def choose_backend(op: str, backend: str) -> str:
    """Resolves a requested backend to one that can run.

    Args:
        op: Name of the operation, for the message.
        backend: ``"auto"`` lets the package choose; ``"eager"`` is the plain PyTorch twin.

    Raises:
        ValueError: No such backend exists for the operation.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return "eager"
