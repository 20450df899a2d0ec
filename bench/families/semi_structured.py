"""The 2:4 kernels: on dense tensor cores, on sparse ones, and what packs weights for those."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.gpus import runs_mma_sp
from ...kernels.semi_structured import gluon as on_sparse
from ...kernels.semi_structured import pack, sparse_tensor_core
from ...kernels.semi_structured import triton as kernels
from ...kernels.semi_structured.backends import BACKENDS as _BACKENDS
from ...kernels.semi_structured.layout import SemiStructuredLayout
from ...kernels.structures import TWO_FOUR
from . import contract
from .contract import REDUCE, SHAPE, Kernel, Row


def _matrix(row: Row) -> list[str]:
    """Complaints of a kernel on dense tensor cores."""
    found = ", ".join(sorted(_instructions(row)))
    wrong = bool(found) != (row["dtype"] != "fp32")
    return [f"matrix instruction: {found or 'none'} for {row['dtype']}"] if wrong else []


def _sparse_matrix(row: Row) -> list[str]:
    found = _instructions(row)
    said = f"matrix instruction: meant HMMA.SP.16832, got {', '.join(sorted(found)) or 'none'}"
    return ([] if found == {"HMMA.SP.16832"} else [said]) + _wide(row)


def _instructions(row: Row) -> set[str]:
    return {name.removesuffix(".BF16").removesuffix(".F32") for name in row["matrix"]}


def _wide(row: Row) -> list[str]:
    return [f"loads of the weights of {row['load_bits']} bits"] if row["load_bits"] < 128 else []


def _multiply(row: Row) -> list[str]:
    return _matrix(row) + _wide(row)


def _moves(row: Row) -> list[str]:
    """Compressing and expanding read as wide as their operands lie."""
    return []


_PAIR = ("tl.load(pair",)
KERNELS = (
    Kernel(on_sparse.multiply, ("_copy(weights_smem",), check=_sparse_matrix, alias="sparse_tensor_core"),
    Kernel(kernels._multiply, _PAIR, check=_multiply),
    Kernel(kernels._multiply_t, _PAIR, check=_multiply),
    Kernel(kernels._outer, ("dy = tl.load(", "x = tl.load("), check=_matrix),
    Kernel(kernels._compress, ("w = tl.load(",), multiplies=False, check=_moves),
    Kernel(kernels._spread, _PAIR, multiplies=False, check=_moves),
    Kernel(pack._pack, ("tl.load(source", "tl.load(kept_ptr"), multiplies=False, check=_wide),
    Kernel(pack._pack_transposed, ("tl.load(pairs",), multiplies=False, check=_wide),
)
LAUNCHERS = (kernels, sparse_tensor_core)
BACKENDS = (_BACKENDS,)

PACKED = ("values", "parent", "parent.T", "parent with holes", "parent of four", "transposed values")
"""What is packed: stored values, a parent's weight along its rows and across them, with a mask, children of four."""
FORMS: tuple[pack.Form, ...] = ("fragments", "rows", "dense")


@dataclass(frozen=True)
class Case(contract.Case):
    """A launch of a 2:4 operation.

    Attributes:
        op: ``"forward"``, ``"dx"``, ``"dw"``, ``"compress"``, ``"expand"``; ``"sparse"``: the forward on sparse tensor
            cores; or what is packed and into which form, as ``"pack parent.T into rows"``.
        dtype: Of the operands.
        children: 1 or 2.
        m: Rows of activations.
        shape: ``(N, K)`` of the parent.
    """

    op: str
    dtype: str
    children: int
    m: int
    shape: tuple[int, int] = SHAPE
    file: ClassVar[str] = "semi-structured"
    each: ClassVar[bool] = True

    @property
    def id(self) -> str:
        """As ``sparse-bf16-2-m16``."""
        return f"{self.op}-{self.dtype}-{self.children}-m{self.m}"

    @property
    def option(self) -> str:
        """See :class:`.contract.Case`."""
        return TWO_FOUR

    @property
    def columns(self) -> Row:
        """See :class:`.contract.Case`."""
        return {"dtype": self.dtype, "children": self.children, "m": self.m}

    def owns(self, kernel: str) -> bool:
        """The sum of a split reduction is compiled with other families; packing is a case of its own."""
        return kernel != REDUCE.name and (self.op.startswith("pack") or not kernel.startswith("_pack"))

    def runs_on(self, arch: int) -> bool:
        """See :class:`.contract.Case`."""
        return self.op != "sparse" or runs_mma_sp(arch)

    def launch(self) -> object:
        """See :class:`.contract.Case`."""
        n, k = self.shape
        codes = torch.empty(n, k // 8, dtype=torch.uint8, device="meta")
        layout = SemiStructuredLayout(self.shape, codes, None, self.children)
        x, dy = self.empty(self.m, k), self.empty(self.m, self.children, n)
        values = self.empty(*layout.values_shape)
        calls: dict[str, Callable[[], Tensor]] = {
            "sparse": lambda: sparse_tensor_core.semi_structured_matmul_sparse_tensor_core(x, values, layout),
            "forward": lambda: kernels.semi_structured_matmul_triton(x, values, layout),
            "dx": lambda: kernels.semi_structured_matmul_t_triton(dy, values, layout),
            "dw": lambda: kernels.semi_structured_grad_triton(dy, x, layout),
            "compress": lambda: kernels.semi_structured_compress_triton(self.empty(n, k), layout),
            "expand": lambda: kernels.semi_structured_expand_triton(values, layout),
        }
        return calls.get(self.op, self._pack)()

    def _pack(self) -> Tensor:
        """Calls a packer; codes of the result have a nibble for each quad of four inputs."""
        (n, k), source = self.shape, self.op.removeprefix("pack ").partition(" into ")[0]
        form = next(form for form in FORMS if self.op.endswith(form))
        empty = self.empty

        def codes(rows: int, inputs: int) -> Tensor:
            return torch.empty(rows, inputs // 8, dtype=torch.uint8, device="meta")

        def of_result(rows: int, inputs: int) -> tuple[Tensor, int] | tuple[()]:
            return (codes(rows, inputs), inputs) if form == "dense" else ()

        if source == "values":
            return pack.pack_values(empty(2, n, k // 2), form, *of_result(n, k))
        if source == "transposed values":
            return pack.pack_transposed(empty(2, n, k // 2), codes(n, k), k, form, *of_result(k, 2 * n)[:1])
        if source == "parent.T":
            return pack.pack_parent(empty(n, k).T, 2, None, form, *of_result(k, 2 * n))
        alpha = 4 if source == "parent of four" else 2
        kept = None
        if source != "parent":
            kept = torch.empty(1, n, k * alpha // 2, dtype=torch.bool, device="meta")
        return pack.pack_parent(empty(n, k), alpha, kept, form, *of_result(n, alpha * k))


CASES = (
    *(Case(*c) for c in product(("sparse",), ("bf16", "fp16"), (1, 2), (1, 16, 32, 64, 1024))),
    *(Case(*c) for c in product(("forward", "dx", "dw"), ("bf16", "fp16", "fp32"), (1, 2), (1, 64, 1024))),
    *(Case(*c, 1) for c in product(("compress", "expand"), ("bf16", "fp32"), (1, 2))),
    *(Case(f"pack {source} into {form}", "bf16", 2, 1) for source, form in product(PACKED, FORMS)),
)
QUICK = (
    Case("sparse", "bf16", 2, 64),
    Case("forward", "bf16", 2, 64),
    Case("pack parent.T into fragments", "bf16", 2, 1),
)
