"""Whether the package imports, compiles and walks ``fpe gpu --dry-run`` with the Python, PyTorch and Triton at hand.

``python -m fpe.bench.gpu.compatible FILE`` writes what it found to a results file, in place of an earlier row of the
same versions. To try another Triton or PyTorch, put it in front on ``PYTHONPATH``.
"""

import platform
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import walk_packages
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
import triton

import fpe
from fpe import bench, kernels
from fpe.kernels.device import KNOWN
from fpe.kernels.structures import BLOCK, STRUCTURES, TWO_FOUR

from ..latency.problems import Case
from ..results import Results, provenance
from . import cli, warm

ARCHITECTURES = (80, 90)
CASES = (
    Case(16, 4096, 14336),
    Case(1024, 4096, 14336, structure=TWO_FOUR),
    Case(1024, 4096, 14336, structure="block"),
    Case(16, 4096, 14336, 4),
)
SKIPPED = ("test_latency", "__main__", "compatible")
"""Modules that do more than define something as they are imported, or need a test runner."""

NEEDS = {
    "fpe.models.hugging_face": "transformers",
    "fpe.models.lora": "peft",
    **dict.fromkeys(
        (
            "fpe.kernels.vectors",
            "fpe.kernels.block.cpu",
            "fpe.kernels.partition.cpu",
            "fpe.kernels.partition.cpu_storage",
        ),
        "numba",
    ),
}
"""Modules that import a package which may be absent."""


def modules() -> list[str]:
    """Every module that can be imported here; those of :data:`NEEDS` only where what they need is installed."""
    found = {m.name for p in (fpe, kernels, bench) for m in walk_packages(p.__path__, f"{p.__name__}.")}
    absent = {name for name, needed in NEEDS.items() if find_spec(needed) is None}
    return sorted(name for name in found - absent if not name.endswith(SKIPPED))


def trace() -> int:
    """Traces an expanded network of each structure whole, as ``torch.compile`` does; returns how many."""
    for structure in STRUCTURES:
        dense = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        wide = fpe.expand(dense, 2, structure=structure, block=(4, 16) if structure == BLOCK else None)
        torch.compile(wide, fullgraph=True, backend="eager")(torch.randn(3, 64)).sum().backward()
    return len(STRUCTURES)


def main(file: str | None = None) -> int:
    """Prints what was tried and writes it to a results file, if one is given; returns the exit status."""
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "numpy": numpy.__version__,
    }
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    names = modules()
    for name in names:
        import_module(name)
    traced = trace()
    print(f"{len(names)} modules imported, networks of {traced} structures traced")
    todo = [launch for case in CASES for level in ("op", "merge") for launch in warm.launches(case, level, ())
            if not (level == "merge" and case.structure == TWO_FOUR)]  # fmt: skip
    bad, compiled = 0, {}
    for arch in ARCHITECTURES:
        rows = warm.compile_all(todo, arch, KNOWN[arch], jobs=1)
        wrong = [row for row in rows if row["status"] != "ok"]
        bad += len(wrong)
        compiled[f"sm_{arch}"] = [len(rows) - len(wrong), len(rows)]
        print(f"sm_{arch}: {len(rows) - len(wrong)} of {len(rows)} binaries compiled")
        for row in wrong:
            print(f"  {row['kernel']} {row['launch']}: {row['reason']}")
    with TemporaryDirectory() as folder:
        status = cli.main(["--dry-run", "--output", folder])
    if file:
        spent = sum(time for who in (RUSAGE_SELF, RUSAGE_CHILDREN) for time in getrusage(who)[:2])
        row = {"modules": len(names), "traced": traced, **compiled, "dry_run": status == 0, "processor_seconds": spent}
        keep(Path(file), versions, row)
    return int(bool(bad) or status != 0)


def keep(path: Path, versions: Mapping[str, str], row: Mapping[str, Any]) -> None:
    """Writes a row to a file in the place of that of the same versions."""
    before = Results.read(path).rows if path.exists() else []
    others = [r for r in before if any(r[name] != version for name, version in versions.items())]
    rows = [*others, {**versions, **row, "commit": provenance()["commit"]}]
    Results("versions", {}, sorted(rows, key=lambda r: [r[name] for name in versions])).write(path)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
