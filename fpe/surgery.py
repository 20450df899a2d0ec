"""Replaces modules inside a model, and widens what is between the layers of a pair."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import nn

from .replaceable import check_settled, check_unshared, own_forward
from .unshard import unshard_into

Model = TypeVar("Model", bound=nn.Module)

# What may stand between the layers of a pair: element-wise modules stay, norms over the features are widened.
ELEMENTWISE = (
    nn.CELU,
    nn.Dropout,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)


def widen_norm(norm: nn.Module, alpha: int) -> nn.Module:
    """A norm over ``alpha`` times the features: affine parameters and running statistics are copied.

    Args:
        norm: ``nn.LayerNorm`` or ``nn.RMSNorm`` over the last dimension, or ``nn.BatchNorm1d``.
        alpha: Children per neuron.

    Raises:
        ValueError: The norm is of another kind, or spans several dimensions.
    """
    if isinstance(norm, nn.BatchNorm1d):
        return tiled(norm, alpha, num_features=alpha * norm.num_features)
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and len(norm.normalized_shape) == 1:
        return tiled(norm, alpha, normalized_shape=(alpha * norm.normalized_shape[0],))
    raise ValueError(f"expand: cannot widen {norm}; expected a norm over one dimension of features")


def tiled(module: nn.Module, alpha: int, **sizes: object) -> nn.Module:
    """A copy with every per-feature tensor repeated ``alpha`` times, and the given sizes."""
    wide = copy.deepcopy(module)
    for name, size in sizes.items():
        setattr(wide, name, size)
    for name, parameter in wide.named_parameters():
        setattr(wide, name, nn.Parameter(parameter.detach().repeat(alpha), parameter.requires_grad))
    for name, buffer in wide.named_buffers():
        if buffer.dim():
            setattr(wide, name, buffer.repeat(alpha))
    return wide


def replace_modules(model: Model, replaced: Mapping[str, nn.Module]) -> Model:
    """A deep copy of a model with some modules replaced by name; the originals are not copied."""
    memo: dict[int, object] = {id(model.get_submodule(name)): module for name, module in replaced.items()}
    unshard_into(memo, model)
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        _forgo_fast_path(module)
    return copied


def _forgo_fast_path(module: nn.Module) -> None:
    """Has PyTorch's transformer encoder call its layers.

    In eval mode it hands all weights to one kernel instead, which knows dense layers alone. Both flags are its own, set
    where it was built for an activation or in a form that the kernel does not know.
    """
    if any(not isinstance(m, nn.Linear) and hasattr(m, "edge_weight") for m in module.modules()):
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def is_chain(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other and nothing else: an ``nn.Sequential`` as it comes."""
    return isinstance(module, nn.Sequential) and not own_forward(module, nn.Sequential)


def sequential_leaves(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The layers of a Sequential, nested ones unrolled, in the order in which they run."""
    leaves: list[tuple[str, nn.Module]] = []
    for name, child in model._modules.items():  # unlike named_children, keeps a module used twice
        if child is not None and is_chain(child):
            leaves += sequential_leaves(child, f"{prefix}{name}.")
        elif child is not None:
            leaves.append((prefix + name, child))
    return leaves


def chains(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The chains of a model that are inside no other chain, each with the prefix of its layers' names."""
    if is_chain(model):
        yield prefix, model
    inner = (
        sequential_leaves(model, prefix) if is_chain(model) else [(prefix + n, m) for n, m in model.named_children()]
    )
    for name, module in inner:
        yield from chains(module, f"{name}.")


def widened_between(
    model: nn.Module, first: str, second: str, alpha: int, inside: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Widened copies of the norms between the layers of a pair: in a chain, and of what is known to be between.

    Raises:
        ValueError: Something else is between, or a norm that cannot be replaced.
    """
    between = [(name, model.get_submodule(name)) for name in inside]
    leaves = between
    for prefix, chain in chains(model):
        run = sequential_leaves(chain, prefix)
        names = [name for name, _ in run]
        if first in names and second in names:
            leaves, between = run, run[names.index(first) + 1 : names.index(second)]
    widened: dict[str, nn.Module] = {}
    for name, module in between:
        check_settled("expand", name, module)
        if next(module.parameters(), None) is not None and sum(leaf is module for _, leaf in leaves) > 1:
            raise ValueError(f"expand: '{name}' ({type(module).__name__}) is used twice and cannot be replaced")
        check_unshared("expand", model, name, module)
        known = next((kind for kind in (*NORMS, *ELEMENTWISE, nn.PReLU) if isinstance(module, kind)), None)
        if known is not None and own_forward(module, known):
            known = None
        if known in NORMS:
            widened[name] = widen_norm(module, alpha)
        elif isinstance(module, nn.PReLU) and known is nn.PReLU and module.num_parameters > 1:
            widened[name] = tiled(module, alpha, num_parameters=alpha * module.num_parameters)
        elif known is None:
            raise ValueError(
                f"expand: '{name}' ({type(module).__name__}) between '{first}' and '{second}' is neither "
                "element-wise nor a norm over the features; it cannot be widened"
            )
    return widened
