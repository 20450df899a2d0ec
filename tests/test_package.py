"""The package as it is installed: what importing it needs, who imports whom, what the wheel holds, the README."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

# Importing


def python(*args: str, cwd: Path) -> str:
    """Runs this interpreter away from the checkout, so that only what is installed can be imported."""
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_EXTRAS = """
import sys
for name in ("triton", "sklearn", "click", "matplotlib", "pandas", "jinja2", "rich", "safetensors", "hypothesis"):
    sys.modules[name] = None  # importing it raises ImportError
import torch, fpe
dense = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
wide = fpe.expand(dense)
wide(torch.ones(2, 8)).sum().backward()
assert fpe.nonzeros(wide) == fpe.nonzeros(dense)
assert fpe.kernels.split_matmul and fpe.metrics.gram and fpe.theory.child_coverage
try:
    fpe.expand(dense, split="gram")
except ImportError as error:
    assert "scikit-learn" in str(error) and "[bench]" in str(error), error
else:
    raise AssertionError("the Gram split needs scikit-learn")
print("done")
"""


def test_works_where_triton_and_the_extras_are_not_installed(tmp_path: Path) -> None:
    assert python("-c", WITHOUT_EXTRAS, cwd=tmp_path).strip() == "done"


IMPORTS_LITTLE = """
import sys, torch
before = set(sys.modules)
import fpe
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""


def test_importing_imports_nothing_but_itself_and_torch(tmp_path: Path) -> None:
    added = set(python("-c", IMPORTS_LITTLE, cwd=tmp_path).split())
    assert "fpe" in added
    assert added <= {"fpe", "numpy", "torch"}


# Who may import whom

ROOMS = {"fpe": "fpe", "kernels": "fpe.kernels", "bench": "fpe.bench"}


def imports_of(room: str) -> Iterator[tuple[Path, str]]:
    """Every module that a room's files import, by its installed name."""
    for path in sorted((ROOT / room).rglob("*.py")):
        inside = path.relative_to(ROOT / room).with_suffix("").parts
        package = [*ROOMS[room].split("."), *inside][:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                yield path, module
                yield from ((path, f"{module}.{alias.name}") for alias in node.names)


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def test_the_import_reader_sees_what_the_rules_are_about() -> None:
    found = {module for _, module in imports_of("fpe")}
    assert {"torch", "fpe.kernels", "fpe.kernels.block.layout", "fpe.partition"} <= found
    assert "fpe.kernels.block.layout" in {module for _, module in imports_of("kernels")}


def test_kernels_import_neither_the_method_nor_the_benchmarks() -> None:
    own = [(str(p), m) for p, m in imports_of("kernels") if is_in(m, "fpe")]
    assert [(p, m) for p, m in own if not is_in(m, "fpe.kernels")] == []


def test_the_method_imports_no_benchmarks() -> None:
    assert [(str(p), m) for p, m in imports_of("fpe") if is_in(m, "fpe.bench")] == []


def test_no_room_is_imported_by_its_folder_name() -> None:
    for room in ROOMS:
        assert [(str(p), m) for p, m in imports_of(room) if is_in(m, "kernels") or is_in(m, "bench")] == []


# The wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources, because building writes into the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", ".*", "results")
    for name in ROOMS:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    python(*build, "--wheel-dir", str(folder), str(source), cwd=folder)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_one_top_level_package(wheel: zipfile.ZipFile) -> None:
    """``kernels`` is Hugging Face's: neither it nor ``bench`` may land in site-packages."""
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fpe"}


def test_the_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if name.endswith(".py")}
    for room, package in ROOMS.items():
        folder = package.replace(".", "/")
        wanted = {f"{folder}/{p.relative_to(ROOT / room).as_posix()}" for p in (ROOT / room).rglob("*.py")}
        assert wanted <= inside
    assert "fpe/py.typed" in wheel.namelist()


def test_the_wheels_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert "\nName: fixed-parameter-expansion\n" in metadata
    base = {line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE) if "extra ==" not in line}
    assert {re.split(r"[^\w-]", line)[0] for line in base} == {"torch", "triton", "numpy"}
    entry_points = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "fpe = fpe.bench.__main__:main" in entry_points


# The README


def readme_examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_has_examples() -> None:
    assert readme_examples()


@pytest.mark.parametrize("example", readme_examples(), ids=lambda e: e.strip().splitlines()[0])
def test_the_readmes_examples_run(example: str, tmp_path: Path) -> None:
    python("-c", example, cwd=tmp_path)
