"""Copies of models that FSDP2 has sharded, which it forbids ``copy.deepcopy`` to make: plain modules, no shards."""

import copy
import sys
from typing import Any

from torch import nn

from .layers.placement import whole

STATE = ("__composable_api_state_key", "_fsdp", "_is_fsdp")
"""What FSDP2 notes in a module begins with these."""


def unshard_into(memo: dict[int, object], model: nn.Module) -> None:
    """Has ``copy.deepcopy`` with this memo put plain modules and whole parameters in place of FSDP2's.

    It is a collective: every process makes the copy.

    Args:
        memo: As of ``copy.deepcopy``; what it holds already stays.
        model: Any model; without FSDP2 nothing happens.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    sharded = [m for m in model.modules() if fsdp is not None and isinstance(m, fsdp.FSDPModule) and id(m) not in memo]
    for parameter in model.parameters() if sharded else ():
        memo.setdefault(id(parameter), nn.Parameter(whole(parameter).detach().clone(), parameter.requires_grad))
    plain: list[tuple[nn.Module, nn.Module]] = []
    for module in sharded:
        kind: Any = type(module).__bases__[-1]  # FSDP2 has made a subclass of itself and this
        shell = kind.__new__(kind)
        memo[id(module)] = shell
        plain.append((module, shell))
    for module, shell in plain:
        held = {name: value for name, value in vars(module).items() if not name.startswith(STATE)}
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            own = {key: hook for key, hook in held[name].items() if not _gathers(hook)}
            held[name] = type(held[name])(own)
        shell.__dict__.update({name: copy.deepcopy(value, memo) for name, value in held.items()})


def _gathers(hook: object) -> bool:
    """Whether a hook is FSDP2's, which gathers or frees shards."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
