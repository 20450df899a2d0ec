"""Real data sets, from files or packages that are already on the machine; nothing is downloaded."""

import gzip
from pathlib import Path

import numpy as np
import torch

from .protocol import Data

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the files."""


def load_fashion_mnist(folder: Path = FASHION_MNIST) -> Data:
    """Fashion-MNIST from its four ``*-ubyte.gz`` files: 60 000 + 10 000 images, 784 pixels in 0 .. 1.

    Raises:
        FileNotFoundError: A file is missing.
    """

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    def images(name: str) -> torch.Tensor:
        return torch.from_numpy(read(name, 16).reshape(-1, 784).astype(np.float32) / 255)

    def labels(name: str) -> torch.Tensor:
        return torch.from_numpy(read(name, 8).astype(np.int64))

    return Data(
        images("train-images-idx3-ubyte.gz"),
        labels("train-labels-idx1-ubyte.gz"),
        images("t10k-images-idx3-ubyte.gz"),
        labels("t10k-labels-idx1-ubyte.gz"),
    )


def load_digits() -> Data:
    """The 8 x 8 handwritten digits that scikit-learn ships (UCI): 1 437 + 360 images, pixels in 0 .. 1."""
    from sklearn.datasets import load_digits as load

    digits = load()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.from_numpy((digits.data[order] / 16).astype(np.float32))
    y = torch.from_numpy(digits.target[order].astype(np.int64))
    return Data(x[:1437], y[:1437], x[1437:], y[1437:])


def load_features(path: Path) -> Data:
    """Frozen features from an ``.npz`` with ``X [n, d]``, ``y [n]``, ``Xt [m, d]`` and ``yt [m]``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is missing, or the sizes do not agree.
    """
    with np.load(path) as file:
        missing = [key for key in ("X", "y", "Xt", "yt") if key not in file]
        if missing:
            raise ValueError(f"{path}: expected the arrays X, y, Xt, yt; missing {', '.join(missing)}")
        x, x_test = (torch.from_numpy(file[key].astype(np.float32)) for key in ("X", "Xt"))
        y, y_test = (torch.from_numpy(file[key].astype(np.int64)) for key in ("y", "yt"))
    if len(x) != len(y) or len(x_test) != len(y_test) or x.shape[1:] != x_test.shape[1:] or x.dim() != 2:
        shapes = [tuple(t.shape) for t in (x, y, x_test, y_test)]
        raise ValueError(f"{path}: expected X [n, d], y [n], Xt [m, d], yt [m], got {shapes}")
    return Data(x, y, x_test, y_test)
