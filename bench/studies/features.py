"""Frozen features of a user's own images, through torchvision's data sets and open_clip's encoders, both optional."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from ..cli.options import check_folder, device_option
from .study import OwnCommand

Batches = Iterable[tuple[Tensor, Tensor]]

DATASETS = ("cifar100", "cifar10", "imagenet", "folder")
"""What :func:`image_sets` loads; ``"folder"`` is any ``train/`` and ``val/`` of a folder for each class."""


def image_sets(name: str, root: Path, transform: Callable) -> tuple[Any, Any]:
    """Training and test set of labelled images.

    Args:
        name: One of :data:`DATASETS`.
        root: Where the data set lies; nothing is downloaded.
        transform: From an image to what the encoder takes.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: The files are not there (torchvision's own message).
    """
    from torchvision import datasets

    if name == "imagenet":
        return tuple(datasets.ImageNet(root, split=split, transform=transform) for split in ("train", "val"))
    if name == "folder":
        return tuple(datasets.ImageFolder(root / split, transform=transform) for split in ("train", "val"))
    kind = {"cifar100": datasets.CIFAR100, "cifar10": datasets.CIFAR10}[name]
    return tuple(kind(root, train=train, transform=transform) for train in (True, False))


def clip_encoder(model: str, pretrained: str, device: str) -> tuple[Callable[[Tensor], Tensor], Callable]:
    """A CLIP image encoder and the transform of its images.

    Args:
        model: open_clip's name, as ``"ViT-B-16"`` (the paper's).
        pretrained: open_clip's name of the weights, or a file.
        device: Where it runs.

    Raises:
        ImportError: open_clip is not installed.
    """
    import open_clip

    network, _, transform = open_clip.create_model_and_transforms(model, pretrained=pretrained, device=device)
    return network.eval().encode_image, transform


@torch.no_grad()
def extract(encode: Callable[[Tensor], Tensor], batches: Batches, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Features, float16 ``[n, d]``, and labels, int64 ``[n]``, of all images.

    Raises:
        ValueError: There is no image.
    """
    features, labels = [], []
    for images, classes in batches:
        features.append(encode(images.to(device)).float().cpu().numpy().astype(np.float16))
        labels.append(np.asarray(classes, dtype=np.int64))
    if not features:
        raise ValueError("features: the data set holds no images")
    return np.concatenate(features), np.concatenate(labels)


@click.command("features")
@click.option("--dataset", type=click.Choice(DATASETS), default="cifar100", show_default=True, help="Whose images.")
@click.option(
    "--root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Its folder."
)
@click.option("--model", default="ViT-B-16", show_default=True, help="open_clip's name of the encoder.")
@click.option("--pretrained", default="openai", show_default=True, help="open_clip's name of its weights, or a file.")
@click.option("--batch", type=click.IntRange(1), default=256, show_default=True, help="Images at a time.")
@device_option
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The .npz to write.")
def features_command(
    dataset: str, root: Path, model: str, pretrained: str, batch: int, device: str, output: Path
) -> None:
    """Encode your own images with CLIP, for --data of the other studies.

    Needs torchvision and open_clip: pip install torchvision open_clip_torch.
    """
    check_folder(output.parent)
    try:
        encode, transform = clip_encoder(model, pretrained, device)
        sets = image_sets(dataset, root, transform)
        loaders = [torch.utils.data.DataLoader(images, batch_size=batch) for images in sets]
        (x, y), (x_test, y_test) = (extract(encode, loader, device) for loader in loaders)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    np.savez(output, X=x, y=y, Xt=x_test, yt=y_test)
    click.echo(f"Features: {output.resolve()}")


STUDIES = (OwnCommand("features", features_command),)
