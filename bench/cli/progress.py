"""Progress bars: on standard error, so that standard output holds what a command prints and nothing else."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str, total: int, done: int = 0, quiet: bool = False) -> Iterable[T]:
    """Passes items on under a bar.

    Args:
        items: What is still to come.
        what: Stands before the bar.
        total: How many there are, those included that an earlier run has done.
        done: How many that are: where the bar begins.
        quiet: No bar.
    """
    from rich.console import Console
    from rich.progress import track

    return track(items, what, total, done, console=Console(stderr=True), disable=quiet)
