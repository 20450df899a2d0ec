"""What every PyTorch module owes, asked of each layer as PyTorch's own tests ask it; ``nn.Linear`` is the control.

The questions are those of ``torch/testing/_internal/common_modules.py`` and ``test_modules.py``. That harness itself is
internal and needs packages that nothing else here does, so that the questions are put anew.
"""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from support import readable_id, seeded
from torch import Tensor, nn
from torch.func import functional_call

from fpe import BlockLinear, MaskedLinear, MergeLinear, Partition, SplitLinear
from fpe.bench import accuracy
from fpe.kernels import HOLE
from fpe.layers import KINDS

BLOCKS = torch.block_diag(*[torch.ones(3, 4)] * 2).bool()
MASK = torch.rand(6, 8, generator=seeded()) < 0.5
HOLES = Partition.random(3, 8, 2, generator=seeded()).without(MASK[:3])


@dataclass(frozen=True)
class Entry:
    """A module: how it is made, and the width of its input."""

    id: str
    make: Callable[..., nn.Module]
    inputs: int

    def build(self, **factory: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.make(**factory)

    def batch(self, dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (3,)) -> Tensor:
        return torch.randn(*rows, self.inputs, generator=seeded(1), dtype=torch.float64).to(dtype)


ENTRIES = (
    Entry("nn.Linear", lambda **kw: nn.Linear(8, 6, **kw), 8),
    Entry("nn.Linear-no-bias", lambda **kw: nn.Linear(8, 6, bias=False, **kw), 8),
    Entry("split", lambda **kw: SplitLinear(Partition.random(3, 8, 2, generator=seeded()), **kw), 8),
    Entry("split-no-bias", lambda **kw: SplitLinear(Partition.random(3, 8, 3, generator=seeded()), False, **kw), 8),
    Entry("split-holes", lambda **kw: SplitLinear(HOLES, **kw), 8),
    Entry("split-2:4", lambda **kw: SplitLinear(Partition.semi_structured(3, 8, generator=seeded()), **kw), 8),
    Entry("merge", lambda **kw: MergeLinear(Partition.random(3, 8, 2, generator=seeded()), **kw), 16),
    Entry("merge-holes", lambda **kw: MergeLinear(HOLES, **kw), 16),
    Entry("masked", lambda **kw: MaskedLinear(MASK, **kw), 8),
    Entry("masked-full", lambda **kw: MaskedLinear(torch.ones_like(MASK), False, **kw), 8),
    Entry("masked-empty", lambda **kw: MaskedLinear(torch.zeros_like(MASK), **kw), 8),
    Entry("block", lambda **kw: BlockLinear(BLOCKS, (3, 4), **kw), 8),
    Entry("block-full", lambda **kw: BlockLinear(torch.ones_like(MASK), (2, 4), **kw), 8),
    Entry("block-empty", lambda **kw: BlockLinear(torch.zeros_like(MASK), (2, 4), **kw), 8),
    Entry("block-ragged-planes", lambda **kw: BlockLinear(MASK, (2, 3), (2, 2), **kw), 8),
)
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=readable_id)


def test_every_layer_has_an_entry() -> None:
    assert {type(entry.build()) for entry in ENTRIES} == {nn.Linear, *KINDS}
    assert any(bool((entry.build().labels == HOLE).any()) for entry in ENTRIES if entry.id == "split-holes")


def stored(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
        assert ours[name].dtype == theirs[name].dtype, name


@each_entry
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=readable_id)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factory_keywords_place_every_parameter(entry: Entry, dtype: torch.dtype, device: str) -> None:
    module = entry.build(device=device, dtype=dtype)
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(dtype, device)}
    assert {b.device.type for b in module.buffers()} <= {device}
    assert module(entry.batch(dtype).to(device)).shape == (3, module.out_features)


@each_entry
def test_a_device_context_places_every_tensor(entry: Entry) -> None:
    with torch.device("meta"):
        module = entry.build()
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
    repr(module)


@each_entry
def test_parameters_are_drawn_as_on_their_device_once_they_are_there(entry: Entry) -> None:
    """Deferred initialisation: built on meta, made empty, drawn."""
    deferred = entry.build(device="meta").to_empty(device="cpu")
    torch.manual_seed(5)
    deferred.reset_parameters()
    direct = entry.build()
    torch.manual_seed(5)
    direct.reset_parameters()
    assert_same(deferred, direct)
    x = entry.batch()
    assert torch.equal(deferred(x), direct(x))


@each_entry
def test_to_empty_and_loading_make_the_module_again(entry: Entry) -> None:
    module = entry.build()
    for start in ("cpu", "meta"):
        other = entry.build().to(start).to_empty(device="cpu")
        for parameter in other.parameters():
            parameter.data.fill_(torch.nan)
        other.load_state_dict(module.state_dict())
        assert_same(other, module)
        assert torch.equal(other(entry.batch()), module(entry.batch()))
        assigned = entry.build().to("meta")
        assigned.load_state_dict(stored(module), assign=True)
        assert torch.equal(assigned(entry.batch()), module(entry.batch()))


@each_entry
def test_forward_changes_nothing_in_any_mode(entry: Entry) -> None:
    module = entry.build()
    before, x = stored(module), entry.batch()
    y = module.train()(x)
    assert torch.equal(module.eval()(x), y)
    with torch.no_grad():
        torch.testing.assert_close(module(x), y)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), y)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


@each_entry
def test_a_module_made_in_inference_mode_runs(entry: Entry) -> None:
    with torch.inference_mode():
        module = entry.build()
        assert torch.equal(module(entry.batch()), entry.build()(entry.batch()))


@each_entry
def test_inputs_of_any_layout_and_leading_shape(entry: Entry) -> None:
    module = entry.build(dtype=torch.float64)
    x = entry.batch(torch.float64, (2, 3))
    y = module(x)
    torch.testing.assert_close(module(x.transpose(0, 1)).transpose(0, 1), y)
    torch.testing.assert_close(module(x.mT.contiguous().mT), y)
    torch.testing.assert_close(module(x[0, 0]), y[0, 0])
    assert module(x[:0]).shape == (0, 3, y.shape[-1])


@each_entry
def test_gradients_and_their_gradients(entry: Entry) -> None:
    module = entry.build(dtype=torch.float64)
    x = entry.batch(torch.float64, (2,)).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (x,))

    # Entries that stand for no edge are not read: whatever moves them moves nothing.
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values))


@each_entry
def test_frozen_parameters_get_no_gradient(entry: Entry) -> None:
    module = entry.build().requires_grad_(False)
    x = entry.batch().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in module.parameters())
    module = entry.build()
    module(entry.batch()).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())
    module.zero_grad()
    assert all(p.grad is None for p in module.parameters())


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: _through_file(module),
}


def _through_file(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=isinstance(module, dict))


@each_entry
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_the_module_and_independent(entry: Entry, copied: Callable[[nn.Module], nn.Module]) -> None:
    module = entry.build()
    module(entry.batch()).sum().backward()
    twin = copied(module)
    assert_same(twin, module)
    y = module(entry.batch())
    assert torch.equal(twin(entry.batch()), y)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(module(entry.batch()), y)


@each_entry
def test_state_goes_through_a_file(entry: Entry) -> None:
    module, other = entry.build(), entry.make()
    state = _through_file(dict(module.state_dict()))
    assert all(isinstance(t, Tensor) for t in state.values())
    result = other.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same(other, module)


@each_entry
def test_dtype_and_back(entry: Entry) -> None:
    module = entry.build()
    x = entry.batch()
    wanted = entry.build().double()(x.double())
    torch.testing.assert_close(module.double()(x.double()), wanted)
    module.float()
    torch.testing.assert_close(module(x), wanted.float(), rtol=1e-4, atol=1e-5)
    before, x = module.weight.detach(), x.bfloat16()
    weight = module.bfloat16().weight.detach()
    assert torch.equal(weight, before.bfloat16())
    with torch.no_grad():
        expected = accuracy.expected(partial(nn.functional.linear, x, weight, module.bias))
        assert accuracy.excess(module(x), *expected, "bf16", by_torch=True) <= 1


@each_entry
def test_repr_and_names(entry: Entry) -> None:
    module = entry.build()
    assert f"in_features={entry.inputs}, out_features={module.out_features}" in repr(module)
    assert [name for name, _ in module.named_parameters()][1:] == (["bias"] if module.bias is not None else [])
    assert module.weight.shape == (module.out_features, module.in_features)
    torch.testing.assert_close(module(entry.batch()), nn.functional.linear(entry.batch(), module.weight, module.bias))


@each_entry
def test_memory_can_be_shared(entry: Entry) -> None:
    module = entry.build().share_memory()
    assert all(p.is_shared() for p in module.parameters())
    assert torch.equal(module(entry.batch()), entry.build()(entry.batch()))
