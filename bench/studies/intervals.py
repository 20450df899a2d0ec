"""What stands behind a mean. ``±`` is half of a 95 % interval across trials; a standard deviation is called sd."""

import numpy as np
import numpy.typing as npt
from scipy import stats


def mean_and_half(values: npt.ArrayLike) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval (Student's t); 0 of a single value."""
    mean, sd = mean_and_sd(values)
    count = np.size(values)
    return mean, float(stats.t.ppf(0.975, count - 1) * sd / count**0.5) if count > 1 else 0.0


def mean_and_sd(values: npt.ArrayLike) -> tuple[float, float]:
    """Mean and the trials' own standard deviation, of the sample; 0 of a single value."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


def interval(values: npt.ArrayLike, places: int = 1, sign: str = "") -> str:
    """Mean ± half its 95 % interval; the mean alone of one value, a dash of none."""
    count = np.size(values)
    if not count:
        return "-"
    mean, half = mean_and_half(values)
    return f"{mean:{sign}.{places}f} ± {half:.{places}f}" if count > 1 else f"{mean:{sign}.{places}f}"
