"""What an operation costs on a GPU: bytes over bandwidth, FLOPs over rate, unpacking over integer rate, launches.

One model serves ``fpe explain``, ``fpe verdict``, the report and the choice of a backend. It is pure: plain numbers in,
plain numbers out, neither a device nor Triton nor torch.

Its inputs are of two kinds. A :class:`Roof` says what a device can do: published by its vendor (:data:`PUBLISHED`) or
measured on it (a JSON file that ``fpe gpu`` writes). A :class:`Share` says which part of that an implementation
reaches: :data:`ASSUMED` until a roof file brings measured ones. What is predicted from assumed shares is an estimate,
and every output says so (:attr:`Roof.basis`).

Left out: bytes that large batches move twice because operands outgrow L2 (``fpe lab traffic`` counts them; arithmetic
limits those sizes), the rounding of sizes up to whole tiles, and overlap between launches.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil, log2
from pathlib import Path
from typing import Any, NamedTuple

from .gpus import GPUS, OLDEST, Gpu, architecture
from .structures import BLOCK, SEEDED, SEEDED_CHILDREN, STRUCTURES, TWO_FOUR

OPS = ("split_matmul", "merge_matmul", "partition_grad")
ITEMSIZE = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}
"""Bytes of an element; ``"tf32"`` is float32 storage multiplied on tensor cores, ``"fp32"`` is not."""
BLOCK_SIDES = (16, 32, 64, 128)
MAX_ROWS = 1 << 17
"""Batch sizes above this are not searched for a crossover."""


class Share(NamedTuple):
    """Which part of a roof an implementation reaches: of its bandwidth, and of its arithmetic."""

    bandwidth: float
    arithmetic: float


# Assumptions, all of them, in this one place. Measured shares replace them where a roof file has some.

ASSUMED: Mapping[str, Share] = {
    "parent": Share(0.90, 1.00),  # cuBLAS: it is what the arithmetic roof is measured with
    "wide dense": Share(0.90, 1.00),
    "masked dense": Share(0.90, 1.00),
    "packed labels": Share(0.90, 0.65),
    "blocks": Share(0.90, 0.80),
    "torch.sparse": Share(0.45, 0.75),
    "sparse tensor cores": Share(0.85, 0.75),
}
ASSUMED_REACH = Share(0.90, 0.80)
"""What the best program reaches of published figures: a copy of the bandwidth, a large GEMM of the arithmetic."""
ASSUMED_SMALL_BLOCKS = {16: 0.35, 32: 0.65, 64: 1.0, 128: 1.0}
"""What is left of the arithmetic share of blocks, by their smaller side."""
ASSUMED_UNPACKING = {"packed labels": 1.75, "sparse tensor cores": 0.5}
"""Integer slots for each weight and child, done again for every tile of rows: half of the seven instructions of all
kinds that a compiled sketch needs for a weight and its two children, as twice the integer rate can be issued."""
ASSUMED_TILE_ROWS = 128
DECODE_ROWS = 64
"""Rows of 16-bit activations up to which labels are unpacked by :data:`UNPACKING` instead."""
UNPACKING: Mapping[tuple[str, bool], Mapping[int, tuple[float, float]]] = {
    ("split_matmul", False): {2: (1.55, 1.67), 3: (2.56, 2.57), 4: (3.06, 3.07), 8: (6.55, 13.1)},
    ("split_matmul", True): {2: (2.16, 2.19), 3: (3.41, 6.82), 4: (3.91, 7.82), 8: (15.06, 30.12)},
    ("merge_matmul", False): {2: (1.55, 1.83), 3: (2.56, 2.9), 4: (3.06, 3.56), 8: (6.55, 13.1)},
    ("merge_matmul", True): {2: (2.22, 2.22), 3: (3.34, 3.31), 4: (3.84, 3.83), 8: (7.56, 15.12)},
}
"""Integer slots for each weight, by operation, transposition and children: for up to 16 rows, and for every 32.

Counted by ``fpe lab compile`` in the binaries for compute capability 9.0 (the others differ little): the instructions
at the integer rate, or half of all where that is more. A test holds them equal to the committed counts."""
ASSUMED_LAUNCH = 2.5e-6
"""Seconds from one kernel's end to the next one's first useful work."""


@dataclass(frozen=True)
class Roof:
    """What a device can do.

    Attributes:
        name: Of the device.
        arch: Compute capability, as 90 for 9.0.
        bandwidth: Bytes of memory traffic a second.
        flops: Dense FLOPs a second by dtype (:data:`ITEMSIZE` has the names); products of 16-bit and TF32 operands on
            tensor cores with float32 accumulation.
        l2: Bytes of L2.
        integer: 32-bit bitwise instructions a second, over all lanes.
        launch_seconds: Cost of each launch.
        source: ``"published"`` or ``"measured"``.
        reach: What the best program reaches of ``bandwidth`` and ``flops``; all of it where they were measured.
        shares: What each implementation reaches of that.
    """

    name: str
    arch: int
    bandwidth: float
    flops: Mapping[str, float]
    l2: float
    integer: float
    launch_seconds: float = ASSUMED_LAUNCH
    source: str = "published"
    reach: Share = ASSUMED_REACH
    shares: Mapping[str, Share] = field(default_factory=lambda: dict(ASSUMED))

    @property
    def basis(self) -> str:
        """What predictions for this device rest on, in words for captions."""
        assumed = [name for name in ASSUMED if self.shares[name] == ASSUMED[name]]
        shares = "assumed" if len(assumed) == len(ASSUMED) else "partly assumed" if assumed else "measured"
        return f"predicted, not measured: {self.source} roofs of the {self.name}, {shares} shares of them"

    @classmethod
    def read(cls, path: Path) -> "Roof":
        """Reads a measured roof from a JSON file with this class's field names; ``shares`` may name some or none.

        Raises:
            ValueError: The file is cut, or a field is missing, unknown or no positive number.
        """
        try:
            given = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a roof in JSON: {error}") from error
        return cls.of(given, str(path))

    @classmethod
    def of(cls, given: Any, where: str = "roof") -> "Roof":
        """Makes a measured roof from a mapping, as :meth:`read` does.

        Raises:
            ValueError: See :meth:`read`; ``where`` begins the message.
        """
        names = {f.name for f in fields(cls)} - {"reach"}
        if not isinstance(given, dict):
            raise ValueError(f"{where}: expected an object with {', '.join(sorted(names))}, got {type(given).__name__}")
        provenance = {"provenance"}
        missing = {"name", "arch", "bandwidth", "flops", "l2", "integer"} - set(given)
        unknown = set(given) - names - provenance
        if missing or unknown:
            raise ValueError(f"{where}: a roof lacks {sorted(missing)} and has unknown {sorted(unknown)}")
        numbers = {n: given[n] for n in ("arch", "bandwidth", "l2", "integer", "launch_seconds") if n in given}
        numbers |= {f"flops.{dtype}": rate for dtype, rate in given["flops"].items()}
        shares = {name: Share(*pair) for name, pair in given.get("shares", {}).items()}
        numbers |= {f"shares.{name}": value for name, pair in shares.items() for value in pair}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{where}: {name} must be a positive number, got {value!r}")
        strangers = sorted({*given["flops"]} - {*ITEMSIZE} | {*shares} - {*ASSUMED})
        if strangers:
            raise ValueError(f"{where}: unknown {strangers}; dtypes are {[*ITEMSIZE]}, implementations {[*ASSUMED]}")
        own = {name: value for name, value in given.items() if name not in provenance}
        return cls(**{**own, "source": "measured", "reach": Share(1.0, 1.0), "shares": {**ASSUMED, **shares}})


def _published(gpu: Gpu) -> Roof:
    """The roof of a data sheet."""
    flops = {"bf16": gpu.tensor * 1e12, "fp16": gpu.tensor * 1e12, "tf32": gpu.tf32 * 1e12, "fp32": gpu.fp32 * 1e12}
    # The CUDA programming guide gives 64 bitwise instructions a clock and multiprocessor for all of these.
    return Roof(gpu.name, gpu.arch, gpu.bandwidth * 1e9, flops, gpu.l2 * 2**20, 64 * gpu.sms * gpu.clock * 1e9)


PUBLISHED: Mapping[str, Roof] = {key: _published(gpu) for key, gpu in GPUS.items()}
"""Roofs by :data:`~fpe.kernels.gpus.GPUS`. Published, not measured: :data:`ASSUMED_REACH` is applied."""


def roof_named(name: str, arch: int | None = None) -> Roof:
    """The roof of a GPU by its key in :data:`PUBLISHED` or by a device's own name, as ``"NVIDIA H200"``.

    Args:
        name: Key or name.
        arch: Compute capability, as 90. With it a GPU that is not in the table is taken for the last one there that is
            not newer, and its name says so: right in kind, not in size.

    Raises:
        ValueError: No such GPU is known.
    """
    words = {word.removesuffix("gb") for word in re.split("[^a-z0-9]+", name.lower())}
    fitting = [key for key in PUBLISHED if {*key.split("-")} <= words and "laptop" not in words]
    if fitting:
        return PUBLISHED[max(fitting, key=len)]
    if arch is not None and arch >= OLDEST:
        alike = [roof for roof in PUBLISHED.values() if roof.arch == architecture(arch).arch]
        stand_in = min(alike, key=lambda roof: roof.bandwidth)
        return replace(stand_in, name=f"{name}, taken for a {stand_in.name}")
    raise ValueError(f"GPU must be one of {', '.join(PUBLISHED)} or a measured roof's file, got {name!r}")


def bytes_by_format(n: int, k: int, alpha: int, itemsize: int = 2, block: tuple[int, int] = (64, 64)) -> dict[str, int]:
    """Bytes of one layer's weights, ``[n, k]`` before its split into ``alpha`` children, by storage format.

    ======================  ==================================================================================
    format                  what is stored
    ======================  ==================================================================================
    parent (dense)          ``n * k`` values: the yardstick
    wide (dense)            ``alpha * n * k`` values, most of them zero
    CSR                     ``n * k`` values, an int32 column each, int32 row pointers
    wide + bitmap           ``n * k`` values, a bit for each of ``alpha * n * k`` positions
    partition labels        ``n * k`` values, ``ceil(log2(alpha))`` bits each
    2:4 (alpha = 2)         ``n * k`` values, two bits each
    seeded labels           ``n * k`` values and 64 bytes, whatever the size; ``alpha`` 2, 4 or 8
    blocks                  ``n * k`` values in whole tiles, an int32 column for each, int32 row pointers
    ======================  ==================================================================================

    Args:
        n: Output features of the parent.
        k: Input features.
        alpha: Children per parent.
        itemsize: Bytes of a value.
        block: Tile ``(bn, bk)`` of the block format.
    """
    values = n * k * itemsize
    tiles_down, tiles_across = ceil(n / block[0]), ceil(k / block[1])
    tiles = tiles_down * tiles_across
    formats = {
        "parent (dense)": values,
        "wide (dense)": alpha * values,
        "CSR": values + 4 * n * k + 4 * (alpha * n + 1),
        "wide + bitmap": values + ceil(alpha * n * k / 8),
        "partition labels": values + ceil(n * k * ceil(log2(alpha)) / 8),
        "blocks": tiles * block[0] * block[1] * itemsize + 4 * tiles + 4 * (alpha * tiles_down + 1),
    }
    if alpha == 2:
        formats[TWO_FOUR] = values + ceil(n * k * 2 / 8)
    if alpha in SEEDED_CHILDREN:
        formats["seeded labels"] = values + 64
    return formats


def relative(formats: Mapping[str, int]) -> dict[str, float]:
    """Bytes of each format over those of the dense parent."""
    return {name: size / formats["parent (dense)"] for name, size in formats.items()}


@dataclass(frozen=True)
class Candidate:
    """A way to run an operation, and what it is predicted to cost.

    Attributes:
        name: Of the implementation: a key of :data:`ASSUMED`.
        seconds: Predicted time.
        bytes: Compulsory memory traffic: each operand and each result once.
        flops: Floating-point operations done, those on zeros included.
        limited_by: ``"memory"``, ``"arithmetic"``, ``"unpacking"`` or ``"launch"`` (copies made first included): the
            largest part of the time.
        reason_not: Why it cannot be chosen; empty if it can.
    """

    name: str
    seconds: float
    bytes: float
    flops: float
    limited_by: str
    reason_not: str = ""


YARDSTICKS = ("parent", "wide dense")
"""Dense layers that are compared with and never chosen: another function, and unmasked weights."""


def candidates(
    op: str,
    structure: str,
    m: int,
    n: int,
    k: int,
    alpha: int,
    dtype: str,
    roof: Roof,
    block: tuple[int, int] | None = None,
    constant: bool = True,
    transposed: bool = False,
) -> list[Candidate]:
    """Every way to run an operation, those that cannot be chosen included, in a fixed order.

    Args:
        op: ``"split_matmul"`` (``x[m, k]`` to ``y[m, alpha, n]``), ``"merge_matmul"`` (``z[m, alpha, k]`` to
            ``y[m, n]``) or ``"partition_grad"`` (``dy[m, alpha, n]`` and ``x[m, k]`` to ``dw[n, k]``).
        structure: Of :data:`~fpe.kernels.structures.STRUCTURES`.
        m: Rows of activations.
        n: Rows of the parent's weight.
        k: Columns of the parent's weight.
        alpha: Children per parent.
        dtype: ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"fp32"``.
        roof: Of the device.
        block: ``(bn, bk)`` of structure ``"block"``; 64 x 64 if not given.
        constant: Whether the weights stay from call to call, so that compressed forms of them are kept.
        transposed: Whether the weight is stored as its transpose.

    Raises:
        ValueError: An argument is not one of these, or a size is not positive.
    """
    _check(op, structure, (m, n, k), alpha, dtype, roof, block)
    size, useful = ITEMSIZE[dtype], 2.0 * m * n * k
    block = block or (64, 64)
    formats = bytes_by_format(n, k, alpha, size, block)
    parent, wide = formats["parent (dense)"], formats["wide (dense)"]
    grad = op == "partition_grad"
    activations = size * m * (alpha * (k if op == "merge_matmul" else n) + (n if op == "merge_matmul" else k))
    sides = size * m * (n + k)

    def costs(
        name: str,
        bytes_: float,
        flops: float,
        launches: int = 1,
        speed: float = 1.0,
        why: str = "",
        before: float = 0.0,
    ) -> Candidate:
        """A candidate; ``speed`` is its arithmetic's rate over the dense one's, ``before`` what is copied first."""
        share = roof.shares[name]
        per_weight = alpha * ASSUMED_UNPACKING.get(name, 0.0) * ceil(m / ASSUMED_TILE_ROWS)
        if name == "packed labels" and m <= DECODE_ROWS and size == 2 and (n if transposed else k) % 2 == 0:
            per_weight = unpacking(op, transposed, alpha, m)
        parts = {
            "memory": bytes_ / (roof.bandwidth * roof.reach.bandwidth * share.bandwidth),
            "arithmetic": flops / (roof.flops[dtype] * roof.reach.arithmetic * share.arithmetic * speed),
            "unpacking": 0.0 if grad else n * k * per_weight / roof.integer,
        }
        launch = launches * roof.launch_seconds + before / (roof.bandwidth * roof.reach.bandwidth)
        limit = max(parts, key=lambda part: parts[part])
        seconds, moved = parts[limit] + launch, bytes_ + before
        return Candidate(name, seconds, moved, flops, "launch" if launch > parts[limit] else limit, why)

    # Yardsticks; then what runs from labels whatever their structure; then what a structure opens.
    found = [
        costs("parent", parent + sides, useful, why="yardstick: not expanded"),
        costs("wide dense", wide + activations, alpha * useful, why="yardstick: not masked"),
        # The eager twin: makes the wide weight (or takes dW out of the wide one) in a pass of its own.
        costs("masked dense", parent + n * k + 2 * wide + activations, alpha * useful, launches=3 if grad else 2),
    ]
    if structure == BLOCK:
        small = ASSUMED_SMALL_BLOCKS.get(min(block), min(ASSUMED_SMALL_BLOCKS.values()))
        why = "" if {*block} <= {*BLOCK_SIDES} else f"it takes blocks with sides of {BLOCK_SIDES}, got {block}"
        why = why or _too_old(roof)
        return [*found, costs("blocks", formats["blocks"] + activations, useful, speed=small, why=why)]
    stored = formats["seeded labels" if structure == SEEDED else "partition labels"] + activations
    found.append(costs("packed labels", stored, alpha * useful, why=_too_old(roof)))
    why = _too_old(roof) or _why_not_sparse(op, structure, alpha, dtype)
    rate = 2 * architecture(roof.arch).warp_mma
    # A merge's activations are laid side by side first, by a copy; weights that have changed are compressed anew.
    more, launches = (2.0 * size * m * alpha * k, 2) if op == "merge_matmul" else (0.0, 1)

    def anew(name: str) -> tuple[float, int]:
        return (0.0, 0) if constant else repacking(name, op, structure, n * k, alpha, size)

    moved, packs = anew("sparse tensor cores")
    found.append(costs("sparse tensor cores", stored, alpha * useful, launches + packs, rate, why, more + moved))
    why = why or ("it takes alpha = 2" if alpha != 2 else "")
    why = why or (f"it takes sizes in multiples of 16, got {n} x {k}" if n % 16 or k % 16 else "")
    two_four = formats.get(TWO_FOUR, formats["partition labels"]) + activations
    moved, packs = anew("torch.sparse")
    found.append(costs("torch.sparse", two_four, alpha * useful, launches + packs, 2.0, why, more + moved))
    return found


def unpacking(op: str, transposed: bool, alpha: int, m: int) -> float:
    """Integer slots that up to :data:`DECODE_ROWS` rows spend on a weight; 0 for ``partition_grad``.

    Args:
        op: As :func:`candidates` takes it.
        transposed: Whether the weight is stored as its transpose.
        alpha: Children; for more than the table has, in proportion.
        m: Rows of activations.
    """
    if op == "partition_grad":
        return 0.0
    table = UNPACKING[op, transposed]
    known = min((count for count in table if count >= alpha), default=max(table))
    few, many = table[known]
    return (few if m <= 16 else many * ceil(m / 32)) * max(alpha / known, 1.0)


def repacking(name: str, op: str, structure: str, weights: int, alpha: int, size: int) -> tuple[float, int]:
    """Bytes that move, and launches, until weights that have changed lie as an implementation takes them.

    What the kernels of ``semi_structured.pack`` read and write, once each. A split takes its children's values first,
    which its dX starts from; every other merge starts from the parent. cuSPARSELt is given the plain wide weight and
    makes a form of its own, values and two bits for each; where PyTorch runs CUTLASS instead, less moves.

    Args:
        name: ``"sparse tensor cores"`` or ``"torch.sparse"``.
        op: ``"split_matmul"`` or ``"merge_matmul"``.
        structure: Of the labels.
        weights: Of the parent.
        alpha: Children.
        size: Bytes of a weight.
    """
    parent, codes = weights * size, weights / 8  # a nibble for each quad of a child's inputs, the second's not stored
    values = parent * max(alpha // 2, 1)  # four children: a zero beside each value
    wide, index = alpha * parent, alpha * codes
    moved, launches = (2 * parent + codes, 1) if op == "split_matmul" else (0.0, 0)
    moved += parent + (codes if op == "merge_matmul" and structure == TWO_FOUR else 0.0)
    moved += 2 * weights if alpha == 4 else 0.0  # which of each pair is the zero
    if name == "sparse tensor cores":
        return moved + values, launches + 1
    return moved + index + wide + wide + values + index, launches + 2


def best(found: Sequence[Candidate]) -> Candidate:
    """The fastest candidate that can be chosen.

    Raises:
        ValueError: None can.
    """
    able = [candidate for candidate in found if not candidate.reason_not]
    if not able:
        raise ValueError(f"none of {', '.join(c.name for c in found)} can run")
    return min(able, key=lambda candidate: candidate.seconds)


PASSES: Mapping[str, Callable[[int, int], tuple[str, int, int]]] = {
    "forward": lambda n, k: ("split_matmul", n, k),
    "dX": lambda n, k: ("merge_matmul", k, n),
    "dW": lambda n, k: ("partition_grad", n, k),
}
"""Which operation an expanded layer ``[n, k]`` runs in each pass, and the sizes of the weight that it sees."""
INFERENCE = ("forward",)
TRAINING = ("forward", "dX", "dW")


def layer_candidates(
    passes: Sequence[str],
    structure: str,
    m: int,
    n: int,
    k: int,
    alpha: int,
    dtype: str,
    roof: Roof,
    block: tuple[int, int] | None = None,
) -> list[list[Candidate]]:
    """The candidates of each pass of an expanded layer ``[n, k]``: see :func:`candidates`; with dW, weights change."""
    turned = {"dX": block[::-1] if block else None}
    found = []
    for name in passes:
        op, rows, columns = PASSES[name](n, k)
        tile = turned.get(name, block)
        stays = "dW" not in passes
        found.append(candidates(op, structure, m, rows, columns, alpha, dtype, roof, tile, stays, name == "dX"))
    return found


def seconds_of(found: Sequence[Sequence[Candidate]], name: str | None = None) -> float:
    """Predicted time of several passes: each at its best, or all by one named candidate."""
    return sum((best(c) if name is None else next(x for x in c if x.name == name)).seconds for c in found)


def crossover(
    passes: Sequence[str],
    structure: str,
    n: int,
    k: int,
    alpha: int,
    dtype: str,
    roof: Roof,
    block: tuple[int, int] | None = None,
    tolerance: float = 0.10,
    yardstick: str = "parent",
) -> int:
    """The largest batch up to which an expanded layer costs at most ``1 + tolerance`` times its parent.

    It holds for every batch up to there. 0 if not even for one row; :data:`MAX_ROWS` if for all that are tried.

    Raises:
        ValueError: See :func:`candidates`.
    """

    def holds(m: int) -> bool:
        found = layer_candidates(passes, structure, m, n, k, alpha, dtype, roof, block)
        return seconds_of(found) <= (1 + tolerance) * seconds_of(found, yardstick)

    # Ratios jump where tiles begin and change slowly elsewhere: eighths of a power of two find the first failure.
    steps = sorted({*range(1, 17), *(2**e + 2**e * i // 8 for e in range(4, 17) for i in range(8)), MAX_ROWS})
    last = 0
    for m in steps:
        if not holds(m):
            break
        last = m
    else:
        return MAX_ROWS
    while m - last > 1:
        middle = (m + last) // 2
        last, m = (middle, m) if holds(middle) else (last, middle)
    return last


def _too_old(roof: Roof) -> str:
    return "" if roof.arch >= OLDEST else f"it needs compute capability {OLDEST / 10}, got {roof.arch / 10}"


def _why_not_sparse(op: str, structure: str, alpha: int, dtype: str) -> str:
    """What keeps sparse tensor cores from an operation, in words."""
    if op == "partition_grad":
        return "no operand of dW is sparse"
    if dtype not in ("bf16", "fp16"):
        return f"it takes bf16 and fp16, got {dtype}"
    if structure == SEEDED:
        return "it takes labels in a table, not a seed"
    if op == "split_matmul" and structure != TWO_FOUR:
        return f"it takes structure {TWO_FOUR} here"
    return "" if alpha in (2, 4) else f"it takes alpha = 2 or 4, got {alpha}"


def _check(
    op: str,
    structure: str,
    sizes: tuple[int, int, int],
    alpha: int,
    dtype: str,
    roof: Roof,
    block: tuple[int, int] | None,
) -> None:
    for name, value, known in (("op", op, OPS), ("structure", structure, STRUCTURES), ("dtype", dtype, (*ITEMSIZE,))):
        if value not in known:
            raise ValueError(f"model: {name} must be one of {', '.join(known)}, got {value!r}")
    if dtype not in roof.flops:
        raise ValueError(f"model: the roof of the {roof.name} has no rate for {dtype}, only {', '.join(roof.flops)}")
    whole = {"m": sizes[0], "n": sizes[1], "k": sizes[2], "alpha": alpha}
    whole |= {"block": min(block)} if block else {}
    for name, size in whole.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"model: {name} must be a positive integer, got {size!r}")
    if structure == TWO_FOUR and alpha != 2:
        raise ValueError(f"model: structure {TWO_FOUR!r} has alpha = 2, got {alpha}")
    if structure == SEEDED and alpha not in SEEDED_CHILDREN:
        raise ValueError(f"model: structure {SEEDED!r} has alpha in {SEEDED_CHILDREN}, got {alpha}")
