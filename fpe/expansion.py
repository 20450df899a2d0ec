"""A trained model in, a wider model with as many non-zero weights out (paper, section 2.3)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Generator, Tensor, nn

from fpe.kernels import HOLE
from fpe.kernels.partition.seeded import SEEDS, beside
from fpe.kernels.structures import BLOCK, RANDOM, SEEDED, STRUCTURES, Structure

from .checkpoint import guard_state_dict
from .layers import BlockLinear, ExpandedLinear, MaskedLinear, MergeLinear, SplitLinear
from .partition import Partition, check_block, check_generator
from .probe import check_pairs
from .replaceable import check_replaceable, check_unshared
from .resparsify import POLICIES, Plan, Policy, choose, plan
from .surgery import is_chain, replace_modules, sequential_leaves, widened_between

Split = Literal["random", "groups", "gram"]
SPLITS: tuple[Split, ...] = ("random", "groups", "gram")
Groups = Sequence[int] | Tensor
Model = TypeVar("Model", bound=nn.Module)


def expand(
    model: Model,
    alpha: int = 2,
    split: Split = "random",
    structure: Structure = "random",
    block: tuple[int, int] | None = None,
    resparsify: Policy | Literal["auto"] = "auto",
    pairs: Iterable[tuple[str, str]] | None = None,
    groups: Groups | Mapping[str, Groups] | None = None,
    generator: Generator | None = None,
    example_inputs: Any = None,
    seed: int | None = None,
) -> Model:
    """Expands every pair of linear layers: more neurons, disjoint inputs, the same number of non-zeros.

    The first layer of a pair gets ``alpha`` children per neuron that divide its weights (biases are copied to
    every child); the second is widened to match and both are pruned back to the pair's dense count. In an
    ``nn.Sequential`` the linear layers are paired from the front, ``(1, 2), (3, 4), ...``: the paper's alternating
    expansion, in which the head is never split. Norms between the layers of a pair are widened with them.

    Train the returned model with a new optimizer: its parameters are new.

    Args:
        model: A trained model; left as it is.
        alpha: Children per neuron, at least 2.
        split: How inputs are divided: ``"random"``, ``"groups"`` (inputs that belong together stay together) or
            ``"gram"`` (groups found from the trained weight).
        structure: ``"random"``, ``"2:4"`` (``alpha`` 2), ``"block"`` or ``"seeded"`` (``alpha`` 2, 4 or 8: the labels
            are a function of a seed and take no memory, where no edge is removed: under policy ``"partition"``); the
            last three with ``split="random"``.
        block: Tile ``(bn, bk)`` for ``structure="block"`` or ``resparsify="block"``.
        resparsify: Which weights pay for the wider second layer, see :func:`fpe.resparsify.plan`:
            ``"magnitude"`` (the paper's), ``"input"``, ``"block"`` or ``"partition"``; ``"auto"`` chooses between
            ``"input"`` and ``"partition"`` by the pair's sizes, see :func:`fpe.resparsify.choose`.
        pairs: Names of the layers of each pair, as in ``[("fc1", "fc2")]``. Needed unless the model is an
            ``nn.Sequential``. Whatever your module computes between them must be element-wise.
        groups: For ``split="groups"``, the group of each input; a mapping from the name of a pair's first
            layer where there are several pairs.
        generator: Source of randomness (CPU); the same seed gives the same model.
        example_inputs: Positional arguments of one forward pass, or a single one. With them it is found out whether
            the layers of each pair run in their order, and whether what the model computes between them treats every
            neuron alike and on its own. Without them that is known of the layers in an ``nn.Sequential`` alone.
        seed: For ``structure="seeded"``: of the first pair's first layer; every layer further on has the next one.
            Without it seeds are drawn.

    Returns:
        A new model of the same class. Its ``load_state_dict`` refuses a state that does not fit before it
        changes anything.

    Raises:
        TypeError: ``model`` is no module, a named layer no ``nn.Linear``, or a weight is not floating point.
        ValueError: An option is unknown or does not fit the model, a layer holds what its replacement would drop
            (hooks, a forward of its own, a parametrization, shared parameters), or ``example_inputs`` show that a pair
            is none; the message names the layer and says what was expected.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expand: model must be an nn.Module, got {type(model).__name__}")
    _check_options(split, structure, block, resparsify, groups, seed)
    check_generator("expand", generator)
    named = list(_sequential_pairs(model) if pairs is None else _named_pairs(model, pairs))
    group_of = _groups_by_name(groups, [first for first, _ in named])
    replaced: dict[str, nn.Module] = {}
    between: dict[tuple[str, str], dict[str, nn.Module]] = {}
    with torch.device("cpu"):  # masks are data, wherever the caller has new tensors made
        for i, (first, second) in enumerate(named):
            fc1, fc2 = _linear(model, first), _linear(model, second)
            _check_pair(first, fc1, second, fc2)
            own = None if seed is None else beside(seed, 2 * i)
            partition = _partition(fc1, alpha, split, structure, block, group_of.get(first), generator, own)
            replaced[first], replaced[second] = expand_pair(
                fc1, fc2, partition, resparsify, block=block, generator=generator
            )
            between[first, second] = widened_between(model, first, second, alpha) if is_chain(model) else {}
            replaced.update(between[first, second])
    if example_inputs is not None:
        check_pairs(model, between, alpha, example_inputs)
    return guard_state_dict(replace_modules(model, replaced))


def expand_pair(
    fc1: nn.Linear,
    fc2: nn.Linear,
    partition: Partition,
    resparsify: Policy | Literal["auto"] = "auto",
    *,
    block: tuple[int, int] | None = None,
    generator: Generator | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Expands one pair of layers with a partition of your own; what :func:`expand` does to each pair.

    Args:
        fc1: The layer whose neurons are split, ``[h, d]``.
        fc2: The layer that reads them, ``[c, h]``.
        partition: Who owns the edges of ``fc1``.
        resparsify: As in :func:`expand`.
        block: As in :func:`expand`.
        generator: As in :func:`expand`.

    Returns:
        The expanded layer and its widened successor, on the devices and in the dtypes of the originals.

    Raises:
        TypeError: A weight is not floating point.
        ValueError: Sizes do not chain, a weight is not finite, or the policy cannot remove enough.
    """
    if resparsify not in ("auto", *POLICIES):
        raise ValueError(f"expand_pair: resparsify must be one of {('auto', *POLICIES)}, got {resparsify!r}")
    _check_pair("fc1", fc1, "fc2", fc2)
    check_generator("expand_pair", generator)
    if not isinstance(partition, Partition):
        raise TypeError(f"expand_pair: partition must be a fpe.Partition, got {type(partition).__name__}")
    if resparsify == "auto":
        resparsify = choose(fc2.out_features, fc1.in_features, partition.alpha)
    if partition.shape != tuple(fc1.weight.shape):
        raise ValueError(
            f"expand_pair: partition is over {list(partition.shape)}, fc1's weight {list(fc1.weight.shape)}"
        )
    holes = int((partition.validate().labels == HOLE).sum())
    if holes:
        raise ValueError(f"expand_pair: the partition must own every edge, {holes} are owned by nobody")
    alpha = partition.alpha
    if resparsify != "partition" and fc1.weight.is_meta | fc2.weight.is_meta:
        raise ValueError(
            f"expand: resparsify={resparsify!r} ranks weights, and these are on 'meta'; load them first, or take "
            "resparsify='partition'"
        )
    chosen = plan(fc1.weight, fc2.weight, partition, resparsify, block=block, generator=generator)
    with torch.no_grad():
        first = _expanded(fc1, chosen)
        second = _successor(fc2, chosen, resparsify, block or partition.block_shape)
        for layer, bias in ((first, fc1.bias), (second, fc2.bias)):
            if bias is not None:
                layer.bias.copy_(bias.repeat(alpha) if layer is first else bias)  # type: ignore[union-attr]
    for new, old in ((first, fc1), (second, fc2)):
        new.train(old.training)
        trained = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
        for name, parameter in new.named_parameters():
            parameter.requires_grad_(trained["bias" if name == "bias" else "weight"])
    return first, second


def _expanded(fc1: nn.Linear, chosen: Plan) -> ExpandedLinear:
    """The split layer, weights set, bias not yet."""
    partition, bias = chosen.first, fc1.bias is not None
    if partition.block_shape:
        planes = (partition.alpha, 1)
        kept = partition.masks().flatten(0, 1)
        blocks = BlockLinear(kept, partition.block_shape, planes, bias, **_like(fc1))
        blocks.set_wide_weight(fc1.weight.repeat(partition.alpha, 1))
        return blocks
    layer = SplitLinear(partition, bias, **_like(fc1))
    layer.set_edge_weight(fc1.weight)
    layer.clear_removed()
    return layer


def _successor(
    fc2: nn.Linear, chosen: Plan, policy: Policy, block: tuple[int, int] | None
) -> ExpandedLinear | nn.Linear:
    """The widened layer, weights set, bias not yet."""
    c, alpha, h = chosen.second.shape
    bias, kept = fc2.bias is not None, chosen.second.flatten(1)
    wide = fc2.weight.repeat(1, alpha)
    if policy == "input":
        dense = nn.utils.skip_init(nn.Linear, alpha * h, c, bias=bias, **_like(fc2))
        dense.weight.copy_(wide)
        return dense
    if policy == "magnitude":
        masked = MaskedLinear(kept, bias, **_like(fc2))
        masked.set_wide_weight(wide)
        return masked
    if policy == "partition" and not chosen.first.block_shape:
        owner = chosen.second.to(torch.uint8).argmax(1).to(torch.uint8)
        seed = chosen.first.seed
        read = Partition(owner, alpha) if seed is None else Partition.seeded(c, h, alpha, beside(seed))
        merge = MergeLinear(read, bias, **_like(fc2))
        merge.set_edge_weight(fc2.weight)
        return merge
    assert block is not None
    blocks = BlockLinear(kept, block, (1, alpha), bias, **_like(fc2))
    blocks.set_wide_weight(wide)
    return blocks


def _like(layer: nn.Linear) -> dict:
    return {"device": layer.weight.device, "dtype": layer.weight.dtype}


def _partition(
    fc1: nn.Linear,
    alpha: int,
    split: Split,
    structure: Structure,
    block: tuple[int, int] | None,
    groups: Groups | None,
    generator: Generator | None,
    seed: int | None,
) -> Partition:
    out_features, in_features = fc1.weight.shape
    if split == "groups":
        assert groups is not None
        if len(groups) != in_features:
            raise ValueError(f"expand: groups must have one entry per input, {in_features}, got {len(groups)}")
        partition = Partition.from_groups(groups, out_features, alpha, generator=generator)
    elif split == "gram":
        partition = Partition.from_gram(fc1.weight, alpha, generator=generator)
    elif seed is not None:
        partition = Partition.seeded(out_features, in_features, alpha, seed)
    else:
        partition = Partition.of(structure, out_features, in_features, alpha, block=block, generator=generator)
    if fc1.weight.is_meta:
        return partition
    return partition.to(fc1.weight.device)


def _check_options(split: str, structure: str, block: object, resparsify: str, groups: object, seed: object) -> None:
    for name, value, known in (
        ("split", split, SPLITS),
        ("structure", structure, STRUCTURES),
        ("resparsify", resparsify, ("auto", *POLICIES)),
    ):
        if value not in known:
            raise ValueError(f"expand: {name} must be one of {known}, got {value!r}")
    if structure != RANDOM and split != "random":
        raise ValueError(f"expand: structure {structure!r} goes with split 'random', got split {split!r}")
    if (split == "groups") != (groups is not None):
        raise ValueError(f"expand: split='groups' and groups=... go together, got split={split!r}, groups={groups!r}")
    if seed is not None and structure != SEEDED:
        raise ValueError(f"expand: a seed goes with structure 'seeded', got seed {seed!r} with {structure!r}")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise TypeError(f"expand: seed must be an integer, got {type(seed).__name__}")
    if seed is not None and not 0 <= seed < SEEDS:
        raise ValueError(f"expand: seed must be from 0 to 2^32 - 1, got {seed}")
    needs_block = structure == BLOCK or resparsify == "block"
    if needs_block:
        check_block("expand", block)
    elif block is not None:
        raise ValueError(
            f"expand: block={block} needs structure='block' or resparsify='block', got {structure!r}, {resparsify!r}"
        )


def _sequential_pairs(model: nn.Module) -> list[tuple[str, str]]:
    if not is_chain(model):
        why = ", and this one has a forward of its own" if isinstance(model, nn.Sequential) else ""
        raise ValueError(
            f"expand: name the layers of a {type(model).__name__} with pairs=[('first', 'second')]; only "
            f"nn.Sequential is paired automatically{why}"
        )
    leaves = sequential_leaves(model)
    for name, module in leaves:
        if isinstance(module, ExpandedLinear):
            raise ValueError(f"expand: '{name}' is expanded already ({type(module).__name__})")
    linears = [name for name, module in leaves if isinstance(module, nn.Linear)]
    if len(linears) < 2:
        raise ValueError(f"expand: expected at least two nn.Linear layers, got {len(linears)}")
    return list(zip(linears[::2], linears[1::2], strict=False))


def _named_pairs(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    named = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise ValueError(f"expand: pairs must be of two layer names, got {pair!r}")
        named.append((pair[0], pair[1]))
    if not named:
        raise ValueError("expand: pairs is empty, nothing to expand")
    names = [name for pair in named for name in pair]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"expand: '{name}' stands in pairs twice; a layer is split or widened, once")
    if is_chain(model):
        order = [name for name, module in sequential_leaves(model) if isinstance(module, nn.Linear)]
        for first, second in named:
            if order and first == order[-1]:
                raise ValueError(f"expand: '{first}' is the head, its outputs are the model's and cannot be split")
            if {first, second} <= set(order) and order.index(second) != order.index(first) + 1:
                raise ValueError(f"expand: '{second}' does not read '{first}'; the linear layers run in order {order}")
    return named


def _groups_by_name(groups: Groups | Mapping[str, Groups] | None, firsts: list[str]) -> Mapping[str, Groups]:
    if groups is None:
        return {}
    if isinstance(groups, Mapping):
        if set(groups) != set(firsts):
            raise ValueError(f"expand: groups must name the first layers {firsts}, got {sorted(groups)}")
        return groups
    if len(firsts) > 1:
        raise ValueError(f"expand: with several pairs, groups must be a mapping from {firsts} to their groups")
    return {firsts[0]: groups}


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"expand: the model has no layer '{name}'") from error
    if isinstance(module, ExpandedLinear):
        raise ValueError(f"expand: '{name}' is expanded already ({type(module).__name__})")
    check_replaceable("expand", name, module, nn.Linear)
    check_unshared("expand", model, name, module)
    assert isinstance(module, nn.Linear)
    return module


def _check_pair(first: str, fc1: nn.Linear, second: str, fc2: nn.Linear) -> None:
    for name, layer in ((first, fc1), (second, fc2)):
        check_replaceable("expand", name, layer, nn.Linear)
    if fc2.in_features != fc1.out_features:
        raise ValueError(
            f"expand: '{second}' must read the {fc1.out_features} outputs of '{first}', got in_features = "
            f"{fc2.in_features}"
        )
    for name, layer in ((first, fc1), (second, fc2)):
        if not all(p.is_meta or bool(p.isfinite().all()) for p in layer.parameters()):
            raise ValueError(f"expand: the weights of '{name}' must be finite, got NaN or infinity")


def nonzeros(model: nn.Module) -> int:
    """Number of weights that may be non-zero, over all layers: what FPE keeps fixed.

    Counts the kept edges of FPE layers, and every entry of the other parameters with two or more dimensions.
    Biases and norms are not counted (the paper counts weights alone); FPE copies them to every child.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"nonzeros: model must be an nn.Module, got {type(model).__name__}")
    count = 0
    for module in model.modules():
        if isinstance(module, ExpandedLinear):
            count += module.nonzeros
        else:
            count += sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
    return count


def to_dense(model: Model) -> Model:
    """An equivalent model of plain ``nn.Linear`` layers at the wide size; the model is left as it is.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_dense: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, ExpandedLinear):
        return model.to_linear()  # type: ignore[return-value]
    expanded = {n: m.to_linear() for n, m in model.named_modules() if isinstance(m, ExpandedLinear)}
    return replace_modules(model, expanded)
