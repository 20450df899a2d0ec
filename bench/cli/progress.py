"""Progress bars: on standard error, so that standard output holds what a command prints and nothing else."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str, total: int, done: int = 0, quiet: bool = False) -> Iterable[T]:
    """Passes items on and shows a bar meanwhile.

    Args:
        items: The items that are still to be done.
        what: The text before the bar.
        total: Number of all items, also of those that an earlier run has done.
        done: Number of items that an earlier run has done; the bar begins there.
        quiet: Whether to show no bar.
    """
    from rich.console import Console
    from rich.progress import track

    return track(items, what, total, done, console=Console(stderr=True), disable=quiet)
