"""The package as it is installed: what importing it needs, who imports whom, what the wheel holds, the README."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, without_pictures

from fpe.kernels.cpu import numba_installed

# Importing


def python(*args: str, cwd: Path) -> str:
    """Runs this interpreter away from the checkout, so that only what is installed can be imported."""
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


EVERY_MODULE = """
from importlib import import_module
from fpe.bench.gpu.compatible import modules
names = modules()
for name in names:
    import_module(name)
assert len(names) > 150
"""


def test_every_module_imports_with_the_packages_at_hand(tmp_path: Path) -> None:
    python("-c", EVERY_MODULE, cwd=tmp_path)


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


# Hugging Face's ``kernels``, which transformers looks for: in the checkout's root our folder is found under that name

NO_KERNELS = """
import importlib.util, sys, torch, fpe
import kernels
assert importlib.util.find_spec("kernels") is not None  # the folder is seen
assert not hasattr(kernels, "__file__") and not hasattr(kernels, "__version__")  # and is not taken for a package
assert not hasattr(kernels, "split_matmul")
assert fpe.kernels.split_matmul and not [name for name in sys.modules if name.startswith("kernels.")]
try:
    import kernels.partition
except ModuleNotFoundError:
    print("done")
"""

THEIR_KERNELS = """
import torch, fpe
import kernels
from kernels import get_kernel
from kernels.layer import Mode
assert kernels.__version__ == "0.99" and get_kernel() == "theirs" and Mode.__module__ == "kernels.layer"
assert fpe.kernels.split_matmul
print("done")
"""


def test_the_folder_named_kernels_is_inert_in_the_root() -> None:
    assert python("-c", NO_KERNELS, cwd=ROOT).strip() == "done"


def test_the_real_kernels_is_let_through_in_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("__version__ = '0.99'\ndef get_kernel():\n    return 'theirs'\n")
    (tmp_path / "kernels/layer.py").write_text("from . import get_kernel\nclass Mode:\n    pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert python("-c", THEIR_KERNELS, cwd=ROOT).strip() == "done"


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


# What is built of it


def test_the_source_distribution_holds_what_the_checkout_does(tmp_path: Path) -> None:
    """So that whoever packages it can run its tests and build its documents."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    tracked = {name for name in listed.split("\n") if name and (ROOT / name).is_file()}
    if not tracked:
        pytest.skip("this is no checkout: no list of its files")
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    python("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=source)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - held == {".gitignore"}


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources, because building writes into the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in ROOMS:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    python(*build, "--wheel-dir", str(folder), str(source), cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_file)


@pytest.fixture(scope="session")
def installed(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it and nothing of the checkout; other packages are this interpreter's."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    own = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    others = [p for p in sys.path if Path(p).name == "site-packages"]  # on a .pth: their own .pth files are not read
    (Path(own) / "others.pth").write_text("\n".join(others))
    interpreter = home / "bin/python"
    install = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    python("-m", "pip", "--python", str(interpreter), "install", *install, str(wheel_file), cwd=home)
    return home


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


def test_the_wheel_holds_every_file_that_the_program_reads(wheel: zipfile.ZipFile) -> None:
    """Whatever lies in the rooms beside the modules: committed results, templates, tables."""
    tracked = subprocess.run(["git", "ls-files", *ROOMS], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    wanted = set()
    for name in tracked.split() or [str(p.relative_to(ROOT)) for room in ROOMS for p in (ROOT / room).rglob("*.jsonl")]:
        room, _, rest = name.partition("/")
        wanted.add(f"{ROOMS[room].replace('.', '/')}/{rest}")
    assert any(name.endswith(".jsonl") for name in wanted)
    assert wanted <= set(wheel.namelist())


ELSEWHERE = """
import json, sys
from pathlib import Path
from click.testing import CliRunner
import fpe, fpe.bench.results as results
assert Path(fpe.__file__).is_relative_to(sys.prefix), fpe.__file__
from fpe.bench.cli import cli
def run(*arguments, status=0):
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == status, (arguments, done.output, done.exception)
    return done.output
committed = [path.relative_to(results.COMMITTED).with_suffix("") for path in results.COMMITTED.rglob("*.jsonl")]
listed = "".join(line.split("  ")[0] for line in run("results").splitlines())
assert len(committed) >= 10 and all(str(name) in listed for name in committed)
assert "accuracy" in run("results", str(results.COMMITTED / "studies/boolean.jsonl"))
assert json.loads(run("verdict", "--gpu", "4090", "--json").splitlines()[0])["gpu"]
assert "predicted" in run("explain", "--gpu", "4090")
assert "checkout" in run("docs", status=1)
"""


def test_the_main_commands_run_outside_a_checkout(installed: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "fpe, version" in run(str(installed / "bin/fpe"), "--version")
    run(str(installed / "bin/python"), "-c", ELSEWHERE)
    run(str(installed / "bin/fpe"), "report", "--quick", "--output", "out")
    page = without_pictures((tmp_path / "out/report.html").read_text())
    assert page.count("<svg") == 20 + numba_installed() and "nan" not in page  # what this CPU was measured to do


@pytest.mark.skipif(not numba_installed(), reason="one of them measures CPU kernels, which Numba compiles")
def test_a_newcomers_commands_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    script = shutil.copy(ROOT / "tests/newcomer.py", tmp_path)
    command = [str(installed / "bin/python"), script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) >= 20


def test_the_wheels_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert "\nName: fixed-parameter-expansion\n" in metadata
    base = {line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE) if "extra ==" not in line}
    assert {re.split(r"[^\w-]", line)[0] for line in base} == {"torch", "triton", "numpy"}
    entry_points = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "fpe = fpe.bench.__main__:main" in entry_points


# What the documents show

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def snippets(language: str) -> list[Any]:
    """Every fenced block of a language, named by its document and its first line."""
    found = []
    for path in DOCUMENTS:
        for text in re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            found.append(pytest.param(text, id=f"{path.stem}: {text.strip().splitlines()[0]}"))
    return found


def test_every_fenced_block_is_of_a_language_that_is_tried() -> None:
    opened = [line for path in DOCUMENTS for line in path.read_text().splitlines() if re.match("```.", line)]
    assert set(opened) <= {"```python", "```sh", "```text"}
    assert len(snippets("python")) >= 2 and len(snippets("sh")) >= 2


@pytest.mark.parametrize("text", snippets("python"))
def test_a_snippet_runs(text: str, tmp_path: Path) -> None:
    python("-c", text, cwd=tmp_path)


@pytest.mark.parametrize("text", snippets("sh"))
def test_a_shell_snippet_names_what_there_is(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of make, and commands with options that parse; none is run."""
    from fpe.bench.cli import cli

    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"[\w/-]+\.jsonl", text):
        Path(name).touch()
    targets = set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        program, *arguments = shlex.split(line)
        if program == "make":
            assert set(arguments) <= targets, line
        elif program == "fpe":
            parse(cli, arguments)
        else:
            assert program in ("python", "pytest", "pip"), line


def parse(command: Any, arguments: list[str]) -> None:
    """Reads a command line down to the last command; raises where an option or a command does not exist."""
    context = command.make_context("fpe", list(arguments), resilient_parsing=False)
    if hasattr(command, "resolve_command"):
        name, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert inner is not None, name
        parse(inner, rest)


def test_the_readmes_names_exist() -> None:
    """What the README calls by its full name in the running text."""
    text = (ROOT / "README.md").read_text()
    names = sorted(set(re.findall(r"`(fpe(?:\.\w+)+)", text)))
    assert "fpe.convolution.expand_conv_pair" in names
    python("-c", f"import fpe\nfor name in {names}: eval(name)", cwd=ROOT.parent)
