"""What a layer keeps in memory: parameters, the index, gradients, Adam's state, saved activations, the peak."""

from typing import Any

import torch
from torch import Tensor, nn

from fpe.layers import ExpandedLinear


def columns(module: nn.Module) -> dict[str, int]:
    """Bytes that a module keeps in training.

    Returns:
        ``parameter_bytes``; ``index_bytes`` (labels, bitmaps, block positions); ``gradient_bytes``; ``optimizer_bytes``
        (Adam's two moments).
    """
    own = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    index = sum(t.numel() * t.element_size() for t in _index(module))
    return {"parameter_bytes": own, "index_bytes": index, "gradient_bytes": own, "optimizer_bytes": 2 * own}


def columns_on(module: nn.Module, x: Tensor) -> dict[str, int | None]:
    """Bytes of a module in training on a batch.

    Args:
        module: A layer or several.
        x: Its input.

    Returns:
        :func:`columns`; ``activation_bytes`` (storages that autograd saves, parameters and index not counted, the input
        counted where it is saved); ``peak_bytes`` of forward and backward over what was held before, on a GPU, else
        ``None``.
    """
    activations, peak = saved_bytes(module, x), peak_bytes(module, x) if x.is_cuda else None
    return {**columns(module), "activation_bytes": activations, "peak_bytes": peak}


def _index(module: nn.Module) -> list[Tensor]:
    """What says where the weights lie: of a layer that is not the package's, its buffers."""
    each = (
        layer.topology_tensors() if isinstance(layer, ExpandedLinear) else layer.buffers(recurse=False)
        for layer in module.modules()
    )
    return [t for tensors in each for t in tensors]


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that a forward saves for its backward, the module's own tensors not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *_index(module))}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    leaf = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(leaf)
    del y
    return sum(saved.values())


def peak_bytes(module: nn.Module, x: Tensor) -> int:
    """The most that a forward and backward allocate at a time, gradients included, over what is allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    grads: Any = torch.autograd.grad(y, [leaf, *module.parameters()], torch.ones_like(y))
    torch.cuda.synchronize()
    del grads
    return torch.cuda.max_memory_allocated() - before
