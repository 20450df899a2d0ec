"""The configuration of a launch: a tuned one from a JSON file with its provenance, else one by a rule.

A family's ``config.py`` has a ``Problem``, which says what a launch must do, by which rule and what fits, and a
``Config``. :func:`choose` is the same for all families. A file of tuned configurations is

``{"provenance": {...}, "entries": [{"op": "block_matmul", "max_m": 64, "block": [64, 64], "config": {...}}]}``.
An entry holds for problems of up to ``max_m`` rows whose attributes are those that it names.
"""

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, ClassVar, Protocol, TypeVar

from .device import Device

NOTES = ("family", "max_m", "config", "milliseconds", "rule_milliseconds", "tried", "skipped")
"""Fields of an entry that are no conditions."""


Config = TypeVar("Config")


class Problem(Hashable, Protocol[Config]):
    """What a launch must do, of any family.

    Attributes:
        family: Whose tables hold for it.
        config: The class of its configurations.
    """

    family: ClassVar[str]
    config: ClassVar[type]

    @property
    def m(self) -> int:
        """Rows of activations."""
        ...

    def rule(self, device: Device) -> Config:
        """The configuration where nothing was tuned; it may ask for more than fits."""
        ...

    def fits(self, config: Config, device: Device) -> bool:
        """Whether a configuration can run: its sizes are possible, and what it keeps on chip fits."""
        ...


def choose(problem: Problem[Config], device: Device) -> Config:
    """The configuration of a launch: a tuned entry if one fits, else the rule's, made smaller until it fits.

    First the pipeline is made less deep, then the tile gets fewer rows of activations.
    """
    for entry in tuned(problem.family, device, problem.config):
        if entry.holds(problem) and problem.fits(entry.config, device):
            return entry.config
    return _by_rule(problem, device, device.sets_fence)


@lru_cache(maxsize=4096)
def _by_rule(problem: Problem[Config], device: Device, sets_fence: bool) -> Config:
    """What no table says, kept: a host asks before every launch.

    ``sets_fence`` is the one thing that a device says, and so a rule may ask, which the installed Triton decides too.
    """
    config: Any = problem.rule(device)
    while config.num_stages > 2 and not problem.fits(config, device):
        config = replace(config, num_stages=config.num_stages - 1)
    while config.block_m > 16 and not problem.fits(config, device):
        config = replace(config, block_m=config.block_m // 2)
    return config


@dataclass(frozen=True)
class Entry:
    """A tuned configuration and where it holds.

    Attributes:
        max_m: The most rows of activations that it holds for.
        where: Attributes that a problem must have.
        config: The configuration.
    """

    max_m: int
    where: Mapping[str, Any]
    config: Any

    def holds(self, problem: Any) -> bool:
        """Whether a launch falls under this entry."""
        return problem.m <= self.max_m and all(getattr(problem, name) == value for name, value in self.where.items())


def parse(table: Mapping[str, Any], config: type) -> tuple[Entry, ...]:
    """Reads a table, smallest ``max_m`` first.

    Args:
        table: As the file holds it.
        config: The class of the entries' configurations.
    """
    read = []
    for entry in table["entries"]:
        conditions = {name: value for name, value in entry.items() if name not in NOTES}
        where = {name: tuple(value) if isinstance(value, list) else value for name, value in conditions.items()}
        read.append(Entry(entry["max_m"], where, config(**entry["config"])))
    return tuple(sorted(read, key=lambda entry: entry.max_m))


def file_name(kind: str, device: str) -> str:
    """The file name of what was measured on a device, as ``"partition_nvidia_h200.json"``."""
    return f"{kind}_{device.lower().replace(' ', '_')}.json"


def table_name(family: str, device: Device) -> str:
    """The file of a family's tuned configurations on a device; devices of one kind differ in what is fastest."""
    return file_name(family, device.name or f"sm{device.arch}")


@cache
def tuned(family: str, device: Device, config: type) -> tuple[Entry, ...]:
    """The shipped entries for a family of kernels on a device; empty if nothing was measured there."""
    file = files(__package__) / "configs" / table_name(family, device)
    return parse(json.loads(file.read_text()), config) if file.is_file() else ()
