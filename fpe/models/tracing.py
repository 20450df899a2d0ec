"""Linear layers that are joined by element-wise code alone, found in one forward pass of an unknown model."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..groups import Group
from ..probe import run

aten = torch.ops.aten
KEEPS_FEATURES = {
    aten.view, aten._unsafe_view, aten.expand, aten.clone, aten.detach, aten.alias, aten.unsqueeze, aten.slice,
    aten._to_copy, aten.squeeze, aten.lift_fresh,
}  # fmt: skip
"""Operations that change a tensor's shape or copy it; where the last dimension is as before, so are the features."""


class Source(NamedTuple):
    """Where features come from.

    Attributes:
        name: The linear layer that made them.
        part: Which of its equal parts.
        parts: How many.
    """

    name: str
    part: int = 0
    parts: int = 1


class _Follower(TorchDispatchMode):
    """Notes which tensors are element-wise functions of which layers' outputs, and who reads them otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: Any = WeakIdKeyDictionary()
        self.readers: dict[str, dict[str, frozenset[Source]]] = {}  # by second layer
        self.escaped: dict[str, str] = {}
        self.inside = 0

    def enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for source in self.sources.get(inputs[0], frozenset()) if self.inside == 0 and inputs else ():
            self.readers.setdefault(source.name, {})[name] = self.sources[inputs[0]]
        self.inside += 1

    def leave(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.inside -= 1
        if self.inside == 0 and isinstance(output, Tensor):
            self.sources[output] = frozenset({Source(name)})

    def escape(self, sources: frozenset[Source], how: str) -> None:
        for source in sources:
            self.escaped.setdefault(source.name, how)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.inside:
            return output
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = [t for t in tensors if t in self.sources]
        if not known:
            return output
        sources: frozenset[Source] = frozenset().union(*(self.sources[t] for t in known))
        width = known[0].shape[-1]
        others = [t for t in tensors if t not in self.sources]
        if (
            func.overloadpacket is aten.split
            and {t.shape[-1] * len(output) for t in output} == {width}
            and all(source.parts == 1 for source in sources)
        ):
            for i, piece in enumerate(output):
                self.sources[piece] = frozenset(Source(source.name, i, len(output)) for source in sources)
            return output
        pointwise = torch.Tag.pointwise in func.tags and all(t.dim() == 0 or t.shape[-1] == 1 for t in others)
        same = {t.shape[-1] for t in known} == {width} and isinstance(output, Tensor) and output.shape[-1:] == (width,)
        if same and (pointwise or func.overloadpacket in KEEPS_FEATURES):
            self.sources[output] = sources
        else:
            self.escape(sources, f"its output is read by {func.overloadpacket}, which is not element-wise there")
        return output


def traced(model: nn.Module, names: Sequence[str], example_inputs: Any) -> tuple[list[Group], dict[str, str]]:
    """Finds the groups among some linear layers, and why the others are in none.

    Args:
        model: Left as it is; a copy runs, in eval mode.
        names: The layers to look at.
        example_inputs: As in :func:`fpe.expand`.
    """
    plain, follower = copy.deepcopy(model).eval(), _Follower()
    order: list[str] = []
    for name in names:
        module = plain.get_submodule(name)
        module.register_forward_pre_hook(partial(_entering, follower, order, name))
        module.register_forward_hook(partial(follower.leave, name))
    with follower:
        for output in run(plain, example_inputs):
            follower.escape(follower.sources.get(output, frozenset()), "its output is the model's")
    groups: list[Group] = []
    refused = dict.fromkeys((name for name in names if name not in order), "it does not run on example_inputs")
    taken: set[str] = set()
    for second in dict.fromkeys(order):
        read = {sources for readers in follower.readers.values() if (sources := readers.get(second)) is not None}
        sources = frozenset().union(*read)
        firsts = tuple(dict.fromkeys(name for name in order if name in {source.name for source in sources}))
        if not firsts or taken & {*firsts, second}:
            continue
        parts = {source.parts for source in sources}
        whole = len(sources) == len(firsts) * max(parts) and (len(firsts) == 1 or parts == {1})
        lost = next((follower.escaped[name] for name in firsts if name in follower.escaped), None)
        many = next((name for name in firsts if len(follower.readers[name]) > 1), None)
        if lost is None and many is not None:
            lost = f"it is read by {', '.join(follower.readers[many])}"
        if lost is None and not (whole and len(read) == 1):
            lost = f"'{second}' reads it together with others"
        if lost is None:
            groups.append(Group(firsts, second, max(parts)))
            taken.update(groups[-1].names)
        else:
            refused.update(dict.fromkeys(firsts, lost))
    for name in order:
        refused.setdefault(name, follower.escaped.get(name, "no other linear layer reads it through element-wise code"))
    return groups, {name: reason for name, reason in refused.items() if name not in taken}


def _entering(follower: _Follower, order: list[str], name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    order.append(name)
    follower.enter(name, module, inputs)
