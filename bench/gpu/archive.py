"""The results of ``fpe gpu`` as one file, and back: into a run's folder to go on, or into the committed results."""

import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..results import COMMITTED, Results

NAME = "fpe-gpu.tar.gz"
_MEMBER = re.compile(r"[\w-]+\.(jsonl|json)")


def pack(folder: Path, path: Path) -> Path:
    """Writes the rows, roof and tables of a folder into an archive, aside first; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with tarfile.open(part, "w:gz") as archive:
        for file in sorted(folder.iterdir()):
            if _MEMBER.fullmatch(file.name):
                archive.add(file, file.name)
    return part.replace(path)


def read(path: Path) -> dict[str, bytes]:
    """The files of an archive by name.

    Raises:
        ValueError: It is no archive, or holds something else.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            members = archive.getmembers()
            odd = [m.name for m in members if not (m.isfile() and _MEMBER.fullmatch(m.name))]
            if odd or not members:
                raise ValueError(f"{path}: expected an archive of results, found {odd[0] if odd else 'nothing'!r}")
            found = {m.name: archive.extractfile(m) for m in members}
            return {name: file.read() for name, file in found.items() if file is not None}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected an archive of results: {error}") from error


def unpack(path: Path, folder: Path) -> None:
    """Puts an archive's files into a folder, for a run to go on with.

    Raises:
        ValueError: See :func:`read`; or the folder has rows already.
    """
    files = read(path)
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(file.name for file in folder.glob("*.jsonl"))
    if there:
        raise ValueError(f"{folder} holds {there[0]} already: name an empty folder to go on with {path}")
    for name, content in files.items():
        (folder / name).write_bytes(content)


def merge(path: Path, root: Path = COMMITTED) -> list[Path]:
    """Puts an archive into the committed results of its device; returns what was written.

    Units that are there already give way to the archive's; rows say by ``run`` which run made them, and ``runs.jsonl``
    what that ran with. Each file's provenance then names the commits and days of the runs that its rows are of.

    Raises:
        ValueError: See :func:`read`; or it holds a dry run, several devices, damaged rows, or rows of an unknown run.
    """
    files = read(path)
    made = {n: Results.parse(c.decode(), f"{path}: {n}") for n, c in files.items() if n.endswith(".jsonl")}
    devices = {results.settings.get("device", "unknown") for results in made.values()}
    if len(devices) != 1:
        raise ValueError(f"{path}: expected rows of one device, got {', '.join(sorted(devices)) or 'none'}")
    if any(results.settings.get("dry_run", True) for results in made.values()):
        raise ValueError(f"{path}: it holds a dry run, and nothing that was measured on a GPU")
    folder = root / slug(devices.pop())
    for name, results in made.items():
        target = folder / name
        if target.exists():
            keys = {row["key"] for row in results.rows}
            results.rows[:0] = [row for row in Results.read(target).rows if row["key"] not in keys]
    runs = {row["run"]: row for row in made["runs.jsonl"].rows} if "runs.jsonl" in made else {}
    unknown = {row["run"] for results in made.values() for row in results.rows} - set(runs)
    if unknown:
        raise ValueError(f"{path}: expected every run in runs.jsonl, which lacks {min(unknown)}")
    written = [_of_runs(results, runs).write(folder / name) for name, results in made.items()]
    for name, content in files.items():
        if name.endswith(".json"):
            json.loads(content)
            (folder / name).write_bytes(content)
            written.append(folder / name)
    return written


def _of_runs(results: Results, runs: Mapping[str, Mapping[str, Any]]) -> Results:
    """The results with the commits and days of their rows' runs in their provenance."""
    of = sorted({row["run"] for row in results.rows})
    named = {name: ", ".join(dict.fromkeys(runs[run][name] for run in of)) for name in ("commit", "date")}
    return replace(results, provenance={**results.provenance, **named})


def slug(device: str) -> str:
    """A device's name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
