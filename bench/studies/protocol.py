"""What the studies share: train a dense network, split it, train on; trials side by side in processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pandas as pd
import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

import fpe
from fpe.layers import ExpandedLinear

from ..cli.progress import progress


@dataclass(frozen=True)
class Data:
    """A classification problem: inputs ``[samples, features]`` and integer targets to train on and to test on.

    Choices are made on validation samples, so that the test says something once; :meth:`held_out` sets them aside.
    Without it there are none.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    x_validation: Tensor = field(default_factory=lambda: torch.empty(0))
    y_validation: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def to(self, device: torch.device | str) -> "Data":
        """The same data on a device."""
        return Data(**{one.name: getattr(self, one.name).to(device) for one in fields(self)})

    def held_out(self, share: float, seed: int = 0) -> "Data":
        """The same data with a share of the training samples, drawn by a seed, set aside for validation.

        Raises:
            ValueError: The share is not between 0 and 1, or samples are set aside already.
        """
        if not 0 < share < 1 or len(self.x_validation):
            raise ValueError(
                f"held_out: expected a share between 0 and 1 of data without validation samples, got {share} and "
                f"{len(self.x_validation)} samples"
            )
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed)).to(self.x.device)
        aside, rest = order.tensor_split([round(share * len(order))])
        return Data(self.x[rest], self.y[rest], self.x_test, self.y_test, self.x[aside], self.y[aside])


@dataclass(frozen=True)
class Training:
    """How a network is trained: Adam, with L1 on the first layer and L2 on everything.

    Attributes:
        epochs: Epochs before the split, and again after it.
        batch: Samples to a step.
        lr: Adam's step size.
        l1: Strength of the L1 penalty on the first layer's weights.
        l2: Strength of the L2 penalty on all parameters (Adam's ``weight_decay``).
    """

    epochs: int
    batch: int
    lr: float
    l1: float = 0.0
    l2: float = 0.0


Watch = Callable[[int, nn.Module], None]


def fit(
    model: nn.Module,
    data: Data,
    training: Training,
    epochs: int,
    generator: torch.Generator,
    watch: Watch | None = None,
) -> nn.Module:
    """Trains a model in place with a new optimizer and returns it.

    A single output is a logit of binary cross-entropy, several are the logits of a softmax.

    Args:
        model: The network.
        data: Training data, on the model's device.
        training: Optimizer and penalties.
        epochs: Passes over the data.
        generator: Order of the samples (CPU).
        watch: Called after every epoch with its number, from 1, and the model.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=training.lr, weight_decay=training.l2, fused=True)
    layer = _first(model)
    first = layer.edge_weight if isinstance(layer, ExpandedLinear) else layer.weight
    model.train()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(data.x), generator=generator).to(data.x.device)
        x, y = data.x[order], data.y[order]
        for x_batch, y_batch in zip(x.split(training.batch), y.split(training.batch), strict=True):
            optimizer.zero_grad()
            loss = _loss(model(x_batch), y_batch)
            if training.l1:
                loss = loss + training.l1 * first.abs().sum()
            loss.backward()
            optimizer.step()
        if watch is not None:
            watch(epoch, model)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of samples that the model classifies correctly, in percent."""
    model.eval()
    logits = model(x)
    model.train()
    predicted = logits.squeeze(-1) > 0 if logits.shape[-1] == 1 else logits.argmax(-1)
    return float((predicted == y).double().mean()) * 100


def first_layer(model: nn.Module) -> Tensor:
    """Wide weight of a network's first layer, ``[neurons, features]``, detached."""
    return _first(model).weight.detach()


def _first(model: nn.Module) -> nn.Linear | ExpandedLinear:
    return next(m for m in model.modules() if isinstance(m, (nn.Linear, ExpandedLinear)))


def describe(model: nn.Module, data: Data) -> dict[str, Any]:
    """The facts that every study records of a trained network."""
    weight = first_layer(model)
    return {
        "test_accuracy": accuracy(model, data.x_test, data.y_test),
        "train_accuracy": accuracy(model, data.x, data.y),
        "feature_capacity": float(fpe.metrics.feature_capacity(weight).sum()),
        "cosine_similarity": float(fpe.metrics.mean_cosine_similarity(weight)),
        "nonzeros": fpe.nonzeros(model),
        "neurons": weight.shape[0],
    }


def described(rows: pd.DataFrame) -> tuple[str, str, str]:
    """What tables show of that: mean cosine, neurons and non-zeros."""
    return f"{rows['cosine_similarity'].mean():+.3f}", f"{rows['neurons'].iloc[0]}", f"{rows['nonzeros'].iloc[0]}"


def run_trials(job: Callable[..., Any], arguments: Sequence[dict[str, Any]], what: str, quiet: bool = False) -> list:
    """Runs a job for each set of arguments, two or more at a time, under a progress bar; keeps their order.

    Every job runs in a process of its own with one thread, so that results do not depend on the cores.
    """
    finished = dict(trials_as_they_end(job, arguments, what, quiet))
    return [finished[i] for i in range(len(arguments))]


def trials_as_they_end(
    job: Callable[..., Any], arguments: Sequence[dict[str, Any]], what: str, quiet: bool = False, before: int = 0
) -> Iterator[tuple[int, Any]]:
    """:func:`run_trials`, each with its number as it ends; ``before`` so many of an earlier run the bar begins."""
    jobs: Iterable = (delayed(_single_threaded)(i, job, kwargs) for i, kwargs in enumerate(arguments))
    done: Iterator = Parallel(n_jobs=-1, return_as="generator_unordered")(jobs)
    yield from progress(done, what, before + len(arguments), before, quiet)


def _single_threaded(number: int, job: Callable[..., Any], kwargs: dict[str, Any]) -> tuple[int, Any]:
    torch.set_num_threads(1)
    return number, job(**kwargs)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.shape[-1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(logits.squeeze(-1), targets.to(logits.dtype))
    return nn.functional.cross_entropy(logits, targets)
