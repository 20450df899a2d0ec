"""Where tensors are: parameters that FSDP2 may have sharded, and the topology on the device of its weight."""

from typing import Any, TypeVar

import torch
from torch import Tensor

Held = TypeVar("Held")


def whole(t: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one (a collective, differentiable)."""
    gather: Any = getattr(t, "full_tensor", None)
    return t if gather is None else gather()


@torch.no_grad()
def overwrite(t: Tensor, value: Tensor) -> None:
    """Writes all of a tensor, of which each process may hold a shard; every process has the same ``value``."""
    if hasattr(t, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = t
        own: Any = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
        sharded.to_local().copy_(own.to_local())
    else:
        t.copy_(value)


def of_the_batch(t: Tensor) -> Tensor:
    """All slices of a tensor of which ``vmap`` shows one, the dimension that it runs over in front."""
    levels = torch._C._functorch
    while levels.is_batchedtensor(t):
        t = levels.get_unwrapped(t).movedim(levels.maybe_get_bdim(t), 0)
    return t


def on(held: Held, device: torch.device) -> Held:
    """A tensor, or a named tuple with tensors, on a device; ``None`` stays."""
    moved = {name: t.to(device) for name, t in tensors_of(held).items() if t.device != device}
    if not moved:
        return held
    return moved[""] if isinstance(held, Tensor) else held._replace(**moved)  # type: ignore[return-value, attr-defined]


def of_constant_size(held: Held) -> Held:
    """Has ``torch.compile`` take the sizes of tensors for constant, as it does those of buffers.

    It is ``torch._dynamo.mark_static``, which would import all of the compiler.
    """
    for t in tensors_of(held).values():
        t._dynamo_static_indices = set(range(t.dim()))  # type: ignore[attr-defined]
    return held


def tensors_of(held: object) -> dict[str, Tensor]:
    """The tensors in ``held`` by field: of a named tuple, or a single tensor under ``""``; empty for ``None``."""
    fields = {"": held} if isinstance(held, Tensor) else held._asdict() if hasattr(held, "_asdict") else {}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def exports_to_onnx() -> bool:
    """Whether a model is being exported to ONNX; ``torch.compile`` takes the answer for constant."""
    return torch.onnx.is_in_onnx_export()


exports_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined] # assume_constant_result, without its import
