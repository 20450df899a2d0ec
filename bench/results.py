"""Result files: JSON Lines, a header with provenance first, then one raw fact a row.

A file is written whole to a temporary name and renamed, so that a reader never sees half of one.
"""

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

SCHEMA = 1
"""Version of the files' layout."""

COMMITTED = Path(__file__).parent / "results"
"""Results that were measured and committed, from which documents are drawn."""


@dataclass(frozen=True)
class Results:
    """What a study or a measurement produced.

    Attributes:
        study: Its name.
        settings: Every choice that was made, by name.
        rows: Raw facts, one to a row.
        provenance: Where and with what it ran.
    """

    study: str
    settings: Mapping[str, Any]
    rows: list[dict[str, Any]]
    provenance: Mapping[str, Any] = field(default_factory=lambda: provenance())

    @property
    def frame(self) -> pd.DataFrame:
        """The rows as a data frame."""
        return pd.DataFrame(self.rows)

    def write(self, path: Path) -> Path:
        """Writes the file aside and renames it; returns its path."""
        header = {
            "schema": SCHEMA,
            "study": self.study,
            "settings": dict(self.settings),
            "provenance": dict(self.provenance),
        }
        lines = [json.dumps(header, default=_plain), *(json.dumps(row, default=_plain) for row in self.rows)]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text("\n".join(lines) + "\n")
        return part.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Reads a file back.

        Raises:
            ValueError: The file has another schema, or a row is cut or no JSON.
        """
        lines = path.read_text().splitlines()
        parsed = []
        for number, line in enumerate(lines, 1):
            try:
                parsed.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is cut or no JSON: {error}") from error
        if not parsed or parsed[0].get("schema") != SCHEMA:
            got = parsed[0].get("schema") if parsed else "an empty file"
            raise ValueError(f"{path}: expected a results file of schema {SCHEMA}, got {got}")
        header = parsed[0]
        return cls(header["study"], header["settings"], parsed[1:], header["provenance"])


def provenance() -> dict[str, Any]:
    """Device, versions and commit of this run."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    array = np.asarray(list(values), dtype=float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


def _commit() -> str:
    root = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _plain(value: Any) -> Any:
    """Turns what JSON does not know into what it does."""
    if isinstance(value, (np.generic, torch.Tensor)):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} to a results file")
