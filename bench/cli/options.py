"""Options that commands share, and what is checked of them before anything is computed."""

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from ..latency.shapes import find, parse

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
    """Adds ``--json`` and ``--csv``, raw rows instead of a table: ``form`` is ``"json"``, ``"csv"`` or ``None``."""
    for form, how in (("csv", "CSV"), ("json", "JSON, an object a line")):
        text = f"Print raw rows as {how}, and nothing else."
        command = click.option(f"--{form}", "form", flag_value=form, default=None, help=text)(command)
    return command


def alpha_option(least: int = 2, default: int | None = 2) -> Callable:
    """``--alpha``, from ``least`` to 254: from 2, or from 1 where the parent itself can be shown."""
    says = "Children per parent." if least == 2 else "Children per parent; 1 is the parent itself."
    return click.option("--alpha", type=click.IntRange(least, 254), default=default, show_default=True, help=says)


def block_option(default: tuple[int, int] | None = (64, 64)) -> Callable:
    """``--block BN BK``."""
    says = "Tile of structure block, outputs x inputs."
    kind = (click.IntRange(1), click.IntRange(1))
    return click.option("--block", type=kind, metavar="BN BK", default=default, show_default=True, help=says)


def dtype_option(kinds: Iterable[str], default: str | None = "bf16", says: str = "") -> Callable:
    """``--dtype``, one of ``kinds``."""
    says = f"Type of the numbers.{says}"
    return click.option("--dtype", type=click.Choice(list(kinds)), default=default, show_default=True, help=says)


ROWS_HELP = "Rows of activations."
STRUCTURE_HELP = "What the masks look like."


class Number(click.FloatRange):
    """A number in a range; ``nan`` is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Reads it."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


class Shape(click.ParamType):
    """``NxK``, output and input features of the parent."""

    name = "NxK"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Reads ``NxK``, or fails with a message."""
        if isinstance(value, tuple):
            return value
        try:
            return parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Shapes(click.ParamType):
    """``NxK`` or the name of a set of them: a tuple of pairs."""

    name = "NxK"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple:
        """Reads ``NxK`` or a name, or fails with a message."""
        try:
            return find(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SHAPE_HELP = "Output x input features of the parent"


def shape_option(default: tuple[int, int] | None, says: str) -> Callable:
    """``--shape NxK``."""
    return click.option(
        "--shape",
        type=Shape(),
        metavar="NxK",
        default=default,
        help=f"{SHAPE_HELP}.  [default: {says}]",
    )


JOBS_HELP = "Number of processes."
jobs_option = click.option("--jobs", type=click.IntRange(1), help=f"{JOBS_HELP}  [default: one for each core]")
one_job_option = click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help=JOBS_HELP)
data_option = click.option("--data", help="A data set's name or path.  [default: what is installed]")
device_option = click.option("--device", default="cpu", show_default=True, callback=_device, help="A PyTorch device.")


seed_option = click.option(
    "--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Seed of all randomness."
)


def trials_option(default: object = None) -> Callable:
    """``--trials``."""
    return click.option("--trials", type=click.IntRange(1), help=f"Networks of each kind.{_default(default)}")


EPOCHS_HELP = "Epochs of training: before the split, and as many after it."


def epochs_option(default: object = None, says: str = EPOCHS_HELP) -> Callable:
    """``--epochs``."""
    return click.option("--epochs", type=click.IntRange(1), help=f"{says}{_default(default)}")


def _default(value: object) -> str:
    return f"  [default: {value or 'by data set'}]"


def common(command: Callable) -> Callable:
    """Adds the options that every measuring command takes."""
    for option in (rows_options, device_option, seed_option):
        command = option(command)
    return command


def check_folder(folder: Path) -> None:
    """Makes a folder and checks that it can be written to, before anything is computed for minutes.

    Raises:
        click.BadParameter: It cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise click.BadParameter(
            f"cannot write to {folder}: {error.strerror or error}", param_hint="'--output'"
        ) from error


def output_option(default: str = "out") -> Callable:
    """``--output``, a folder that is made and checked (:func:`check_folder`)."""

    def checked(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
        check_folder(value)
        return value

    kind = click.Path(file_okay=False, path_type=Path)
    return click.option(
        "--output",
        type=kind,
        metavar="FOLDER",
        default=Path(default),
        show_default=True,
        callback=checked,
        help="Folder for the results.",
    )
