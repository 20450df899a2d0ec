"""A classifier of handwritten digits: train, expand, train on, save, restore.

    python examples/classifier.py

Both networks train for the same number of epochs: halfway, one copy of the dense network is expanded, and the other
trains on unchanged. The digits are part of scikit-learn (``pip install 'fixed-parameter-expansion[bench]'``).
"""

import argparse
import time
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fpe

Data = tuple[Tensor, Tensor]


def digits(seed: int) -> tuple[Data, Data]:
    """1 347 digits to train with and 450 to test with: pixels ``[digits, 64]`` from 0 to 1, and names 0 to 9."""
    x, y = (torch.as_tensor(t) for t in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order].float() / 16, y[order]
    return (x[:1347], y[:1347]), (x[1347:], y[1347:])


def train(model: nn.Module, data: Data, epochs: int, seed: int) -> float:
    """Trains with a new optimizer; returns the milliseconds of a step."""
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    begin, steps = time.perf_counter(), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            steps += 1
    return 1e3 * (time.perf_counter() - begin) / max(steps, 1)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Percent of the digits that are classified correctly."""
    x, y = data
    return 100 * (model(x).argmax(-1) == y).float().mean().item()


def main() -> None:
    """Prints a line for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=6, help="hidden neurons of the dense network")
    parser.add_argument("--alpha", type=int, default=2, help="children of a neuron")
    parser.add_argument("--epochs", type=int, default=40, help="epochs before the expansion, and again after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three epochs")
    options = parser.parse_args()
    epochs = 3 if options.quick else options.epochs

    training, test = digits(options.seed)
    torch.manual_seed(options.seed)
    dense = nn.Sequential(nn.Linear(64, options.neurons), nn.ReLU(), nn.Linear(options.neurons, 10))
    train(dense, training, epochs, options.seed)
    wide = fpe.expand(dense, alpha=options.alpha, generator=torch.Generator().manual_seed(options.seed))
    before = deepcopy(dense)
    times = {"dense": train(dense, training, epochs, options.seed + 1)}
    times["expanded"] = train(wide, training, epochs, options.seed + 1)

    with TemporaryDirectory() as folder:
        files = {"dense": Path(folder) / "dense.safetensors", "expanded": Path(folder) / "expanded.safetensors"}
        save_file(dense.state_dict(), files["dense"])
        fpe.save(wide, files["expanded"])
        restored = fpe.restore(before, files["expanded"])
        assert torch.equal(restored(test[0]), wide(test[0]))
        print(f"{'':10} {'accuracy':>9} {'non-zeros':>10} {'file':>8} {'a step':>8}")
        print(f"{'half-way':10} {accuracy(before, test):8.1f}% {fpe.nonzeros(before):10}")
        for name, model in (("dense", dense), ("expanded", restored)):
            size = files[name].stat().st_size
            print(f"{name:10} {accuracy(model, test):8.1f}% {fpe.nonzeros(model):10} {size:7}B {times[name]:6.2f}ms")


if __name__ == "__main__":
    main()
