"""What a layer multiplies by on a CPU: its dense weight, unless its operation was measured to be faster.

The eager twin takes much time to read labels and blocks. The CPU kernels can be faster than the dense weight where a
layer does not fit the caches and a batch has few rows; whether they are is known once ``fpe here`` has measured this
machine.

Without gradients the dense weight is made once for each version of the layer's tensors, and kept. With gradients every
forward makes a masked copy of the weight, and its gradient is masked in the same way; only the mask is kept.

What is kept takes memory. Once a layer has run without gradients, its dense weight is kept: ``alpha`` times the
parent's bytes, or those of ``[out_features, in_features]`` for a block layer. Once it has run with gradients, its mask
is kept: a byte for each entry of the dense weight, or eight bytes for each weight if only those of edges are stored.
Neither is part of a state dict, a copy or a pickle. ``keeps_dense = False``, set on a layer or on
:class:`fpe.layers.ExpandedLinear` for all of them, turns both off. Every call then reads the labels or the blocks
themselves: it needs no memory but the layer's own, and takes several times as long.

Changes are noticed by PyTorch's version counters. Fused optimizers and writes through ``.data`` do not count there, so
a sample of the entries is compared too, and a forward with gradients frees the dense weight. After writing a few
entries through ``.data``, call :func:`forget`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fpe.kernels.here import roof_here

if TYPE_CHECKING:
    from .base import ExpandedLinear
    from .kept import KeptLinear

SAMPLE = 64
"""Entries of a tensor that are compared."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes: the integers as which floating-point numbers are read to work on their bits."""


class Made(NamedTuple):
    """What was made of a layer's tensors, and how they were then.

    Attributes:
        result: What was made.
        first: The first of the tensors. It is held, so that no other tensor takes over its identity or its memory.
        version: Its version counter then.
        pointer: Where its entries lay then.
        sample: A view of some of its entries.
        entries: A copy of what these were then.
        others: Names, tensors and versions of the other tensors; a layer may have ``None`` in a tensor's place.
    """

    result: Tensor
    first: Tensor
    version: int
    pointer: int
    sample: Tensor
    entries: Tensor
    others: list[tuple[str, Tensor | None, int]]

    @classmethod
    def of(cls, result: Tensor, first: Tensor, layer: nn.Module, names: Sequence[str]) -> "Made":
        """Notes the present state of contiguous tensors on a CPU."""
        flat = first.detach().view(INTEGERS[first.element_size()]).view(-1)
        sample = flat[:: len(flat) // SAMPLE + 1]
        tensors = [(name, _own(layer, name)) for name in names]
        others = [(name, tensor, 0 if tensor is None else tensor._version) for name, tensor in tensors]
        return cls(result, first, first._version, first.data_ptr(), sample, sample.clone(), others)

    def is_of(self, first: object, layer: nn.Module) -> bool:
        """Whether it was made of this tensor and of what the layer has now, and none of them has changed."""
        seen = self.first
        if (
            first is not seen
            or seen._version != self.version
            or seen.data_ptr() != self.pointer
            or not torch.equal(self.sample, self.entries)
        ):
            return False
        for name, tensor, version in self.others:
            if _own(layer, name) is not tensor or (tensor is not None and tensor._version != version):
                return False
        return True


_WEIGHTS: WeakKeyDictionary[nn.Module, Made] = WeakKeyDictionary()
_MASKS: WeakKeyDictionary[nn.Module, Made] = WeakKeyDictionary()


def forget(layer: nn.Module) -> None:
    """Frees what is cached for a layer; the next call computes it again."""
    _WEIGHTS.pop(layer, None)
    _MASKS.pop(layer, None)


def _own(layer: nn.Module, name: str) -> Any:
    """A layer's buffer or attribute: ``getattr`` of a buffer takes half a microsecond."""
    own = layer.__dict__
    return own[name] if name in own else own["_buffers"].get(name)


def _keep(
    place: WeakKeyDictionary[nn.Module, Made],
    layer: nn.Module,
    first: Tensor,
    names: Sequence[str],
    make: Callable[[], Tensor],
) -> Tensor:
    """Makes something of a layer's tensors and keeps it, unless one has no version or its memory is not its own."""
    place.pop(layer, None)
    with torch.inference_mode(False), torch.no_grad():  # what is kept may be used with gradients later
        result = make().contiguous()
        tensors = [t for t in (first, result, *(_own(layer, name) for name in names)) if t is not None]
        if all(type(t) in (Tensor, nn.Parameter) and t.is_contiguous() and not t.is_inference() for t in tensors):
            place[layer] = Made.of(result, first, layer, names)
    return result


def dense_weight(layer: "ExpandedLinear", x: object) -> Tensor | None:
    """The weight ``[out_features, in_features]`` to multiply ``x`` by, differentiable where the layer trains.

    Returns:
        The weight; or ``None`` if the layer's operation is to be called instead: on other devices, with a backend that
        was asked for by name, while a graph is traced or compiled, where the operation was measured to be faster, and
        for an ``x`` that the operation will refuse with a message.
    """
    if (
        layer.backend != "auto"
        or not layer.keeps_dense
        or not isinstance(x, Tensor)
        or not x.is_cpu
        or not x.dim()
        or x.size(-1) != layer.in_features
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return None
    made = _WEIGHTS.get(layer)
    name, *others = layer.made_of
    stored: Any = layer._parameters.get(name)
    if roof_here() is not None and _operation_wins(layer, x, stored):
        return None
    if (
        made is not None
        and made.result.dtype is x.dtype
        and not (torch.is_grad_enabled() and stored is not None and stored.requires_grad)
        and made.is_of(stored, layer)
    ):
        return made.result
    own = type(stored) is nn.Parameter  # else a transform, a parametrization or a subclass has taken its place
    weight = stored if own else getattr(layer, name)
    same = x.dtype == weight.dtype or torch.is_autocast_enabled("cpu")
    if not same or not weight.is_cpu or type(weight) not in (Tensor, nn.Parameter):
        return None
    if not own or torch._C._are_functorch_transforms_active():
        return layer.wide_weight()
    if torch.is_grad_enabled() and weight.requires_grad:
        _WEIGHTS.pop(layer, None)  # the next step of the optimizer changes it
        return layer.masked_copy()
    return _keep(_WEIGHTS, layer, weight, others, layer.wide_weight)


def _operation_wins(layer: "ExpandedLinear", x: Tensor, stored: Any) -> bool:
    """Whether a layer's operation was measured to be faster on this machine, for a call that wants no gradient."""
    return (
        type(stored) is nn.Parameter
        and stored.is_cpu
        and stored.dtype is x.dtype
        and not (torch.is_grad_enabled() and (stored.requires_grad or x.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and layer.beats_wide(x)
    )


def masked_copy(layer: "ExpandedLinear", along: int, children: int) -> Tensor:
    """The dense weight of a layer that is stored as its parent's weight, by a quick differentiable copy.

    Args:
        layer: Whose ``made_of`` names its weight, and then what its mask is made of.
        along: The dimension of the dense weight in which children lie side by side.
        children: How many children there are.
    """

    def bits() -> Tensor:
        return layer.kept().unflatten(along, (children, -1)).to(torch.int8).neg_()

    return _Masked.apply(getattr(layer, layer.made_of[0]), _index(layer, bits), along)


def placed_copy(layer: "KeptLinear") -> Tensor:
    """The dense weight of a layer that stores the weights of its edges alone, by a quick differentiable copy."""
    places = _index(layer, layer.places)
    return _Placed.apply(getattr(layer, layer.made_of[0]), places, layer.out_features, layer.in_features)


def _index(layer: "ExpandedLinear", make: Callable[[], Tensor]) -> Tensor:
    """Returns what training needs of a layer's topology; ``make`` is called once for each version of it."""
    _, topology, *others = layer.made_of
    first, made = _own(layer, topology), _MASKS.get(layer)
    known = made is not None and made.is_of(first, layer)
    return made.result if made is not None and known else _keep(_MASKS, layer, first, others, make)


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
        """The kept entries of the gradient at the parent's size, differentiable if a graph is wanted."""
        (grad,), bits = grads, ctx.bits
        grad = grad.reshape(bits.shape)
        if torch.is_grad_enabled() or not torch._C._has_storage(grad):  # a graph is wanted, or it is batched
            kept = torch.where(bits != 0, grad, grad.new_zeros(()))
        else:
            kept = _and(grad, bits)
        return kept.sum(ctx.along), None, None


class _Placed(torch.autograd.Function):
    """The weights of edges at their places: a scatter, and a gather back, which hit each place once."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
        """The dense weight ``[rows, columns]``, with ``values[nnz]`` at their places in it and zero elsewhere."""
        ctx.places = places
        return values.new_zeros(rows * columns).scatter_(0, places, values).view(rows, columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient at the places, differentiable."""
        return grads[0].flatten().index_select(0, ctx.places), None, None, None


def _and(values: Tensor, bits: Tensor) -> Tensor:
    return (values.view(INTEGERS[values.element_size()]) & bits).view(values.dtype)
