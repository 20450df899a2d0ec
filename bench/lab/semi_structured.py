"""Compiles the 2:4 kernels as they ship, Triton's and Gluon's, for every architecture, and reads the machine code.

As in ``compile``, the real launchers run on meta tensors while their launches are caught.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import getsourcelines
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from ...kernels.device import KNOWN
from ...kernels.gpus import ARCHITECTURES, GPUS, runs_mma_sp
from ...kernels.semi_structured import gluon as sparse_kernels
from ...kernels.semi_structured import pack, sparse_tensor_core
from ...kernels.semi_structured import triton as dense_kernels
from ...kernels.semi_structured.layout import SemiStructuredLayout
from ..results import Results
from ..table import Table
from . import hazards
from .compile import catching, read
from .sass import Row, programs_per_sm

SHAPE = (14336, 4096)
"""``(N, K)`` of the parent: an LLM's."""
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

PACKED = ("values", "parent", "parent.T", "parent with holes", "parent of four", "transposed values")
"""What is packed: stored values, a parent's weight along its rows and across them, with a mask, children of four."""
FORMS: tuple[pack.Form, ...] = ("fragments", "rows", "dense")


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        op: ``"forward"``, ``"dx"``, ``"dw"``, ``"compress"``, ``"expand"``; ``"sparse"``: the forward on sparse tensor
            cores; or what is packed and into which form, as ``"pack parent.T into rows"``.
        dtype: A name in ``TYPES``.
        children: 1 or 2.
        m: Rows of activations.
        shape: ``(N, K)``.
    """

    op: str
    dtype: str
    children: int
    m: int
    shape: tuple[int, int] = SHAPE

    @property
    def id(self) -> str:
        """As ``sparse-bf16-2-m16``."""
        return f"{self.op}-{self.dtype}-{self.children}-m{self.m}"


CASES = (
    *(Case(*c) for c in product(("sparse",), ("bf16", "fp16"), (1, 2), (1, 16, 32, 64, 1024))),
    *(Case(*c) for c in product(("forward", "dx", "dw"), TYPES, (1, 2), (1, 64, 1024))),
    *(Case(*c, 1) for c in product(("compress", "expand"), ("bf16", "fp32"), (1, 2))),
    *(Case(f"pack {source} into {form}", "bf16", 2, 1) for source, form in product(PACKED, FORMS)),
)

STREAMS = {
    "multiply": ("_copy(weights_smem",),
    "_multiply": ("tl.load(pair",),
    "_multiply_t": ("tl.load(pair",),
    "_outer": ("dy = tl.load(", "x = tl.load("),
    "_compress": ("w = tl.load(",),
    "_spread": ("tl.load(pair",),
    "_pack": ("tl.load(source", "tl.load(kept_ptr"),
    "_pack_transposed": ("tl.load(pairs",),
}
"""For each kernel: the source of the loads of what it streams: the weights, for dW both operands."""


def rates() -> Table:
    """What sparse tensor cores can gain over the wide dense layer where arithmetic bounds it: predicted bounds."""
    rows = []
    for arch in ARCHITECTURES.values():
        gpu, share = GPUS[arch.example], arch.measured_warp_mma
        bound = None if share is None else 2 * share
        rows.append(
            (
                f"{gpu.name}, sm_{arch.arch}",
                f"{gpu.tensor:g}",
                "-" if share is None else f"{share:.1%}",
                "-" if bound is None else f"{bound:.2f}",
                f"{arch.matrix}.sp",
                "2.00",
                "-" if bound is None else f"{2 / bound:.2f}",
            )
        )
    columns = (
        "device",
        "dense TFLOP/s",
        "share by mma",
        "bound by mma.sp",
        "own instruction",
        "its bound",
        "left to gain",
    )
    title = "Predicted from published rates, not measured: the most that 2:4 can gain over the wide dense layer"
    return Table(title, columns, rows)


def _call(case: Case) -> None:
    n, k = case.shape
    dtype = TYPES[case.dtype]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    codes = torch.empty(n, k // 8, dtype=torch.uint8, device="meta")
    layout = SemiStructuredLayout(case.shape, codes, None, case.children)
    x, dy, values = empty(case.m, k), empty(case.m, case.children, n), empty(*layout.values_shape)
    calls: dict[str, Callable[[], Tensor]] = {
        "sparse": lambda: sparse_tensor_core.semi_structured_matmul_sparse_tensor_core(x, values, layout),
        "forward": lambda: dense_kernels.semi_structured_matmul_triton(x, values, layout),
        "dx": lambda: dense_kernels.semi_structured_matmul_t_triton(dy, values, layout),
        "dw": lambda: dense_kernels.semi_structured_grad_triton(dy, x, layout),
        "compress": lambda: dense_kernels.semi_structured_compress_triton(empty(n, k), layout),
        "expand": lambda: dense_kernels.semi_structured_expand_triton(values, layout),
    }
    calls.get(case.op, lambda: _call_pack(case))()


def _call_pack(case: Case) -> Tensor:
    """Calls a packer; codes of the result have a nibble for each quad of four inputs."""
    (n, k), source = case.shape, case.op.removeprefix("pack ").partition(" into ")[0]
    form = next(form for form in FORMS if case.op.endswith(form))

    def empty(*shape: int, dtype: torch.dtype = TYPES[case.dtype]) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def codes(rows: int, inputs: int) -> Tensor:
        return empty(rows, inputs // 8, dtype=torch.uint8)

    def of_result(rows: int, inputs: int) -> tuple[Tensor, int] | tuple[()]:
        return (codes(rows, inputs), inputs) if form == "dense" else ()

    if source == "values":
        return pack.pack_values(empty(2, n, k // 2), form, *of_result(n, k))
    if source == "transposed values":
        return pack.pack_transposed(empty(2, n, k // 2), codes(n, k), k, form, *of_result(k, 2 * n)[:1])
    if source == "parent.T":
        return pack.pack_parent(empty(n, k).T, 2, None, form, *of_result(k, 2 * n))
    alpha = 4 if source == "parent of four" else 2
    kept = None if source == "parent" else empty(1, n, k * alpha // 2, dtype=torch.bool)
    return pack.pack_parent(empty(n, k), alpha, kept, form, *of_result(n, alpha * k))


def _lines(kernel: str) -> set[tuple[str, int]]:
    """File and lines of a kernel's streamed loads."""
    module = sparse_kernels if kernel == "multiply" else pack if kernel.startswith("_pack") else dense_kernels
    source, first = getsourcelines(getattr(module, kernel).fn)
    file = Path(str(module.__file__)).name
    return {(file, first + i) for i, line in enumerate(source) if any(part in line for part in STREAMS[kernel])}


def compile_case(case: Case, arch: int) -> Row:
    """Compiles one launch and returns its row: configuration, facts of the binary, occupancy, complaints."""
    with ExitStack() as stack:
        for module in (dense_kernels, sparse_tensor_core):
            stack.enter_context(patch.object(module, "device_of", lambda tensor: KNOWN[arch]))
        # The sum of a split reduction is every family's, and is compiled with the others; packing is a case of its own.
        others = ("_reduce",) if case.op.startswith("pack") else ("_reduce", "_pack")
        caught = stack.enter_context(catching(arch, lambda kernel, key: kernel.endswith(others)))
        _call(case)
    ((compiled, given),) = caught
    kernel = compiled.metadata.name
    multiplies = case.op in ("sparse", "forward", "dx", "dw")
    facts = read(compiled.asm["cubin"], compiled.asm["ptx"], _lines(kernel), multiplies)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    tensor = getattr(compiled.metadata, "tmem_size", None) or 0
    held = programs_per_sm(arch, warps, facts["registers"], shared, tensor)
    row = {
        "kernel": "sparse_tensor_core" if case.op == "sparse" else kernel,
        "arch": arch,
        "case": case.id,
        "op": case.op,
        "dtype": case.dtype,
        "children": case.children,
        "m": case.m,
        "config": {k.lower(): v for k, v in given.items() if k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT", "STAGES")},
        **facts,
        "shared": shared,
        "programs_per_sm": min(held.values()),
        "limited_by": min(held, key=lambda name: held[name]),
    }
    return {**row, "complaints": check(row)}


def check(row: Row) -> list[str]:
    """What is wrong with a row, in words; nothing where it is as meant."""
    complaints = []
    if row["spill_stores"] or row["spill_loads"] or row["local"] or row["stack"]:
        complaints.append(f"spills: {row['spill_stores']} bytes stored, {row['spill_loads']} loaded")
    limit = KNOWN[row["arch"]].shared
    if row["shared"] > limit:
        complaints.append(f"shared memory: {row['shared']} bytes of {limit}")
    if not row["programs_per_sm"]:
        complaints.append(f"does not fit a multiprocessor: {row['limited_by']}")
    complaints += hazards.complaints(row)
    found = {name.removesuffix(".BF16").removesuffix(".F32") for name in row["matrix"]}
    if row["op"] == "sparse" and found != {"HMMA.SP.16832"}:
        complaints.append(f"matrix instruction: meant HMMA.SP.16832, got {', '.join(sorted(found)) or 'none'}")
    if row["op"] in ("forward", "dx", "dw") and bool(found) != (row["dtype"] != "fp32"):
        complaints.append(f"matrix instruction: {', '.join(sorted(found)) or 'none'} for {row['dtype']}")
    if row["load_bits"] < 128 and (row["op"] in ("sparse", "forward", "dx") or row["op"].startswith("pack")):
        complaints.append(f"loads of the weights of {row['load_bits']} bits")
    return complaints


def run(
    cases: Iterable[Case] = CASES,
    architectures: Iterable[int] = tuple(KNOWN),
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda rows, total: rows,
) -> Results:
    """Compiles cases for architectures, one row for each pair; the sparse kernel where it is meant to run."""
    cases, architectures = tuple(cases), tuple(architectures)
    pairs = [(c, a) for a, c in product(architectures, cases) if c.op != "sparse" or runs_mma_sp(a)]
    rows = [compile_case(case, arch) for case, arch in progress(pairs, len(pairs))]
    settings = {"triton": triton.__version__, "shape": list(SHAPE), "architectures": list(architectures)}
    return Results("lab-semi-structured", settings, rows)
