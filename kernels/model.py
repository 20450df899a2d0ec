"""What an operation costs on a GPU: bytes over bandwidth, FLOPs over rate, unpacking over integer rate, launches.

One model serves ``fpe explain``, ``fpe verdict``, the report and the choice of a backend. It is pure: plain numbers in,
plain numbers out, neither a device nor Triton nor torch.

Its inputs are a layer and a batch (:class:`Sizes`), and what a device can do (:class:`~fpe.kernels.roofs.Roof`).

The model leaves out: bytes that large batches move twice because operands do not fit L2 (``fpe lab traffic`` counts
them; arithmetic limits those sizes), passes of L1 (``fpe lab wavefronts`` counts those of kept values), the rounding of
sizes up to whole tiles, and overlap between launches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log2

from .gpus import OLDEST, architecture, reads_kept_values
from .roofs import ITEMSIZE, Roof
from .structures import BLOCK, RANDOM, SEEDED, SEEDED_CHILDREN, STRUCTURES, TWO_FOUR

OPS = ("split_matmul", "merge_matmul", "partition_grad")
BLOCK_SIDES = (16, 32, 64, 128)
MAX_ROWS = 1 << 17
"""Batch sizes above this are not searched for a crossover."""

ASSUMED_SMALL_BLOCKS = {16: 0.35, 32: 0.65, 64: 1.0, 128: 1.0}
"""Factor on the arithmetic rate of blocks, by their smaller side."""
ASSUMED_UNPACKING = {"packed labels": 1.75, "sparse tensor cores": 0.5}
"""Integer slots for each weight and child, spent again for every tile of rows. A compiled sketch needs seven
instructions of all kinds for a weight and its two children; half of them count, because twice the integer rate can be
issued."""
ASSUMED_TILE_ROWS = 128
INDEX_BITS = 1 + 16 / 1024
"""Bits of a bitmap for each position: the bit itself, and the running counts of values."""
DECODE_ROWS = 64
"""Rows of 16-bit activations up to which labels are unpacked by :data:`UNPACKING` instead."""
UNPACKING: Mapping[tuple[str, bool], Mapping[int, tuple[float, float]]] = {
    ("split_matmul", False): {2: (1.55, 1.67), 3: (2.56, 2.57), 4: (3.06, 3.07), 8: (6.55, 13.1)},
    ("split_matmul", True): {2: (2.16, 2.19), 3: (3.41, 6.82), 4: (3.91, 7.82), 8: (8.0, 16.0)},
    ("merge_matmul", False): {2: (1.55, 1.83), 3: (2.56, 2.9), 4: (3.06, 3.56), 8: (6.55, 13.1)},
    ("merge_matmul", True): {2: (2.22, 2.22), 3: (3.34, 3.31), 4: (3.84, 3.83), 8: (7.56, 15.12)},
}
"""Integer slots for each weight, by operation, transposition and children: for up to 16 rows, and for every 32.

Counted by ``fpe lab compile`` in the binaries for compute capability 9.0 (the others differ little): the instructions
at the integer rate, or half of all where that is more. A test holds them equal to the committed counts."""
KEPT_UNPACKING: Mapping[tuple[str, bool], Mapping[int, tuple[float, float]]] = {
    ("split_matmul", False): {1: (5.03, 5.06), 2: (6.61, 6.61), 4: (8.12, 8.12), 8: (11.61, 11.61)},
    ("split_matmul", True): {1: (9.35, 12.81), 2: (12.69, 19.0), 4: (21.44, 21.44), 8: (44.5, 44.5)},
    ("merge_matmul", False): {1: (5.03, 5.06), 2: (6.61, 6.61), 4: (8.17, 8.17), 8: (11.72, 11.72)},
    ("merge_matmul", True): {1: (9.35, 12.81), 2: (12.96, 16.28), 4: (17.09, 17.09), 8: (39.25, 39.25)},
}
"""The same for a weight of which only the kept values are stored, for each position, kept or not: for 16 rows, and for
each tile of 64."""
KEPT_VALUES, DECOMPRESSED, MASKED_DENSE = "kept values", "decompressed", "masked dense"
"""Ways to run an operation on kept values: reading them while multiplying, writing them to their places first, or the
eager twin."""


@dataclass(frozen=True)
class Sizes:
    """A layer and a batch, or the weight and the rows that one operation of it is given.

    Attributes:
        m: Rows of activations.
        n: Rows of the parent's weight: its output features.
        k: Columns of the parent's weight: its input features.
        alpha: Children per parent.
        structure: Of :data:`~fpe.kernels.structures.STRUCTURES`.
        dtype: ``"bf16"``, ``"fp16"``, ``"tf32"`` or ``"fp32"``.
        block: ``(bn, bk)`` of structure ``"block"``.
        kept: Share of the entries that exist, if only these are stored, with a bitmap; ``None`` if all are stored.
    """

    m: int
    n: int
    k: int
    alpha: int = 2
    structure: str = RANDOM
    dtype: str = "bf16"
    block: tuple[int, int] = (64, 64)
    kept: float | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]

    @property
    def turned(self) -> "Sizes":
        """The sizes of the transposed weight."""
        return replace(self, n=self.k, k=self.n, block=self.block[::-1])


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
        name: Of the implementation: a key of :data:`~fpe.kernels.roofs.ASSUMED`.
        seconds: Predicted time.
        bytes: Memory traffic: each operand and each result once, and intermediate copies once written and once read.
        flops: Floating-point operations that are executed, those on zeros included.
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
"""Dense layers to compare with, never chosen: the parent is another function, and the wide layer has no mask."""


def candidates(op: str, sizes: Sizes, roof: Roof, constant: bool = True, transposed: bool = False) -> list[Candidate]:
    """Every way to run an operation, those that cannot be chosen included, in a fixed order.

    Args:
        op: ``"split_matmul"`` (``x[m, k]`` to ``y[m, alpha, n]``), ``"merge_matmul"`` (``z[m, alpha, k]`` to
            ``y[m, n]``) or ``"partition_grad"`` (``dy[m, alpha, n]`` and ``x[m, k]`` to ``dw[n, k]``).
        sizes: Of the weight as the operation takes it.
        roof: Of the device.
        constant: Whether the weights stay from call to call, so that compressed forms of them are kept.
        transposed: Whether the weight is stored as its transpose.

    Raises:
        ValueError: An argument is not one of these, or a size is not positive.
    """
    _check(op, sizes, roof)
    m, n, k, alpha, structure, block = sizes.m, sizes.n, sizes.k, sizes.alpha, sizes.structure, sizes.block
    size, useful = sizes.itemsize, 2.0 * m * n * k
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
        if name == KEPT_VALUES and not grad:
            per_weight = kept_unpacking(op, transposed, alpha, m)
        parts = {
            "memory": bytes_ / (roof.bandwidth * roof.reach.bandwidth * share.bandwidth),
            "arithmetic": flops / (roof.flops[sizes.dtype] * roof.reach.arithmetic * share.arithmetic * speed),
            "unpacking": 0.0 if grad else n * k * per_weight / roof.integer,
        }
        launch = launches * roof.launch_seconds + before / (roof.bandwidth * roof.reach.bandwidth)
        limit = max(parts, key=lambda part: parts[part])
        seconds, moved = parts[limit] + launch, bytes_ + before
        return Candidate(name, seconds, moved, flops, "launch" if launch > parts[limit] else limit, why)

    # Yardsticks; then what runs for every structure; then what only some structures allow.
    found = [
        costs("parent", parent + sides, useful, why="yardstick: not expanded"),
        costs("wide dense", wide + activations, alpha * useful, why="yardstick: not masked"),
        # The eager twin: makes the wide weight (or takes dW out of the wide one) in a pass of its own.
        costs(MASKED_DENSE, parent + n * k + 2 * wide + activations, alpha * useful, launches=3 if grad else 2),
    ]
    if sizes.kept is not None:
        values = sizes.kept * parent + n * k * INDEX_BITS / 8
        labels = formats["partition labels"] - parent
        why = _too_old(roof) or _why_not_gathered(m, roof)
        # The twin makes 64-bit indices from a mask of bytes, and scatters the values.
        twin = values + parent + 18.0 * n * k
        return [
            *found[:2],
            costs(MASKED_DENSE, found[2].bytes, found[2].flops, 6, before=twin),
            costs(KEPT_VALUES, values + labels + activations, alpha * useful, why=why),
            _decompressed(op, sizes, roof, transposed, values + parent),
        ]
    if structure == BLOCK:
        small = ASSUMED_SMALL_BLOCKS.get(min(block), min(ASSUMED_SMALL_BLOCKS.values()))
        why = "" if {*block} <= {*BLOCK_SIDES} else f"it takes blocks with sides of {BLOCK_SIDES}, got {block}"
        why = why or _too_old(roof)
        return [*found, costs("blocks", formats["blocks"] + activations, useful, speed=small, why=why)]
    stored = formats["seeded labels" if structure == SEEDED else "partition labels"] + activations
    found.append(costs("packed labels", stored, alpha * useful, why=_too_old(roof)))
    why = _too_old(roof) or _why_not_sparse("sparse tensor cores", op, sizes)
    rate = 2 * architecture(roof.arch).warp_mma
    # A merge first copies its activations so that siblings lie side by side; changed weights are compressed again.
    more, launches = (2.0 * size * m * alpha * k, 2) if op == "merge_matmul" else (0.0, 1)

    def anew(name: str) -> tuple[float, int]:
        return (0.0, 0) if constant else repacking(name, op, structure, n * k, alpha, size)

    moved, packs = anew("sparse tensor cores")
    found.append(costs("sparse tensor cores", stored, alpha * useful, launches + packs, rate, why, more + moved))
    why = _too_old(roof) or _why_not_sparse("torch.sparse", op, sizes)
    why = why or ("it takes alpha = 2" if alpha != 2 else "")
    why = why or (f"it takes sizes in multiples of 16, got {n} x {k}" if n % 16 or k % 16 else "")
    two_four = formats.get(TWO_FOUR, formats["partition labels"]) + activations
    moved, packs = anew("torch.sparse")
    found.append(costs("torch.sparse", two_four, alpha * useful, launches + packs, 2.0, why, more + moved))
    return found


def _decompressed(op: str, sizes: Sizes, roof: Roof, transposed: bool, moved: float) -> Candidate:
    """Returns the cost of the best product, with the pass that writes values to their places or takes them out."""
    every = candidates(op, replace(sizes, kept=None), roof, False, transposed)
    # With one child it is a dense matmul.
    inner = best(every) if sizes.alpha > 1 else next(c for c in every if c.name == "parent")
    before = roof.launch_seconds + moved / (roof.bandwidth * roof.reach.bandwidth * roof.shares[DECOMPRESSED].bandwidth)
    limit = "launch" if before > inner.seconds else inner.limited_by
    return Candidate(DECOMPRESSED, inner.seconds + before, inner.bytes + moved, inner.flops, limit, _too_old(roof))


def kept_unpacking(op: str, transposed: bool, alpha: int, m: int) -> float:
    """Integer slots that an operation on kept values spends on a position; as :func:`unpacking` counts them."""
    table = KEPT_UNPACKING[op, transposed]
    known = min((count for count in table if count >= alpha), default=max(table))
    # Of a tile: sums of all children share the registers, on the stored weight with more that is under way.
    rows = max(min(128 // known, DECODE_ROWS if transposed else 32), 16)
    few, many = table[known]
    return (few if m <= 32 else many) * ceil(m / rows) * max(alpha / known, 1.0)


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
    """Bytes and launches that it takes to bring changed weights into an implementation's format.

    The bytes are what the kernels of ``semi_structured.pack`` read and write, once each. A split extracts its
    children's values first, and its dX starts from these; every other merge starts from the parent. cuSPARSELt is given
    the plain wide weight and makes a format of its own, values and two bits for each. Where PyTorch runs CUTLASS, fewer
    bytes move.

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


PASSES: Mapping[str, Callable[[Sizes], tuple[str, Sizes]]] = {
    "forward": lambda layer: ("split_matmul", layer),
    "dX": lambda layer: ("merge_matmul", layer.turned),
    "dW": lambda layer: ("partition_grad", layer),
}
"""Which operation an expanded layer runs in each pass, and the sizes that it sees."""
INFERENCE = ("forward",)
TRAINING = ("forward", "dX", "dW")


def layer_candidates(passes: Sequence[str], layer: Sizes, roof: Roof) -> list[list[Candidate]]:
    """The candidates of each pass of an expanded layer (:func:`candidates`). If dW is among them, weights change."""
    stays = "dW" not in passes
    return [candidates(*PASSES[name](layer), roof, stays, transposed=name == "dX") for name in passes]


def seconds_of(found: Sequence[Sequence[Candidate]], name: str | None = None) -> float:
    """Predicted time of several passes: each at its best, or all by one named candidate."""
    return sum((best(c) if name is None else next(x for x in c if x.name == name)).seconds for c in found)


def crossover(passes: Sequence[str], layer: Sizes, roof: Roof, tolerance: float = 0.10) -> int:
    """The largest batch up to which an expanded layer costs at most ``1 + tolerance`` times its parent.

    It holds for every batch up to there. The layer's own ``m`` does not matter. 0 if one row costs more already,
    :data:`MAX_ROWS` if none that is tried costs more.

    Raises:
        ValueError: See :func:`candidates`.
    """

    def holds(m: int) -> bool:
        found = layer_candidates(passes, replace(layer, m=m), roof)
        return seconds_of(found) <= (1 + tolerance) * seconds_of(found, "parent")

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


def _why_not_gathered(m: int, roof: Roof) -> str:
    """Returns why kernels cannot read kept values while they multiply; empty if they can."""
    if m > DECODE_ROWS:
        return f"it takes up to {DECODE_ROWS} rows, got {m}"
    fenced = reads_kept_values(roof.arch)
    return "" if fenced else f"Triton leaves out a fence on compute capability {roof.arch / 10}"


def _why_not_sparse(name: str, op: str, sizes: Sizes) -> str:
    """Returns why a candidate of sparse tensor cores cannot be chosen for an operation; empty if it can."""
    if op == "partition_grad":
        return "no operand of dW is sparse"
    if sizes.dtype not in ("bf16", "fp16"):
        return f"it takes bf16 and fp16, got {sizes.dtype}"
    if sizes.structure == SEEDED:
        if name != "sparse tensor cores" or op != "split_matmul":
            return "it takes stored labels, not those of a seed"
        if sizes.alpha != 2:
            return f"it takes two children of a seed, got {sizes.alpha}"
        return "it takes labels of a seed only if it is asked for by name"  # until a GPU has timed it
    if op == "split_matmul" and sizes.structure != TWO_FOUR:
        return f"it takes a split of structure {TWO_FOUR} alone"
    return "" if sizes.alpha in (2, 4) else f"it takes alpha = 2 or 4, got {sizes.alpha}"


def _check(op: str, sizes: Sizes, roof: Roof) -> None:
    named = (("op", op, OPS), ("structure", sizes.structure, STRUCTURES), ("dtype", sizes.dtype, (*ITEMSIZE,)))
    for name, value, known in named:
        if value not in known:
            raise ValueError(f"model: {name} must be one of {', '.join(known)}, got {value!r}")
    if sizes.dtype not in roof.flops:
        rates = ", ".join(roof.flops)
        raise ValueError(f"model: the roof of the {roof.name} has no rate for {sizes.dtype}, only {rates}")
    whole = {"m": sizes.m, "n": sizes.n, "k": sizes.k, "alpha": sizes.alpha, "block": min(sizes.block)}
    for name, size in whole.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"model: {name} must be a positive integer, got {size!r}")
    if sizes.structure == TWO_FOUR and sizes.alpha != 2:
        raise ValueError(f"model: structure {TWO_FOUR!r} has alpha = 2, got {sizes.alpha}")
    if sizes.kept is not None and not 0 <= sizes.kept <= 1:
        raise ValueError(f"model: kept must be a share from 0 to 1, got {sizes.kept!r}")
    if sizes.kept is not None and sizes.structure != RANDOM:
        raise ValueError(f"model: kept values beside a bitmap have structure {RANDOM!r}, got {sizes.structure!r}")
    if sizes.structure == SEEDED and sizes.alpha not in SEEDED_CHILDREN:
        raise ValueError(f"model: structure {SEEDED!r} has alpha in {SEEDED_CHILDREN}, got {sizes.alpha}")
