"""Which layers are expanded together: pairs, and gated triples whose first layers share one partition."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from .layers import ExpandedLinear, StackedLinear
from .replaceable import check_replaceable, check_unshared, is_transposed
from .surgery import is_chain, sequential_leaves

Name = str | re.Pattern[str]
Pair = tuple[Name | tuple[Name, ...], str]
"""The layers that are split, by name, and the layer that reads them.

``("fc1", "fc2")`` is a pair. ``(("gate", "up"), "down")`` is a gated triple: the model multiplies what the first two
give, entry by entry. ``(("gate_up", "gate_up"), "down")`` is the same with both in one layer, one above the other.
"""


class Group(NamedTuple):
    """Layers that are expanded together.

    Attributes:
        firsts: Names of the layers whose neurons are split: one, or the two of a gated triple.
        second: Name of the layer that reads them.
        parts: How many layers each of ``firsts`` holds, one above the other: 2 for a fused ``gate_up_proj``, else 1.
        between: Names of modules that run between ``firsts`` and ``second`` and may have to be widened.
    """

    firsts: tuple[str, ...]
    second: str
    parts: int = 1
    between: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All layers."""
        return (*self.firsts, self.second)

    @property
    def pair(self) -> Pair:
        """As ``pairs`` of :func:`fpe.expand` takes it."""
        firsts = self.firsts * self.parts
        return (firsts if len(firsts) > 1 else firsts[0], self.second)

    def __str__(self) -> str:
        """As a reader would write it."""
        firsts = ", ".join(self.firsts) + (f" ({self.parts} in one)" if self.parts > 1 else "")
        return f"{f'({firsts})' if len(self.firsts) > 1 else firsts} -> {self.second}"


@contextmanager
def errors_name(op: str, group: Group) -> Iterator[None]:
    """Has a ``ValueError`` say in which group of a model it was raised."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{op}: {group}: {error}") from error


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense layer that can be expanded: ``nn.Linear``, or GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def as_linear(module: nn.Module) -> nn.Linear:
    """A dense layer as ``nn.Linear``: the layer itself, or a copy of one that stores its weight transposed."""
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return linear.train(module.training)


def dense_layers(model: nn.Module, group: Group) -> tuple[list[nn.Linear], nn.Linear]:
    """The layers of a group: those that are split, a fused one as its parts, and the one that reads them.

    Raises:
        TypeError: One is not a dense layer.
        ValueError: One does not exist, is expanded already, holds what its replacement would drop or a weight that is
            not finite, or the sizes do not fit.
    """
    firsts, second = [dense_layer(model, name) for name in group.firsts], dense_layer(model, group.second)
    for name, first in zip(group.firsts, firsts, strict=True):
        if second.in_features * group.parts != first.out_features:
            raise ValueError(
                f"expand: '{group.second}' must read the {first.out_features // group.parts} outputs of '{name}', got "
                f"in_features = {second.in_features}"
            )
        if first.in_features != firsts[0].in_features:
            raise ValueError(
                f"expand: '{name}' must have the {firsts[0].in_features} inputs of '{group.firsts[0]}', got "
                f"{first.in_features}"
            )
    for name, layer in zip(group.names, (*firsts, second), strict=True):
        if not all(p.is_meta or bool(p.isfinite().all()) for p in layer.parameters()):
            raise ValueError(f"expand: the weights of '{name}' must be finite, got NaN or infinity")
    return [part for first in firsts for part in _parts(first, group.parts)], second


def dense_layer(model: nn.Module, name: str) -> nn.Linear:
    """The layer of a name, if it can be expanded.

    Raises:
        TypeError: It is not a dense layer.
        ValueError: It does not exist, is expanded already, or holds what its replacement would drop.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"expand: the model has no layer '{name}'") from error
    if isinstance(module, (ExpandedLinear, StackedLinear)):
        raise ValueError(f"expand: '{name}' is expanded already ({type(module).__name__})")
    check_replaceable("expand", name, module, type(module) if is_transposed(module) else nn.Linear)
    check_unshared("expand", model, name, module)
    return as_linear(module)


def _parts(layer: nn.Linear, parts: int) -> list[nn.Linear]:
    """Returns the layers that a fused one holds, one above the other."""
    if parts == 1:
        return [layer]
    biases = [None] * parts if layer.bias is None else layer.bias.detach().chunk(parts)
    found = []
    for weight, bias in zip(layer.weight.detach().chunk(parts), biases, strict=True):
        part = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
        part.weight = nn.Parameter(weight, layer.weight.requires_grad)
        if bias is not None:
            part.bias = nn.Parameter(bias, layer.bias.requires_grad)
        found.append(part.train(layer.training))
    return found


def named_groups(model: nn.Module, pairs: Iterable[Pair]) -> list[Group]:
    r"""The groups that ``pairs`` name, patterns matched with the names of the model's layers.

    A name with ``*`` is a pattern in which each ``*`` stands for some text; in the other names of the pair it stands
    for the same. A compiled regular expression in the first place is matched with whole names; the other names are then
    templates, with ``\1`` for its first group.

    Raises:
        ValueError: An entry of ``pairs`` is not a pair of names, a pattern matches no layer, a layer is named twice, or
            there are no pairs.
    """
    groups: list[Group] = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"expand: pairs must be of two layer names, got {pair!r}")
        firsts = tuple(pair[0]) if isinstance(pair[0], (tuple, list)) else (pair[0],)
        known = (*firsts[1:], pair[1])
        if not firsts or not isinstance(firsts[0], (str, re.Pattern)) or not all(isinstance(n, str) for n in known):
            raise ValueError(f"expand: pairs must be of two layer names, got {pair!r}")
        for names in _matching(model, firsts[0], [str(name) for name in known]):
            inner = names[:-1]
            fused = len(inner) > 1 and len(set(inner)) == 1
            groups.append(Group(inner[:1] if fused else inner, names[-1], len(inner) if fused else 1))
    if not groups:
        raise ValueError("expand: pairs is empty, nothing to expand")
    everything = [name for group in groups for name in group.names]
    for name in everything:
        if everything.count(name) > 1:
            raise ValueError(f"expand: pairs name '{name}' twice; a layer is split or widened only once")
    if is_chain(model):
        _check_order(model, groups)
    return groups


def _matching(model: nn.Module, first: Name, others: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the names of each group that a pattern matches; plain names match themselves."""
    if isinstance(first, str) and "*" not in first:
        return [(first, *others)]
    if isinstance(first, str):
        pattern = re.compile("(.*)".join(map(re.escape, first.split("*"))))
        stars = first.count("*")
        for other in others:
            if other.count("*") != stars:
                raise ValueError(f"expand: '{first}' and '{other}' must have as many '*'")
        templates = [_template(other) for other in others]
    else:
        pattern, templates = first, list(others)
    matches = [match for name, _ in model.named_modules() if (match := pattern.fullmatch(name))]
    if not matches:
        raise ValueError(
            f"expand: no layer of the model is named like '{pattern.pattern if first is pattern else first}'"
        )
    return [(match.string, *(match.expand(template) for template in templates)) for match in matches]


def _template(glob: str) -> str:
    """A glob as a template: its first star is group 1, and so on."""
    pieces = glob.split("*")
    return "".join(f"{piece}\\g<{i}>" for i, piece in enumerate(pieces[:-1], 1)) + pieces[-1]


def _check_order(model: nn.Module, groups: list[Group]) -> None:
    """Raises where the layers of a chain are paired in an order in which they do not run."""
    order = [name for name, module in sequential_leaves(model) if is_linear(module)]
    for group in groups:
        for first in group.firsts:
            if order and first == order[-1]:
                raise ValueError(f"expand: '{first}' is the head: its outputs are the model's and cannot be split")
            if {first, group.second} <= set(order) and order.index(group.second) != order.index(first) + 1:
                raise ValueError(
                    f"expand: '{group.second}' does not read '{first}'; the linear layers run in order {order}"
                )
