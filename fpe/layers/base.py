"""What the layers have in common: sizes, the wide view, a mask that may move, and a checked state dict."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .dense_form import forget

FORMAT_VERSION = 2
"""Version of the state dict's layout; its first entry in every layer's header."""


class ExpandedLinear(nn.Module):
    """What the FPE layers have in common: sizes, the wide view, and a checked state dict.

    Attributes:
        in_features: Width of the input.
        out_features: Width of the output.
        backend: Which implementation runs: ``"auto"``, ``"triton"`` or ``"eager"``.
        keeps_dense: Whether a CPU keeps the dense weight between calls, see :mod:`.dense_form`.
        made_of: Names of the weight parameter and of the tensors that say where its entries lie.
    """

    keeps_dense: bool = True
    made_of: tuple[str, ...]

    def __init__(self, in_features: int, out_features: int, backend: str) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.backend = backend

    bias: nn.Parameter | None

    def wide_weight(self) -> Tensor:
        """The weight of the equivalent dense layer, ``[out_features, in_features]``, differentiable."""
        raise NotImplementedError

    def masked_copy(self) -> Tensor | None:
        """:meth:`wide_weight` by the quickest way on a CPU; none where the layer's operation is quicker still."""
        raise NotImplementedError

    def kept(self) -> Tensor:
        """Which entries of :meth:`wide_weight` exist, bool ``[out_features, in_features]``."""
        raise NotImplementedError

    def rewire(self, kept: Tensor, *followers: Tensor) -> None:
        """Takes another mask with as many edges, as :class:`fpe.Rewiring` makes it; in place.

        Edges that stay keep their weight. New edges begin at zero.

        Args:
            kept: The new :meth:`kept`, bool ``[out_features, in_features]``.
            followers: Tensors of the weight parameter's shape that belong to it entry by entry, as an optimizer's
                moments; edges keep their entries, new ones begin at zero there too.

        Raises:
            ValueError: The mask is one that the layer cannot have.
        """
        raise NotImplementedError

    @property
    def nonzeros(self) -> int:
        """Number of weights that the layer keeps."""
        return int(self.kept().sum())

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` that computes the same function at the wide size."""
        weight = self.wide_weight()
        dense = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        dense.weight.copy_(weight)
        dense.weight.requires_grad_(next(self.parameters()).requires_grad)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    def reset_parameters(self, fan_in: int) -> None:
        """Draws weights as ``nn.Linear`` with ``fan_in`` inputs does, zero where no edge is kept."""
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        self.clear_removed()

    def clear_removed(self) -> None:
        """Sets the stored values of removed edges to zero."""
        raise NotImplementedError

    # The state dict. Every entry is a tensor, so that safetensors takes it too.

    def _apply(self, fn: Any, recurse: bool = True) -> "ExpandedLinear":
        """Moves or casts the layer; what a CPU kept of it is freed."""
        forget(self)
        return super()._apply(fn, recurse)

    def _header(self) -> list[int]:
        """What a state dict must agree with before it can be loaded, besides its tensors' shapes."""
        return [FORMAT_VERSION, _kinds().index(type(self)), self.in_features, self.out_features]

    def get_extra_state(self) -> Tensor:
        """The header, int64."""
        return torch.tensor(self._header(), dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: :meth:`check_state` has compared the header before loading began."""

    def check_state(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Raises unless the entries under ``prefix`` are a state of a layer like this one.

        Raises:
            ValueError: An entry is missing, has another shape or holds what cannot be. Nothing has been
                loaded then.
        """
        header = state.get(f"{prefix}_extra_state")
        if not isinstance(header, Tensor) or header.dtype != torch.int64:
            raise ValueError(
                f"state dict: expected the header of a {type(self).__name__} at '{prefix}_extra_state', got "
                f"{'nothing' if header is None else type(header).__name__}"
            )
        if header.tolist() != self._header():
            raise ValueError(
                f"state dict: '{prefix}_extra_state' should be {self._header()} (format, kind, in, out, ...), got "
                f"{header.tolist()}"
            )
        for name, own in self._expected_tensors().items():
            value = state.get(prefix + name)
            if not isinstance(value, Tensor):
                raise ValueError(f"state dict: expected a tensor at '{prefix}{name}', got {type(value).__name__}")
            expect(prefix + name, list(value.shape), own)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], prefix: str = "") -> "ExpandedLinear":
        """Builds the layer whose entries stand under ``prefix``, weights included.

        Raises:
            ValueError: The entries are no state of an FPE layer.
        """
        header = state.get(f"{prefix}_extra_state")
        values = header.tolist() if isinstance(header, Tensor) and header.dtype == torch.int64 else []
        if len(values) < 4 or values[0] != FORMAT_VERSION or not 0 <= values[1] < len(_kinds()):
            raise ValueError(
                f"state dict: expected the header of an FPE layer of format {FORMAT_VERSION} at "
                f"'{prefix}_extra_state', got {values or type(header).__name__}"
            )
        own = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        try:
            layer = _kinds()[values[1]]._empty(values, own)
            layer.load_state_dict(own)
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"state dict: the entries under '{prefix}' are damaged: {error}") from error
        return layer

    @classmethod
    def _empty(cls, header: list[int], own: Mapping[str, Tensor]) -> "ExpandedLinear":
        """A layer of the topology that a state describes, weights still to be loaded."""
        raise NotImplementedError

    def _expected_tensors(self) -> dict[str, list[int]]:
        """Names and shapes of the tensors of a state dict."""
        own = {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}
        return {n: list(t.shape) for n, t in own.items() if n not in self._non_persistent_buffers_set}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.check_state(state_dict, prefix)
        self._adopt_topology(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.clear_removed()

    def _adopt_topology(self, state: Mapping[str, Any], prefix: str) -> None:
        """Makes room for a checked state whose tensors have other sizes than the layer's."""

    def _repr_details(self) -> str:
        return ""

    def extra_repr(self) -> str:
        """Sizes, structure and the share of weights kept."""
        total = max(self.in_features * self.out_features, 1)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self._repr_details()}"
            f"nonzeros={self.nonzeros} ({self.nonzeros / total:.1%}), bias={self.bias is not None}"
        )

    def _make_bias(self, bias: bool, **factory: Any) -> nn.Parameter | None:
        return nn.Parameter(torch.empty(self.out_features, **factory)) if bias else None


def _kinds() -> tuple[type[ExpandedLinear], ...]:
    from . import KINDS

    return KINDS


def expect(name: str, got: object, wanted: object) -> None:
    """Raises unless an entry of a state dict is what it should be."""
    if got != wanted:
        raise ValueError(f"state dict: '{name}' should be {wanted}, got {got}")
