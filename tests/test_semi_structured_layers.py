"""Layers that run as 2:4: training, serving, loading and compiling, split or merged."""

from collections import Counter
from copy import deepcopy
from functools import partial
from unittest.mock import patch

import pytest
import torch
from cpu_cases import needs_numba
from gluon_numpy import on_numpy
from support import allow, seeded
from torch import Tensor, nn

import fpe
from fpe import Partition
from fpe.bench import accuracy
from fpe.kernels import HOLE, SemiStructuredLayout, UnsupportedError, partition_grad, semi_structured_compress
from fpe.kernels.semi_structured import derived, sparse_tensor_core
from fpe.kernels.semi_structured.backends import BACKENDS


def layer(backend: str, holes: bool = True, seed: int = 1) -> fpe.SplitLinear:
    partition = Partition.semi_structured(12, 24, generator=seeded(seed))
    if holes:
        partition = partition.without(torch.rand(12, 24, generator=seeded(2)) < 0.3)
    torch.manual_seed(0)
    return fpe.SplitLinear(partition, backend=backend)


@pytest.mark.parametrize("holes", [True, False])
def test_a_2_to_4_layer_trains_as_the_eager_one(holes: bool) -> None:
    x = torch.randn(40, 24, generator=seeded(3))
    target = torch.randn(40, 24, generator=seeded(4))
    losses: dict[str, list[float]] = {}
    for backend in ("eager", "triton"):
        model = nn.Sequential(layer(backend, holes), nn.ReLU(), nn.Linear(24, 24))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses[backend] = []
        for _ in range(5):
            loss = nn.functional.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
        first = model[0]
        assert first.edge_weight.numel() == int((first.labels != HOLE).sum())
    torch.testing.assert_close(losses["triton"], losses["eager"], rtol=1e-5, atol=1e-6)
    assert losses["triton"][-1] < losses["triton"][0]


@needs_numba
def test_on_a_cpu_its_kernel_runs_by_the_labels() -> None:
    ours = layer("cpu")
    x, wanted = torch.randn(3, 24, generator=seeded(), requires_grad=True), ours.weight.detach()
    torch.testing.assert_close(ours(x), x @ wanted.T + ours.bias)
    ours(x).sum().backward()
    assert x.grad is not None and all(parameter.grad is not None for parameter in ours.parameters())
    ours.requires_grad_(False)
    torch.testing.assert_close(ours(x), x @ wanted.T + ours.bias)
    with pytest.raises(UnsupportedError, match="'cpu' cannot run here: it needs tensors on a CPU"):
        ours.to("meta")(x.to("meta"))


def test_serving_compresses_once_for_each_version_of_the_weight() -> None:
    ours, x = layer("triton"), torch.randn(3, 24, generator=seeded(3))
    with (
        patch("fpe.layers.labelled.semi_structured_compress", wraps=semi_structured_compress) as compress,
        torch.no_grad(),
    ):
        before = [ours(x), ours(x)]
        assert compress.call_count == 1 and torch.equal(*before)
        ours.edge_weight.mul_(2)
        after = ours(x)
        assert compress.call_count == 2
    ours.backend = "eager"
    torch.testing.assert_close(after, ours(x))


def test_a_loaded_state_brings_its_own_quads() -> None:
    one, other = layer("triton"), layer("triton", seed=7)
    other.load_state_dict({k: v.clone() for k, v in one.state_dict().items()})
    assert "codes" not in one.state_dict()
    x = torch.randn(3, 24, generator=seeded(3))
    assert torch.equal(one(x), other(x))
    torch.testing.assert_close(deepcopy(other).double().to(torch.float32)(x), one(x))


def test_a_layer_compiles_whole_for_any_batch() -> None:
    ours, x = layer("triton"), torch.randn(6, 24, generator=seeded(3))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (x, x[:3]):
        torch.testing.assert_close(compiled(batch), ours(batch))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ours(x))


@pytest.mark.parametrize("alpha", [2, 4])
@pytest.mark.parametrize("holes", [False, True])
def test_a_merged_layer_runs_as_2_to_4_whatever_its_labels(
    alpha: int, holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.randint(alpha, (7, 9), generator=seeded(1)).to(torch.uint8)
    labels[torch.rand(labels.shape, generator=seeded(2)) < 0.3 * holes] = HOLE
    torch.manual_seed(0)
    merged = fpe.MergeLinear(Partition(labels, alpha), backend="eager").bfloat16()
    z = torch.randn(3, alpha * 9, generator=seeded(3)).bfloat16().requires_grad_()
    dy = torch.randn(3, 7, generator=seeded(4)).bfloat16()
    want = merged(z)

    def at_edges(z: Tensor, dy: Tensor) -> Tensor:
        return partition_grad(z, dy, labels.T).T[labels < alpha].view(merged.edge_weight.shape)

    products = {
        z: partial(torch.matmul, dy, merged.weight.detach()),
        merged.edge_weight: partial(at_edges, z.detach().view(3, alpha, 9), dy),
        merged.bias: partial(lambda dy: dy.sum(0), dy),
    }
    merged.backend = "sparse_tensor_core"
    allow(monkeypatch, BACKENDS, "sparse_tensor_core")
    with on_numpy():
        got = merged(z)
        torch.testing.assert_close(got, want)
        for ours, product in zip(torch.autograd.grad(got, list(products), dy), products.values(), strict=True):
            assert accuracy.excess(ours, *accuracy.expected(product), "bf16", by_torch=True) <= 1
        with torch.no_grad():
            served = merged(z)
            torch.testing.assert_close(served, want)
            merged.edge_weight.mul_(2)
            assert not torch.equal(merged(z), served)


@pytest.mark.parametrize("structure", ["2:4", "merged"])
def test_in_training_the_weights_are_packed_anew_and_codes_and_metadata_are_not(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each step: a packing for the forward, and one for dX where that is 2:4 too."""
    labels = Partition.semi_structured(8, 16, generator=seeded(1))
    ours = (fpe.SplitLinear if structure == "2:4" else fpe.MergeLinear)(labels, backend="sparse_tensor_core").bfloat16()
    x = torch.randn(3, ours.in_features, generator=seeded(3)).bfloat16().requires_grad_()
    for name in BACKENDS:
        allow(monkeypatch, BACKENDS, name)
    made: Counter[str] = Counter()

    def counted(module: object, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, staticmethod(lambda *args: made.update([name]) or real(*args)))

    for name in ("pack_values", "pack_transposed", "pack_parent"):
        counted(sparse_tensor_core, name)
    counted(derived, "pack_metadata")
    counted(SemiStructuredLayout, "interleaved")
    with on_numpy():
        for _ in range(3):
            ours(x).square().sum().backward()
            with torch.no_grad():
                ours.edge_weight.sub_(0.1)
    each = {"pack_values": 3, "pack_transposed": 3} if structure == "2:4" else {"pack_parent": 3}
    assert made == {"pack_metadata": len(each), "interleaved": 1, **each}
