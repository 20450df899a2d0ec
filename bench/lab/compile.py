"""Compiles every kernel as it ships, for every architecture, with no GPU, and reads the machine code.

Nothing is described twice: the real launchers run on meta tensors while their launches are caught, so signature,
specialization and configuration are those of a GPU run. Triton's own cache keeps the binaries, and what was read from
one lies beside them, by the hash of binary and reader.

How work is counted: the main loop is the innermost loop that holds the matrix instructions. ``instructions_per_byte``
is its SASS instructions, times the program's warps, over the bytes of the streamed tiles that one turn consumes: warp
instructions for each byte of weight. dW streams both operands, so there it is for each byte of activations.
``instructions_per_weight`` is the same for each weight and thread: what an issue slot of a lane costs, comparable with
the slots that a device has while a weight comes out of DRAM; ``integer_per_weight`` are those at the integer rate.

``in_flight`` are bytes of a multiprocessor: of streamed loads into registers that its threads have under way at most,
with as many programs as fit.
"""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from inspect import getsource, getsourcelines
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ...kernels import epilogue
from ...kernels.block import triton as block_kernels
from ...kernels.block.layout import BlockLayout, grid
from ...kernels.device import KNOWN, interpreting
from ...kernels.gpus import architecture
from ...kernels.mlp import triton as mlp_kernels
from ...kernels.partition import gluon as partition_direct
from ...kernels.partition import triton as partition_kernels
from ...kernels.partition.config import COLUMNS, GROUP
from ...kernels.partition.labels import PackedLabels, digits, row_bytes
from ..results import Results
from ..table import Table
from . import hazards, sass
from .sass import Row, programs_per_sm

ARCHITECTURES = tuple(KNOWN)
BLOCK_OPERATIONS = ("forward", "dx", "dw")
PARTITION_OPERATIONS = ("split", "merge", "grad", "split_t", "merge_t", "grad_t")
"""On the weight as it is stored, and on its transpose: forward, dX and dW of both layers of a pair."""
OPERATIONS = (*BLOCK_OPERATIONS, *PARTITION_OPERATIONS, "mlp")
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (64, 128), (128, 64), (16, 64))
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
MLP_SHAPE = (64, 512, 1000)
"""Parents, inputs and outputs of the fused MLP."""
SHAPE = (14336, 4096)
"""``(N, K)`` of the layer: an LLM's, of its blocks half are kept (alpha = 2)."""


@dataclass(frozen=True)
class Case:
    """One launch of an operation.

    Attributes:
        op: A name in ``OPERATIONS``.
        dtype: A name in ``TYPES``; ``"fp32"`` multiplies in full precision.
        m: Rows of activations.
        block: ``(bn, bk)`` of a block operation.
        alpha: Children; of a block operation one block in so many is kept, every other one if not given.
        activation: Fused into a forward together with a bias, or none of both.
        shape: ``(N, K)`` of the stored weight; of a block operation that of the wide one.
    """

    op: str
    dtype: str
    m: int
    block: tuple[int, int] | None = None
    alpha: int | None = None
    activation: str | None = None
    shape: tuple[int, int] = SHAPE

    @property
    def id(self) -> str:
        """As ``forward-64x128-bf16-m16`` or ``split-alpha2-bf16-m16``."""
        structure = f"{self.block[0]}x{self.block[1]}" if self.block else f"alpha{self.alpha}"
        end = f"-{self.activation}" if self.activation else ""
        size = "" if self.shape == SHAPE else f"-{self.shape[0]}x{self.shape[1]}"
        return f"{self.op}-{structure}-{self.dtype}-m{self.m}{end}{size}"


CASES = (
    *(Case(op, t, m, b) for op, b, t, m in product(BLOCK_OPERATIONS, BLOCKS, TYPES, (1, 16, 64, 1024, 8192))),
    *(
        Case("forward", "bf16", m, block, activation=activation)
        for block, m, activation in product(BLOCKS, (16, 8192), ("relu", "gelu", "silu"))
    ),
    *(
        Case(op, "bf16", m, alpha=alpha)
        for op, alpha, m in product(PARTITION_OPERATIONS, (2, 3, 4, 8), (16, 32, 64, 1024, 8192))
    ),
    *(Case(op, t, m, alpha=2) for op, t, m in product(PARTITION_OPERATIONS, ("fp16", "fp32", "tf32"), (16, 64, 8192))),
    *(Case(op, "bf16", m, alpha=2, activation="gelu") for op, m in product(("split", "merge"), (16, 64, 8192))),
    *(
        Case("mlp", t, m, alpha=alpha, activation="relu")
        for t, m, alpha in product(("bf16", "fp16"), (1, 64), (2, 4, 8))
    ),
)

QUICK = (
    Case("forward", "bf16", 1024, (128, 128)),
    Case("forward", "bf16", 1, (64, 64), activation="gelu"),
    Case("dx", "fp16", 1024, (64, 64)),
    Case("dw", "bf16", 1024, (128, 128)),
    Case("split", "bf16", 16, alpha=2),
    Case("merge_t", "bf16", 16, alpha=2),
    Case("split_t", "fp16", 64, alpha=4),
    Case("merge", "bf16", 1024, alpha=2),
    Case("grad", "bf16", 1024, alpha=2),
    Case("mlp", "bf16", 1, alpha=2, activation="relu"),
)
"""A few of each kind, for CI."""


@dataclass(frozen=True)
class Kernel:
    """What the lab knows of a kernel.

    Attributes:
        function: The kernel, or the part of it that loads its streamed operands.
        streams: Source of the loads of its streamed operands.
        multiplies: Whether it has matrix instructions.
    """

    function: JITFunction
    streams: tuple[str, ...]
    multiplies: bool = True


KERNELS = {
    "_block_multiply": Kernel(block_kernels._block_multiply, ("tl.load(values_ptr",)),
    "_block_outer": Kernel(block_kernels._block_outer, ("tl.load(dy_ptr", "tl.load(x_ptr")),
    "_partition_multiply": Kernel(partition_kernels._partition_multiply, ("tl.load(words_at",)),
    "multiply_rows": Kernel(partition_direct._group, ("gl.load(upper_ptrs", "gl.load(lower_ptrs")),
    "multiply_columns": Kernel(partition_direct._rows, ("gl.load(words_at",)),
    "_partition_outer": Kernel(partition_kernels._partition_outer, ("tl.load(left_at", "tl.load(right_at")),
    "_expanded_mlp": Kernel(mlp_kernels._expanded_mlp, ("tl.load(words_at",)),
    "_reduce": Kernel(epilogue._reduce, ("tl.load(partial_ptr",), False),
}

_ACROSS = "tensor cores read TF32 along the reduction only, the operands lie across it: copied 4 bytes at a time"
NARROW = dict.fromkeys([("dx", "tf32"), ("dw", "tf32"), ("grad", "tf32"), ("grad_t", "tf32")], _ACROSS)
"""Operations and types whose streamed loads cannot be 128 bits wide everywhere, and why."""


@cache
def _stream_lines(kernel: str) -> tuple[set[tuple[str, int]], bool]:
    known = KERNELS[kernel]
    lines, first = getsourcelines(known.function.fn)
    file = Path(known.function.fn.__code__.co_filename).name
    found = {(file, first + i) for i, line in enumerate(lines) if any(f in line for f in known.streams)}
    return found, known.multiplies


def disassemble(cubin: bytes) -> tuple[str, str]:
    """A binary's machine code and its resources, as ``nvdisasm -c -g -hex`` and ``cuobjdump -res-usage`` print them."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        code = run([triton.knobs.nvidia.nvdisasm.path, "-c", "-g", "-hex", file.name]).stdout
        return code, run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]).stdout


def read(cubin: bytes, ptx: str, streams: set[tuple[str, int]], multiplies: bool) -> Row:
    """Facts of a binary (:func:`fpe.bench.lab.sass.analyse`), and its hazards: how many of each kind, and the first."""
    code, resources = disassemble(cubin)
    found = hazards.search(*sass.read_sass(code), ptx)
    facts = sass.analyse(code, resources, sass.lines_in_binary(ptx, streams), multiplies)
    return {**facts, "hazards": hazards.counted(found), "first_hazard": found[0].said if found else ""}


def _facts(kernel: str, cubin: bytes, ptx: str) -> Row:
    """Facts of a binary, from the cache or from the disassembler."""
    streams, multiplies = _stream_lines(kernel)
    reader = getsource(sass) + getsource(hazards) + ptx + repr(sorted(streams))
    key = hashlib.sha256(cubin + reader.encode()).hexdigest()
    kept = Path(triton.knobs.cache.dir) / "fpe-lab" / f"{key}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    facts = read(cubin, ptx, streams, multiplies)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=kept.parent, delete=False) as part:
        json.dump(facts, part)
    Path(part.name).replace(kept)
    return facts


# Catching launches.


@dataclass(frozen=True)
class Launch:
    """A launch to compile: the first case that makes it, and the key by which Triton tells binaries apart."""

    case: Case
    arch: int
    kernel: str
    key: str


class _Driver:
    """What Triton asks of a driver before it compiles. Each is a device of its own: nothing was compiled for it yet."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> "_Driver":
        return self

    def get_current_stream(self, device: "_Driver") -> int:
        return 0


@contextmanager
def catching(
    arch: int, skip: Callable[[str, str], bool], instead: Callable[..., None] = lambda *launch: None
) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Within it a launch compiles for ``arch``, if ``skip`` of kernel and key is false, and runs nothing.

    Args:
        arch: Compute capability.
        skip: Of a kernel's name and key.
        instead: Called with what was compiled, the kernel, the grid, and the arguments of the launch.

    Yields:
        What was compiled, with the keyword arguments of the launch.
    """
    if interpreting():
        raise RuntimeError("fpe lab compile: kernels are interpreted where TRITON_INTERPRET=1; unset it")
    caught: list[tuple[Any, dict[str, Any]]] = []
    driver = _Driver(arch)

    def launcher(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            kernel.device_caches.pop(driver)
            if compiled is not None:
                caught.append((compiled, kwargs))
                instead(compiled, kernel, grid, args, kwargs)

        return launch

    def hook(*, key: str, fn: Any, **unused: Any) -> bool:
        return skip(fn.name, key)

    with ExitStack() as stack:
        stack.enter_context(patch.object(triton.runtime.driver, "_active", driver))
        stack.enter_context(patch.object(triton.knobs.runtime, "jit_cache_hook", hook))
        stack.enter_context(patch.object(JITFunction, "__getitem__", launcher))
        for module in (block_kernels, partition_kernels, mlp_kernels):
            stack.enter_context(patch.object(module, "device_of", lambda tensor: KNOWN[arch]))
        yield caught


def _call(case: Case) -> None:
    """Calls the case's launcher on meta tensors."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    try:
        _call_block(case, case.block) if case.block else _call_partition(case, case.alpha or 2)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _empty(case: Case, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=TYPES[case.dtype], device="meta")


def _call_block(case: Case, block: tuple[int, int]) -> None:
    n, k = case.shape
    rows, columns = (torch.arange(size) for size in grid(case.shape, block))
    shared_out = BlockLayout.from_mask((rows[:, None] + columns) % (case.alpha or 2) == 0, case.shape, block)
    layout = BlockLayout(case.shape, block, *(index.to("meta") for index in shared_out.tensors))
    x, dy, values = _empty(case, case.m, k), _empty(case, case.m, n), _empty(case, *layout.values_shape)
    if case.op == "forward":
        bias = _empty(case, n) if case.activation else None
        block_kernels.block_matmul_triton(x, values, layout, bias, case.activation)
    elif case.op == "dx":
        block_kernels.block_matmul_t_triton(dy, values, layout)
    else:
        block_kernels.block_grad_triton(dy, x, layout)


def _call_partition(case: Case, alpha: int) -> None:
    n, k = case.shape
    planes = torch.empty(digits(alpha), n, row_bytes(k), dtype=torch.uint8, device="meta")
    labels, w = PackedLabels(planes, case.shape, alpha), _empty(case, n, k)
    if case.op.endswith("_t"):
        labels, w, (n, k) = labels.T, w.T, (k, n)
    activation = case.activation
    if case.op == "mlp":
        _call_mlp(case, alpha)
    elif case.op.startswith("split"):
        bias = _empty(case, alpha, n) if activation else None
        partition_kernels.split_matmul_triton(_empty(case, case.m, k), w, labels, alpha, bias, activation)
    elif case.op.startswith("merge"):
        bias = _empty(case, n) if activation else None
        partition_kernels.merge_matmul_triton(_empty(case, case.m, alpha, k), w, labels, bias, activation)
    else:
        partition_kernels.partition_grad_triton(_empty(case, case.m, alpha, n), _empty(case, case.m, k), labels)


def _call_mlp(case: Case, alpha: int) -> None:
    h, k, n = MLP_SHAPE
    planes = torch.empty(digits(alpha), h, row_bytes(k), dtype=torch.uint8, device="meta")
    x, w1, w2 = _empty(case, case.m, k), _empty(case, h, k), _empty(case, n, alpha * h)
    bias1, bias2 = _empty(case, alpha, h), _empty(case, n)
    labels = PackedLabels(planes, (h, k), alpha)
    mlp_kernels.expanded_mlp_triton(x, w1, labels, w2, None, alpha, bias1, bias2, case.activation)


def launches(cases: Iterable[Case], architectures: Iterable[int]) -> dict[Launch, list[str]]:
    """What has to be compiled, each binary once, with the ids of all cases that launch it."""
    users: dict[tuple[int, str, str], list[Case]] = {}
    for arch, case in product(architectures, cases):
        keys: list[tuple[str, str]] = []
        with catching(arch, partial(_note, keys)):
            _call(case)
        for key in keys:
            users.setdefault((arch, *key), []).append(case)
    return {Launch(used[0], *key): [case.id for case in used] for key, used in users.items()}


def _note(keys: list[tuple[str, str]], kernel: str, key: str) -> bool:
    keys.append((kernel, key))
    return True


def compile_launch(launch: Launch) -> Row:
    """Compiles one launch and returns its row: configuration, facts of the binary, occupancy."""
    with catching(launch.arch, lambda *key: key != (launch.kernel, launch.key)) as caught:
        _call(launch.case)
    ((compiled, given),) = caught
    return _row(launch, compiled, given)


def _tile(kernel: str, given: dict[str, Any], itemsize: int) -> tuple[int, int]:
    """Of one step of a program: bytes of the streamed operands, and rows of the tile that multiplies first."""
    if kernel == "_reduce":
        return given["BLOCK"] * 4, 0
    if kernel == "_block_outer":
        return given["BLOCK_M"] * (given["BN"] + given["BK"]) * itemsize, given["BN"]
    if kernel == "_partition_outer":
        left = given["BLOCK_N"] * (given["ALPHA"] if given["CHILDREN_LEFT"] else 1)
        right = given["BLOCK_K"] * (1 if given["CHILDREN_LEFT"] else given["ALPHA"])
        return given["BLOCK_M"] * (left + right) * itemsize, given["BLOCK_N"]
    if kernel == "_expanded_mlp":
        rows = given["BLOCK_M" if given["TURNED"] else "BLOCK_H"]
        return given["BLOCK_H"] * given["BLOCK_K"] * itemsize, rows
    if kernel == "multiply_rows":
        return given["BLOCK_N"] * GROUP * given["WARPS_IN"] * itemsize, 16
    if kernel == "multiply_columns":
        return given["UNROLL"] * 16 * given["num_warps"] * COLUMNS * itemsize, 16
    if kernel == "_partition_multiply":
        rows = given["BLOCK_M" if given["TURNED"] else "BLOCK_K" if given["TRANSPOSED"] else "BLOCK_N"]
        return given["BLOCK_N"] * given["BLOCK_K"] * itemsize, rows
    return given["BLOCK_IN"] * given["BK" if given["TRANSPOSED"] else "BN"] * itemsize, given["BLOCK_M"]


def _row(launch: Launch, compiled: Any, given: dict[str, Any]) -> Row:
    case, metadata = launch.case, compiled.metadata
    facts = _facts(launch.kernel, compiled.asm["cubin"], compiled.asm["ptx"])
    tensor = getattr(metadata, "tmem_size", None) or 0
    warps = metadata.num_warps
    held = programs_per_sm(launch.arch, warps, facts["registers"], metadata.shared, tensor)
    programs = min(held.values())
    itemsize = TYPES[case.dtype].itemsize
    tile, rows = _tile(launch.kernel, given, itemsize)
    # A short loop may be unrolled: its loads say how often. Tiles smaller than the program are loaded once by all.
    turns = facts["loop_load_bytes"] * 32 * warps / tile
    consumed = tile * max(round(turns), 1)
    return {
        "kernel": launch.kernel,
        "arch": launch.arch,
        "case": case.id,
        "op": case.op,
        "block": list(case.block) if case.block else None,
        "alpha": case.alpha,
        "dtype": case.dtype,
        "rows": rows,
        "tile": "x".join(str(given[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_IN") if name in given),
        "split": given.get("SPLIT"),
        "num_warps": warps,
        "num_stages": metadata.num_stages,
        **facts,
        "shared": metadata.shared,
        "tensor_columns": tensor,
        "programs_per_sm": programs,
        "limited_by": min(held, key=lambda name: held[name]),
        "occupancy": round(programs * warps / architecture(launch.arch).warps, 3),
        "tile_bytes": tile,
        "narrow_because": NARROW.get((case.op, case.dtype), "") if facts["load_bits"] < 128 else "",
        "instructions_per_byte": round(facts["loop_instructions"] * warps / consumed, 4),
        "instructions_per_weight": round(facts["loop_instructions"] * warps * 32 * itemsize / consumed, 2),
        "integer_per_weight": round(facts["loop_integer"] * warps * 32 * itemsize / consumed, 2),
        "in_flight": facts["loop_in_flight"] * 32 * warps * programs,
    }


def check(row: Row) -> list[str]:
    """What is wrong with a row of the table, in words; nothing where it is as meant."""
    complaints = []
    if row["spill_stores"] or row["spill_loads"] or row["local"] or row["stack"]:
        spilled = f"{row['spill_stores']} bytes stored, {row['spill_loads']} loaded, stack {row['stack']}"
        complaints.append(f"spills: {spilled}, local {row['local']}")
    limit = KNOWN[row["arch"]].shared
    if row["shared"] > limit:
        complaints.append(f"shared memory: {row['shared']} bytes of {limit}")
    if not row["programs_per_sm"]:
        complaints.append(f"does not fit a multiprocessor: {row['limited_by']}")
    complaints += hazards.complaints(row)
    if not KERNELS[row["kernel"]].multiplies:
        return complaints
    meant = expected_matrix(row)
    found = {name.split(".")[0] for name in row["matrix"]} or ({"FFMA"} if row["multiply_adds"] else set())
    if found != {meant}:
        complaints.append(f"matrix instruction: meant {meant}, got {', '.join(sorted(found)) or 'none'}")
    if row["load_bits"] < (32 if (row["op"], row["dtype"]) in NARROW else 128):
        threads = 32 * row["num_warps"]
        complaints.append(f"loads of {row['load_bits']} bits: {row['tile_bytes']} bytes a step for {threads} threads")
    if row["kernel"] in DIRECT and row["tile"].startswith(("8", "16")):
        spent = row["instructions_per_weight"]
        if spent > ISSUE_SLOTS:
            complaints.append(f"{spent} instructions a weight: unpacking would outlast the memory")
    if row["kernel"] in DIRECT and row["loop_shared"]:
        complaints.append(f"{row['loop_shared']} instructions on shared memory in a loop that needs none")
    return complaints


DIRECT = ("multiply_rows", "multiply_columns")
"""Kernels for few rows, whose weights go from memory to the tensor cores directly."""
ISSUE_SLOTS = 14
"""Instructions that an H200's lanes can issue while a 16-bit weight arrives at 4.8 TB/s (132 x 128 lanes, 1.98 GHz)."""


def expected_matrix(row: Row) -> str:
    """The instruction that a configuration is meant to multiply with."""
    if row["dtype"] == "fp32":
        return "FFMA"
    if row["rows"] >= 64 and row["num_warps"] % 4 == 0:
        return {"mma": "HMMA", "wgmma": "HGMMA", "tcgen05.mma": "UTCHMMA"}[architecture(row["arch"]).matrix]
    return "HMMA"


def run(
    cases: Iterable[Case] = CASES,
    architectures: Iterable[int] = ARCHITECTURES,
    jobs: int | None = None,
    progress: Callable[[Iterable[Row], int], Iterable[Row]] = lambda rows, total: rows,
) -> Results:
    """Compiles cases for architectures in parallel processes.

    Args:
        cases: What to launch.
        architectures: Compute capabilities, as 90.
        jobs: Processes; as many as cores when none is given.
        progress: Wraps the rows as they come, for a bar.

    Returns:
        One row for each binary, with ``complaints`` and the number of ``cases`` that launch it.
    """
    cases, architectures = tuple(cases), tuple(architectures)
    todo = launches(cases, architectures)
    jobs = jobs or os.cpu_count() or 1
    with ExitStack() as stack:
        if jobs == 1:
            compiled: Iterable[Row] = map(compile_launch, todo)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=get_context("spawn")))
            compiled = pool.map(compile_launch, todo)
        rows = [
            {**row, "cases": len(todo[launch]), "complaints": check(row)}
            for launch, row in zip(todo, progress(compiled, len(todo)), strict=True)
        ]
    settings = {
        "triton": triton.__version__,
        "shape": list(SHAPE),
        "cases": len(cases),
        "architectures": list(architectures),
    }
    return Results("lab-compile", settings, rows)


def table(results: Results, show_all: bool = True) -> Table:
    """The rows for the terminal: all, or those complained of and each kernel's and architecture's largest."""
    largest: dict[tuple[str, int], Row] = {}
    for row in results.rows:
        key = (row["kernel"], row["arch"])
        largest[key] = max(largest.get(key, row), row, key=lambda r: r["registers"])
    chosen = [r for r in results.rows if show_all or r["complaints"] or r is largest[r["kernel"], r["arch"]]]
    title = f"{len(results.rows)} binaries by Triton {results.settings['triton']}, {len(chosen)} shown"
    return Table(
        title, tuple(_cells(results.rows[0])) if results.rows else (), [tuple(_cells(r).values()) for r in chosen]
    )


def _cells(row: Row) -> dict[str, str]:
    loads = ", ".join(f"{count} {name}" for name, count in row["loads"].items())
    return {
        "kernel, architecture, first case": f"{row['kernel']} sm_{row['arch']} {row['case']}",
        "tile/split": f"{row['tile'] or '-'}/{row['split']}",
        "warps/stages": f"{row['num_warps']}/{row['num_stages']}",
        "registers": f"{row['registers']}",
        "spills": f"{row['spill_stores'] + row['spill_loads'] + row['stack'] + row['local']}",
        "shared": f"{row['shared']}",
        "programs/SM": f"{row['programs_per_sm']} ({row['limited_by']})",
        "streamed loads": re.sub(r"\.(E|BYPASS|ACCESS)\b", "", loads) or "-",
        "matrix": ", ".join(row["matrix"]) or ("FFMA" if row["loop_instructions"] else "-"),
        "KB in flight/SM": f"{row['in_flight'] / 1024:.0f}" if row["in_flight"] else "-",
        "instr./weight": f"{row['instructions_per_weight']:.1f}" if row["loop_instructions"] else "-",
        "complaints": "; ".join(row["complaints"]) or "none",
    }
