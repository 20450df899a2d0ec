"""Tensor parallelism: four processes share expanded pairs, alone and beside FSDP2."""

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import Scene, assert_played, play
from support import Recipe, expanded_layers, mlp, seeded
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.parallel import parallelize_module
from training_scenes import SIZES, Traffic, losses, rows, wide_model

import fpe
from fpe.parallel import ColwiseParallel, RowwiseParallel, parallel_plan

PROCESSES = 4
RECIPES = (
    Recipe(resparsify="partition"),
    Recipe(resparsify="partition", alpha=3),
    Recipe("2:4", "partition"),
    Recipe("seeded", "partition", alpha=4),
)


def everywhere(processes: int = PROCESSES) -> DeviceMesh:
    return init_device_mesh("cpu", (processes,), mesh_dim_names=("tp",))


def both_ways() -> DeviceMesh:
    """Two data-parallel groups of two."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def shared(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, parallel_plan(model))


def shared_and_sharded(model: nn.Sequential) -> nn.Module:
    """By tensor parallelism, and by FSDP2 in each layer and at the root."""
    mesh = both_ways()
    shared(model, mesh["tp"])
    for layer in expanded_layers(model):
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def function_and_gradients_are_those_of_one_process(rank: int) -> None:
    """Also where the parents do not divide evenly, and of the whole view."""
    sizes = (32, 18, 6)
    for recipe in RECIPES:
        for bias in (True, False):
            alone = recipe.expand(mlp(*sizes, bias=bias))
            together = shared(deepcopy(alone), everywhere())
            x = torch.randn(5, sizes[0], generator=seeded(3))
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            for model, own in zip((alone, together), inputs, strict=True):
                y = model(own)
                y.square().sum().backward()
            torch.testing.assert_close(together(x), alone(x))
            torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
            for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
                assert bias or ours.to_local().numel() < theirs.numel()
            for ours, theirs in zip(expanded_layers(together), expanded_layers(alone), strict=True):
                assert torch.equal(ours.weight, theirs.weight) and ours.nonzeros == theirs.nonzeros
            torch.testing.assert_close(fpe.to_dense(together)(x), alone(x))


def losses_are_those_of_one_process(rank: int) -> None:
    alone = losses(wide_model(), [0, 1])
    assert alone[-1] < 0.9 * alone[0]
    torch.testing.assert_close(losses(shared(wide_model(), everywhere()), [0, 1]), alone, rtol=0, atol=1e-5)
    both = shared_and_sharded(wide_model())
    own = torch.tensor(losses(both, [rank // 2]))
    distributed.all_reduce(own)
    torch.testing.assert_close(own / PROCESSES, torch.tensor(alone), rtol=0, atol=1e-5)


def a_step_moves_the_parents_bytes(rank: int) -> None:
    """To the byte, without biases, beside PyTorch's own styles on the parent."""
    mesh, moved = everywhere(), []
    for wide in (False, True):
        model = mlp(*SIZES, bias=False)
        if wide:
            plan = parallel_plan(model := fpe.expand(model, resparsify="partition", generator=seeded()))
        else:
            styles = (torch_parallel.ColwiseParallel(), torch_parallel.RowwiseParallel())
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            plan = {name: styles[i % 2] for i, name in enumerate(linear)}
        parallelize_module(model, mesh, plan)
        x = rows(0, 0, 0).requires_grad_()
        with Traffic() as traffic:
            model(x).square().mean().backward()
        moved.append(traffic.moved)
    parent, expanded = moved
    assert expanded == parent
    outputs, inputs = sum(SIZES[2::2]), sum(SIZES[:-1:2])  # of the pairs: summed forward, and backward
    assert parent["_c10d_functional::all_reduce"] == 4 * len(x) * (outputs + inputs)


def checkpoints_do_not_know_how_many_wrote_them(rank: int) -> None:
    x, whole = rows(0, 0, 7), StateDictOptions(full_state_dict=True)
    four = shared(wide_model(), everywhere())
    losses(four, [0])
    wanted = four(x)
    restored = fpe.restore(mlp(*SIZES), {n: t.clone() for n, t in get_model_state_dict(four, options=whole).items()})
    torch.testing.assert_close(restored(x), wanted)
    with TemporaryDirectory() as own:
        place = [own]
        distributed.broadcast_object_list(place, 0)
        dcp.save({"model": get_model_state_dict(four)}, checkpoint_id=place[0])
        if rank == 0:
            one = wide_model(seed=5)
            state = {"model": one.state_dict()}
            dcp.load(state, checkpoint_id=place[0], no_dist=True)
            one.load_state_dict(state["model"])
            torch.testing.assert_close(one(x), wanted)
        two = shared_and_sharded(wide_model(seed=6))
        assert not torch.allclose(two(x), wanted)
        state = {"model": get_model_state_dict(two)}
        dcp.load(state, checkpoint_id=place[0])
        set_model_state_dict(two, state["model"])
        torch.testing.assert_close(two(x), wanted)
        distributed.barrier()


def other_sizes_are_refused(rank: int) -> None:
    mesh = everywhere()
    with pytest.raises(ValueError, match="5 parents, 2 to a process, leave none for the last of 4 processes"):
        shared(fpe.expand(mlp(8, 5, 3), resparsify="partition"), mesh)
    with pytest.raises(ValueError, match="6 parents to a process are no multiple of the structure's 4"):
        shared(nn.Sequential(fpe.MergeLinear(fpe.Partition.semi_structured(3, 24))), mesh)
    model = shared(wide_model(), mesh)
    with pytest.raises(ValueError, match="holds 4 of 16 parents"):
        model[2](torch.zeros(3, 32))
    with pytest.raises(ValueError, match="shared already"):
        shared(model, mesh)
    with pytest.raises(ValueError, match="processes share '0'"):
        fpe.Rewiring(model, torch.optim.SGD(model.parameters()))
    assert [type(m) for m in fpe.fuse(model)] == [type(m) for m in model]


SCENES: tuple[Scene, ...] = (
    function_and_gradients_are_those_of_one_process,
    losses_are_those_of_one_process,
    a_step_moves_the_parents_bytes,
    checkpoints_do_not_know_how_many_wrote_them,
    other_sizes_are_refused,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four processes have written what went wrong in each scene."""
    return play(SCENES, PROCESSES, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_four_processes(scene: Scene, outcomes: Path) -> None:
    assert_played(scene, PROCESSES, outcomes)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (mlp(6, 5, 4), "has no expanded pair"),
        (Recipe().expand(mlp(32, 13, 6)), "MaskedLinear, which processes cannot share"),
    ],
)
def test_plans_name_what_cannot_be_shared(model: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parallel_plan(model)


@pytest.mark.parametrize("call", [parallel_plan, lambda model: fpe.Rewiring(model, torch.optim.SGD([torch.ones(1)]))])
def test_no_module_is_refused_by_name(call: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=r"(parallel_plan|Rewiring): model must be an nn\.Module, got str"):
        call("model")


@pytest.mark.parametrize("style", [ColwiseParallel(), RowwiseParallel()])
@pytest.mark.parametrize("module", [nn.Linear(4, 4), None], ids=["linear", "holes"])
def test_styles_name_what_cannot_be_shared(style: ColwiseParallel | RowwiseParallel, module: nn.Module | None) -> None:
    words = "expected a (Split|Merge)Linear"
    if module is None:
        labels = fpe.Partition.random(8, 8, 2).without(torch.eye(8, dtype=torch.bool))
        module, words = style.SHARE.OF(labels), "without those that were removed"
    with pytest.raises(ValueError, match=words):
        style._apply(module, None)  # type: ignore[arg-type] # no mesh is asked


def test_tensor_parallelism_is_imported_by_whoever_wants_it() -> None:
    run = "import sys, fpe; sys.exit('torch.distributed.tensor.parallel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", run]).returncode == 0
