"""Neural fields: an image as a small network from Fourier features of a place to its colour (Tancik et al. 2020).

Three outputs are so few that the second layer is nearly free, however wide: the case in which width should cost least.
A quarter of the pixels, drawn by a seed, is for validation; the figure of merit is the peak signal-to-noise ratio in
decibels, of the image that was learnt and of the pixels that were not.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fpe

from ..results import Results
from ..table import Table
from . import sweep
from .conditions import CONTINUED, WIDE
from .drawing import below, doubling, figure, line
from .intervals import interval
from .mlp import perceptron
from .protocol import Training
from .rivals import FPE, FPE_MOVING, RIGL, STATIC, moving
from .stack import Stack, seeded
from .study import committed
from .sweep import Sweep

STEPS = 100
"""Steps that this study calls an epoch."""

FEATURES = 128
"""Fourier features of a place."""

SCALE = 5.0
"""Standard deviation of the features' frequencies, in periods to the image's longer side."""


@dataclass(frozen=True)
class Settings(sweep.Settings):
    """Settings of this study, whose epochs are hundreds of steps.

    Attributes:
        data: ``"china"`` or ``"flower"``, the photographs that scikit-learn ships, or the path of an image.
        pixels: Longer side to which the image is reduced, by averages of squares.
        batch: Pixels to a step.
        lr: Adam's step size.
    """

    data: str = "china"
    pixels: int = 160
    epochs: int = 6
    batch: int = 1024
    lr: float = 5e-3


@dataclass(frozen=True)
class Cell:
    """One configuration."""

    condition: str
    neurons: int
    width: int = 2


def cells() -> list[Cell]:
    """The split, sparse training and more weights at three widths."""
    made = []
    for neurons in (32, 16, 64):
        made += [Cell(name, neurons) for name in (CONTINUED, FPE, FPE_MOVING, STATIC, RIGL, WIDE)]
        made += [Cell(name, neurons, 4) for name in (FPE, FPE_MOVING, RIGL)]
    return made


@dataclass(frozen=True)
class Image:
    """Places' features ``[pixels, FEATURES]`` and colours ``[pixels, 3]`` to learn and to validate with."""

    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor


def read(name: str) -> np.ndarray:
    """An image ``[height, width, 3]`` in 0 .. 1.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg").astype(np.float32) / 255
    from matplotlib.image import imread

    if not Path(name).is_file():
        raise FileNotFoundError(f"there is no file {name}; --data takes the path of a picture, china or flower")
    picture = np.asarray(imread(Path(name)), dtype=np.float32)[..., :3]
    return picture / 255 if picture.max() > 1 else picture


@lru_cache(maxsize=1)
def image(settings: Settings) -> Image:
    """The image of a study, reduced, with its features; three quarters of the pixels to learn."""
    picture = torch.from_numpy(read(settings.data)).movedim(-1, 0)
    factor = max(1, round(max(picture.shape[1:]) / settings.pixels))
    picture = nn.functional.avg_pool2d(picture, factor).movedim(0, -1)
    height, width = picture.shape[:2]
    side = max(height, width)
    rows, columns = torch.meshgrid(torch.arange(height) / side, torch.arange(width) / side, indexing="ij")
    generator = torch.Generator().manual_seed(settings.seed)
    waves = torch.randn(2, FEATURES // 2, generator=generator) * SCALE * 2 * math.pi
    phase = torch.stack([rows, columns], -1).flatten(0, 1) @ waves
    x, y = torch.cat([phase.sin(), phase.cos()], 1), picture.flatten(0, 1)
    aside, rest = torch.randperm(len(x), generator=generator).tensor_split([len(x) // 4])
    return Image(*(t.to(settings.device) for t in (x[rest], y[rest], x[aside], y[aside])))


def field_of(neurons: int) -> nn.Module:
    """A dense field of so many neurons."""
    return nn.Sequential(*perceptron(FEATURES, 3, neurons, 2, 0), nn.Sigmoid())


def run_cell(cell: Cell, settings: Settings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each."""
    pixels = image(settings)
    after = cell.condition in (CONTINUED, FPE, FPE_MOVING)
    steps = STEPS * settings.epochs * (1 if after else 2)
    draws = [torch.Generator().manual_seed(settings.seed * 1009 + trial) for trial in range(settings.trials)]

    if after:
        models = list(_dense(cell.neurons, settings))
        if cell.condition != CONTINUED:
            each = zip(models, draws, strict=True)
            models = [fpe.expand(m, cell.width, resparsify="magnitude", generator=draw) for m, draw in each]
    else:
        wide = cell.condition == WIDE
        neurons = cell.neurons * (cell.width if wide else 1)
        models = seeded(lambda: field_of(neurons), settings.trials, settings.seed)
        if not wide:
            models = [fpe.sparse(m, cell.width, generator=draw) for m, draw in zip(models, draws, strict=True)]
    regrow = {FPE_MOVING: "random", RIGL: "gradient"}.get(cell.condition)
    stack = _trained(models, settings, 1, steps, moving(models, steps, draws, regrow) if regrow else None)
    learnt, others = (decibels(stack, *pair) for pair in _parts(pixels))
    return [
        {
            **asdict(cell),
            "trial": trial,
            "decibels": round(learnt[trial], 4),
            "validation_decibels": round(others[trial], 4),
            "nonzeros": stack.nonzeros[trial],
        }
        for trial in range(settings.trials)
    ]


def _parts(pixels: Image) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (pixels.x, pixels.y), (pixels.x_validation, pixels.y_validation)


@lru_cache(maxsize=1)
def _dense(neurons: int, settings: Settings) -> list[nn.Module]:
    models = seeded(lambda: field_of(neurons), settings.trials, settings.seed)
    return [model.cpu() for model in _trained(models, settings, 0, STEPS * settings.epochs).models()]


def _trained(models: Sequence[nn.Module], settings: Settings, stage: int, steps: int, move: Any = None) -> Stack:
    """Trains fields side by side, each on pixels of its own."""
    stack = Stack([model.to(settings.device) for model in models])
    generator = torch.Generator().manual_seed(settings.seed * 1009 + stage)
    training = Training(settings.epochs, settings.batch, settings.lr)
    stack.train(_batches(settings, steps, len(models), generator), training, _squared, own=True, move=move)
    return stack


def _batches(
    settings: Settings, steps: int, networks: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    pixels = image(settings)
    for _ in range(steps):
        drawn = torch.randint(len(pixels.x), (networks, settings.batch), generator=generator)
        yield pixels.x[drawn], pixels.y[drawn]


def _squared(colours: Tensor, y: Tensor) -> Tensor:
    return (colours - y).square().mean((1, 2)).sum()


@torch.no_grad()
def decibels(stack: Stack, x: Tensor, y: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of every network over some pixels, in decibels."""
    error = torch.zeros(len(stack), dtype=torch.float64)
    for places, colours in zip(x.split(4096), y.split(4096), strict=True):
        error += (stack(places) - colours).double().square().sum((1, 2)).cpu()
    return (-10 * (error / y.numel()).log10()).tolist()


def over_dense(results: Results) -> pd.DataFrame:
    """The rows beside the dense network's of the same neurons; ``gain`` in decibels on the pixels that were learnt."""
    frame, key = results.frame, ["neurons", "trial"]
    dense = frame[frame["condition"] == CONTINUED].set_index(key)["decibels"].rename("dense")
    joined = frame.join(dense, on=key)
    return joined.assign(gain=joined["decibels"] - joined["dense"])


def table(results: Results, shown: Sequence[Cell]) -> Table:
    """A row for each method and width."""
    frame = over_dense(results)
    rows = []
    frame = frame.sort_values("neurons", ascending=False, kind="stable")
    for (neurons, method, width), own in frame.groupby(["neurons", "condition", "width"], sort=False):
        control = method == CONTINUED
        rows.append(
            (
                f"{neurons}",
                str(method),
                "-" if control else f"{width}",
                f"{own['nonzeros'].iloc[0]}",
                interval(own["decibels"], 2),
                "-" if control else interval(own["gain"], 2, "+"),
                interval(own["validation_decibels"], 2),
            )
        )
    s = results.settings
    steps = STEPS * s["epochs"]
    about = f"{Path(s['data']).stem}, {FEATURES} Fourier features, {steps} + {steps} steps, {s['trials']} trials"
    columns = ("neurons", "method", "width", "non-zeros", "PSNR, dB", "over dense, dB", "PSNR of unseen pixels, dB")
    return Table(f"A neural field ({about}; nothing chosen on these pixels; ± is a 95 % interval)", columns, rows)


LOOKS = {
    CONTINUED: "#4a4f57",
    FPE: "#2a7de1",
    FPE_MOVING: "#0c8599",
    STATIC: "#2f9e44",
    RIGL: "#e8590c",
    WIDE: "#8a8f98",
}


def by_weights(several: Sequence[Results]) -> Figure:
    """PSNR by non-zero weights, a panel for each image."""
    made, axes = figure(4.2 * len(several), 4.4, len(several))
    for axis, results in zip(axes, several, strict=True):
        frame = results.frame
        for method, colour in LOOKS.items():
            own = frame[frame["condition"] == method]
            for width, rows in own.groupby("width"):
                label = method if method == CONTINUED else f"{method}, width {width}"
                line(axis, rows, "nonzeros", colour, label, "decibels", "-" if width == 2 else ":")
        doubling(axis)
        title = f"An image learned: {Path(results.settings['data']).stem}"
        axis.set(xlabel="non-zero weights", ylabel="PSNR of the image, dB", title=title)
    below(made, 3)
    return made


FILES = ("field-china", "field-flower")
"""Committed rows."""

SWEEP: Sweep = Sweep(
    "field",
    "Learn an image as a neural field: FPE, sparse training and more weights, in decibels.",
    "field",
    Settings,
    cells,
    run_cell,
    table,
    [Cell(name, 4) for name in (CONTINUED, FPE, RIGL, WIDE)],
    {"trials": 2, "epochs": 1, "batch": 32, "pixels": 20},
    tables={name: lambda name=name: SWEEP.shown(name) for name in FILES},  # type: ignore[misc]
    figures={"field": lambda: by_weights([committed(name) for name in FILES])},
)
STUDIES = (SWEEP,)
