"""The studies' data: sets that come with packages, images, and features of one's own."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.image import imsave
from torch import nn

from fpe.bench.cli import cli
from fpe.bench.studies import data


def test_features_round_trip_and_refusals(tmp_path: Path) -> None:
    arrays = {"X": np.ones((4, 3), np.float16), "y": np.arange(4), "Xt": np.zeros((2, 3)), "yt": np.arange(2)}
    np.savez(tmp_path / "f.npz", **arrays)
    loaded = data.load_features(tmp_path / "f.npz")
    assert loaded.x.dtype == torch.float32 and loaded.y.tolist() == [0, 1, 2, 3] and loaded.x_test.shape == (2, 3)
    np.savez(tmp_path / "short.npz", X=arrays["X"], y=arrays["y"], yt=arrays["yt"])
    with pytest.raises(ValueError, match=r"missing Xt$"):
        data.load_features(tmp_path / "short.npz")
    np.savez(tmp_path / "odd.npz", **{**arrays, "y": np.arange(3)})
    with pytest.raises(ValueError, match="expected X"):
        data.load_features(tmp_path / "odd.npz")


def test_features_without_a_test_set_are_divided_the_same_way_every_time(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", X=np.arange(70, dtype=np.float16)[:, None], y=np.arange(70))
    one, two = (data.load_features(tmp_path / "f.npz") for _ in range(2))
    assert len(one.y_test) == 10 and torch.equal(one.y_test, two.y_test)
    assert sorted([*one.y.tolist(), *one.y_test.tolist()]) == list(range(70))
    assert all(torch.equal(x[:, 0].long(), y) for x, y in ((one.x, one.y), (one.x_test, one.y_test)))
    assert one.y_test.diff().unique().numel() > 1  # shuffled: files are often sorted by class


def test_digits_are_a_real_set() -> None:
    digits = data.load_digits()
    assert (len(digits.x), len(digits.x_test), digits.x.shape[1]) == (1437, 360, 64)
    assert digits.x.min() >= 0 and digits.x.max() == 1 and set(digits.y.tolist()) == set(range(10))


def test_cifar10_is_read_as_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 1024, 3), dtype=np.uint8)
    for number, part in enumerate(pixels):
        name = "test_batch.png" if number == 5 else f"data_batch_{number + 1}.png"
        imsave(tmp_path / name, part)
    (tmp_path / "train_lables.json").write_text(json.dumps([i % 10 for i in range(20)]))
    (tmp_path / "test_lables.json").write_text("[3, 1, 4, 1]")
    read = data.load_cifar10(tmp_path)
    assert read.x.shape == (20, 3, 32, 32) and read.y_test.tolist() == [3, 1, 4, 1] and read.y[13] == 3
    shown = torch.from_numpy(pixels[1, 2].reshape(32, 32, 3)).permute(2, 0, 1) / 255
    torch.testing.assert_close(read.x[6], shown)
    (tmp_path / "test_lables.json").write_text("[3]")
    with pytest.raises(ValueError, match="as many labels as images"):
        data.load_cifar10(tmp_path)


def test_features_of_ones_own_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With stand-ins for open_clip and torchvision: sets, labels and the file are put together as they should be."""
    asked: list[object] = []

    class Encoder(nn.Module):
        def encode_image(self, images: torch.Tensor) -> torch.Tensor:
            assert not self.training and not torch.is_grad_enabled()
            return images.flatten(1)[:, :3] * 2

    def create(model: str, pretrained: str, device: str) -> tuple:
        asked.append((model, pretrained, device))
        return Encoder(), None, lambda number: torch.full((1, 2, 2), float(number))

    def images(root: Path, train: bool, transform: object) -> list:
        asked.append((root, train))
        return [(transform(number), number % 3) for number in range(5 if train else 2)]  # type: ignore[operator]

    open_clip, torchvision = ModuleType("open_clip"), ModuleType("torchvision")
    open_clip.create_model_and_transforms = create  # type: ignore[attr-defined]
    torchvision.datasets = SimpleNamespace(CIFAR100=images, CIFAR10=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "open_clip", open_clip)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    path = tmp_path / "f.npz"
    arguments = ["study", "features", "--root", str(tmp_path), "--batch", "2", "--output", str(path)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert asked == [("ViT-B-16", "openai", "cpu"), (tmp_path, True), (tmp_path, False)]
    read = data.load_features(path)
    assert read.x[:, 0].tolist() == [0, 2, 4, 6, 8] and read.y.tolist() == [0, 1, 2, 0, 1]
    assert read.x_test.shape == (2, 3) and read.y_test.tolist() == [0, 1]


def test_features_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    arguments = ["study", "features", "--root", str(tmp_path), "--output", str(tmp_path / "f.npz")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code != 0 and "open_clip" in done.output and "Traceback" not in done.output
