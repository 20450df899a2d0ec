"""Where the values of a 2:4 weight lie: two of every four consecutive inputs (a quad), at given places."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_readable, check_tensor

CODES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)
"""The six ways to take two of four: index of the first in the two low bits, of the second in the two high bits."""


class SemiStructuredLayout(NamedTuple):
    """Positions of the values of a 2:4 weight ``W[N, K]``, or of a parent's two children, one child a plane.

    A quad is four consecutive inputs; the last one is padded where ``K`` is no multiple of 4. Of each quad a row
    stores two values, in the order of their inputs: ``[children, N, 2 * quads]`` in all, with ``quads = ceil(K / 4)``.
    With two children the second takes the two inputs that the first leaves, so that its places cost no storage and both
    children together hold the parent's values, each once. What is stored for an input outside ``K`` is read as zero.

    Attributes:
        shape: ``(N, K)``.
        codes: uint8 ``[N, ceil(quads / 2)]``, the first child's: four bits of ``CODES`` for each quad, those of even
            quads in the low half of a byte. They are the metadata that sparse tensor cores take.
        kept: bool ``[children, N, 2 * quads]``, false where a stored value is not an edge (a quad of fewer than two
            edges, an edge of no child, the padding); ``None`` if all are edges.
        children: 1 (one 2:4 weight) or 2.
    """

    shape: tuple[int, int]
    codes: Tensor
    kept: Tensor | None = None
    children: int = 1

    @classmethod
    def from_mask(cls, mask: Tensor) -> "SemiStructuredLayout":
        """The layout of one 2:4 weight.

        Args:
            mask: bool ``[N, K]``, at most two of each quad of a row.

        Raises:
            TypeError: ``mask`` is no bool tensor.
            ValueError: It is not a matrix, is on the meta device, or keeps more than two of a quad; the message names
                the first such quad.
        """
        op = "SemiStructuredLayout.from_mask"
        _check_matrix(op, "mask", mask, torch.bool)
        quads = _quads(mask)
        _refuse(op, quads.sum(-1), "the mask keeps")
        return cls._of((~quads).long(), mask.shape, 1)

    @classmethod
    def from_labels(cls, labels: Tensor) -> "SemiStructuredLayout":
        """The layout of a parent's two children, at most two inputs of a quad to each.

        Args:
            labels: uint8 ``[N, K]``: 0 or 1, the child that owns the edge; anything else means that none does.

        Raises:
            TypeError: ``labels`` is no uint8 tensor.
            ValueError: It is not a matrix, is on the meta device, or gives a child more than two inputs of a quad; the
                message names the first such quad.
        """
        op = "SemiStructuredLayout.from_labels"
        _check_matrix(op, "labels", labels, torch.uint8)
        quads = _quads(labels, 255)
        for child in (0, 1):
            _refuse(op, (quads == child).sum(-1), f"child {child} has")
        return cls._of(torch.where(quads == 0, 0, torch.where(quads == 1, 2, 1)), labels.shape, 2)

    @classmethod
    def interleaved(cls, labels: Tensor, alpha: int = 2) -> "SemiStructuredLayout":
        """The layout of the weight ``[N, alpha * K]`` that reads child ``a`` of input ``k`` at ``alpha * k + a``.

        It is 2:4 for any labels. With two children a quad is two inputs times two children, and its values are the
        parent's in their own order; with four it is one input times four children, 1:4, and stores a zero beside each
        value. :meth:`from_parent` makes the values.

        Args:
            labels: uint8 ``[N, K]``: which child an edge reads; a label not below ``alpha`` means that it reads none.
            alpha: Children of an input, 2 or 4.

        Raises:
            TypeError: ``labels`` is no uint8 tensor.
            ValueError: It is not a matrix or is on the meta device, or ``alpha`` is neither 2 nor 4.
        """
        op = "SemiStructuredLayout.interleaved"
        _check_matrix(op, "labels", labels, torch.uint8)
        if not isinstance(alpha, int) or alpha not in (2, 4):
            raise ValueError(f"{op}: alpha must be 2 or 4, got {alpha!r}")
        n, k = labels.shape
        if alpha == 4:
            last = labels >= 3  # the value comes second: the first place, 0, is filled with a zero
            codes = _join_nibbles(torch.where(last, 0, labels) | 0xC)
            kept = torch.stack((~last, labels == 3), -1).flatten(1)
        else:
            padded = pad(labels, (0, k % 2), value=255)
            even, odd = (padded.unflatten(-1, (-1, 2)) == 1).to(torch.uint8).unbind(-1)
            codes, kept = _join_nibbles(even | (odd << 2) | 0x8), padded < 2
        return cls((n, alpha * k), codes, kept[None], 1)

    @classmethod
    def _of(cls, rank: Tensor, shape: torch.Size, children: int) -> "SemiStructuredLayout":
        """From ranks ``[N, quads, 4]``: 0 for the first child's inputs, 2 for the second's, 1 for nobody's."""
        order = (4 * rank + torch.arange(4, device=rank.device)).argsort(-1)
        first = order[..., :2].sort(-1).values
        codes = _join_nibbles((first[..., 0] + 4 * first[..., 1]).to(torch.uint8))
        layout = cls((shape[0], shape[1]), codes, None, children)
        quad_rank = rank.flatten(1).expand(children, -1, -1).gather(-1, layout.positions())
        kept = quad_rank == torch.arange(0, 2 * children, 2, device=rank.device)[:, None, None]
        return layout if bool(kept.all()) else layout._replace(kept=kept)

    @property
    def quads(self) -> int:
        """Quads of a row, ``ceil(K / 4)``."""
        return -(-self.shape[1] // 4)

    @property
    def values_shape(self) -> tuple[int, int, int]:
        """Shape of the stored values, ``(children, N, 2 * quads)``."""
        return self.children, self.shape[0], 2 * self.quads

    def nibbles(self) -> Tensor:
        """The code of each quad of each child, uint8 ``[children, N, quads]``."""
        codes = torch.stack([self.codes, complement(self.codes)][: self.children])
        return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., : self.quads]

    def positions(self) -> Tensor:
        """The input that each stored value belongs to, int64 ``[children, N, 2 * quads]``; may lie past ``K``."""
        nibbles = self.nibbles().long()
        inside = torch.stack((nibbles & 3, nibbles >> 2), -1)
        return (inside + 4 * torch.arange(self.quads, device=self.codes.device)[:, None]).flatten(-2)

    def mask(self) -> Tensor:
        """Which edges exist, bool ``[children, N, K]``."""
        kept = self.codes.new_ones(self.values_shape, dtype=torch.bool) if self.kept is None else self.kept
        return self.to_dense(kept)

    def to_dense(self, values: Tensor) -> Tensor:
        """Expands stored values of any dtype to the plain weight, ``[children, N, K]``, zero elsewhere."""
        check_tensor("SemiStructuredLayout.to_dense", "values", values, self.values_shape, any_dtype=True)
        wide = values.new_zeros(*self.values_shape[:2], 4 * self.quads).scatter(-1, self.positions(), values)
        return wide[..., : self.shape[1]]

    def from_dense(self, weight: Tensor) -> Tensor:
        """Takes the values of the edges, zero where there is none: ``[children, N, 2 * quads]``, differentiable.

        Args:
            weight: ``[children, N, K]``, or ``[N, K]`` of which every child takes its own share: a parent's weight. Of
                any dtype.

        Raises:
            TypeError: ``weight`` is not a tensor.
            ValueError: Its shape does not fit.
        """
        shape = self.shape if isinstance(weight, Tensor) and weight.dim() == 2 else (self.children, *self.shape)
        check_tensor("SemiStructuredLayout.from_dense", "weight", weight, shape, any_dtype=True)
        padded = pad(weight, (0, 4 * self.quads - self.shape[1])).expand(self.children, -1, -1)
        values = padded.gather(-1, self.positions())
        return values if self.kept is None else torch.where(self.kept, values, values.new_zeros(()))

    def from_parent(self, weight: Tensor) -> Tensor:
        """Values of an :meth:`interleaved` layout: ``[1, N, 2 * quads]``, differentiable.

        Args:
            weight: The parent's weight ``[N, K]`` of any dtype, where the layout has ``alpha * K`` inputs.

        Raises:
            TypeError: ``weight`` is not a tensor.
            ValueError: Its shape does not fit.
        """
        n, inputs = self.shape
        alpha = 4 if isinstance(weight, Tensor) and weight.shape == (n, inputs // 4) else 2
        check_tensor("SemiStructuredLayout.from_parent", "weight", weight, (n, inputs // alpha), any_dtype=True)
        values = (weight.repeat_interleave(2, -1) if alpha == 4 else pad(weight, (0, weight.shape[1] % 2)))[None]
        return values if self.kept is None else torch.where(self.kept, values, values.new_zeros(()))

    def transposed(self, values: Tensor) -> tuple[Tensor, "SemiStructuredLayout"]:
        """The transposed weight of two children, ``[K, 2 * N]`` with a parent's children side by side.

        It is 2:4 again (see :meth:`interleaved`): dX is a matmul of this weight and ``dy`` interleaved.

        Args:
            values: ``[2, N, 2 * quads]``, zero where there is no edge.

        Returns:
            Its values ``[1, K, N]`` (the parent's weight, transposed; one column more where ``N`` is odd) and layout.

        Raises:
            TypeError: ``values`` is not a tensor.
            ValueError: Its shape does not fit, or the layout has one child, whose transposed weight is not 2:4.
        """
        parent = self.to_dense(values).sum(0)
        return pad(parent.T, (0, self.shape[0] % 2))[None].contiguous(), self.transpose()

    def transpose(self) -> "SemiStructuredLayout":
        """The layout of :meth:`transposed` alone: it does not depend on the values.

        Raises:
            ValueError: The layout has one child, whose transposed weight is not 2:4.
        """
        if self.children != 2:
            raise ValueError(
                f"SemiStructuredLayout.transpose: the transposed weight is 2:4 where children is 2, got {self.children}"
            )
        second = self._replace(kept=None).mask()[1].to(torch.uint8)
        return self.interleaved(second.T)

    def validate(self) -> "SemiStructuredLayout":
        """Reads the tensors and checks that they fit each other; returns the layout.

        Raises:
            ValueError: A shape or dtype is not what it must be, or a code is none of ``CODES``; the message names the
                first such code.
        """
        op, (n, _) = "SemiStructuredLayout.validate", self.shape
        if self.codes.dtype != torch.uint8 or self.codes.shape != (n, -(-self.quads // 2)):
            raise ValueError(
                f"{op}: codes must be uint8 {[n, -(-self.quads // 2)]} for a weight {list(self.shape)}, got "
                f"{self.codes.dtype} {list(self.codes.shape)}"
            )
        if self.children not in (1, 2):
            raise ValueError(f"{op}: children must be 1 or 2, got {self.children}")
        if self.kept is not None and (self.kept.dtype != torch.bool or self.kept.shape != self.values_shape):
            raise ValueError(
                f"{op}: kept must be bool {list(self.values_shape)}, got {self.kept.dtype} {list(self.kept.shape)}"
            )
        nibbles = self.nibbles()[0]
        wrong = ~torch.isin(nibbles, nibbles.new_tensor(CODES))
        if bool(wrong.any()):
            row, quad = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{op}: the code of row {row}, quad {quad} is {int(nibbles[row, quad])}; expected one of {list(CODES)}"
            )
        return self


def complement(codes: Tensor) -> Tensor:
    """The codes of the inputs that ``codes`` leave, of both quads of a byte: the second child's from the first's.

    Each index has a lower and a higher bit. Where the higher bits of the two indices are equal, which the pairs (0, 1)
    and (2, 3) are, the complement has both of them inverted. Otherwise it has both lower bits inverted.
    """
    apart = ((codes >> 3) ^ (codes >> 1)) & 0x11
    return codes ^ 0xAA ^ (apart * 15)


def _join_nibbles(nibbles: Tensor) -> Tensor:
    """Two quads to a byte: uint8 ``[N, quads]`` to ``[N, ceil(quads / 2)]``, padded with a valid code."""
    low, high = pad(nibbles, (0, nibbles.shape[-1] % 2), value=CODES[0]).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def _quads(matrix: Tensor, fill: int = 0) -> Tensor:
    """``[N, K]`` as ``[N, quads, 4]``, padded with ``fill``."""
    return pad(matrix, (0, -matrix.shape[1] % 4), value=fill).unflatten(-1, (-1, 4))


def _check_matrix(op: str, name: str, value: object, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype:
        raise TypeError(f"{op}: {name} must be a {dtype} tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.dim() != 2:
        raise ValueError(f"{op}: {name} must have shape [N, K], got {list(value.shape)}")
    check_readable(op, name, value)


def _refuse(op: str, counts: Tensor, who: str) -> None:
    """Raises if a quad ``[N, quads]`` holds more than two."""
    crowded = counts > 2
    if bool(crowded.any()):
        row, quad = crowded.nonzero()[0].tolist()
        raise ValueError(f"{op}: not 2:4, {who} {int(counts[row, quad])} inputs of quad {quad} in row {row}, at most 2")
