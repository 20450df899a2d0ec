"""What the tests beside other packages need: ``make test-ecosystem`` runs them, ``make test`` does not."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

try:
    import torchvision  # noqa: F401
except RuntimeError:  # built for CUDA, beside a PyTorch without: two operations of detection models are missing
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_addoption(parser: pytest.Parser) -> None:
    """An option of ``test_architectures.py``."""
    parser.addoption("--write-table", action="store_true", help="write the table of docs/models.md")
