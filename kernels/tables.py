"""Tuned configurations as data: JSON files with their provenance, which a chooser asks before its rule.

``{"provenance": {...}, "entries": [{"op": "block_matmul", "max_m": 64, "block": [64, 64], "config": {...}}]}``:
an entry holds for problems of up to ``max_m`` rows whose attributes are those that it names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

NOTES = ("family", "max_m", "config", "milliseconds", "rule_milliseconds")
"""What an entry holds besides its conditions."""


@dataclass(frozen=True)
class Entry:
    """A tuned configuration and where it holds.

    Attributes:
        max_m: Up to so many rows of activations.
        where: Attributes that a problem must have.
        config: The configuration.
    """

    max_m: int
    where: Mapping[str, Any]
    config: Any

    def fits(self, problem: Any) -> bool:
        """Whether a launch falls under this entry."""
        return problem.m <= self.max_m and all(getattr(problem, name) == value for name, value in self.where.items())


def parse(table: Mapping[str, Any], config: type) -> tuple[Entry, ...]:
    """Reads a table, smallest ``max_m`` first.

    Args:
        table: As the file holds it.
        config: What the entries' configurations are.
    """
    read = []
    for entry in table["entries"]:
        conditions = {name: value for name, value in entry.items() if name not in NOTES}
        where = {name: tuple(value) if isinstance(value, list) else value for name, value in conditions.items()}
        read.append(Entry(entry["max_m"], where, config(**entry["config"])))
    return tuple(sorted(read, key=lambda entry: entry.max_m))


@cache
def tuned(family: str, arch: int, config: type) -> tuple[Entry, ...]:
    """Entries shipped for a family of kernels on an architecture; none where nothing was measured."""
    file = files(__package__) / "configs" / f"{family}_sm{arch}.json"
    return parse(json.loads(file.read_text()), config) if file.is_file() else ()
