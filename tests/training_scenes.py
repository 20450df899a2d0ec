"""Scenes of two processes beside one: losses, bytes and checkpoints; ``test_layers_distributed.py`` plays them."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from support import mlp, seeded
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fpe

SIZES = (32, 16, 32, 16, 6)
STEPS, PARTS, ROWS = 20, 2, 8


def wide_model(seed: int = 0) -> nn.Sequential:
    """Both policies that keep the parent's tensors."""
    return fpe.expand(mlp(*SIZES), resparsify="partition", generator=seeded(seed))


def sharded(model: nn.Sequential) -> nn.Sequential:
    """By layer and at the root."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def rows(step: int, part: int, rank: int) -> Tensor:
    return torch.randn(ROWS, SIZES[0], generator=seeded(100 * step + 10 * part + rank))


def losses(model: nn.Module, ranks: list[int]) -> list[float]:
    """Of each step on the rows of some processes, with accumulation and clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    said = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for part in range(PARTS):
            batch = torch.cat([rows(step, part, rank) for rank in ranks])
            loss = model(batch).square().mean() / PARTS
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        said.append(total)
    return said


def losses_are_those_of_one_process(rank: int) -> None:
    alone = losses(wide_model(), [0, 1])
    assert alone[-1] < 0.9 * alone[0]
    for model in (DistributedDataParallel(wide_model()), sharded(wide_model())):
        own = torch.tensor(losses(model, [rank]))
        distributed.all_reduce(own)
        torch.testing.assert_close(own / 2, torch.tensor(alone), rtol=0, atol=1e-5)


class Traffic(TorchDispatchMode):
    """Bytes that collectives move, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name:
            size = sum(t.nbytes for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor))
            self.moved[name] = self.moved.get(name, 0) + size
        return result


def a_step_moves_the_parents_bytes(rank: int) -> None:
    """To the byte, without biases, which every child has a copy of."""
    moved = []
    for children in (1, 2):
        model = mlp(*SIZES, bias=False)
        if children > 1:
            model = fpe.expand(model, children, resparsify="partition", generator=seeded())
        model = sharded(model)
        with Traffic() as traffic:
            model(rows(0, 0, rank)).square().mean().backward()
        moved.append(traffic.moved)
    parent, expanded = moved
    weights = 4 * sum(a * b for a, b in pairwise(SIZES))
    assert parent["c10d::_reduce_scatter_base_"] == weights * 3 // 2  # what goes in whole, what comes out by halves
    assert expanded == parent


def checkpoints_change_hands(rank: int) -> None:
    """Saved by two, loaded by one with another topology, saved by that one, loaded by two."""
    with TemporaryDirectory() as own:
        place = [own]
        distributed.broadcast_object_list(place, 0)
        change_hands(rank, Path(place[0]))
        distributed.barrier()


def change_hands(rank: int, folder: Path) -> None:
    two = sharded(wide_model())
    losses(two, [rank])
    dcp.save({"model": get_model_state_dict(two)}, checkpoint_id=folder / "two")
    x = rows(0, 0, 7)
    wanted = two(x)
    if rank == 0:
        one = wide_model(seed=5)
        state = {"model": one.state_dict()}
        dcp.load(state, checkpoint_id=folder / "two", no_dist=True)
        one.load_state_dict(state["model"])
        torch.testing.assert_close(one(x), wanted)
        for layer, other in zip(one, wide_model(), strict=True):
            if hasattr(layer, "kept"):
                assert torch.equal(layer.kept(), other.kept())
        with torch.no_grad():
            one[0].edge_weight.mul_(2)
        torch.save(one(x), folder / "output")
        dcp.save({"model": one.state_dict()}, checkpoint_id=folder / "one", no_dist=True)
    distributed.barrier()
    again = sharded(wide_model(seed=9))
    state = {"model": get_model_state_dict(again)}
    dcp.load(state, checkpoint_id=folder / "one")
    set_model_state_dict(again, state["model"])
    torch.testing.assert_close(again(x), torch.load(folder / "output"))
