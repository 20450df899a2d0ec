"""Tensor parallelism: processes share each expanded pair, by PyTorch's own engine.

::

    from torch.distributed.tensor.parallel import parallelize_module
    from fpe.parallel import parallel_plan

    mesh = init_device_mesh("cuda", (4,))
    parallelize_module(wide, mesh, parallel_plan(wide))

As with ``nn.Linear``, the first layer of a pair is divided by its outputs and the second by its inputs. A process has
all children of some parents, so the activation between the two layers needs no communication. A pair takes one sum over
the processes in the forward and one in the backward pass, of as many bytes as the parent's pair, because its inputs and
outputs are the parent's. (Every process holds the whole bias of the first layer, so the gradients of that bias are
gathered: ``alpha`` numbers for each parent.)

Parameters become ``DTensor``, sharded along the parent's outputs or inputs. So gradient clipping, FSDP2 over another
dimension of the mesh, distributed checkpoints and ``fpe.restore`` see the layer as it was, and a checkpoint does not
depend on how many processes wrote it. Every process holds all labels (a bit a weight at ``alpha = 2``) and those of its
own part.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from fpe.kernels import PackedLabels, SeededLabels

from .layers import ExpandedLinear, MergeLinear, SplitLinear
from .layers.labelled import Labels


class _Share:
    """What a process computes of a layer of the kind ``OF``: some rows of its parent's weight (``AXIS`` 0) or columns.

    Args:
        mesh: Of one dimension.
    """

    OF: type[SplitLinear] | type[MergeLinear]
    AXIS: int

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._labels: tuple[Tensor | None, Labels | None] = (None, None)

    def span(self, size: int) -> tuple[int, int]:
        """The process's own range of so many rows or columns."""
        chunk = _chunk(size, self.mesh)
        first = min(self.mesh.get_local_rank() * chunk, size)
        return first, min(first + chunk, size)

    def labels(self, layer: SplitLinear | MergeLinear) -> Labels:
        """The labels of the process's own part, made once for each topology and device."""
        known, own = self._labels
        if own is None or known is not layer._index:
            whole, spans = layer.packed, [(0, size) for size in layer.matrix_shape]
            spans[self.AXIS] = self.span(layer.matrix_shape[self.AXIS])
            if isinstance(whole, SeededLabels):
                own = whole.part(*spans)
            else:
                (top, bottom), (left, right) = spans
                own = PackedLabels.pack(layer.labels[top:bottom, left:right].contiguous(), layer.alpha)
            self._labels = layer._index, own
        return own

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """The process's part of the layer's function."""
        raise NotImplementedError


class _Parents(_Share):
    """A process's share of a first layer: all children of some parents."""

    OF, AXIS = SplitLinear, 0

    def __call__(self, layer: SplitLinear, x: Tensor) -> Tensor:
        """The children ``[..., alpha * own]`` of the process's own parents, in planes, of the whole input."""
        x = DTensor.from_local(x, self.mesh, (Replicate(),), run_check=False).to_local(grad_placements=(Partial(),))
        weight, bias = _own(layer.edge_weight), None
        labels = layer._beside(weight, self.labels(layer))
        if layer.bias is not None:
            by_child: Any = layer.bias.view(layer.alpha, -1)
            bias = by_child.redistribute(placements=(Shard(1),)).to_local().flatten()
        return layer.product(x, weight, labels, None, bias)


class _Inputs(_Share):
    """A process's share of a second layer: the children of some parents; processes sum their products."""

    OF, AXIS = MergeLinear, 1

    def __call__(self, layer: MergeLinear, x: Tensor) -> Tensor:
        """The whole output ``[..., outputs]``, the same in every process, of the children of its own parents."""
        weight = _own(layer.edge_weight)
        if x.shape[-1] != layer.alpha * weight.shape[1]:
            raise ValueError(
                f"RowwiseParallel: this process holds {weight.shape[1]} of {layer.matrix_shape[1]} parents; the input "
                f"must be their {layer.alpha * weight.shape[1]} children, as ColwiseParallel gives them, got "
                f"{list(x.shape)}"
            )
        part = layer.product(x, weight, layer._beside(weight, self.labels(layer)), None, None)
        summed: Any = DTensor.from_local(part, self.mesh, (Partial(),), run_check=False)
        y = summed.redistribute(placements=(Replicate(),)).to_local()
        return y if layer.bias is None else y + _own(layer.bias)


def _chunk(size: int, mesh: DeviceMesh) -> int:
    """Returns how many rows or columns ``DTensor`` gives to each process but the last ones."""
    return -(-size // mesh.size())


def _own(parameter: Tensor) -> Any:
    """A process's own part of a ``DTensor``."""
    sharded: Any = parameter
    return sharded.to_local()


class _Style(ParallelStyle):
    """A style of ``parallelize_module`` that shares a layer; ``SHARE`` is a process's part of it."""

    SHARE: type[_Share]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        why = self._why_not(module, device_mesh)
        if why is not None:
            raise ValueError(f"{type(self).__name__}: {why}")
        assert isinstance(module, SplitLinear | MergeLinear)
        self._distribute(module, "edge_weight", device_mesh, Shard(self.SHARE.AXIS))
        if module.bias is not None:
            self._distribute(module, "bias", device_mesh, Replicate())
        module.share = self.SHARE(device_mesh)
        return module

    def _why_not(self, module: nn.Module, mesh: DeviceMesh) -> str | None:
        """Returns why processes cannot share a layer, or ``None`` if they can."""
        name = type(module).__name__
        if not isinstance(module, self.SHARE.OF):
            return f"expected a {self.SHARE.OF.__name__}, got {name}"
        if module.share is not None:
            return f"this {name} is shared already"
        if module.bitmap is not None:
            return (
                f"this {name} stores the weights of its edges in one row, without those that were removed, and "
                "such a row has no dimension of the layer; expand with resparsify='partition', or shard by FSDP2"
            )
        size, unit = module.matrix_shape[self.SHARE.AXIS], module.unit[self.SHARE.AXIS]
        chunk, processes = _chunk(size, mesh), mesh.size()
        if (processes - 1) * chunk >= size:
            return f"{size} parents, {chunk} to a process, leave none for the last of {processes} processes"
        if chunk % unit and processes > 1:
            return f"{chunk} parents to a process are no multiple of the structure's {unit}"
        return None

    def _distribute(self, module: nn.Module, name: str, mesh: DeviceMesh, placement: Shard | Replicate) -> None:
        whole = getattr(module, name)
        source = getattr(self, "src_data_rank", 0)
        own = distribute_tensor(whole.detach(), mesh, (placement,), src_data_rank=source)
        setattr(module, name, nn.Parameter(own, requires_grad=whole.requires_grad))


class ColwiseParallel(_Style):
    """Divides the first layer of a pair, a :class:`fpe.SplitLinear`, by its parents.

    The input is the same in every process. The output of a process is the children of its own parents, in planes.

    Raises:
        ValueError: ``parallelize_module`` raises it for a layer that cannot be shared; the message says why.
    """

    SHARE = _Parents


class RowwiseParallel(_Style):
    """Divides the second layer of a pair, a :class:`fpe.MergeLinear`, by the parents that it reads.

    The input is what :class:`ColwiseParallel` gives; the output is the same in every process.

    Raises:
        ValueError: ``parallelize_module`` raises it for a layer that cannot be shared; the message says why.
    """

    SHARE = _Inputs


def parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """Returns a plan for ``torch.distributed.tensor.parallel.parallelize_module`` with every expanded pair of a model.

    The plan has no entry for other layers. They stay whole in every process unless you add entries for them.

    Args:
        model: What :func:`fpe.expand` returned.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: The model has no expanded pair, or has FPE layers that processes cannot share: masked or block ones.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parallel_plan: model must be an nn.Module, got {type(model).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ExpandedLinear)}
    for name, layer in layers.items():
        if not isinstance(layer, SplitLinear | MergeLinear):
            raise ValueError(
                f"parallel_plan: '{name}' is a {type(layer).__name__}, which processes cannot share; expand with "
                "resparsify='partition', or shard by FSDP2"
            )
    if not layers:
        raise ValueError(f"parallel_plan: {type(model).__name__} has no expanded pair")
    return {name: ColwiseParallel() if isinstance(m, SplitLinear) else RowwiseParallel() for name, m in layers.items()}
