"""Trials of perceptrons with validation samples and an order of the samples for each: what the later studies share.

A choice between methods, schedules or settings is made on the validation samples; the test is reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from . import mlp, sweep
from .protocol import Data, Training
from .stack import Move, Stack, classification_loss, own_epochs_of, seeded
from .vision import load

VALIDATION = 0.1
"""Share of the training samples that choices are made on."""


@dataclass(frozen=True)
class Settings(mlp.Settings):
    """Settings of perceptrons: every trial has its own weights, masks and order of the samples.

    Attributes:
        l1: Strength of the L1 penalty on the first layer's weights.
        l2: Strength of the L2 penalty on all parameters.
    """

    l1: float = 0.0
    l2: float = 0.0


@lru_cache(maxsize=2)
def load_held_out(data: str, device: str = "cpu") -> Data:
    """A data set with its validation samples set aside, kept in memory."""
    return load(data).held_out(VALIDATION).to(device)


def sizes(data: Data) -> tuple[int, int]:
    """Inputs and classes."""
    return data.x.shape[1], int(data.y.max()) + 1


def generators(settings: sweep.Settings, stage: int) -> list[torch.Generator]:
    """A generator for each trial; stages of one trial draw other numbers."""
    trials = range(settings.trials)
    return [torch.Generator().manual_seed((settings.seed + stage * 7919) * 1009 + trial) for trial in trials]


def train(
    models: Sequence[nn.Module], data: Data, epochs: int, settings: Settings, stage: int, move: Move | None = None
) -> Stack:
    """Trains classifiers side by side, each on its own order of the samples.

    Args:
        models: The networks.
        data: What they learn.
        epochs: Passes over it.
        settings: Batch, step size, seed and device.
        stage: Number of this training in the networks' lives: 0 for the first.
        move: What changes their masks.
    """
    stack = Stack([model.to(settings.device) for model in models])
    batches = own_epochs_of(data, epochs, settings.batch, generators(settings, stage))
    training = Training(epochs, settings.batch, settings.lr, settings.l1, settings.l2)
    stack.train(batches, training, classification_loss, own=True, move=move)
    return stack


@lru_cache(maxsize=16)
def compact(data: Data, neurons: int, epochs: int, settings: Settings) -> list[nn.Module]:
    """Dense networks of one hidden layer after so many epochs, on the CPU."""
    models = seeded(lambda: mlp.perceptron(*sizes(data), neurons, 2, 0), settings.trials, settings.seed)
    return [model.cpu() for model in train(models, data, epochs, settings, 0).models()] if epochs else models


def measured(stack: Stack, data: Data) -> list[dict[str, float]]:
    """Of every network the weights that it keeps and its accuracies in percent, on validation samples and test."""
    columns: dict[str, Sequence[float]] = {
        "validation_accuracy": stack.accuracy(data.x_validation, data.y_validation),
        "test_accuracy": stack.accuracy(data.x_test, data.y_test),
        "nonzeros": stack.nonzeros,
    }
    return [{name: round(values[i], 4) for name, values in columns.items()} for i in range(len(stack))]
