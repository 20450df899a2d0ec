"""Tables of the sweeps, drawn from their rows."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from scipy import stats

from ..results import Results
from ..summary import Table
from .conditions import CONTINUED, DENSE
from .mlp import Cell


def interval(values: object, places: int = 1, sign: str = "") -> str:
    """Mean and half the width of its 95 % confidence interval (Student's t); the mean alone of a single value."""
    array = np.asarray(values, dtype=float)
    mean = f"{array.mean():{sign}.{places}f}"
    if len(array) < 2:
        return mean
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5
    return f"{mean} ± {half:.{places}f}"


def against_control(results: Results) -> pd.DataFrame:
    """The rows of perceptrons beside their control's, trial by trial.

    Columns added: ``control`` (accuracy of the dense network of the same shape that trained as long), ``points`` and
    ``relative`` (gain over it, in points and in percent of it).
    """
    frame = results.frame
    shape = ["neurons", "layers", "around", "trial"]
    control = frame[frame["condition"] == CONTINUED].set_index(shape)["test_accuracy"].rename("control")
    joined = frame.join(control, on=shape)
    joined["points"] = joined["test_accuracy"] - joined["control"]
    joined["relative"] = joined["points"] / joined["control"] * 100
    return joined


def perceptrons(results: Results, cells: Sequence[Cell], title: str) -> Table:
    """A row for each cell of a study: accuracy, gain over the control, and which layer kept how many weights."""
    frame = against_control(results)
    rows = []
    for cell in dict.fromkeys(cells):
        own = frame[np.logical_and.reduce([frame[name] == value for name, value in asdict(cell).items()])]
        if not len(own):
            continue
        dense = cell.condition in (DENSE, CONTINUED)
        rows.append(
            (
                _label(cell),
                f"{cell.neurons}",
                "-" if dense else f"{cell.alpha}",
                interval(own["test_accuracy"]),
                "-" if dense or own["points"].isna().all() else interval(own["points"], 2, "+"),
                "-" if dense or own["points"].isna().all() else interval(own["relative"], 1, "+"),
                f"{own['cosine_similarity'].mean():+.3f}",
                f"{own['first_nonzeros'].mean():.0f} + {own['second_nonzeros'].mean():.0f}",
            )
        )
    columns = ("condition", "neurons", "alpha", "test %", "points", "relative %", "cosine", "non-zeros of the pair")
    return Table(f"{title} ({_about(results)}; ± is a 95 % interval)", columns, rows)


def _label(cell: Cell) -> str:
    parts = [cell.condition]
    if cell.layers != Cell.layers:
        parts.append(f"{cell.layers} layers")
    if cell.split != Cell.split:
        parts.append(f"split after {cell.split:.0%}")
    if cell.rewire:
        parts.append(f"rewired, {cell.rewire}")
    return ", ".join(parts)


def _about(results: Results) -> str:
    s = results.settings
    return f"{s['data']}, {s['epochs']} + {s['epochs']} epochs, {s['trials']} trials"
