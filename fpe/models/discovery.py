"""Says which layers of a model would be expanded, and why the others would not."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..groups import Group, Pair, dense_layers, is_linear, named_groups
from ..layers import ExpandedLinear
from ..probe import check_pairs
from ..surgery import chains, is_chain, sequential_leaves, widened_between
from .table import known
from .tracing import traced

LAST = "is the last layer of its chain: its outputs are read outside"


@dataclass(frozen=True)
class Found:
    """What :func:`find_pairs` found.

    Attributes:
        groups: The layers that would be expanded together.
        refused: For every other dense layer, by name, why it would not be expanded; also for modules that hold weights
            of three dimensions, as of experts.
    """

    groups: tuple[Group, ...]
    refused: Mapping[str, str]

    @property
    def pairs(self) -> list[Pair]:
        """As ``pairs`` of :func:`fpe.expand` takes them."""
        return [group.pair for group in self.groups]

    def __str__(self) -> str:
        """A line for each group and each refusal; those that differ only by numbers in their names share a line."""
        lines: dict[str, list[str]] = {}
        shown = [f"expands {group}" for group in self.groups]
        shown += [f"leaves  {name}: {reason}" for name, reason in self.refused.items()]
        for line in shown:
            lines.setdefault(_numberless(line), []).append(line)
        alike = ((same[0], "") if len(same) == 1 else (line, f"  ({len(same)} times)") for line, same in lines.items())
        return "\n".join(line + times for line, times in alike)


def _numberless(line: str) -> str:
    return re.sub(r"(?<=[. (])\d+(?=[.:, )']|$)", "*", line)


def find_pairs(model: nn.Module, pairs: Iterable[Pair] | None = None, example_inputs: Any = None) -> Found:
    """Says which layers :func:`fpe.expand` would expand, and why not the others. It changes nothing.

    It looks in three places, in this order: the blocks of :mod:`fpe.models.table`; every ``nn.Sequential``, whose
    linear layers are paired from the front; and, with ``example_inputs``, one forward pass, for linear layers with
    only element-wise code between them.

    Args:
        model: A dense model; some of its layers may be expanded already.
        pairs: As in :func:`fpe.expand`: names or patterns. If they are given, no other pairs are looked for.
        example_inputs: As in :func:`fpe.expand`. The pairs that are found are tested with them.

    Returns:
        The pairs, and why other layers are in none. A named pair that cannot be expanded is among the latter.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: An entry of ``pairs`` is not a pair of names, a pattern matches no layer, a layer is named twice, or
            there are no pairs.

    Example:
        >>> print(fpe.find_pairs(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))))
        expands 0 -> 2
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"find_pairs: model must be an nn.Module, got {type(model).__name__}")
    refused: dict[str, str] = {}
    found = list(named_groups(model, pairs) if pairs is not None else candidates(model, refused))
    groups: list[Group] = []
    taken: set[str] = set()

    def take(group: Group) -> None:
        reason = f"'{group.firsts[0]}' is in another pair" if taken & {*group.names} else _why_not(model, group)
        if reason is None:
            groups.append(group)
            taken.update(group.names)
        for name in group.names if reason else ():
            refused.setdefault(name, reason or "")

    for group in found:
        take(group)
    left = [name for name, module in model.named_modules() if is_linear(module) and name not in taken]
    if pairs is None and example_inputs is not None:
        traced_groups, reasons = traced(model, left, example_inputs)
        for group in traced_groups:
            take(group)
        for name, reason in reasons.items():
            refused.setdefault(name, reason)
    if example_inputs is not None:
        for group in list(groups):
            why = _differs(model, group, example_inputs)
            if why is not None:
                groups.remove(group)
                taken.difference_update(group.names)
                refused.update(dict.fromkeys(group.names, why))
    for name, module in model.named_modules():
        stacks = [own for own, p in module.named_parameters(recurse=False) if p.dim() == 3]
        if stacks and not isinstance(module, nn.modules.conv._ConvNd):
            refused[name] = (
                f"holds weights of three dimensions ({', '.join(stacks)}), as of experts, and no linear layers"
            )
    unknown = "is in no block that fpe knows" + (
        "" if example_inputs is not None else "; pass example_inputs, or name it in pairs"
    )
    for name in left:
        refused.setdefault(name, unknown if pairs is None else "is not named in pairs")
    return Found(tuple(groups), {name: reason for name, reason in refused.items() if name not in taken})


def blocks(model: nn.Module) -> Iterator[Group]:
    """The groups of known blocks."""
    for prefix, block in model.named_modules():
        group, path = known(block), f"{prefix}." if prefix else ""
        if group is not None:
            inside = dict(block.named_modules())
            yield group._replace(
                firsts=tuple(path + name for name in group.firsts),
                second=path + group.second,
                between=tuple(path + name for name in group.between if name in inside),
            )


def candidates(model: nn.Module, refused: dict[str, str]) -> Iterator[Group]:
    """The groups of known blocks and of chains; notes why a chain's other layers are in none."""
    yield from blocks(model)
    for path, sequence in model.named_modules():
        if isinstance(sequence, nn.Sequential) and not is_chain(sequence):
            inside = (f"{path}.{name}".lstrip(".") for name, module in sequence.named_children() if is_linear(module))
            refused.update(dict.fromkeys(inside, f"is in a {type(sequence).__name__}, which has a forward of its own"))
    for prefix, chain in chains(model):
        linears: list[str] = []
        split: str | None = None  # the expanded layer whose children the next layer reads
        for name, module in sequential_leaves(chain, prefix):
            if isinstance(module, ExpandedLinear):
                refused.update(dict.fromkeys(linears[len(linears) // 2 * 2 :], f"is joined to '{name}'"))
                refused[name] = f"is expanded already ({type(module).__name__})"
                del linears[len(linears) // 2 * 2 :]
                split = name if module.planes[0] > 1 else None
            elif is_linear(module) and split is not None:
                refused[name], split = f"reads the children of '{split}', which is expanded already", None
            elif is_linear(module):
                linears.append(name)
        yield from (Group((first,), second) for first, second in zip(linears[::2], linears[1::2], strict=False))
        if len(linears) % 2:
            refused[linears[-1]] = LAST


def _why_not(model: nn.Module, group: Group) -> str | None:
    """Why a group cannot be expanded; ``None`` where it can."""
    try:
        dense_layers(model, group)
        widened_between(model, group.firsts[0], group.second, 2, group.between)
    except (TypeError, ValueError) as error:
        return str(error).removeprefix("expand: ")
    return None


def _differs(model: nn.Module, group: Group, example_inputs: Any) -> str | None:
    """Returns how outputs differ on an input if the layers of a group are no pair, or ``None``."""
    try:
        check_pairs(
            model, {group: widened_between(model, group.firsts[0], group.second, 2, group.between)}, 2, example_inputs
        )
    except ValueError as error:
        return str(error).removeprefix("expand: ")
    return None
