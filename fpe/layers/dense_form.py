"""What a layer multiplies by on a CPU: its dense weight. Labels and blocks save a CPU no time, and cost it much.

Without gradients the dense weight is made once for each version of the layer's tensors, and kept. With gradients every
forward makes a masked copy of the weight, and its gradient is masked alike; there the mask is kept.

What is kept takes memory: the dense weight ``alpha`` times the parent's bytes (of a block layer, a whole
``[out_features, in_features]``) once the layer has run without gradients, and the mask a byte for each entry of the
dense weight once it has been trained. Neither is part of a state dict, a copy or a pickle. ``keeps_dense = False``, set
on a layer or on :class:`fpe.layers.ExpandedLinear` for all of them, turns both off: every call then reads the labels or
the blocks themselves, in the parent's memory and several times as long.

Changes are seen by PyTorch's version counters. What is written through ``.data`` does not count there, so a sample of
the entries is compared too: averaged weights that are swapped in are seen. After writing a few entries in that way,
call :func:`forget`.
"""

from collections.abc import Callable
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .base import ExpandedLinear

SAMPLE = 8
"""Entries of a tensor that are compared."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes: what floating-point numbers are read as where their bits count."""


class Made(NamedTuple):
    """What was made of some tensors, and how they were then.

    Attributes:
        result: What was made.
        sources: The tensors, held so that neither their identity nor their memory can become another's.
        versions: Of PyTorch's counters.
        pointer: Where the entries of the first one lay.
        sample: Some of its entries, in its own memory.
        entries: What they were.
    """

    result: Tensor
    sources: tuple[Tensor, ...]
    versions: list[int]
    pointer: int
    sample: Tensor
    entries: list[int]

    @classmethod
    def of(cls, result: Tensor, sources: tuple[Tensor, ...]) -> "Made":
        """Notes how contiguous tensors on a CPU are."""
        first = sources[0]
        flat = first.detach().view(INTEGERS[first.element_size()]).view(-1)
        sample = flat[:: len(flat) // SAMPLE + 1]
        return cls(result, sources, [t._version for t in sources], first.data_ptr(), sample, sample.tolist())

    def of_these(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether it was made of these tensors, and they have not changed."""
        return (
            len(sources) == len(self.sources)
            and all(map(is_, sources, self.sources))
            and [t._version for t in sources] == self.versions
            and sources[0].data_ptr() == self.pointer
            and self.sample.tolist() == self.entries
        )


class Kept:
    """The last result for each layer, for as long as the layer lives."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[nn.Module, Made] = WeakKeyDictionary()

    def get(self, layer: nn.Module, sources: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """What ``make()`` returned when it was last called on these tensors, or returns now, without gradients."""
        made = self._made.get(layer)
        if made is not None and made.of_these(sources):
            return made.result
        self.drop(layer)
        with torch.inference_mode(False), torch.no_grad():  # what is kept may meet gradients later
            result = make().contiguous()
            if all(map(_can_be_kept, (*sources, result))):
                self._made[layer] = Made.of(result, sources)
        return result

    def drop(self, layer: nn.Module) -> None:
        """Frees what is kept for a layer."""
        self._made.pop(layer, None)


def _can_be_kept(tensor: Tensor) -> bool:
    """Not so: subclasses, tensors of ``torch.inference_mode``, which have no version, and strided ones."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu
    return plain and not tensor.is_inference() and tensor.is_contiguous()


_WEIGHTS = Kept()
_MASKS = Kept()


def forget(layer: nn.Module) -> None:
    """Frees what is kept for a layer; the next call makes it anew."""
    _WEIGHTS.drop(layer)
    _MASKS.drop(layer)


def dense_weight(layer: "ExpandedLinear", x: object) -> Tensor | None:
    """The weight ``[out_features, in_features]`` to multiply ``x`` by, differentiable where the layer trains.

    Returns:
        The weight; or none where the layer's operation is to be called: on other devices, with a backend that was asked
        for, while a graph is traced or compiled, where it is faster, and for an ``x`` that it will refuse by name.
    """
    if not (
        isinstance(x, Tensor)
        and x.is_cpu
        and layer.keeps_dense
        and layer.backend == "auto"
        and x.dim()
        and x.size(-1) == layer.in_features
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack())
    ):
        return None
    stored: Any = layer._parameters.get("edge_weight")
    own = type(stored) is nn.Parameter  # else a transform, a parametrization or a subclass has taken its place
    weight = stored if own else layer.edge_weight
    same = x.dtype == weight.dtype or torch.is_autocast_enabled("cpu")
    if not same or not weight.is_cpu or type(weight) not in (Tensor, nn.Parameter):
        return None
    if not own or torch._C._are_functorch_transforms_active():
        return layer.wide_weight()
    if torch.is_grad_enabled() and weight.requires_grad:
        _WEIGHTS.drop(layer)  # the next step makes it stale
        return layer.masked_copy()
    return _WEIGHTS.get(layer, (weight, *layer.topology_tensors()), layer.wide_weight)


def masked_copy(layer: "ExpandedLinear", along: int, children: int) -> Tensor:
    """The dense weight of a layer that is stored as its parent's weight, by a quick differentiable copy.

    Args:
        layer: One whose ``edge_weight`` is the parent's weight.
        along: Dimension of the dense weight in which children lie side by side.
        children: How many.
    """

    def bits() -> Tensor:
        return layer.kept().unflatten(along, (children, -1)).to(torch.int8).neg_()

    return _Masked.apply(layer.edge_weight, _MASKS.get(layer, layer.topology_tensors(), bits), along)


class _Masked(torch.autograd.Function):
    """Every child's entries of a weight: an ``and`` of bits, which is exact where the weight is not finite.

    On a CPU it takes a tenth of the time of ``torch.where``, and the mask a byte an entry. Transforms of ``torch.func``
    take ``wide_weight()``: the ``setup_context`` that they ask for would cost every step more than the copy itself.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: Tensor, along: int) -> Tensor:
        """The dense weight of ``weight[N, K]`` and ``bits[alpha, N, K]`` or ``[N, alpha, K]``, 0 or -1."""
        ctx.bits, ctx.along = bits, along
        return _and(weight.unsqueeze(along), bits).flatten(along, along + 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The kept entries of the gradient at the parent's size, differentiable where a graph is wanted."""
        (grad,), bits = grads, ctx.bits
        grad = grad.reshape(bits.shape)
        if torch.is_grad_enabled() or not torch._C._has_storage(grad):  # a graph is wanted, or it is batched
            kept = torch.where(bits != 0, grad, grad.new_zeros(()))
        else:
            kept = _and(grad, bits)
        return kept.sum(ctx.along), None, None


def _and(values: Tensor, bits: Tensor) -> Tensor:
    return (values.view(INTEGERS[values.element_size()]) & bits).view(values.dtype)
