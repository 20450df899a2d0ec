"""Options that commands share, and what is checked of them before anything is computed."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import click

MAX_SEED = 2**32 - 1
"""What NumPy takes; PyTorch takes more."""


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    import torch

    try:
        torch.ones(2, device=value).sum().item()  # "meta" makes tensors and computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise click.BadParameter(f"{value!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return value


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON rows to standard output and nothing else."
)
jobs_option = click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: one a core]")
device_option = click.option("--device", default="cpu", show_default=True, callback=_device, help="A PyTorch device.")


def common(command: Callable) -> Callable:
    """The options that every measuring command takes."""
    seed = click.IntRange(0, MAX_SEED)
    for option in (
        json_option,
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
        "--output", type=kind, default=Path(default), show_default=True, callback=checked, help="Folder."
    )
