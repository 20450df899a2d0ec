"""Every operation under the transforms of ``torch.func`` and under forward mode, beside its dense masked weights."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from every_op import OPS, WITH_BIAS, WITH_EPILOGUE, Case, Function, Maker, Problem
from support import SIZES, Recipe, mlp, readable_id, seeded
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import fpe

CASES = (
    *(Case(op, bias=op in WITH_BIAS) for op in OPS),
    *(Case(op, activation="gelu", bias=True) for op in WITH_EPILOGUE),
    Case("split_matmul", labels="turned"),
    Case("merge_matmul", labels="packed"),
    Case("expanded_mlp", merged=True, bias=True, activation="silu"),
)
each_case = pytest.mark.parametrize("case", CASES, ids=readable_id)


def problem_of(case: Case) -> Problem:
    """With numbers that are no integers, so that a difference cannot hide in a symmetry."""
    made = Maker(case).problem()
    noise = [torch.rand(t.shape, dtype=t.dtype, generator=seeded(i)) for i, t in enumerate(made.operands)]
    return replace(made, operands=tuple(t * (1 + n) for t, n in zip(made.operands, noise, strict=True)))


def like(tensors: tuple[Tensor, ...], seed: int = 9) -> tuple[Tensor, ...]:
    return tuple(torch.randn(t.shape, dtype=t.dtype, generator=seeded(seed + i)) for i, t in enumerate(tensors))


def stacked(tensors: tuple[Tensor, ...], which: int | None = None) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Three of one operand, or of each, along a dimension that differs; and the dimensions."""
    batched, dims = [], []
    for i, t in enumerate(tensors):
        dim = None if which not in (None, i) else i % (t.dim() + 1)
        batched.append(t if dim is None else torch.stack([t, -t, 2 * t], dim))
        dims.append(dim)
    return tuple(batched), tuple(dims)


def scalar(f: Function) -> Function:
    return lambda *operands: f(*operands).square().sum()


def at_all(f: Function, transform: Callable[..., Function]) -> Function:
    """A transform of a function of many operands with respect to all of them."""
    return lambda *operands: transform(f, argnums=tuple(range(len(operands))))(*operands)


def backward_of(f: Function) -> Function:
    def pulled(*operands: Tensor) -> Any:
        y, pull = vjp(f, *operands)
        return pull(like((y,))[0])

    return pulled


def pushed(f: Function) -> Function:
    return lambda *operands: jvp(f, operands, like(operands))


def batched_over(which: int | None) -> Callable[[Function], Function]:
    def over(f: Function) -> Function:
        def batched(*operands: Tensor) -> Tensor:
            tensors, dims = stacked(operands, which)
            return vmap(f, in_dims=dims)(*tensors)

        return batched

    return over


def per_sample(f: Function) -> Function:
    """The gradient of each sample alone, as ``vmap(grad(loss))``."""

    def gradients(*operands: Tensor) -> Any:
        tensors, dims = stacked(operands, 0)
        return vmap(at_all(scalar(f), grad), in_dims=dims)(*tensors)

    return gradients


def through_a_batch(f: Function) -> Function:
    """The gradient through ``vmap``."""
    return at_all(scalar(batched_over(None)(f)), grad)


def of_a_gradient(f: Function) -> Function:
    """The gradient of the squared norm of the gradient: two levels of reverse mode."""

    def squared(*operands: Tensor) -> Tensor:
        return sum(g.square().sum() for g in at_all(scalar(f), grad)(*operands))

    return at_all(squared, grad)


def with_the_rest_constant(f: Function) -> Function:
    """The inner level differentiates what does not depend on the operands, the outer one the result."""
    return at_all(lambda *operands: grad(lambda s: s * scalar(f)(*operands))(operands[0].new_ones(())), grad)


def in_forward_mode(f: Function) -> Function:
    def dual(*operands: Tensor) -> Any:
        with forward_ad.dual_level():
            y = f(*(forward_ad.make_dual(t, d) for t, d in zip(operands, like(operands), strict=True)))
            return forward_ad.unpack_dual(y)

    return dual


def many_gradients_at_once(f: Function) -> Function:
    def gradients(*operands: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in operands]
        y = f(*leaves)
        return torch.autograd.grad(y, leaves, torch.stack(like((y, y, y))), is_grads_batched=True)

    return gradients


def vectorized_jacobian(f: Function) -> Function:
    return lambda *operands: torch.autograd.functional.jacobian(f, operands, vectorize=True)


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": lambda f: at_all(scalar(f), grad),
    "vjp": backward_of,
    "jvp": pushed,
    "jacrev": lambda f: at_all(f, jacrev),
    "jacfwd": lambda f: at_all(f, jacfwd),
    "hessian": lambda f: at_all(scalar(f), hessian),
    "jacrev-of-jacfwd": lambda f: at_all(at_all(scalar(f), jacfwd), jacrev),
    "grad-of-grad": of_a_gradient,
    "outer-level-only": with_the_rest_constant,
    "vmap-first": batched_over(0),
    "vmap-last": batched_over(-1),
    "vmap-all": batched_over(None),
    "vmap-of-grad": per_sample,
    "grad-of-vmap": through_a_batch,
    "forward-mode": in_forward_mode,
    "is_grads_batched": many_gradients_at_once,
    "vectorized-jacobian": vectorized_jacobian,
}


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


@pytest.mark.parametrize("transform", TRANSFORMS)
@each_case
def test_a_transform_gives_what_it_gives_of_dense_weights(case: Case, transform: str) -> None:
    problem = problem_of(case)
    if transform == "vmap-last":
        make: Callable[[Function], Function] = batched_over(len(problem.operands) - 1)
    else:
        make = TRANSFORMS[transform]
    ours, dense = (flat(make(f)(*problem.operands)) for f in (problem.ours, problem.dense))
    assert any(t.abs().max() > 0 for t in dense)
    for mine, right in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("which", [0, None], ids=["first", "all"])
@each_case
def test_a_batch_of_none(case: Case, which: int | None) -> None:
    problem = problem_of(case)
    tensors, dims = stacked(problem.operands, which)
    none = tuple(t if dim is None else t.narrow(dim, 0, 0) for t, dim in zip(tensors, dims, strict=True))
    ours, dense = (vmap(f, in_dims=dims)(*none) for f in (problem.ours, problem.dense))
    assert ours.shape == dense.shape and ours.shape[0] == 0


MODELS = (("random", "partition"), ("block", "input"), ("block", "block"), ("2:4", "magnitude"))


@pytest.mark.parametrize(("structure", "resparsify"), MODELS, ids="-".join)
def test_gradients_of_each_sample_of_an_expanded_model(structure: str, resparsify: str) -> None:
    model = Recipe(structure, resparsify).expand(mlp(*SIZES).double())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(4, SIZES[0], dtype=torch.float64, generator=seeded())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample,)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(together[name][i], p.grad)


def of_each(models: list[torch.nn.Module], x: Tensor) -> Tensor:
    """PyTorch's recipe for ensembles: ``vmap`` over the states of models that are built alike."""
    return vmap(lambda *state: functional_call(models[0], state, (x,)))(*stack_module_state(models))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("structure", "resparsify"), MODELS, ids="-".join)
def test_an_ensemble_of_expanded_models(structure: str, resparsify: str, training: bool) -> None:
    wide = Recipe(structure, resparsify).expand(mlp(*SIZES).double()).train(training)
    models = [deepcopy(wide) for _ in range(3)]
    for i, model in enumerate(models):
        for p in model.parameters():
            p.data.mul_(1 + i)
    x = torch.randn(4, SIZES[0], dtype=torch.float64, generator=seeded())
    together = of_each(models, x)
    for i, model in enumerate(models):
        torch.testing.assert_close(together[i], model(x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_ensemble_of_other_masks_is_refused(training: bool) -> None:
    recipe = Recipe(resparsify="partition")
    models = [recipe.expand(mlp(*SIZES), i).train(training) for i in range(2)]
    with pytest.raises(RuntimeError, match="masks differ"):
        of_each(models, torch.ones(2, SIZES[0]))


@pytest.mark.parametrize(("structure", "resparsify"), MODELS, ids="-".join)
@pytest.mark.parametrize("transform", [jacfwd, jacrev, hessian], ids=readable_id)
def test_derivatives_of_an_expanded_model_are_its_dense_models(
    transform: Callable[..., Function], structure: str, resparsify: str
) -> None:
    model = Recipe(structure, resparsify).expand(mlp(*SIZES, between=[torch.nn.Tanh()]).double())
    x = torch.randn(SIZES[0], dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(transform(model)(x), transform(fpe.to_dense(model))(x))


def test_a_gradient_function_compiles_whole() -> None:
    problem = problem_of(Case("split_matmul", bias=True, activation="gelu"))
    f = at_all(scalar(problem.ours), grad)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for mine, right in zip(compiled(*problem.operands), f(*problem.operands), strict=True):
        torch.testing.assert_close(mine, right)
