"""Expanded convolutions: output channels are the neurons, an edge is a tap of an input channel.

A convolution is a linear layer over patches. So an expanded one stores an FPE layer and shares everything
that goes with it: labels, checked state dicts, rewiring, the count of non-zeros.
"""

from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import conv2d

from .expansion import expand_pair
from .partition import Partition
from .replaceable import check_replaceable
from .resparsify import Policy

Form = Literal["split", "widened"]


class PatchConv2d(nn.Module):
    """A convolution whose weight is held by a linear layer over patches.

    Args:
        edges: The layer. In form ``"split"`` it maps patches ``[in_channels * kh * kw]`` to channels and owns the
            bias; in form ``"widened"`` it maps input channels to ``[out_channels * kh * kw]``.
        form: ``"split"`` for an expanded convolution, ``"widened"`` for its successor.
        like: The convolution that it came from: kernel size, stride, padding and dilation.
    """

    bias: nn.Parameter | None

    def __init__(self, edges: nn.Module, form: Form, like: nn.Conv2d) -> None:
        super().__init__()
        self.edges = edges
        self.form = form
        self.kernel_size, self.stride = like.kernel_size, like.stride
        self.padding, self.dilation = like.padding, like.dilation
        bias = like.bias if form == "widened" else None
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)

    @property
    def weight(self) -> Tensor:
        """The weight of the equivalent dense convolution, ``[out_channels, in_channels, kh, kw]``."""
        wide = self.edges.weight
        assert isinstance(wide, Tensor)
        kh, kw = self.kernel_size
        if self.form == "split":
            return wide.unflatten(1, (-1, kh, kw))
        return wide.unflatten(0, (-1, kh, kw)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of ``[batch, in_channels, height, width]``; as ``nn.Conv2d``, also without the batch."""
        bias = self.edges.bias if self.form == "split" else self.bias
        return conv2d(x, self.weight, bias, self.stride, self.padding, self.dilation)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Form, kernel and stride."""
        return f"{self.form}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


def expand_conv_pair(
    conv1: nn.Conv2d,
    conv2: nn.Conv2d,
    partition: Partition,
    resparsify: Policy | Literal["auto"] = "auto",
    *,
    generator: Generator | None = None,
) -> tuple[PatchConv2d, PatchConv2d]:
    """Expands a pair of convolutions at the same number of non-zero weights (paper, v2).

    Only modules that treat every channel alike and on its own may run between the two: activations, pooling.

    Args:
        conv1: The convolution whose output channels are split, ``[h, c0, kh, kw]``.
        conv2: The one that reads them, ``[c, h, kh, kw]``.
        partition: Who owns the taps of ``conv1``, over ``[h, c0 * kh * kw]``.
        resparsify: Which weights are removed, as in :func:`fpe.expand`.
        generator: Source of randomness (CPU).

    Returns:
        The expanded convolution, its channels in planes of children, and its widened successor.

    Raises:
        TypeError: A layer is not an ``nn.Conv2d``, or ``partition`` is not a :class:`fpe.Partition`.
        ValueError: ``conv2`` does not read the channels of ``conv1``; a convolution has groups, pads with other values
            than zeros, or holds what its replacement would drop (hooks, a parametrization); or as in
            :func:`fpe.expand_pair`.
    """
    for name, conv in (("conv1", conv1), ("conv2", conv2)):
        check_replaceable("expand_conv_pair", name, conv, nn.Conv2d)
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise ValueError(
                f"expand_conv_pair: {name} must have groups = 1 and pad with zeros, got groups = {conv.groups}, "
                f"padding_mode = {conv.padding_mode!r}"
            )
    if conv2.in_channels != conv1.out_channels:
        raise ValueError(
            f"expand_conv_pair: conv2 must read the {conv1.out_channels} channels of conv1, got {conv2.in_channels}"
        )
    fc1 = _linear(conv1.weight.flatten(1), conv1.bias)
    fc2 = _linear(conv2.weight.permute(0, 2, 3, 1).flatten(0, 2), None)
    first, second = expand_pair(fc1, fc2, partition, resparsify, generator=generator)
    return PatchConv2d(first, "split", conv1), PatchConv2d(second, "widened", conv2)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    factory = {"device": weight.device, "dtype": weight.dtype}
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias is not None, **factory)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.weight.requires_grad_(weight.requires_grad)
        if bias is not None:
            layer.bias.copy_(bias)
            layer.bias.requires_grad_(bias.requires_grad)
    return layer
