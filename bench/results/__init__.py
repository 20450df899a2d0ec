"""Result files: JSON Lines, a header with provenance first, then one raw fact a row.

A file is written whole to a temporary name and renamed, so that a reader never sees half of one.
"""

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

SCHEMA = 1
"""Version of the files' layout."""

COMMITTED = Path(__file__).parent
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

    @property
    def origin(self) -> str:
        """On what it ran, of which commit and when: for titles and captions."""
        on = f", {self.provenance['date']}" if "date" in self.provenance else ""
        return f"{self.provenance['device']} at commit {self.provenance['commit']}{on}"

    def write(self, path: Path) -> Path:
        """Writes the file aside and renames it; returns its path."""
        header = {
            "schema": SCHEMA,
            "study": self.study,
            "settings": dict(self.settings),
            "provenance": dict(self.provenance),
        }
        lines = [_line(header), *map(_line, self.rows)]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text("\n".join(lines) + "\n")
        return part.replace(path)

    @classmethod
    def read(cls, path: Path, cut: bool = False) -> "Results":
        """Reads a file back.

        Args:
            path: The file.
            cut: Whether its last row may be cut off, and is left out then: for a run that goes on.

        Raises:
            ValueError: The file has another schema, or a row is cut or no JSON.
        """
        text = path.read_text(errors="replace")
        lines = text.splitlines()
        if cut and len(lines) > 1 and not text.endswith("\n"):
            del lines[-1]
        return cls.parse("\n".join(lines), str(path))

    @classmethod
    def parse(cls, text: str, path: str) -> "Results":
        """Reads a file's text; see :meth:`read`."""
        parsed: list[Any] = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                parsed.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is cut or no JSON: {error}") from error
        header = parsed[0] if parsed and isinstance(parsed[0], dict) else {}
        if header.get("schema") != SCHEMA:
            got = header.get("schema", "none") if parsed else "an empty file"
            raise ValueError(f"{path}: expected a results file of schema {SCHEMA}, got {got}")
        odd = [n for n, row in enumerate(parsed, 1) if not isinstance(row, dict)]
        if odd or not {"study", "settings", "provenance"} <= set(header):
            where = f"line {odd[0]} is no row" if odd else "its header lacks study, settings or provenance"
            raise ValueError(f"{path}: {where}")
        return cls(header["study"], header["settings"], parsed[1:], header["provenance"])

    @classmethod
    def resume(
        cls, path: Path, study: str, settings: Mapping[str, Any], provenance: Mapping[str, Any] | None = None
    ) -> "Results":
        """The results so far of a run that appends, or a new file with a header alone.

        Args:
            path: Of the file.
            study: What the rows are of.
            settings: What they were made with.
            provenance: Of a new file; asked of the machine if not given.

        Raises:
            ValueError: See :meth:`read`; or the file is of another study or other settings.
        """
        if not path.exists():
            fresh = cls(study, settings, [], **({} if provenance is None else {"provenance": provenance}))
            fresh.write(path)
            return fresh
        found = cls.read(path, cut=True)
        settings = json.loads(_line(dict(settings)))
        if (found.study, found.settings) != (study, settings):
            raise ValueError(
                f"{path}: expected rows of {study!r} with {settings} to go on with, got {found.study!r} with "
                f"{found.settings}; move it away to begin anew"
            )
        if not path.read_bytes().endswith(b"\n"):
            found.write(path)  # a row that was cut is gone, and the next one begins on a line of its own
        return found

    def append(self, path: Path, *rows: dict[str, Any]) -> None:
        """Adds rows to the file, all in a single write, and to :attr:`rows`."""
        lines = [_line(row) for row in rows]
        with path.open("ab", buffering=0) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        self.rows.extend(json.loads(line) for line in lines)


def provenance(commit: str | None = None) -> dict[str, Any]:
    """Device, versions, commit and day (UTC) of this run; with a GPU its driver, CUDA and Triton too.

    Args:
        commit: Of the code, where it runs outside its repository; else git is asked.
    """
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if torch.cuda.is_available():
        import triton

        found |= {"triton": triton.__version__, "cuda": torch.version.cuda or "none", "driver": _driver()}
    return found


def commits(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The commits of two runs whose rows stand in one file, by their provenances: each once, those of before first."""
    return ", ".join(dict.fromkeys(name for one in (before, after) for name in str(one.get("commit")).split(", ")))


def _commit() -> str:
    return _said("git", "describe", "--always", "--dirty")


def _driver() -> str:
    return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def _said(program: str, *arguments: str) -> str:
    """What a program prints, or ``"unknown"``."""
    if shutil.which(program) is None:
        return "unknown"
    done = subprocess.run([program, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, default=_plain)


def _plain(value: Any) -> Any:
    """Turns what JSON does not know into what it does."""
    if isinstance(value, (np.generic, torch.Tensor)):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} to a results file")
