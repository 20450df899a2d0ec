"""The dense form of a layer on a CPU: that it is the layer, who does without it, what it saves."""

from copy import deepcopy

import pytest
import torch
from dense_forms import batch, each_kind, kept, linears, without, write_data
from support import (
    DTYPES,
    SIZES,
    Recipe,
    assert_as_accurate,
    each_recipe,
    expanded_layers,
    mlp,
    readable_id,
    removed_entries,
    seeded,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fpe
from fpe.bench.latency import whole
from fpe.bench.results import COMMITTED, Results
from fpe.layers import ExpandedLinear, dense_form

# It is the layer.


@each_recipe
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_it_is_the_dense_model(recipe: Recipe, dtype: torch.dtype) -> None:
    wide = recipe.expand(mlp(*SIZES)).to(dtype)
    plain = fpe.to_dense(wide)
    truth = deepcopy(plain).double()
    x = batch().to(dtype)
    with torch.no_grad():
        for y in (wide(x), wide(x)):  # made, then kept
            assert_as_accurate(y, plain(x), truth(x.double()))
    assert kept(wide) == [True] * len(expanded_layers(wide))
    ours, yardstick, exact = (t.requires_grad_() for t in (x.clone(), x.clone(), x.double()))
    outputs = [model(t) for model, t in ((wide, ours), (plain, yardstick), (truth, exact))]
    assert_as_accurate(*outputs)
    for y in outputs:
        y.square().sum().backward()
    assert not any(kept(wide))  # a step is about to make them stale
    assert_as_accurate(ours.grad, yardstick.grad, exact.grad)
    for layer, *others in zip(linears(wide), linears(plain), linears(truth), strict=True):
        if isinstance(layer, ExpandedLinear):
            assert_as_accurate(layer.edge_weight.grad, *(folded(layer, other.weight.grad) for other in others))
            assert (layer.edge_weight.grad[removed_entries(layer)] == 0).all()
        assert_as_accurate(layer.bias.grad, *(other.bias.grad for other in others))


def folded(layer: ExpandedLinear, grad: Tensor) -> Tensor:
    """The gradient of a layer's own weight for one of its dense weight."""
    twin = deepcopy(layer).to(grad.dtype)
    return torch.autograd.grad(twin.wide_weight(), twin.edge_weight, grad)[0]


@each_kind
def test_any_leading_dimensions_and_none(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    plain = fpe.to_dense(wide)
    for lead in ((), (0,), (3,), (2, 3)):
        x = torch.randn(*lead, SIZES[0], generator=seeded())
        assert torch.equal(wide(x), plain(x))
        with torch.no_grad():
            assert torch.equal(wide(x), plain(x))


@each_kind
def test_it_differentiates_twice_and_forward(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES)).double()
    layers = expanded_layers(wide)
    names, values = zip(*wide.named_parameters(), strict=True)
    x = batch(3).double()

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(wide, dict(zip(names, values, strict=True)), (x,)).square()

    truth = without(wide)

    def penalty(model: nn.Module) -> tuple[Tensor, ...]:
        y = model(x).square().sum()
        first = torch.autograd.grad(y, tuple(model.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tuple(model.parameters()))

    for ours, theirs in zip(penalty(wide), penalty(truth), strict=True):
        torch.testing.assert_close(ours, theirs)
    tangents = tuple(torch.randn(v.shape, dtype=v.dtype, generator=seeded(7)) for v in values)
    _, forward = torch.func.jvp(lambda *v: function(x, *v), values, tangents)
    gradients = torch.autograd.functional.jvp(lambda *v: function(x, *v), values, tangents)[1]
    torch.testing.assert_close(forward, gradients)
    assert layers and not any(kept(wide))


@each_kind
def test_transforms_see_the_function(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES)).double()
    parameters = dict(wide.named_parameters())
    x = batch(4).double()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(wide, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        wide.zero_grad()
        wide(x[i]).square().sum().backward()
        for name, p in wide.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad)
    stacked = {name: torch.stack([p, 2 * p]).detach() for name, p in parameters.items()}
    both = torch.func.vmap(lambda p: torch.func.functional_call(wide, p, (x,)))(stacked)
    with torch.no_grad():
        torch.testing.assert_close(both[0], wide(x))
        torch.testing.assert_close(torch.func.vmap(wide)(x), wide(x))
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(wide))(x), torch.func.vmap(torch.func.jacfwd(wide))(x))
    batched = torch.autograd.functional.jacobian(wide, x[0], vectorize=True)
    torch.testing.assert_close(batched, torch.func.jacrev(wide)(x[0]))


def test_batched_gradients_of_the_weight() -> None:
    wide = Recipe(resparsify="partition").expand(mlp(*SIZES)).double()
    layer = expanded_layers(wide)[0]
    y, weight = layer(batch(2).double()).flatten(), layer.edge_weight
    rows = torch.eye(len(y), dtype=y.dtype)
    (batched,) = torch.autograd.grad(y, weight, rows, is_grads_batched=True, retain_graph=True)
    for row, gradient in zip(rows, batched, strict=True):
        assert torch.equal(torch.autograd.grad(y, weight, row, retain_graph=True)[0], gradient)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@each_kind
def test_what_is_not_finite_stays_with_its_child(recipe: Recipe, value: float) -> None:
    """Nothing of a removed entry reaches an output or a gradient, which a product with zero would let through."""
    wide = recipe.expand(mlp(*SIZES))
    first = expanded_layers(wide)[0]
    plain = first.to_linear()
    weight, removed = first.edge_weight, removed_entries(first)
    with torch.no_grad():
        weight[removed] = value
    x = torch.ones(2, SIZES[0])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(first(x), plain(x))
    y = first(x)
    y.backward(torch.full_like(y, value))
    assert (weight.grad[removed] == 0).all()
    with torch.no_grad():
        weight.zero_()
        weight.view(-1)[int((~removed).view(-1).nonzero()[0])] = value
    assert int((~first(x)[0].isfinite()).sum()) == 1


@each_kind
def test_under_autocast(recipe: Recipe) -> None:
    wide = recipe.expand(mlp(*SIZES))
    plain = fpe.to_dense(wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(batch()), plain(batch()))
        with torch.no_grad():
            assert torch.equal(wide(batch()), plain(batch()))
    with torch.no_grad():
        assert torch.equal(wide(batch()), plain(batch()))  # what was kept is not the rounded one


# Who does without it.


class Recorder(TorchDispatchMode):
    """Notes the package's operations as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def test_a_traced_call_is_its_operation() -> None:
    """Under a mode: what traces, counts or fakes sees the package's operations."""
    layer = expanded_layers(Recipe(resparsify="partition").expand(mlp(*SIZES)))[0]
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Recorder() as recorder:
            layer(batch())
        assert "fpe" in recorder.seen
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert layer(batch()).shape == (5, 26)
    with torch.no_grad():
        assert torch.equal(layer(batch()), layer.to_linear()(batch()))  # nothing fake was kept


def test_a_backend_that_is_asked_for_runs() -> None:
    wide = without(Recipe().expand(mlp(*SIZES)))
    with torch.no_grad():
        wanted = wide(batch())
    for layer in expanded_layers(wide):
        layer.keeps_dense = True
        layer.backend = "eager"
    with torch.no_grad():
        assert torch.equal(wide[0](batch()), without(wide)[0](batch()))
        assert not kept(wide[:1])[0] and torch.equal(wide(batch()), wanted)


@each_kind
def test_it_can_be_turned_off(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = recipe.expand(mlp(*SIZES))
    monkeypatch.setattr(ExpandedLinear, "keeps_dense", False)
    with torch.no_grad():
        torch.testing.assert_close(wide(batch()), fpe.to_dense(wide)(batch()))
    wide(batch()).sum().backward()
    assert not any(kept(wide)) and not any(m in dense_form._MASKS for m in expanded_layers(wide))


def test_compiled_models_agree() -> None:
    wide = Recipe(resparsify="partition").expand(mlp(*SIZES))
    torch._dynamo.reset()
    compiled = torch.compile(wide, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = wide(batch())
        torch.testing.assert_close(compiled(batch()), before)
        write_data(wide)
        torch.testing.assert_close(compiled(batch()), fpe.to_dense(wide)(batch()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_jit_trace_holds_no_constant_weight() -> None:
    wide = Recipe().expand(mlp(*SIZES)).eval()
    with torch.no_grad():
        wide(batch())
        traced = torch.jit.trace(wide, batch(), check_trace=False)
        write_data(wide)
        torch.testing.assert_close(traced(batch()), wide(batch()))


def test_large_blocks_are_multiplied_by_themselves_in_training() -> None:
    layer = fpe.BlockLinear(torch.block_diag(*[torch.ones(256, 256)] * 4).bool(), (256, 256))
    small = fpe.BlockLinear(torch.block_diag(*[torch.ones(8, 8)] * 4).bool(), (8, 8))
    assert layer.masked_copy() is None and small.masked_copy() is not None
    x = torch.randn(2, 1024, generator=seeded())
    torch.testing.assert_close(layer(x), layer.to_linear()(x))


# What it saves.


@pytest.mark.parametrize("rows", [1, 16])
def test_a_cpu_runs_the_readmes_model_in_about_its_dense_forms_time(rows: int) -> None:
    """Half as much again as the bars, for other machines; without the dense form it is 5 times and more."""
    case = whole.Case(whole.SIZES[0], "random auto", rows)
    for row in whole.measure(case, seconds=0.4):
        assert row["ratio"] <= 1.5 * whole.BARS[row["pass"]][rows], row


def test_the_committed_ratios_are_within_the_bars() -> None:
    rows = Results.read(COMMITTED / "cpu/latency-models.jsonl").rows
    assert {(row["model"], row["expansion"], row["M"]) for row in rows} == {
        ("-".join(map(str, case.sizes)), case.expansion, case.rows) for case in whole.cases()
    }
    assert not [row for row in rows if row["ratio"] > whole.BARS[row["pass"]][row["M"]]]
