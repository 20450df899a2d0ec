"""The partition and block operations in PyTorch: autograd, torch.library, torch.compile, autocast."""

import pytest
import torch
from masked_ops import OPS, Case, Op, Topology, each_op, forward_and_grads
from support import FORMS, readable_id
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

# Autograd, torch.library, torch.compile, autocast


@each_op
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=["first", "second", "none"])
def test_only_what_a_wanted_gradient_needs_is_saved(op: Op, wanted: tuple[bool, bool]) -> None:
    topology = Topology.of(Case())
    operands = tuple(t.requires_grad_(w) for t, w in zip(op.operands(Case(), topology), wanted, strict=True))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = op.ours(*operands, topology)
    kept = [any(t.data_ptr() == operand.data_ptr() for t in saved) for operand in operands]
    assert kept == [wanted[1], wanted[0]]
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.sum().backward()
    assert [operand.grad is not None for operand in operands] == list(wanted)


@each_op
def test_inputs_are_not_mutated(op: Op) -> None:
    topology = Topology.of(Case())
    operands = op.operands(Case(), topology)
    inputs = [*operands, topology.labels, *topology.layout.tensors]
    before = [t.clone() for t in inputs]
    forward_and_grads(op.ours, operands, topology)
    for t, copy in zip(inputs, before, strict=True):
        assert torch.equal(t, copy)


@each_op
@pytest.mark.parametrize("form", FORMS[:2])
def test_opcheck(op: Op, form: str) -> None:
    case = Case(form=form)
    topology = Topology.of(case)
    operands = tuple(t.requires_grad_() for t in op.operands(case, topology, torch.float32))
    torch.library.opcheck(op.registered, op.raw(*operands, topology))


def check_compiled(op: Op, backend: str, case: Case) -> None:
    topology = Topology.of(case)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(op.ours, backend=counter, fullgraph=True, dynamic=True)
    for rows in (6, 9):
        sized = Case(lead=(rows,), n=case.n, k=case.k, alpha=case.alpha, block=case.block, form=case.form)
        operands = op.operands(sized, topology, torch.float32)
        got, wanted = (forward_and_grads(call, operands, topology) for call in (compiled, op.ours))
        for mine, right in zip(got, wanted, strict=True):
            assert torch.equal(mine, right)
    assert counter.frame_count == 1


@each_op
@pytest.mark.parametrize("form", FORMS[:2])
def test_compiles_whole_with_dynamic_batch(op: Op, form: str) -> None:
    check_compiled(op, "aot_eager", Case(form=form))


@pytest.mark.parametrize("op", [OPS[1], OPS[3]], ids=readable_id)
def test_compiles_with_inductor(op: Op) -> None:
    check_compiled(op, "inductor", Case())


@each_op
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_operands(op: Op) -> None:
    topology = Topology.of(Case())
    operands = op.operands(Case(), topology, torch.float32)
    low = tuple(t.to(torch.bfloat16) for t in operands)
    with torch.autocast("cpu", torch.bfloat16):
        y, *grads = forward_and_grads(op.ours, operands, topology)
        mixed = op.ours(low[0], operands[1], topology)
        double = op.ours(*(t.double() for t in operands), topology)
    wanted, *low_grads = forward_and_grads(op.ours, low, topology)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wanted)
    assert torch.equal(mixed, wanted)
    assert double.dtype == torch.float64
    for mine, right in zip(grads, low_grads, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, right.float())
