"""Options that commands share, and what is checked of them before anything is computed."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..latency.shapes import parse

MAX_SEED = 2**32 - 1
"""What NumPy takes; PyTorch takes more."""


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    import torch

    try:
        torch.ones(2, device=value).sum().item()  # "meta" makes tensors and computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise click.BadParameter(f"{value!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return value


def rows_options(command: Callable) -> Callable:
    """``--json`` and ``--csv``, raw rows instead of a table: ``form`` is ``"json"``, ``"csv"`` or ``None``."""
    for form, how in (("csv", "CSV"), ("json", "JSON, an object a line")):
        text = f"Print raw rows as {how}, and nothing else."
        command = click.option(f"--{form}", "form", flag_value=form, default=None, help=text)(command)
    return command


def alpha_option(least: int = 2, says: str = "Children per parent.") -> Callable:
    """``--alpha``, from 2 on; from 1, the parent itself, where that can be shown."""
    kind = click.IntRange(least, 254)
    return click.option("--alpha", type=kind, default=2, show_default=True, help=says)


class Shape(click.ParamType):
    """``NxK``, output and input features of the parent."""

    name = "NxK"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Reads it."""
        if isinstance(value, tuple):
            return value
        try:
            return parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def shape_option(default: tuple[int, int] | None, says: str) -> Callable:
    """``--shape NxK``."""
    return click.option(
        "--shape",
        type=Shape(),
        metavar="NxK",
        default=default,
        help=f"Output x input features of the parent.  [default: {says}]",
    )


jobs_option = click.option("--jobs", type=click.IntRange(1), help="Number of processes.  [default: one for each core]")
device_option = click.option("--device", default="cpu", show_default=True, callback=_device, help="A PyTorch device.")


def common(command: Callable) -> Callable:
    """The options that every measuring command takes."""
    seed = click.IntRange(0, MAX_SEED)
    for option in (
        rows_options,
        device_option,
        click.option("--seed", type=seed, default=0, show_default=True, help="Seed of all randomness."),
    ):
        command = option(command)
    return command


def check_folder(folder: Path) -> None:
    """Makes a folder and raises unless it can be written to: before anything is computed for minutes.

    Raises:
        click.BadParameter: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise click.BadParameter(
            f"cannot write to {folder}: {error.strerror or error}", param_hint="--output"
        ) from error


def output_option(default: str = "out") -> Callable:
    """``--output``, a folder that can be written to."""

    def checked(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
        check_folder(value)
        return value

    kind = click.Path(file_okay=False, path_type=Path)
    return click.option(
        "--output",
        type=kind,
        default=Path(default),
        show_default=True,
        callback=checked,
        help="Folder for the results.",
    )
