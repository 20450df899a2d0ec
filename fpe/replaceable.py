"""Which layers can be replaced: a layer with anything that its replacement would drop silently is refused by name."""

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from fpe.kernels.checks import FLOATING

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def full_name(module: object) -> str:
    """A module's class with where it is from: there are several ``Linear``."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a ``Conv1D`` of transformers: a linear layer with its weight stored ``[inputs, outputs]``."""
    return full_name(module) == "transformers.pytorch_utils.Conv1D"


def own_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module computes something else than its base class does."""
    return type(module).forward is not base.forward or "forward" in vars(module)


def check_replaceable(op: str, name: str, module: nn.Module, base: type[nn.Module]) -> None:
    """Raises unless a module is what its base class is and nothing more: a weight and possibly a bias.

    Raises:
        TypeError: It is not a ``base``, or a parameter is sharded, quantized or not floating point.
        ValueError: It holds what its replacement would not: hooks, a forward of its own, other parameters.
    """
    if not isinstance(module, base):
        raise TypeError(f"{op}: '{name}' must be an nn.{base.__name__}, got {full_name(module)}")
    check_settled(op, name, module)
    held = {**module._parameters, **module._buffers}
    foreign = [own for own in held if own not in ("weight", "bias")]
    if foreign or module._parameters.get("weight") is None or next(module.children(), None) is not None:
        raise ValueError(
            f"{op}: '{name}' holds more than a weight and a bias ({', '.join([*foreign, *module._modules])}), as by "
            "weight_norm, spectral_norm or pruning; make it a plain layer first: torch.nn.utils.remove_weight_norm, "
            "remove_spectral_norm, prune.remove"
        )
    if own_forward(module, base):
        raise ValueError(
            f"{op}: '{name}' ({full_name(module)}) has a forward of its own, which the expanded layer would not run"
        )
    for what, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            raise TypeError(
                f"{op}: the {what} of '{name}' is a {full_name(parameter)}; expand before sharding or quantizing"
            )
        if parameter.dtype not in FLOATING:
            raise TypeError(
                f"{op}: the {what} of '{name}' must be floating point of 16, 32 or 64 bits, got {parameter.dtype}"
            )
    hooks = [kind for kind in HOOKS if getattr(module, kind)]
    hooks += [what for what, p in module.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
    if hooks:
        raise ValueError(
            f"{op}: '{name}' has hooks ({', '.join(hooks)}), which the expanded layer would not run; remove them, and "
            "register them on the new model"
        )


def check_settled(op: str, name: str, module: nn.Module) -> None:
    """Raises if a module's parameters do not exist yet, or are computed in every forward pass."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(f"{op}: '{name}' is a {type(module).__name__} without sizes; run one forward first")
    if is_parametrized(module):
        what = ", ".join(what for what, _ in module.get_submodule("parametrizations").named_children())
        raise ValueError(
            f"{op}: '{name}' is parametrized ({what}); make it a plain layer first: "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )


def check_unshared(op: str, model: nn.Module, name: str, module: nn.Module) -> None:
    """Raises if another module has one of the module's parameters too, or the model uses the module twice."""
    for what, parameter in module.named_parameters():
        users = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
        if len(users) > 1:
            raise ValueError(f"{op}: the {what} of '{name}' is shared ({', '.join(users)}) and cannot be replaced")
