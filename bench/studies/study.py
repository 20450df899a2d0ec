"""What every study declares of itself: how it is run, and what documents show of its committed rows.

A module of this package that holds ``STUDIES`` adds them to ``fpe study``, to the documents and to the report; see
:func:`fpe.bench.studies.every`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import click
from matplotlib.figure import Figure

from ..results import COMMITTED, Results
from ..table import Table


@dataclass(frozen=True)
class Study:
    """A study, whatever it runs.

    Attributes:
        name: Of its command.
        tables: What documents may show of its committed rows, by the name of their place.
        figures: The same of the figures in ``docs/figures``.
    """

    name: str
    tables: Mapping[str, Callable[[], Table]] = field(default_factory=dict, kw_only=True)
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict, kw_only=True)

    def command(self) -> click.Command:
        """Runs it: ``fpe study`` and the name."""
        raise NotImplementedError


@dataclass(frozen=True)
class OwnCommand(Study):
    """A study with a command of its own."""

    runs: click.Command

    def command(self) -> click.Command:
        """The command."""
        return self.runs


def committed(name: str) -> Results:
    """Committed rows of studies, by the file's name."""
    return Results.read(COMMITTED / "studies" / f"{name}.jsonl")
