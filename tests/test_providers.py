"""Who is timed: each provider is the layer that it says, in every pass, and takes the memory that it promises."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fpe
from fpe.bench.costs import memory
from fpe.bench.latency import peers, suite
from fpe.bench.latency.problems import AbsentError, Case, Problem
from fpe.bench.latency.providers import PROVIDERS

STRUCTURES = ("random", "2:4", "block")


def problem(structure: str = "random", alpha: int = 2, **sizes: int) -> Problem:
    options = {"m": 7, "n": 48, "k": 64, **sizes}
    return Problem.make(Case(alpha=alpha, structure=structure, dtype="fp32", block=(16, 32), **options), "cpu")


# Problems and providers.


@pytest.mark.parametrize(("structure", "alpha"), [("random", 3), ("2:4", 2), ("block", 2), ("block", 4)])
def test_labels_have_their_structure(structure: str, alpha: int) -> None:
    made = problem(structure, alpha, k=128)
    made.partition.validate()
    assert made.partition.labels.unique().tolist() == list(range(alpha))
    again = problem(structure, alpha, k=128)
    assert torch.equal(made.partition.labels, again.partition.labels) and torch.equal(made.x, again.x)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("bias", [False, True])
def test_every_exact_provider_computes_the_expanded_layer(structure: str, bias: bool) -> None:
    made = problem(structure)
    truth = made.x.double() @ made.wide.double().T
    ran = []
    for provider in PROVIDERS.values():
        if not provider.exact or structure not in provider.structures:
            continue
        try:
            y = provider.build(made, bias)(made.x)
        except (AbsentError, RuntimeError, ValueError):
            continue
        assert torch.allclose(y.double(), truth, atol=1e-5), provider.name
        ran.append(provider.name)
    assert {"wide", "masked", "fpe/auto", "fpe/eager"} <= set(ran)


def fake_blksprs() -> SimpleNamespace:
    """The functions of blksprs that the adapter calls, on dense blocks: ``[batch, rows, columns]`` and its grid."""

    def grid(x: Tensor, block: int) -> Tensor:
        return x.unflatten(1, (-1, block)).unflatten(3, (-1, block)).transpose(2, 3)  # [1, R, C, b, b]

    def layout_of(x: Tensor, block: int) -> Tensor:
        return grid(x, block).ne(0).flatten(3).any(3).int()

    def to_sparse(x: Tensor, layout: Tensor, block: int, layout_cache: dict | None = None) -> Tensor:
        return grid(x, block)[layout.bool()]

    def to_dense(
        v: Tensor, layout: Tensor, block: int, fill_value: float = 0, layout_cache: dict | None = None
    ) -> Tensor:
        tiles = v.new_zeros(*layout.shape, block, block)
        tiles[layout.bool()] = v
        return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def matmul(x, layout_x, y, layout_y, layout_o, block, layout_cache=None):
        return to_sparse(to_dense(x, layout_x, block) @ to_dense(y, layout_y, block), layout_o, block)

    ops = SimpleNamespace(to_sparse=to_sparse, to_dense=to_dense, matmul=matmul)
    return SimpleNamespace(ops=ops, layouting=SimpleNamespace(build_sparsity_layout=layout_of), __spec__=object())


def test_the_blksprs_adapter_hands_over_the_layers_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Problem.make(Case(32, 48, 64, structure="block", dtype="fp32", block=(16, 16)), "cpu")
    with pytest.raises(AbsentError, match="not installed"):
        peers.blksprs(made, False)
    monkeypatch.setitem(sys.modules, "blksprs", fake_blksprs())
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    layer = peers.blksprs(made, False)
    assert int(layer.layout.sum()) == 3 * 4 and torch.allclose(layer(made.x), made.x @ made.wide.T, atol=1e-5)
    with pytest.raises(AbsentError, match="divide 7, 96 and 64"):
        peers.blksprs(Problem.make(Case(7, 48, 64, structure="block", dtype="fp32", block=(16, 16)), "cpu"), False)
    with pytest.raises(AbsentError, match="no bias"):
        peers.blksprs(made, True)


def test_the_parent_is_the_layer_before_its_expansion() -> None:
    made = problem()
    layer = PROVIDERS["parent"].build(made, False)
    assert torch.equal(layer.weight, made.weight)
    children = fpe.kernels.split_matmul(made.x, made.weight, made.partition.labels, 2)
    assert torch.allclose(layer(made.x), children.sum(1), atol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["parent", "wide", "masked", "fpe/eager"])
def test_passes_are_the_gradients_of_autograd(structure: str, name: str) -> None:
    made = problem(structure)
    module = PROVIDERS[name].build(made, False)
    x = made.x.clone().requires_grad_()
    y = module(x)
    dy = made.dy[:, : y.shape[1]]
    dx, dw = torch.autograd.grad(y, [x, *module.parameters()], dy)
    calls = {p: suite.call(made, module, p) for p in suite.PASSES["op"]}
    assert torch.equal(calls["forward"](), y.detach())  # type: ignore[misc]
    for _ in range(2):  # a call can be made again
        assert [torch.equal(a, b) for a, b in zip(calls["dX"](), [dx], strict=True)] == [True]  # type: ignore[misc]
        assert [torch.equal(a, b) for a, b in zip(calls["dW"](), [dw], strict=True)] == [True]  # type: ignore[misc]
        assert [torch.equal(a, b) for a, b in zip(calls["forward+backward"](), [dx, dw], strict=True)] == [True, True]  # type: ignore[misc]
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_mlps_of_all_providers_are_one_network(structure: str) -> None:
    made = problem(structure)
    built = {n: suite._build(made, PROVIDERS[n], "mlp") for n in ("wide", "masked", "fpe/eager", "parent")}
    merged = built["wide"][2].weight.detach()
    for name in ("masked", "fpe/eager"):
        second = built[name][2]
        assert int(second.kept().sum()) == made.weight.numel() == int((merged != 0).sum())
    assert [tuple(m.shape) for m in (built["parent"][0].weight, built["parent"][2].weight)] == [(48, 64), (64, 48)]
    before = built["fpe/eager"][0].wide_weight().clone()
    suite.call(made, built["fpe/eager"], "step")()  # type: ignore[misc]
    after = built["fpe/eager"][0].wide_weight()
    assert not torch.equal(before, after) and torch.equal(before != 0, after != 0)


# Memory.


def test_memory_is_what_the_formats_promise() -> None:
    made = problem(m=5)
    x, (m, n, k) = made.x, (5, 48, 64)
    parent, ours, masked = (PROVIDERS[name].build(made, False) for name in ("parent", "fpe/eager", "masked"))
    found = {
        name: memory.columns_on(layer, x) for name, layer in (("parent", parent), ("ours", ours), ("masked", masked))
    }
    assert found["parent"]["parameter_bytes"] == found["ours"]["parameter_bytes"] == 4 * n * k
    assert found["masked"]["parameter_bytes"] == 2 * 4 * n * k and found["masked"]["optimizer_bytes"] == 4 * 4 * n * k
    assert found["ours"]["gradient_bytes"] == 4 * n * k and found["ours"]["optimizer_bytes"] == 8 * n * k
    assert found["parent"]["activation_bytes"] == 4 * m * k
    assert found["masked"]["activation_bytes"] == 4 * m * k + 2 * 4 * n * k  # the masked copy of the wide weight
    assert found["parent"]["index_bytes"] == 0 < found["ours"]["index_bytes"] <= n * k
    assert found["ours"]["peak_bytes"] is None  # known on a GPU alone
