"""Two processes: DistributedDataParallel, FSDP2, and masks that move in both alike."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from processes import Scene, assert_played, play
from support import Recipe, expanded_layers, mlp, seeded
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_scenes import (
    a_step_moves_the_parents_bytes,
    checkpoints_change_hands,
    losses_are_those_of_one_process,
)

import fpe

SIZES = (32, 13, 6)
RECIPES = (Recipe(), Recipe(resparsify="partition", alpha=3), Recipe("2:4", "input"), Recipe("block", "block"))


def batch(seed: int) -> Tensor:
    return torch.randn(16, SIZES[0], generator=seeded(seed))


def assert_everywhere(*tensors: Tensor) -> None:
    """Every process holds the same bits."""
    for t in tensors:
        first = t.detach().clone().contiguous()
        distributed.broadcast(first, 0)
        same = torch.tensor(int(torch.equal(first, t)))
        distributed.all_reduce(same)
        assert int(same) == distributed.get_world_size()


def moves_are_the_same_in_every_process(rank: int) -> None:
    """Data and generators differ; masks, weights and moments may not."""
    for recipe in RECIPES:
        for regrow in ("gradient", "random") if recipe is RECIPES[0] else ("gradient",):
            wide = recipe.expand(mlp(*SIZES))
            before = [layer.kept().clone() for layer in expanded_layers(wide)]
            model = DistributedDataParallel(wide)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            rewiring = fpe.Rewiring(wide, optimizer, every=2, regrow=regrow, generator=seeded(rank))
            for step in range(4):
                optimizer.zero_grad()
                model(batch(10 * step + rank)).square().mean().backward()
                optimizer.step()
                rewiring.step()
            kept = [layer.kept() for layer in expanded_layers(wide)]
            assert not all(torch.equal(new, old) for new, old in zip(kept, before, strict=True))
            for layer in expanded_layers(wide):
                moments = optimizer.state[layer.edge_weight]
                assert_everywhere(layer.kept().byte(), layer.edge_weight, moments["exp_avg"], moments["exp_avg_sq"])


def growth_is_where_all_gradients_together_are_largest(rank: int) -> None:
    layer = fpe.MaskedLinear(torch.rand(6, SIZES[0], generator=seeded()) < 0.4)
    weight, old = torch.zeros(6, SIZES[0], requires_grad=True), layer.kept().clone()
    rewiring = fpe.Rewiring(layer, torch.optim.SGD(layer.parameters(), lr=0.0), every=1, regrow="gradient")
    layer(batch(rank)).square().sum().backward()
    for other in range(2):
        nn.functional.linear(batch(other), layer.weight.detach() + weight, layer.bias).square().sum().backward()
    rewiring.step()
    gradient, grown = weight.grad.abs(), layer.kept() & ~old
    assert bool(grown.any())
    assert gradient[grown].min() >= 0.9999 * gradient[~old & ~layer.kept()].max()


def replicas_of_other_seeds_are_refused(rank: int) -> None:
    for recipe in (Recipe(resparsify="partition"), Recipe("block", "partition")):
        same = recipe.expand(mlp(*SIZES))
        same(batch(0))  # a forward before does not settle it
        model = DistributedDataParallel(same)
        for _ in range(2):
            model(batch(rank)).sum().backward()
        model.eval()(batch(rank))
        other = DistributedDataParallel(recipe.expand(mlp(*SIZES), seed=rank))
        try:
            with torch.no_grad():
                other(batch(0))
            raised = False
        except RuntimeError as error:
            raised = "different seeds" in str(error)
        assert raised == (rank > 0)


def sharded_models_train_save_and_load(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for recipe, places in zip(RECIPES, (("root", "layers"), ("both",), ("layers",), ("root",)), strict=True):
        for at in places:
            plain = recipe.expand(mlp(*SIZES))
            wide = deepcopy(plain)
            for layer in expanded_layers(wide) if at != "root" else ():
                fully_shard(layer, mesh=mesh)
            if at != "layers":
                fully_shard(wide, mesh=mesh)
            for model in (plain, wide):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
                for step in range(2):
                    optimizer.zero_grad()
                    model(batch(step)).square().mean().backward()
                    optimizer.step()
            torch.testing.assert_close(wide(batch(0)), plain(batch(0)))
            for ours, theirs in zip(expanded_layers(wide), expanded_layers(plain), strict=True):
                torch.testing.assert_close(ours.weight, theirs.weight)
                ours.clear_removed()
                assert torch.equal(ours.weight != 0, ours.kept())
                repr(ours)
            dense = fpe.to_dense(wide)
            assert {type(m) for m in dense} == {nn.Linear, nn.ReLU} and type(dense) is nn.Sequential
            torch.testing.assert_close(dense(batch(0)), plain(batch(0)))
            whole = StateDictOptions(full_state_dict=True)
            state = get_model_state_dict(wide, options=whole)
            restored = fpe.restore(mlp(*SIZES, seed=1), {name: t.clone() for name, t in state.items()})
            torch.testing.assert_close(restored(batch(0)), plain(batch(0)))
            for options in (None, whole):
                held = get_model_state_dict(wide, options=options)
                held = {name: t.clone() for name, t in held.items()}
                for parameter in wide.parameters():
                    parameter.data.fill_(3.0)
                set_model_state_dict(wide, held, options=options)
                torch.testing.assert_close(wide(batch(0)), plain(batch(0)))


def sharded_masks_move(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for recipe in RECIPES:
        wide = recipe.expand(mlp(*SIZES))
        kept = [layer.kept() for layer in expanded_layers(wide)]
        fully_shard(wide, mesh=mesh)
        optimizer = torch.optim.Adam(wide.parameters(), lr=1e-2)
        rewiring = fpe.Rewiring(wide, optimizer, every=1, generator=seeded())
        wide(batch(rank)).square().mean().backward()
        optimizer.step()
        rewiring.step()
        assert not torch.equal(expanded_layers(wide)[0].kept(), kept[0])
        for layer, old in zip(expanded_layers(wide), kept, strict=True):
            weight, moment = layer.weight, optimizer.state[layer.edge_weight]["exp_avg"].full_tensor()
            assert torch.equal(weight != 0, layer.kept() & old)
            assert torch.equal(moment != 0, layer.edge_weight.full_tensor() != 0)
        wide(batch(rank)).square().mean().backward()
        optimizer.step()


SCENES: tuple[Scene, ...] = (
    moves_are_the_same_in_every_process,
    growth_is_where_all_gradients_together_are_largest,
    replicas_of_other_seeds_are_refused,
    sharded_models_train_save_and_load,
    sharded_masks_move,
    losses_are_those_of_one_process,
    a_step_moves_the_parents_bytes,
    checkpoints_change_hands,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have written what went wrong in each scene."""
    return play(SCENES, 2, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_two_processes(scene: Scene, outcomes: Path) -> None:
    assert_played(scene, 2, outcomes)
