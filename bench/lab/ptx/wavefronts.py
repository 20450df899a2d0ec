"""Passes of L1 and of shared memory that a product of kept values costs, counted as its PTX is executed.

A wavefront is what a multiprocessor's L1 serves a warp in one pass: of shared memory a word from each of 32 banks, of
global memory a line of 128 bytes. Accesses of 8 and 16 bytes to shared memory go by half and by quarter warps. Of
global memory, each distinct line of a warp's access counts once. Both are read from the addresses of the first
program's warps. A shuffle goes the way of shared memory, in one pass. The cost of a loop is the difference of two
launches that differ only in its length.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import triton

from ....kernels.bitmap.layout import Bitmap
from ....kernels.device import KNOWN
from ....kernels.partition.config import Problem
from ....kernels.partition.triton import split_matmul_triton
from ....kernels.tables import choose
from ...results import Results
from .harness import Execution, executing
from .machine import WARP, Machine
from .memory import Array
from .parse import Address, Instruction

LINE, BANKS = 128, 32
ROWS, DENSITIES = 16, (0.25, 0.5, 0.75)
LENGTHS = (1024, 2048)
"""Columns of the two launches that are compared: whole runs of the index."""


@dataclass
class Wavefronts:
    """Watches the first program of an execution: wavefronts by what serves them, ``"global"`` or ``"shared"``.

    Attributes:
        warps: Of a program.
        counted: What was seen.
        loaded: Loads since the last turn of a loop: the instruction, which threads made it, and from where.
    """

    warps: int
    counted: Counter[str] = field(default_factory=Counter)
    loaded: list[tuple[Instruction, Array, Array]] = field(default_factory=list)

    def __call__(self, state: Machine, instruction: Instruction, here: Array | None) -> None:
        """As :class:`.machine.Machine` calls it."""
        name, *parts = instruction.opcode.split(".")
        if name == "shfl":
            self.counted["shared"] += self.warps
        if name not in ("ld", "st", "ldmatrix", "cp") or not {"global", "shared"} & {
            p.partition("::")[0] for p in parts
        }:
            return
        mask = here if instruction.guard is None else state._guarded(instruction, here)
        active = np.ones(state.shape, bool) if mask is None else mask
        spaces = [part for part in parts if part.partition("::")[0] in ("shared", "global")]
        addresses = [operand for operand in instruction.operands if isinstance(operand, Address)]
        for space, address in zip(spaces, addresses, strict=True):
            at = state.address(address, 32 if space.startswith("shared") else 64)
            if name == "ld" and self._again(instruction, active, at):
                continue
            width = 16 if name in ("ldmatrix", "cp") else _width(parts)
            lanes = int(instruction.opcode.partition(".x")[2][0]) * 8 if name == "ldmatrix" else WARP
            own = slice(self.warps)
            for addresses_of, runs in zip(at.reshape(-1, WARP)[own], active.reshape(-1, WARP)[own], strict=True):
                where = addresses_of[:lanes][runs[:lanes]].astype(np.int64)
                if space.startswith("shared"):
                    self.counted["shared"] += _of_banks(addresses_of[:lanes], runs[:lanes], width)
                else:
                    self.counted["global"] += len(np.unique(where // LINE))

    def _again(self, instruction: Instruction, active: Array, at: Array) -> bool:
        """Whether a load repeats an earlier one, as Triton makes them for copies: the assembler drops it."""
        if any(instruction is earlier for earlier, _, _ in self.loaded):
            self.loaded.clear()
        again = any(
            earlier.opcode == instruction.opcode and np.array_equal(by, active) and np.array_equal(of, at)
            for earlier, by, of in self.loaded
        )
        self.loaded.append((instruction, active, at))
        return again


def _width(parts: list[str]) -> int:
    """Bytes of a lane's access."""
    vector = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
    return vector * int(parts[-1].lstrip("bufs")) // 8


def _of_banks(at: Array, runs: Array, width: int) -> int:
    """Wavefronts of one warp's access to shared memory: by whole, half or quarter warps, and by clashes."""
    together, passes = max(WARP * 4 // max(width, 4), 1), 0
    for first in range(0, len(at), together):
        some = at[first : first + together][runs[first : first + together]].astype(np.int64)
        if len(some):
            words = np.unique((some[:, None] + np.arange(0, max(width, 4), 4)) // 4)
            passes += int(np.bincount(words % BANKS).max())
    return passes


def of_kept_values(arch: int, density: float, alpha: int = 1) -> dict[str, float]:
    """Wavefronts a position of the loop of ``split_matmul`` on kept values, of a random mask, for few rows."""
    device = KNOWN[arch]
    problem = Problem("split_matmul", ROWS, 14336, 4096, False, alpha, 2, pairs=True, kept=density)
    config = replace(choose(problem, device), split=1)
    counts = []
    for k in LENGTHS:
        watch, launched = Wavefronts(config.num_warps), list[Execution]()
        # Values follow those of the first program, which so takes the loop that all but the last ones take.
        mask = torch.rand(2 * config.block_n, k, generator=torch.Generator().manual_seed(0)) < density
        kept = Bitmap.pack(mask)
        with executing(arch, launched, watch=watch):
            x, values = torch.ones(ROWS, k, dtype=torch.bfloat16), torch.ones(kept.nnz, dtype=torch.bfloat16)
            split_matmul_triton(x, values, None, alpha, config=config, kept=kept)
        counts.append(watch.counted)
    positions = config.block_n * (LENGTHS[1] - LENGTHS[0])
    return {space: round((counts[1][space] - counts[0][space]) * WARP / positions, 3) for space in ("global", "shared")}


def run(architectures: Iterable[int]) -> Results:
    """A row for each architecture and density."""
    rows = [
        {"op": "kept_split", "alpha": 1, "arch": arch, "density": density, **of_kept_values(arch, density)}
        for arch in architectures
        for density in DENSITIES
    ]
    return Results("lab-wavefronts", {"triton": triton.__version__, "rows": ROWS, "lengths": list(LENGTHS)}, rows)
