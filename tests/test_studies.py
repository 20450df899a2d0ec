"""The studies' runner: stacks train what the package's layers train, sweeps resume, every study runs."""


import pytest
import torch
from support import Recipe, mlp, readable_id, seeded
from torch import nn

import fpe
from fpe.bench.studies.protocol import Data, Training
from fpe.bench.studies.stack import Stack, classification_loss, epochs_of

STACKED = (
    Recipe(),
    Recipe("2:4", "input"),
    Recipe("block", "block"),
    Recipe("block", "input"),
    Recipe(resparsify="partition"),
    Recipe(alpha=3),
)


def problem(classes: int = 6) -> Data:
    x, y = torch.randn(96, 24, generator=seeded(1)), torch.randint(classes, (96,), generator=seeded(2))
    return Data(x, y, x[:50], y[:50])


@pytest.mark.parametrize("recipe", STACKED, ids=readable_id)
def test_a_stack_trains_what_the_layers_train(recipe: Recipe) -> None:
    data = problem()
    models = [recipe.expand(mlp(24, 13, 6, seed=seed), seed) for seed in range(3)]
    stack = Stack(models)
    stack.train(epochs_of(data, 3, 32, seeded()), Training(3, 32, 1e-2, l2=1e-3), classification_loss)
    for model, stacked in zip(models, stack.models(), strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-3)
        for x, y in epochs_of(data, 3, 32, seeded()):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        for ours, theirs in zip(fpe.to_dense(model).parameters(), stacked.parameters(), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_classification_loss_is_cross_entropy() -> None:
    logits = torch.randn(3, 5, 7, generator=seeded(), dtype=torch.float64, requires_grad=True)
    y = torch.randint(7, (5,), generator=seeded())
    for shown, targets in ((logits, y), (logits[..., :1], (y > 3).double())):
        ours = classification_loss(shown, targets)
        if shown is logits:
            theirs = sum(nn.functional.cross_entropy(one, y) for one in logits)
        else:
            theirs = sum(nn.functional.binary_cross_entropy_with_logits(one[:, 0], targets) for one in shown)
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*gradients)
