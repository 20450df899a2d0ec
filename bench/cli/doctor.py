"""``fpe doctor``: what runs on this machine, what does not and why, and which data are found."""

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn

import fpe
from fpe.kernels.bitmap.backends import BACKENDS as BITMAP
from fpe.kernels.block.backends import BACKENDS as BLOCK
from fpe.kernels.dispatch import Backend
from fpe.kernels.here import roof_here
from fpe.kernels.mlp.backends import BACKENDS as MLP
from fpe.kernels.partition.backends import MERGE, SPLIT
from fpe.kernels.semi_structured.backends import BACKENDS as SEMI_STRUCTURED

from ..studies.recipes import RECIPES
from ..table import Table
from .options import rows_options
from .output import print_rows, print_table, print_text

TRIED = {"Python": "3.10 to 3.13", "torch": "2.11 and 2.13", "triton": "3.6 to 3.9", "numpy": "2.4"}
"""Versions that were tried; docs/installation.md says what was tried with each."""
OPTIONAL = ("numba", "safetensors", "transformers", "peft", "torchvision", "open_clip_torch", "blksprs")


class Finding(NamedTuple):
    """One fact about this machine.

    Attributes:
        about: ``"versions"``, ``"device"``, ``"backends"``, ``"data"`` or ``"check"``.
        name: What the fact is about: a package, a device, an operation and its backend, a data set.
        state: ``"yes"``, ``"no"`` or ``"broken"``; only ``"broken"`` makes the exit status 1.
        says: A version or an origin, or why not.
    """

    about: str
    name: str
    state: str
    says: str


@click.command()
@rows_options
def doctor(form: str | None) -> None:
    """Say what runs here and what does not, and why, and which data are found.

    The exit status is 0 if the package works, with or without a GPU, and 1 if something is broken: a small network
    does not compute what its dense form computes, or PyTorch sees a GPU that no kernel can use.
    """
    found = list(findings())
    if form:
        print_rows([finding._asdict() for finding in found], form)
    else:
        for about, title in TITLES.items():
            rows = [(f.name, f.state, f.says) for f in found if f.about == about]
            print_table(Table(title, ("what", "here", "version, origin or reason"), rows))
    broken = [f"{finding.name}: {finding.says}" for finding in found if finding.state == "broken"]
    if broken:
        raise click.ClickException(f"broken: {'; '.join(broken)}")
    if not form:
        print_text("Nothing is broken.")


TITLES = {
    "versions": f"Versions (tried: {', '.join(f'{name} {which}' for name, which in TRIED.items())})",
    "device": "Devices",
    "backends": "Which backends run, for bfloat16 operands on the device at hand",
    "data": "Data of the studies: nothing is downloaded",
    "check": "Does it work?",
}


def findings() -> Iterator[Finding]:
    """Every fact, in the order in which they are shown."""
    yield Finding("versions", "Python", "yes", platform.python_version())
    for name in ("fixed-parameter-expansion", "torch", "triton", "numpy", *OPTIONAL):
        installed = _version(name)
        yield Finding("versions", name, "yes" if installed else "no", installed or "not installed")
    yield from _devices()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield from backends(torch.zeros(64, 64, device=device, dtype=torch.bfloat16))
    for recipe in RECIPES.values():
        says = recipe.origin if recipe.found() else f"{recipe.origin}. To make it: {recipe.how}"
        yield Finding("data", recipe.name, "yes" if recipe.found() else "no", says)
    yield check(device)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    yield Finding("device", "CPU", "yes", f"{platform.machine()}, {torch.get_num_threads()} threads")
    roof = roof_here()
    says = 'not measured, so backend="auto" takes the eager twin; `fpe here` measures it in half a minute'
    if roof:
        says = f"measured: reads weights at {roof.read / 1e9:.1f} GB/s"
    yield Finding("device", "the CPU's roof", "yes" if roof else "no", says)
    if not torch.cuda.is_available():
        built = "sees none" if torch.version.cuda else "was built without CUDA"
        yield Finding("device", "NVIDIA GPU", "no", f"PyTorch {torch.__version__} {built}")
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        says = f"compute capability {major}.{minor}, {memory:.0f} GiB"
        yield Finding("device", torch.cuda.get_device_name(index), "yes", says)


def backends(operand: Tensor) -> Iterator[Finding]:
    """Which backends of every family run for an operand ``[64, 64]``, and why the others do not."""
    families: dict[str, tuple[Mapping[str, Backend], tuple[Any, ...]]] = {
        "split_matmul": (SPLIT, (2,)),
        "merge_matmul": (MERGE, (2,)),
        "block_matmul": (BLOCK, ((64, 64),)),
        "semi_structured_matmul": (SEMI_STRUCTURED, (64, 64)),
        "pack_values": (BITMAP, ()),
        "expanded_mlp": (MLP, ()),
    }
    for op, (known, call) in families.items():
        able = []
        for name, backend in known.items():
            reason = backend.why_not(operand, *call)
            able += [] if reason else [name]
            yield Finding("backends", f"{op}, {name}", "no" if reason else "yes", reason or "")
        if operand.is_cuda and able == ["eager"]:
            yield Finding("backends", op, "broken", "PyTorch sees a GPU, and only the eager backend runs on it")


def check(device: str) -> Finding:
    """Whether a small network expands at the same number of non-zero weights and computes what its dense form does."""
    generator = torch.Generator().manual_seed(0)
    name = f"a small network, expanded, on {device}"
    try:
        model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
        wide = fpe.expand(model, 2, generator=generator).to(device)
        x = torch.randn(8, 64, generator=generator).to(device)
        error = (wide(x) - fpe.to_dense(wide)(x)).abs().max().item()
        if fpe.nonzeros(wide) != fpe.nonzeros(model):
            return Finding("check", name, "broken", "its number of non-zero weights has changed")
    except Exception as failure:  # whatever it is, this command is there to say it
        return Finding("check", name, "broken", f"{type(failure).__name__}: {failure}")
    if not error < 1e-2:
        return Finding("check", name, "broken", f"it differs from its dense form by {error:.2g}")
    return Finding("check", name, "yes", "the same number of non-zero weights, the same outputs as its dense form")
