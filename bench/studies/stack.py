"""Many small networks of one shape, trained at once: their weights are stacked and the forward runs over the stack.

A network of a few neurons keeps no core busy by itself. Expanded networks join as their dense equivalents with masks:
a removed weight starts at zero and gets no gradient, which is what the FPE layers do (a test compares them).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import fpe
from fpe.layers import ExpandedLinear

from .protocol import Data, Training

Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Iterator[tuple[Tensor, Tensor]]
Move = Callable[[int, "Stack", dict[str, Tensor]], dict[str, Tensor] | None]
"""What may move masks after a step: from the steps taken, the stack and the gradients of all places of its masked
weights to new masks by name, or to nothing."""


class Stack:
    """Networks of one architecture and size, trained side by side.

    Args:
        models: The networks, expanded or dense; they are copied.

    Attributes:
        parameters: Every parameter by name, the networks stacked in front.
        masks: For the weights of expanded layers, which entries exist.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        dense = [fpe.to_dense(model) for model in models]
        self._skeleton = dense[0]
        self.parameters, self._buffers = stack_module_state(dense)
        self.masks = {
            f"{name}.weight" if name else "weight": torch.stack([m.get_submodule(name).kept() for m in models])  # type: ignore[operator]
            for name, module in models[0].named_modules()
            if isinstance(module, ExpandedLinear)
        }

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def __call__(self, x: Tensor, own: bool = False) -> Tensor:
        """Outputs of every network, ``[networks, *outputs]``.

        Args:
            x: The same input for all networks; with ``own`` one for each, stacked in front.
            own: Whether every network has an input of its own.
        """

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self._skeleton, (parameters, buffers), (x,))

        run = vmap(one, in_dims=(0, 0, 0 if own else None), randomness="different")
        return run(self.parameters, self._buffers, x)

    def models(self) -> list[nn.Module]:
        """The networks, one by one, as plain dense modules."""
        unstacked = []
        for i in range(len(self)):
            model = copy.deepcopy(self._skeleton)
            model.load_state_dict({n: t[i].detach() for n, t in {**self.parameters, **self._buffers}.items()})
            unstacked.append(model)
        return unstacked

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weight matrices by name, stacked."""
        return {name: parameter for name, parameter in self.parameters.items() if parameter.dim() > 2}

    @property
    def nonzeros(self) -> list[int]:
        """Weights that each network keeps."""
        kept = [
            self.masks.get(name, torch.ones_like(weight)).flatten(1).sum(1) for name, weight in self.weights.items()
        ]
        return sum(kept).int().tolist()  # type: ignore[union-attr]

    def train(
        self,
        batches: Batches,
        training: Training,
        loss: Loss,
        own: bool = False,
        move: Move | None = None,
        rate: Callable[[int], float] | None = None,
    ) -> None:
        """Takes a step of Adam on every batch; the loss is summed over the networks, so that each has its own.

        Args:
            batches: Inputs and targets, the same for all networks; with ``own`` one of each for every network.
            training: Optimizer and penalties.
            loss: From outputs ``[networks, ...]`` and targets to the sum of the networks' mean losses.
            own: Whether every network has batches of its own.
            move: What changes the masks, after each step. Edges that come begin at zero, in Adam's moments as well.
            rate: From the step's number, beginning with 1, to the share of the step size that it takes; all of it
                without.
        """
        optimizer = torch.optim.Adam(self.parameters.values(), lr=training.lr, weight_decay=training.l2, fused=True)
        first = next(iter(self.weights.values()))
        for step, (x, y) in enumerate(batches, 1):
            if rate:
                optimizer.param_groups[0]["lr"] = training.lr * rate(step)
            optimizer.zero_grad()
            total = loss(self(x, own), y)
            if training.l1:
                total = total + training.l1 * first.abs().sum()
            total.backward()
            gradients = {n: self.parameters[n].grad.clone() for n in self.masks} if move else {}
            for name, mask in self.masks.items():
                self.parameters[name].grad.mul_(mask)
            optimizer.step()
            moved = move(step, self, gradients) if move else None
            if moved:
                self._take(moved, optimizer)

    @torch.no_grad()
    def _take(self, masks: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Takes other masks: what is dropped is zero from here on, and what comes was zero until now."""
        self.masks.update(masks)
        for name, mask in masks.items():
            weight = self.parameters[name]
            state = optimizer.state[weight]
            for tensor in (weight, state["exp_avg"], state["exp_avg_sq"]):
                tensor.mul_(mask)

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor, chunk: int = 4096) -> list[float]:
        """Share of samples that each network classifies correctly, in percent."""
        right = torch.zeros(len(self))
        for x_part, y_part in zip(x.split(chunk), y.split(chunk), strict=True):
            logits = self(x_part)
            predicted = logits.squeeze(-1) > 0 if logits.shape[-1] == 1 else logits.argmax(-1)
            right += (predicted == y_part).sum(1)
        return (right.double() / len(x) * 100).tolist()


def train_all(models: Sequence[nn.Module], batches: Batches, training: Training, device: str) -> Stack:
    """Classifiers of one size, trained side by side on a device."""
    stack = Stack([model.to(device) for model in models])
    stack.train(batches, training, classification_loss)
    return stack


def seeded(make: Callable[[], nn.Module], trials: int, seed: int) -> list[nn.Module]:
    """A network for each trial, from a seed of its own."""
    models = []
    for trial in range(trials):
        torch.manual_seed(seed * 1009 + trial)
        models.append(make())
    return models


class _CrossEntropy(torch.autograd.Function):
    """Softmax and cross-entropy in one: half the passes over the logits that PyTorch's own takes on a CPU."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        shares = logits.softmax(-1)
        index = y.expand(logits.shape[:-1])[..., None]
        ctx.save_for_backward(shares, index)
        return -shares.gather(-1, index).clamp_min(1e-30).log().sum() / index.shape[-2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shares, index = ctx.saved_tensors
        scale = grad / index.shape[-2]
        return (shares * scale).scatter_add_(-1, index, -scale.expand(index.shape)), None


def classification_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of ``[networks, samples, classes]`` or one logit: summed over networks, averaged over samples.

    Targets are ``[samples]``, or ``[networks, samples]``.
    """
    if logits.shape[-1] > 1:
        return _CrossEntropy.apply(logits, y)
    logits = logits.squeeze(-1)
    targets = y.to(logits.dtype).expand(logits.shape)
    return nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / y.shape[-1]


def epochs_of(data: Data, epochs: int, batch: int, generator: torch.Generator) -> Batches:
    """Batches of so many passes over the data, shuffled anew in each."""
    for _ in range(epochs):
        order = torch.randperm(len(data.x), generator=generator).to(data.x.device)
        for part in order.split(batch):
            yield data.x[part], data.y[part]


def own_epochs_of(data: Data, epochs: int, batch: int, generators: Sequence[torch.Generator]) -> Batches:
    """Batches of so many passes over the data, in an order of its own for each network: ``[networks, batch, ...]``."""
    for _ in range(epochs):
        orders = torch.stack([torch.randperm(len(data.x), generator=one) for one in generators]).to(data.x.device)
        for part in orders.split(batch, 1):
            yield data.x[part], data.y[part]
