"""One call of any operation beside the same product of dense masked weights, written with plain PyTorch alone.

Nothing of the package makes the right answers: masks are made here, and where values are stored is worked out anew.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from support import changed_fields, readable_id, seeded
from torch import Tensor
from torch.nn.functional import gelu, pad, relu, silu

from fpe import kernels
from fpe.kernels import HOLE, Bitmap, BlockLayout, PackedLabels, SemiStructuredLayout

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda t: t,
    "relu": relu,
    "gelu": gelu,
    "silu": silu,
}
OPS = (
    "split_matmul",
    "merge_matmul",
    "partition_grad",
    "block_matmul",
    "block_matmul_t",
    "block_grad",
    "semi_structured_matmul",
    "semi_structured_matmul_t",
    "semi_structured_grad",
    "semi_structured_compress",
    "expanded_mlp",
    "masked_matmul",
    "kept_split",
    "kept_merge",
    "kept_grad",
    "unpack_values",
    "pack_values",
)
KEPT_SPLITS = ("masked_matmul", "kept_split", "kept_merge")
WITH_EPILOGUE = ("split_matmul", "merge_matmul", "block_matmul", "expanded_mlp", *KEPT_SPLITS)
WITH_BIAS = (*WITH_EPILOGUE, "semi_structured_matmul")

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """What is called, of which sizes.

    Attributes:
        op: Of ``OPS``.
        backend: As the operation takes it.
        dtype: Of the operands.
        lead: Leading dimensions of the activations.
        n: Rows of the parent's weight.
        k: Its columns.
        alpha: Children; of the 2:4 operations 1 or 2.
        block: Sides of the blocks.
        outputs: Of the second layer of an MLP.
        merged: Whether that layer reads one child an edge.
        holes: Share of the edges, or of the blocks, that nobody owns.
        labels: ``"plain"``, ``"packed"``, or ``"turned"``: packed for the transposed weight.
        form: How the operands lie in memory, a key of ``FORMS``.
        bias: Whether there is one.
        activation: Of ``ACTIVATIONS``.
        seed: Of the numbers.
    """

    op: str
    backend: str = "eager"
    dtype: torch.dtype = torch.float64
    lead: tuple[int, ...] = (3,)
    n: int = 5
    k: int = 6
    alpha: int = 2
    block: tuple[int, int] = (2, 4)
    outputs: int = 4
    merged: bool = False
    holes: float = 0.3
    labels: str = "plain"
    form: str = "contiguous"
    bias: bool = False
    activation: str | None = None
    seed: int = 0

    @property
    def id(self) -> str:
        rest = changed_fields(replace(self, op="", backend="eager", dtype=torch.float64)).removeprefix("op=")
        return f"{self.op}-{self.backend}-{readable_id(self.dtype)}{rest.replace('=True', '')}"


@dataclass(frozen=True)
class Problem:
    """Operands, and what is computed from them: by the package and by dense masked weights."""

    operands: tuple[Tensor, ...]
    ours: Function
    dense: Function


def _reversed(t: Tensor) -> Tensor:
    order = [*reversed(range(t.dim()))]
    return t.permute(order).contiguous().permute(order)


def _sliced(t: Tensor) -> Tensor:
    """Every second element of a buffer whose other elements are NaN."""
    apart = t.new_full([2 * size for size in t.shape], float("nan"))[tuple(slice(1, None, 2) for _ in t.shape)]
    return apart.copy_(t)


def _shifted(t: Tensor) -> Tensor:
    """Rows that begin one element after where an aligned one would."""
    return pad(t, (1, 1), value=float("nan"))[..., 1:-1]


def _offset(t: Tensor) -> Tensor:
    """All of it one element after where an aligned one would begin."""
    return pad(t.flatten(), (1, 0), value=float("nan"))[1:].view(t.shape)


def _repeated(t: Tensor) -> Tensor:
    """The first row everywhere, once in memory."""
    return t[:1].expand(t.shape) if t.dim() > 1 else t


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "reversed": _reversed,
    "sliced": _sliced,
    "shifted": _shifted,
    "offset": _offset,
    "repeated": _repeated,
}


class Maker:
    """Makes the problem of a case; the numbers are small integers, so that sums are exact in any order and type."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.generator = seeded(case.seed)

    def numbers(self, *shape: int) -> Tensor:
        most = 1 if self.case.dtype == torch.bfloat16 or self.case.op == "expanded_mlp" else 2
        return torch.randint(-most, most + 1, shape, generator=self.generator).to(self.case.dtype)

    def operand(self, *shape: int) -> Tensor:
        return FORMS[self.case.form](self.numbers(*shape))

    def bias(self, *shape: int) -> tuple[Tensor, ...]:
        return (self.operand(*shape),) if self.case.bias else ()

    def gone(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < self.case.holes

    def labels(self, n: int, k: int) -> tuple[Tensor, Tensor, Tensor | PackedLabels]:
        """Masks ``[alpha, n, k]``, where a weight may stand that is not zero, and the labels as they are passed."""
        alpha, gone = self.case.alpha, self.gone(n, k)
        table = torch.randint(alpha, (n, k), generator=self.generator).to(torch.uint8)
        table[gone] = torch.tensor([HOLE, alpha], dtype=torch.uint8)[torch.arange(int(gone.sum())) % 2]
        masks = table == torch.arange(alpha, dtype=torch.uint8)[:, None, None]
        if self.case.labels == "plain":
            return masks, torch.ones(n, k, dtype=torch.bool), table
        turned = self.case.labels == "turned"
        packed = PackedLabels.pack(table.T.contiguous(), alpha).T if turned else PackedLabels.pack(table, alpha)
        return masks, ~gone, packed  # packed labels ask for zeros at holes

    def parent(self, stored: Tensor) -> Tensor:
        weight = self.numbers(*stored.shape) * stored
        return weight if self.case.form == "repeated" else FORMS[self.case.form](weight)

    def quads(self) -> tuple[Tensor, SemiStructuredLayout]:
        """Masks ``[children, n, k]``, two of every four inputs to each child, and their layout."""
        n, k, children = self.case.n, self.case.k, self.case.alpha
        order = torch.rand(n, -(-k // 4), 4, generator=self.generator).argsort(-1)
        table = (order // 2).flatten(1)[:, :k].to(torch.uint8).masked_fill(self.gone(n, k), HOLE)
        masks = table == torch.arange(children, dtype=torch.uint8)[:, None, None]
        make = SemiStructuredLayout.from_labels(table) if children == 2 else SemiStructuredLayout.from_mask(masks[0])
        return masks, make

    def blocks(self) -> tuple[Tensor, Tensor, BlockLayout]:
        """Where each weight is stored ``[n, k]``, which weight each stored value is, and the layout; -1 for none."""
        (n, k), (bn, bk) = (self.case.n, self.case.k), self.case.block
        mask = ~self.gone(-(-n // bn), -(-k // bk))
        number = mask.flatten().cumsum(0).view(mask.shape) - 1
        row, col = torch.arange(n)[:, None], torch.arange(k)
        stored = number[row // bn, col // bk] * bn * bk + row % bn * bk + col % bk
        stored = torch.where(mask[row // bn, col // bk], stored, -1)
        weight = torch.full((int(mask.sum()) * bn * bk,), -1)
        weight[stored[stored >= 0]] = torch.arange(n * k).view(n, k)[stored >= 0]
        return stored, weight, BlockLayout.from_mask(mask, (n, k), (bn, bk))

    def kept(self) -> tuple[Tensor, Bitmap]:
        """Which value each entry ``[n, k]`` is, -1 for none, and the bitmap as it is passed."""
        turned = self.case.labels == "turned"
        mask = ~self.gone(self.case.k, self.case.n) if turned else ~self.gone(self.case.n, self.case.k)
        number = torch.where(mask, mask.flatten().cumsum(0).view(mask.shape) - 1, -1)
        return (number.T, Bitmap.pack(mask).T) if turned else (number, Bitmap.pack(mask))

    def owners(self) -> tuple[Tensor, Tensor | PackedLabels]:
        """Masks ``[alpha, n, k]`` of children that own every entry, and the labels as they are passed."""
        alpha = self.case.alpha
        table = torch.randint(alpha, (self.case.n, self.case.k), generator=self.generator).to(torch.uint8)
        masks = table == torch.arange(alpha, dtype=torch.uint8)[:, None, None]
        turned = {"turned": lambda: PackedLabels.pack(table.T.contiguous(), alpha).T, "plain": lambda: table}
        return masks, turned.get(self.case.labels, lambda: PackedLabels.pack(table, alpha))()

    def problem(self) -> Problem:
        return getattr(self, self.case.op)()

    def _finish(self, y: Tensor, bias: tuple[Tensor, ...]) -> Tensor:
        return ACTIVATIONS[self.case.activation](y + bias[0] if bias else y)

    def split_matmul(self) -> Problem:
        case, (masks, stored, labels) = self.case, self.labels(self.case.n, self.case.k)
        return Problem(
            (self.operand(*case.lead, case.k), self.parent(stored), *self.bias(case.alpha, case.n)),
            lambda x, w, *bias: kernels.split_matmul(
                x, w, labels, case.alpha, *bias, activation=case.activation, backend=case.backend
            ),
            lambda x, w, *bias: self._finish(torch.einsum("...k,ank->...an", x, w * masks), bias),
        )

    def merge_matmul(self) -> Problem:
        case, (masks, stored, labels) = self.case, self.labels(self.case.n, self.case.k)
        return Problem(
            (self.operand(*case.lead, case.alpha, case.k), self.parent(stored), *self.bias(case.n)),
            lambda z, w, *bias: kernels.merge_matmul(
                z, w, labels, *bias, activation=case.activation, backend=case.backend
            ),
            lambda z, w, *bias: self._finish(torch.einsum("...ak,ank->...n", z, w * masks), bias),
        )

    def partition_grad(self) -> Problem:
        case, (masks, _, labels) = self.case, self.labels(self.case.n, self.case.k)
        return Problem(
            (self.operand(*case.lead, case.alpha, case.n), self.operand(*case.lead, case.k)),
            lambda dy, x: kernels.partition_grad(dy, x, labels, backend=case.backend),
            lambda dy, x: (torch.einsum("man,mk->ank", _rows(dy, 2), _rows(x, 1)) * masks).sum(0),
        )

    def block_matmul(self) -> Problem:
        case, (stored, weight, layout) = self.case, self.blocks()
        values = self.operand(len(weight) // prod(case.block), *case.block)
        return Problem(
            (self.operand(*case.lead, case.k), values, *self.bias(case.n)),
            lambda x, v, *bias: kernels.block_matmul(
                x, v, layout, *bias, activation=case.activation, backend=case.backend
            ),
            lambda x, v, *bias: self._finish(x @ _taken(v, stored).mT, bias),
        )

    def block_matmul_t(self) -> Problem:
        case, (stored, weight, layout) = self.case, self.blocks()
        return Problem(
            (self.operand(*case.lead, case.n), self.operand(len(weight) // prod(case.block), *case.block)),
            lambda dy, v: kernels.block_matmul_t(dy, v, layout, backend=case.backend),
            lambda dy, v: dy @ _taken(v, stored),
        )

    def block_grad(self) -> Problem:
        case, (_, weight, layout) = self.case, self.blocks()
        blocks = len(weight) // prod(case.block)
        return Problem(
            (self.operand(*case.lead, case.n), self.operand(*case.lead, case.k)),
            lambda dy, x: kernels.block_grad(dy, x, layout, backend=case.backend),
            lambda dy, x: _taken(_rows(dy, 1).mT @ _rows(x, 1), weight).unflatten(0, (blocks, *case.block)),
        )

    def semi_structured_matmul(self) -> Problem:
        case, (masks, layout) = self.case, self.quads()
        return Problem(
            (self.operand(*case.lead, case.k), self.operand(case.n, case.k), *self.bias(case.alpha, case.n)),
            lambda x, w, *bias: kernels.semi_structured_matmul(
                x, self._compressed(w, layout), layout, *bias, backend=case.backend
            ),
            lambda x, w, *bias: self._finish(torch.einsum("...k,ank->...an", x, w * masks), bias),
        )

    def semi_structured_matmul_t(self) -> Problem:
        case, (masks, layout) = self.case, self.quads()
        return Problem(
            (self.operand(*case.lead, case.alpha, case.n), self.operand(case.n, case.k)),
            lambda dy, w: kernels.semi_structured_matmul_t(
                dy, self._compressed(w, layout), layout, backend=case.backend
            ),
            lambda dy, w: torch.einsum("...an,ank->...k", dy, w * masks),
        )

    def semi_structured_grad(self) -> Problem:
        case, (masks, layout) = self.case, self.quads()
        return Problem(
            (self.operand(*case.lead, case.alpha, case.n), self.operand(*case.lead, case.k)),
            lambda dy, x: layout.to_dense(kernels.semi_structured_grad(dy, x, layout, backend=case.backend)),
            lambda dy, x: torch.einsum("man,mk->ank", _rows(dy, 2), _rows(x, 1)) * masks,
        )

    def semi_structured_compress(self) -> Problem:
        masks, layout = self.quads()
        return Problem(
            (self.operand(self.case.n, self.case.k),),
            lambda w: layout.to_dense(self._compressed(w, layout)),
            lambda w: w * masks,
        )

    def expanded_mlp(self) -> Problem:
        case, (masks1, stored1, labels1) = self.case, self.labels(self.case.n, self.case.k)
        alpha, outputs = case.alpha, case.outputs
        masks2, stored2, labels2 = self.labels(outputs, case.n)
        dense = torch.ones(outputs, alpha * case.n, dtype=torch.bool)

        def ours(x: Tensor, w1: Tensor, w2: Tensor, *bias: Tensor) -> Tensor:
            second = labels2 if case.merged else None
            named = dict(zip(("bias1", "bias2"), bias, strict=False))
            more = {"alpha": alpha, "activation": case.activation, "backend": case.backend}
            return kernels.expanded_mlp(x, w1, labels1, w2, second, **named, **more)

        def truth(x: Tensor, w1: Tensor, w2: Tensor, *bias: Tensor) -> Tensor:
            h = self._finish(torch.einsum("...k,ank->...an", x, w1 * masks1), bias[:1])
            wide = w2 * masks2 if case.merged else w2.unflatten(1, (alpha, case.n)).transpose(0, 1)
            y = torch.einsum("...ak,ank->...n", h, wide)
            return y + bias[1] if bias else y

        return Problem(
            (
                self.operand(*case.lead, case.k),
                self.parent(stored1),
                self.parent(stored2 if case.merged else dense),
                *self.bias(alpha, case.n),
                *self.bias(outputs),
            ),
            ours,
            truth,
        )

    def masked_matmul(self) -> Problem:
        case, (number, kept) = self.case, self.kept()
        return Problem(
            (self.operand(*case.lead, case.k), self.operand(kept.nnz), *self.bias(case.n)),
            lambda x, v, *bias: kernels.masked_matmul(
                x, v, kept, *bias, activation=case.activation, backend=case.backend
            ),
            lambda x, v, *bias: self._finish(x @ _taken(v, number).mT, bias),
        )

    def kept_split(self) -> Problem:
        case, (number, kept), (masks, labels) = self.case, self.kept(), self.owners()
        return Problem(
            (self.operand(*case.lead, case.k), self.operand(kept.nnz), *self.bias(case.alpha, case.n)),
            lambda x, v, *bias: kernels.split_matmul(
                x, v, labels, case.alpha, *bias, activation=case.activation, kept=kept, backend=case.backend
            ),
            lambda x, v, *bias: self._finish(torch.einsum("...k,ank->...an", x, _taken(v, number) * masks), bias),
        )

    def kept_merge(self) -> Problem:
        case, (number, kept), (masks, labels) = self.case, self.kept(), self.owners()
        return Problem(
            (self.operand(*case.lead, case.alpha, case.k), self.operand(kept.nnz), *self.bias(case.n)),
            lambda z, v, *bias: kernels.merge_matmul(
                z, v, labels, *bias, activation=case.activation, kept=kept, backend=case.backend
            ),
            lambda z, v, *bias: self._finish(torch.einsum("...ak,ank->...n", z, _taken(v, number) * masks), bias),
        )

    def kept_grad(self) -> Problem:
        case, (number, kept), (masks, labels) = self.case, self.kept(), self.owners()
        return Problem(
            (self.operand(*case.lead, case.alpha, case.n), self.operand(*case.lead, case.k)),
            lambda dy, x: kernels.partition_grad(dy, x, labels, kept=kept, backend=case.backend),
            lambda dy, x: _in_order((torch.einsum("man,mk->ank", _rows(dy, 2), _rows(x, 1)) * masks).sum(0), number),
        )

    def unpack_values(self) -> Problem:
        number, kept = self.kept()
        return Problem(
            (self.operand(kept.nnz),),
            lambda v: kernels.unpack_values(v, kept, backend=self.case.backend),
            lambda v: _taken(v, number),
        )

    def pack_values(self) -> Problem:
        number, kept = self.kept()
        return Problem(
            (self.operand(self.case.n, self.case.k),),
            lambda w: kernels.pack_values(w, kept, backend=self.case.backend),
            lambda w: _in_order(w, number),
        )

    def _compressed(self, w: Tensor, layout: SemiStructuredLayout) -> Tensor:
        return kernels.semi_structured_compress(w, layout, backend=self.case.backend)


def _rows(t: Tensor, features: int) -> Tensor:
    """Leading dimensions as one, the last ``features`` as they are; sizes may be zero."""
    return t.reshape(prod(t.shape[: t.dim() - features]), *t.shape[t.dim() - features :])


def _in_order(w: Tensor, number: Tensor) -> Tensor:
    """The entries of a matrix that have a number, in the order of these."""
    number = number.flatten()
    return w.flatten()[number.argsort(stable=True)[int((number < 0).sum()) :]]


def _taken(t: Tensor, index: Tensor) -> Tensor:
    """Entries of a flattened tensor, zero where the index is -1."""
    return pad(t.flatten(), (0, 1))[index]
