"""A trained model in, a wider model with as many non-zero weights out (paper, section 2.3)."""

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Generator, Tensor, nn

from fpe.kernels import HOLE
from fpe.kernels.block.config import SUPPORTED_BLOCKS
from fpe.kernels.partition.seeded import SEEDS, beside
from fpe.kernels.structures import BLOCK, RANDOM, SEEDED, STRUCTURES, Structure

from .checkpoint import guard_state_dict
from .companion import note_expansion
from .groups import Group, Pair, dense_layers, errors_name, is_linear, named_groups
from .layers import BlockLinear, ExpandedLinear, MaskedLinear, MergeLinear, SplitLinear, StackedLinear
from .models.discovery import LAST, candidates, find_pairs
from .partition import Partition, check_block, check_generator
from .probe import check_pairs
from .resparsify import HOLES, POLICIES, Holes, Policy, choose, plan, successor_of_seed
from .surgery import is_chain, replace_modules, widened_between

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
    pairs: Iterable[Pair] | None = None,
    groups: Groups | Mapping[str, Groups] | None = None,
    generator: Generator | None = None,
    example_inputs: Any = None,
    seed: int | None = None,
    holes: Holes = "magnitude",
) -> Model:
    """Expands every pair of linear layers: more neurons, disjoint inputs, the same number of non-zeros.

    The first layer of a pair gets ``alpha`` children per neuron that divide its weights (biases are copied to
    every child); the second is widened to match and both are pruned back to the pair's dense count. In a gated block,
    ``down(act(gate(x)) * up(x))``, the same partition splits the first two layers.

    :func:`fpe.find_pairs` says which layers those are: it knows the blocks of common models, and in an
    ``nn.Sequential`` pairs the linear layers from the front, ``(1, 2), (3, 4), ...``: the paper's alternating
    expansion, in which the head is never split. Norms between the layers of a pair are widened with them.

    Train the returned model with a new optimizer: its parameters are new.

    Args:
        model: A trained model; it is not changed.
        alpha: Children per neuron, from 2 to 254.
        split: How inputs are divided: ``"random"``, ``"groups"`` (inputs that belong together stay together) or
            ``"gram"`` (groups found from the trained weight).
        structure: ``"random"``, ``"2:4"`` (``alpha`` 2), ``"block"`` or ``"seeded"`` (``alpha`` 2, 4 or 8: the labels
            are a function of a seed and take no memory); the last three with ``split="random"``.
        block: Tile ``(bn, bk)`` for ``structure="block"`` or ``resparsify="block"``.
        resparsify: Which weights are removed because the pair grew wider, see :func:`fpe.resparsify.plan`:
            ``"magnitude"`` (the paper's), ``"input"``, ``"block"`` or ``"partition"``; ``"auto"`` chooses by the
            pair's sizes, see :func:`fpe.resparsify.choose`.
        pairs: Names of the layers of each pair, as in ``[("fc1", "fc2")]``; patterns, as in ``[("*.fc1", "*.fc2")]``;
            and gated triples, see :data:`fpe.groups.Pair`. By default :func:`fpe.find_pairs` finds them. What your
            module computes between the layers of a pair must be element-wise, or at least treat every channel alike
            and on its own. For example, the values and the output projection of attention are a pair if the module
            reads ``alpha`` times the channels as ``[alpha, heads, channels]`` (``bench/studies/transformer.py``).
        groups: For ``split="groups"``, the group of each input; a mapping from the name of a pair's first
            layer where there are several pairs.
        generator: Source of randomness (CPU); the same seed gives the same model.
        example_inputs: The arguments of one forward pass: a tuple of positional ones, a mapping of keyword ones, or a
            single argument. With them :func:`expand` tests that the layers of each pair run in their order and that
            the model treats every neuron alike between them. They also let it find pairs in unknown models.
        seed: For ``structure="seeded"``, from 0 to 2^32 - 1. The split layers of pair ``i``, counted from 0, have seed
            ``seed + 2 * i``, and the layer after them ``seed + 2 * i + 1`` if its labels are of a seed too. Default:
            seeds are drawn from ``generator``.
        holes: What chooses the weights that policy ``"input"`` removes: ``"magnitude"`` takes the smallest. With
            ``structure="seeded"``, ``"seeded"`` has the seed choose, as many of every neuron; then the places of the
            others are not stored either.

    Returns:
        A new model of the same class. Its ``load_state_dict`` refuses a state that does not fit before it
        changes anything.

    Raises:
        TypeError: ``model`` is not a module, a named layer is not a dense layer, a weight is not floating point,
            ``generator`` is not a ``torch.Generator``, or ``seed`` is not an integer.
        ImportError: ``split="gram"``, and scikit-learn is not installed.
        ValueError: An option is unknown or does not fit the model, a layer holds what its replacement would drop
            (hooks, a forward of its own, a parametrization, shared parameters), or ``example_inputs`` show that two
            layers are not a pair. The message names the layer and says what was expected.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> wide = fpe.expand(model, alpha=2, generator=torch.Generator().manual_seed(0))
        >>> wide[0].out_features
        16
        >>> fpe.nonzeros(wide) == fpe.nonzeros(model)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expand: model must be an nn.Module, got {type(model).__name__}")
    _check_options(split, structure, block, resparsify, groups, seed, holes)
    if holes == "seeded":
        resparsify = "input"
    check_generator("expand", generator)
    named = found_groups("expand", model, example_inputs) if pairs is None else named_groups(model, pairs)
    group_of = _groups_by_name(groups, [group.firsts[0] for group in named])
    replaced: dict[str, nn.Module] = {}
    between: dict[Group, dict[str, nn.Module]] = {}
    with torch.device("cpu"):  # masks are made there, whatever the caller's default device is
        for i, group in enumerate(named):
            firsts, second = dense_layers(model, group)
            own = None if seed is None else beside(seed, 2 * i)
            divided = group_of.get(group.firsts[0])
            with errors_name("expand", group):
                partition = _partition(firsts, alpha, split, structure, block, divided, generator, own)
                children, replaced[group.second] = _expand_together(
                    firsts, second, partition, resparsify, block=block, holes=holes, generator=generator
                )
            if group.parts > 1:
                children = [StackedLinear(children)]
            replaced.update(zip(group.firsts, children, strict=True))
            between[group] = widened_between(model, group.firsts[0], group.second, alpha, group.between)
            replaced.update(between[group])
    if example_inputs is not None:
        check_pairs(model, between, alpha, example_inputs)
    wide = guard_state_dict(replace_modules(model, replaced))
    note_expansion(wide)
    return wide


def expand_pair(
    fc1: nn.Linear,
    fc2: nn.Linear,
    partition: Partition,
    resparsify: Policy | Literal["auto"] = "auto",
    *,
    block: tuple[int, int] | None = None,
    generator: Generator | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Expands one pair of layers with your own partition, as :func:`expand` does with each pair.

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
        TypeError: A layer is not an ``nn.Linear``, a weight is not floating point, or ``partition`` is not a
            :class:`fpe.Partition`.
        ValueError: ``fc2`` does not read the outputs of ``fc1``; the partition is of another size, or some of its edges
            have no owner; a weight is not finite; or the policy cannot remove enough weights.

    Example:
        >>> partition = fpe.Partition.block(8, 16, 2, block=(4, 4))
        >>> fc1, fc2 = fpe.expand_pair(nn.Linear(16, 8), nn.Linear(8, 4), partition, "block", block=(4, 4))
        >>> fc2(fc1(torch.ones(3, 16)).relu()).shape
        torch.Size([3, 4])
    """
    if resparsify not in ("auto", *POLICIES):
        raise ValueError(f"expand_pair: resparsify must be one of {('auto', *POLICIES)}, got {resparsify!r}")
    dense_layers(nn.ModuleDict({"fc1": fc1, "fc2": fc2}), Group(("fc1",), "fc2"))
    check_generator("expand_pair", generator)
    if not isinstance(partition, Partition):
        raise TypeError(f"expand_pair: partition must be an fpe.Partition, got {type(partition).__name__}")
    if partition.shape != tuple(fc1.weight.shape):
        raise ValueError(
            f"expand_pair: partition is over {list(partition.shape)}, fc1's weight {list(fc1.weight.shape)}"
        )
    holes = int((partition.validate().labels == HOLE).sum())
    if holes:
        raise ValueError(f"expand_pair: every edge of the partition must have an owner, {holes} have none")
    (first,), second = _expand_together([fc1], fc2, partition, resparsify, block=block, generator=generator)
    return first, second


def _expand_together(
    firsts: Sequence[nn.Linear],
    fc2: nn.Linear,
    partition: Partition,
    policy: Policy | Literal["auto"],
    *,
    block: tuple[int, int] | None,
    holes: Holes = "magnitude",
    generator: Generator | None,
) -> tuple[list[nn.Module], nn.Module]:
    """Expands the layers of a group by one partition, because the model multiplies what their neurons compute."""
    alpha, weights = partition.alpha, [fc1.weight for fc1 in firsts]
    if policy == "auto":
        policy = choose(fc2.out_features, firsts[0].in_features, alpha, bool(block or partition.block_shape))
    if policy != "partition" and any(weight.is_meta for weight in (*weights, fc2.weight)):
        raise ValueError(
            f"resparsify={policy!r} chooses among weights, and these are on 'meta'; load them first, or take "
            "resparsify='partition'"
        )
    chosen = plan(weights, fc2.weight, partition, policy, block=block, holes=holes, generator=generator)
    with torch.no_grad():
        wide = [_expanded(fc1, own, policy) for fc1, own in zip(firsts, chosen.firsts, strict=True)]
        successor = _successor(fc2, chosen.firsts[0], chosen.second, policy, block or partition.block_shape)
    for new, old in (*zip(wide, firsts, strict=True), (successor, fc2)):
        if old.bias is not None:
            with torch.no_grad():
                new.bias.copy_(old.bias if new is successor else old.bias.repeat(alpha))  # type: ignore[union-attr]
        new.train(old.training)
        trained = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
        for name, parameter in new.named_parameters():
            parameter.requires_grad_(trained["bias" if name == "bias" else "weight"])
    return [*wide], successor


def found_groups(op: str, model: nn.Module, example_inputs: Any = None) -> list[Group]:
    """The groups that are expanded where no pairs were named.

    In an ``nn.Sequential`` these are all groups, even if one cannot be expanded: expanding it will say why.
    """
    refused: dict[str, str] = {}
    groups = list(candidates(model, refused))
    if not groups or not is_chain(model):
        found = find_pairs(model, example_inputs=example_inputs)
        groups, refused = list(found.groups), {**refused, **found.refused}
    if not groups:
        given = ((name, reason) for name, reason in refused.items() if reason != LAST)
        reasons = list(dict.fromkeys(r if r.startswith("'") else f"'{name}' {r}" for name, r in given))[:3]
        count = sum(is_linear(module) for module in model.modules())
        raise ValueError(
            f"{op}: found no pairs of layers in this {type(model).__name__}: "
            f"{'; '.join(reasons) or f'it needs two dense layers, got {count}'}. Name them with "
            "pairs=[('first', 'second')]; fpe.find_pairs(model) says more"
        )
    return groups


def _expanded(fc1: nn.Linear, partition: Partition, policy: Policy) -> ExpandedLinear:
    """The split layer, weights set, bias not yet: in blocks where whole ones are kept."""
    bias = fc1.bias is not None
    if partition.block_shape and policy != "magnitude":
        planes = (partition.alpha, 1)
        kept = partition.masks().flatten(0, 1)
        blocks = BlockLinear(kept, partition.block_shape, planes, bias, **like(fc1))
        blocks.set_wide_weight(fc1.weight.repeat(partition.alpha, 1))
        _say_what_padding_costs(blocks)
        return blocks
    layer = SplitLinear(partition, bias, **like(fc1))
    layer.set_matrix(fc1.weight)
    return layer


def _successor(
    fc2: nn.Linear, partition: Partition, second: Tensor, policy: Policy, block: tuple[int, int] | None
) -> ExpandedLinear | nn.Linear:
    """The widened layer, which keeps the copies ``second[c, alpha, h]``; weights set, bias not yet."""
    c, alpha, h = second.shape
    bias, kept = fc2.bias is not None, second.flatten(1)
    wide = fc2.weight.repeat(1, alpha)
    if policy == "input":
        dense = nn.utils.skip_init(nn.Linear, alpha * h, c, bias=bias, **like(fc2))
        dense.weight.copy_(wide)
        return dense
    if policy == "magnitude":
        masked = MaskedLinear(kept, bias, **like(fc2))
        masked.set_wide_weight(wide)
        return masked
    if policy == "partition" and not partition.block_shape:
        owner = second.to(torch.uint8).argmax(1).to(torch.uint8)
        read = Partition(owner, alpha) if partition.seed is None else successor_of_seed(c, h, partition)
        merge = MergeLinear(read, bias, **like(fc2))
        merge.set_matrix(fc2.weight)
        return merge
    assert block is not None
    blocks = BlockLinear(kept, block, (1, alpha), bias, **like(fc2))
    blocks.set_wide_weight(wide)
    _say_what_padding_costs(blocks)
    return blocks


PADDED = 1.05
"""Weights stored over weights kept above which :func:`expand` warns."""


class PaddingWarning(UserWarning):
    """Blocks store many more weights than a layer keeps, because their sides do not divide those of a child's."""


def _say_what_padding_costs(blocks: BlockLinear) -> None:
    """Warns where a layer stores many more weights than it keeps, and names the smaller block that pads least."""
    stored, kept, thrifty = blocks.edge_weight.numel(), blocks.nonzeros, blocks.grid.thriftiest()
    if stored > PADDED * kept and thrifty.padding < blocks.grid.padding:
        least = min(SUPPORTED_BLOCKS)
        taken, note = blocks.grid.thriftiest(least), ""
        if min(thrifty.block) < least:
            note = f"; the Triton kernels take sides from {least} on"
            if min(taken.block) >= least:
                note += f", of which {taken.block} pads least, a factor of {taken.padding:.2f}"
        warnings.warn(
            f"expand: blocks of {blocks.block_shape} store {stored} weights of a {blocks.out_features} x "
            f"{blocks.in_features} layer that keeps {kept}, {stored / max(kept, 1):.2f} times as many, because their "
            f"sides do not divide those of a child's weight. With blocks of {thrifty.block} padding costs a factor of "
            f"{thrifty.padding:.2f} instead of {blocks.grid.padding:.2f}{note}",
            PaddingWarning,
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """Returns how far up the stack the code that called the package is, for :func:`warnings.warn`.

    Python shows a warning once for each such line and text: once for each size of layer and tile.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(f"{__package__}."):
        if f"{frame.f_globals['__name__']}.".startswith(f"{__package__}.bench."):
            break
        level, frame = level + 1, frame.f_back
    return level


def like(layer: nn.Linear) -> dict:
    """Device and dtype of a layer, for one that takes its place."""
    return {"device": layer.weight.device, "dtype": layer.weight.dtype}


def _partition(
    firsts: Sequence[nn.Linear],
    alpha: int,
    split: Split,
    structure: Structure,
    block: tuple[int, int] | None,
    groups: Groups | None,
    generator: Generator | None,
    seed: int | None,
) -> Partition:
    fc1 = firsts[0]
    out_features, in_features = fc1.weight.shape
    if split == "groups":
        assert groups is not None
        if len(groups) != in_features:
            raise ValueError(f"expand: groups must have one entry per input, {in_features}, got {len(groups)}")
        partition = Partition.from_groups(groups, out_features, alpha, generator=generator)
    elif split == "gram":
        partition = Partition.from_gram(torch.cat([fc.weight for fc in firsts]), alpha, generator=generator)
        partition = Partition(partition.labels[:out_features].contiguous(), alpha)
    elif seed is not None:
        partition = Partition.seeded(out_features, in_features, alpha, seed)
    else:
        partition = Partition.of(structure, out_features, in_features, alpha, block=block, generator=generator)
    if fc1.weight.is_meta:
        return partition
    return partition.to(fc1.weight.device)


def _check_options(
    split: str, structure: str, block: object, resparsify: str, groups: object, seed: object, holes: str
) -> None:
    for name, value, known in (
        ("holes", holes, HOLES),
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
    if holes == "seeded" and (structure != SEEDED or resparsify not in ("auto", "input")):
        raise ValueError(
            f"expand: holes='seeded' goes with structure 'seeded' and resparsify 'input', got {structure!r} and "
            f"{resparsify!r}"
        )
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


def nonzeros(model: nn.Module) -> int:
    """Number of weights that may be non-zero, over all layers: what FPE keeps fixed.

    Counts the kept edges of FPE layers, and every entry of the other parameters with two or more dimensions.
    Biases and norms are not counted (the paper counts weights alone); FPE copies them to every child. A weight that
    several layers share counts once.

    Example:
        >>> fpe.nonzeros(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))
        160
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"nonzeros: model must be an nn.Module, got {type(model).__name__}")
    expanded = [module for module in model.modules() if isinstance(module, ExpandedLinear)]
    own = {id(p) for layer in expanded for p in layer.parameters(recurse=False)}
    plain = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in own)
    return plain + sum(layer.nonzeros for layer in expanded)


def to_dense(model: Model) -> Model:
    """Returns an equivalent model whose expanded layers are plain ``nn.Linear`` at the wide size.

    The model itself does not change. An expanded layer, passed by itself, becomes one ``nn.Linear``.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> fpe.to_dense(fpe.expand(model, alpha=2))
        Sequential(
          (0): Linear(in_features=16, out_features=16, bias=True)
          (1): ReLU()
          (2): Linear(in_features=16, out_features=4, bias=True)
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_dense: model must be an nn.Module, got {type(model).__name__}")
    kinds = (ExpandedLinear, StackedLinear)
    if isinstance(model, kinds):
        return model.to_linear()  # type: ignore[return-value]
    return replace_modules(model, {n: m.to_linear() for n, m in model.named_modules() if isinstance(m, kinds)})
