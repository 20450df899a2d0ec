"""Compiles every kernel as it ships, for every architecture, with no GPU, and reads the machine code.

Nothing is described twice: the real launchers run on meta tensors while their launches are caught, so signature,
specialization and configuration are those of a GPU run. Triton's own cache keeps the binaries, and what was read from
one lies beside them, by the hash of binary and reader.

How work is counted: the main loop is the innermost loop that holds the matrix instructions. ``instructions_per_byte``
is its SASS instructions, times the program's warps, over the bytes of the streamed tiles that one turn consumes: warp
instructions for each byte of weight. dW streams both operands, so there it is for each byte of activations.
``instructions_per_weight`` is the same for each weight and thread: what an issue slot of a lane costs, comparable with
the slots that a device has while a weight comes out of DRAM; ``integer_per_weight`` are those at the integer rate.

``in_flight`` are bytes of a multiprocessor: the most that its threads have under way in streamed loads into registers,
with as many programs as fit. ``in_flight_l2`` are the most that are under way from memory to L2: the same bytes, or
those that the loop prefetches, which are the weights of all turns between a prefetch and the load. A device needs its
memory's bandwidth times its latency in flight, and the latency that counts is that of memory.

Kept values are counted as if every position existed. So for the ``kept_`` operations ``instructions_per_weight`` and
``integer_per_weight`` are for each position, and both numbers of bytes in flight are upper bounds: a position that does
not exist brings no byte, and of a mask that keeps a share of the positions about that share is under way.
"""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ...kernels.device import KNOWN, Device, interpreting
from ...kernels.gpus import architecture
from ...kernels.structures import TWO_FOUR
from ..families import CASES, KERNELS, SHOWN, TYPES, Case, Row, on, semi_structured
from ..families.contract import NARROW, SHAPE
from ..results import Results, commits
from ..table import Table
from . import hazards, sass
from .sass import programs_per_sm

ARCHITECTURES = tuple(KNOWN)


@cache
def _stream_lines(kernel: str) -> tuple[set[tuple[str, int]], bool]:
    known = KERNELS[kernel]
    found: set[tuple[str, int]] = set()
    for function in (part.fn for part in known.loads or (known.function,)):
        lines, first = getsourcelines(function)
        file = Path(function.__code__.co_filename).name
        found |= {(file, first + i) for i, line in enumerate(lines) if any(f in line for f in known.streams)}
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
    arch: int,
    skip: Callable[[str, str], bool],
    instead: Callable[..., None] = lambda *launch: None,
    device: Device | None = None,
) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Within it a launch compiles for ``arch``, if ``skip`` of kernel and key is false, and runs nothing.

    Args:
        arch: Compute capability.
        skip: Of a kernel's name and key.
        instead: Called with what was compiled, the kernel, the grid, and the arguments of the launch.
        device: On which the launchers take their tensors to be; the one known of the architecture if not given.

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
        stack.enter_context(on(device or KNOWN[arch]))
        yield caught


def launches(cases: Iterable[Case], architectures: Iterable[int]) -> dict[Launch, list[str]]:
    """What has to be compiled, each binary once, with the ids of all cases that launch it."""
    users: dict[tuple[Any, ...], list[Case]] = {}
    for arch, case in product(architectures, cases):
        keys: list[tuple[str, str]] = []
        if case.runs_on(arch):
            with catching(arch, partial(_note, keys)):
                case.call()
        for kernel, key in keys:
            if case.owns(kernel):
                users.setdefault((arch, kernel, key, case if case.each else None), []).append(case)
    return {Launch(used[0], *key): [case.id for case in used] for (*key, _), used in users.items()}


def _note(keys: list[tuple[str, str]], kernel: str, key: str) -> bool:
    keys.append((kernel, key))
    return True


def compile_launch(launch: Launch) -> Row:
    """Compiles one launch and returns its row: configuration, facts of the binary, occupancy."""
    with catching(launch.arch, lambda *key: key != (launch.kernel, launch.key)) as caught:
        launch.case.call()
    ((compiled, given),) = caught
    return _row(launch, compiled, given)


def _row(launch: Launch, compiled: Any, given: dict[str, Any]) -> Row:
    case, metadata, kernel = launch.case, compiled.metadata, KERNELS[launch.kernel]
    facts = _facts(launch.kernel, compiled.asm["cubin"], compiled.asm["ptx"])
    tensor = getattr(metadata, "tmem_size", None) or 0
    warps = metadata.num_warps
    held = programs_per_sm(launch.arch, warps, facts["registers"], metadata.shared, tensor)
    programs = min(held.values())
    row = {"kernel": kernel.shown, "arch": launch.arch, "case": case.id, "op": case.op, **case.columns}
    room = {"programs_per_sm": programs, "limited_by": min(held, key=lambda name: held[name])}
    if kernel.step is None:
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT", "STAGES")
        config = {name.lower(): value for name, value in given.items() if name in names}
        return {**row, "config": config, **facts, "shared": metadata.shared, **room}
    itemsize = TYPES[case.dtype].itemsize
    tile, rows = kernel.step(given, itemsize)
    ahead = given["AHEAD"] if facts["loop_prefetches"] else 0
    # A short loop may be unrolled: its loads say how often. Tiles smaller than the program are loaded once by all.
    turns = facts["loop_load_bytes"] * 32 * warps / tile
    consumed = tile * max(round(turns), 1)
    return {
        **row,
        "rows": rows,
        "tile": "x".join(str(given[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_IN") if name in given),
        "split": given.get("SPLIT"),
        "num_warps": warps,
        "num_stages": metadata.num_stages,
        **facts,
        "shared": metadata.shared,
        "tensor_columns": tensor,
        **room,
        "occupancy": round(programs * warps / architecture(launch.arch).warps, 3),
        "tile_bytes": tile,
        "narrow_because": NARROW.get((case.op, case.dtype), "") if facts["load_bits"] < 128 else "",
        "instructions_per_byte": round(facts["loop_instructions"] * warps / consumed, 4),
        "instructions_per_weight": round(facts["loop_instructions"] * warps * 32 * itemsize / consumed, 2),
        "integer_per_weight": round(facts["loop_integer"] * warps * 32 * itemsize / consumed, 2),
        "in_flight": facts["loop_in_flight"] * 32 * warps * programs,
        "in_flight_l2": programs * max(facts["loop_in_flight"] * 32 * warps, tile * ahead),
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
    return [*complaints, *hazards.complaints(row), *SHOWN[row["kernel"]].check(row)]


def run(
    cases: Iterable[Case] = CASES,
    architectures: Iterable[int] = ARCHITECTURES,
    jobs: int | None = None,
    progress: Callable[[Iterable[Row], int], Iterable[Row]] = lambda rows, total: rows,
) -> Results:
    """Compiles cases for architectures in parallel processes.

    Args:
        cases: What to launch; all of one file.
        architectures: Compute capabilities, as 90.
        jobs: Processes; as many as cores when none is given.
        progress: Wraps the rows as they come, for a bar.

    Returns:
        One row for each binary, with ``complaints`` and the number of ``cases`` that launch it.
    """
    cases, architectures = tuple(cases), tuple(architectures)
    (file,) = {case.file for case in cases}
    todo = launches(cases, architectures)
    jobs = jobs or os.cpu_count() or 1
    with ExitStack() as stack:
        if jobs == 1:
            compiled: Iterable[Row] = map(compile_launch, todo)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=get_context("spawn")))
            compiled = pool.map(compile_launch, todo)
        rows = [
            {**row, **({} if launch.case.each else {"cases": len(todo[launch])}), "complaints": check(row)}
            for launch, row in zip(todo, progress(compiled, len(todo)), strict=True)
        ]
    settings = {"triton": triton.__version__, "shape": list(SHAPE), "architectures": list(architectures)}
    return Results(f"lab-{file}", settings, rows)


def by_file(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Cases by the file of results that their rows go to."""
    files: dict[str, list[Case]] = {}
    for case in cases:
        files.setdefault(case.file, []).append(case)
    return files


def option(row: Row) -> str:
    """By which name the command line chooses a row's case."""
    return TWO_FOUR if row["kernel"] in _TWO_FOUR else row["op"]


_TWO_FOUR = {kernel.shown for kernel in semi_structured.KERNELS}


def joined(path: Path, results: Results, options: Collection[str] = ()) -> Results:
    """A file's rows with new ones in the place of those of the same architectures and operations; the rest stays.

    A file holds rows of one version of Triton and of one shape: one of another is replaced whole. A binary of several
    operations has a row of whichever was compiled first.

    Args:
        path: The file; where there is none the new rows are all.
        results: Of :func:`run`.
        options: What was compiled, as the command line names it; all if none is given.
    """
    architectures = results.settings["architectures"]

    def replaced(row: Row, settings: Mapping[str, Any]) -> bool:
        same = all(settings[name] == results.settings[name] for name in ("triton", "shape"))
        return not same or (row["arch"] in architectures and (not options or option(row) in options))

    return insert(path, results, replaced)


def insert(path: Path, results: Results, replaced: Callable[[Row, Mapping[str, Any]], bool]) -> Results:
    """A file's rows with new ones where the first of those stands that they replace; the header names both commits.

    Args:
        path: The file; where there is none the new rows are all.
        results: The new rows; ``architectures`` of the settings become those of both.
        replaced: Whether a row of the file, with the file's settings, goes.
    """
    if not path.exists():
        return results
    before = Results.read(path)
    gone = [replaced(row, before.settings) for row in before.rows]
    if all(gone):
        return results
    kept = [row for row, goes in zip(before.rows, gone, strict=True) if not goes]
    first = gone.index(True) if any(gone) else len(kept)
    both = sorted({*results.settings["architectures"], *before.settings["architectures"]})
    settings = {**before.settings, **results.settings, "architectures": both}
    provenance = {**results.provenance, "commit": commits(before.provenance, results.provenance)}
    return Results(results.study, settings, [*kept[:first], *results.rows, *kept[first:]], provenance)


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
        "to L2": f"{row['in_flight_l2'] / 1024:.0f}" if row["in_flight_l2"] else "-",
        "instr./weight": f"{row['instructions_per_weight']:.1f}" if row["loop_instructions"] else "-",
        "complaints": "; ".join(row["complaints"]) or "none",
    }
