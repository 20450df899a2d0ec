"""Sparse tensor cores without one: fragments, packers and the Gluon kernel against an emulator of PTX ``mma.sp``."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
import torch
from gluon_numpy import Machine, Pointer, Shared, on_numpy
from mma_sp import ORDERED, a_place, b_place, c_place, dense_a, metadata_place, mma_sp
from support import BadCall, allow, bytes_touched, readable_id, seeded
from torch import Tensor

pytest.importorskip("triton")

from fpe import Partition, SplitLinear
from fpe.bench.families.semi_structured import sparse_launches
from fpe.kernels import (
    HOLE,
    SeededLabels,
    SemiStructuredLayout,
    UnsupportedError,
    semi_structured_matmul,
    semi_structured_matmul_t,
    split_matmul,
)
from fpe.kernels.device import KNOWN
from fpe.kernels.epilogue import aligned_pairs
from fpe.kernels.partition import seeded as function
from fpe.kernels.partition.backends import SPLIT_OF_SEED
from fpe.kernels.semi_structured import gluon, sparse_tensor_core
from fpe.kernels.semi_structured.config import SparseConfig, SparseProblem
from fpe.kernels.semi_structured.fragments import Fragments, pack, pack_seeded, unpack
from fpe.kernels.semi_structured.layout import CODES, complement
from fpe.kernels.tables import choose

KINDS = {torch.bfloat16: "bf16", torch.float16: "f16"}
each_dtype = pytest.mark.parametrize("dtype", KINDS, ids=readable_id)


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randint(-4, 5, shape, generator=seeded(seed)).to(dtype)


def pairs(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Pairs of numbers ``[..., 2]`` as registers ``[...]``."""
    return torch.from_numpy(values).to(dtype).contiguous().view(torch.int32).squeeze(-1).numpy()


# The emulator, against a dense product that the tables are filled from.


@each_dtype
@pytest.mark.parametrize(("k", "selector"), [(32, 0), (32, 1), (16, 0), (16, 1), (16, 2), (16, 3)])
def test_the_emulator_multiplies(k: int, selector: int, dtype: torch.dtype) -> None:
    random = np.random.default_rng(selector)
    codes = random.choice(ORDERED, (16, k // 4))
    a, b, c = np.zeros((16, k)), random.integers(-9, 10, (k, 8)), random.integers(-9, 10, (16, 8))
    registers, metadata = np.zeros((32, k // 8, 2)), np.zeros(32, np.int64)
    for row, quad in np.ndindex(codes.shape):
        lane, bit = metadata_place(row, quad, k, selector)
        metadata[lane] |= int(codes[row, quad]) << bit
    for lane, register in np.ndindex(32, k // 8):
        row, first = a_place(lane, 2 * register)
        code = int(codes[row, first // 4])
        registers[lane, register] = random.integers(1, 9, 2)
        a[row, first + (code & 3)], a[row, first + (code >> 2)] = registers[lane, register]
    assert np.count_nonzero(a) == 16 * k // 2  # each place is filled once
    fragments_b = np.array([[b[b_place(lane, i)] for i in range(k // 4)] for lane in range(32)])
    fragments_c = np.array([[c[c_place(lane, i)] for i in range(4)] for lane in range(32)], np.float32)
    operands = pairs(registers, dtype), pairs(fragments_b.reshape(32, -1, 2).astype(np.float64), dtype)
    d = mma_sp(fragments_c, *operands, metadata.astype(np.uint32).view(np.int32), selector, KINDS[dtype], k)
    want = a @ b + c
    assert all(d[lane, i] == want[c_place(lane, i)] for lane, i in np.ndindex(32, 4))
    assert {c_place(lane, i) for lane, i in np.ndindex(32, 4)} == set(np.ndindex(16, 8))
    assert {b_place(lane, i) for lane, i in np.ndindex(32, k // 4)} == set(np.ndindex(k, 8))


def test_one_long_instruction_is_two_short_ones_with_the_same_metadata() -> None:
    """The tables of m16n8k32 and m16n8k16 agree: a lane pair's words are those of two single lanes."""
    fragments = packed(weight_of("random", 32, 32), torch.bfloat16)[0]
    a, e = fragments.weights.numpy()[0, 0, 0], fragments.metadata.numpy()[0, 0]
    b = np.random.default_rng(0).integers(-(2**31), 2**31, (32, 4)).astype(np.int32) & 0x3FFF3FFF
    zero = np.zeros((32, 4), np.float32)
    for half in (0, 1):
        long = mma_sp(zero, a[half], b, e, half, "bf16")
        short = mma_sp(zero, a[half][:, :2], b[:, :2], e, 2 * half, "bf16", 16)
        short = mma_sp(short, a[half][:, 2:], b[:, 2:], e, 2 * half + 1, "bf16", 16)
        np.testing.assert_allclose(long, short, rtol=1e-6)


def test_the_emulator_refuses_metadata_out_of_order() -> None:
    with pytest.raises(ValueError, match="row 0"):
        dense_a(np.zeros((32, 4), np.int32), np.full(32, 0x44444446, np.int32), 32, 0, "f16")


# The packers.


@dataclass(frozen=True)
class Weight:
    """A 2:4 parent in small integers, of which the first child's codes are of one kind or random."""

    values: Tensor
    layout: SemiStructuredLayout


def weight_of(pattern: str, n: int, k: int, children: int = 1, dtype: torch.dtype = torch.bfloat16) -> Weight:
    labels = Partition.semi_structured(n, k + -k % 4, generator=seeded(1)).labels
    if pattern != "random":
        first, second = int(pattern, 16) & 3, int(pattern, 16) >> 2
        labels = torch.ones(n, k // 4, 4, dtype=torch.uint8)
        labels[..., [first, second]] = 0
        labels = labels.flatten(1)
    labels = labels[:, :k].clone()
    if pattern == "random":
        labels[torch.rand(n, k, generator=seeded(2)) < 0.2] = HOLE
    one = SemiStructuredLayout.from_mask(labels == 0) if children == 1 else SemiStructuredLayout.from_labels(labels)
    return Weight(one.from_dense(integers(n, k, seed=3, dtype=dtype)), one)


def packed(weight: Weight, dtype: torch.dtype) -> tuple[Fragments, Tensor]:
    return pack(weight.values, weight.layout.codes), weight.layout.to_dense(weight.values)


@each_dtype
@pytest.mark.parametrize("children", [1, 2])
@pytest.mark.parametrize(
    ("pattern", "n", "k"),
    [(f"{code:x}", 32, 64) for code in CODES]
    + [("random", n, k) for n, k in ((1, 4), (40, 72), (33, 67), (128, 64), (130, 100))],
)
def test_packed_weights_are_the_dense_ones(pattern: str, n: int, k: int, children: int, dtype: torch.dtype) -> None:
    """Fragments and metadata, as the instruction reads them, are the dense weight exactly, zero in the padding."""
    weight = weight_of(pattern, n, k, children, dtype)
    fragments, dense = packed(weight, dtype)
    metadata = fragments.metadata
    for child in range(children):
        tiles = [
            dense_a(fragments.weights[child, :, :, half].numpy(), metadata.numpy(), 32, half, KINDS[dtype])
            for half in (0, 1)
        ]
        whole = np.stack(tiles, 1).transpose(0, 1, 3, 2, 4)  # [tiles, half, 16, instructions, 32]
        whole = whole.reshape(whole.shape[0] * 32, -1)
        assert np.array_equal(whole[:n, :k], dense[child].double().numpy())
        assert not whole[n:].any() and not whole[:, k:].any()
        metadata = complement(metadata.contiguous().view(torch.uint8)).view(torch.int32)
    values, layout = unpack(fragments, n, k, dtype)
    assert torch.equal(values, weight.values) and torch.equal(layout.codes, weight.layout.codes)


def test_both_children_cost_17_bits_a_parent_weight_in_either_form() -> None:
    n, k = 128, 256
    labels = Partition.semi_structured(n, k, generator=seeded(1)).labels
    layout = SemiStructuredLayout.from_labels(labels)
    values = layout.from_dense(integers(n, k))
    fragments = pack(values, layout.codes)
    for tensors in ((values, layout.codes), fragments):
        assert 8 * sum(t.numel() * t.element_size() for t in tensors) == 17 * n * k


# The kernel, run on NumPy.


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    config: SparseConfig | None = None

    @property
    def id(self) -> str:
        shape = f"{self.m}x{self.n}x{self.k}"
        own = self.config
        return f"{shape}-m{own.block_m}-split{own.split}-stages{own.num_stages}" if own else shape


CASES = (
    Case(1, 7, 24),
    Case(11, 136, 200),
    Case(9, 130, 67),
    Case(70, 129, 64),
    Case(3, 128, 256, SparseConfig(8, 1, 8, 2)),
    Case(17, 40, 448, SparseConfig(16, 2, 1, 3)),
    Case(20, 40, 448, SparseConfig(32, 4, 8, 4)),
    Case(130, 136, 64, SparseConfig(64, 1, 2, 4)),
    Case(0, 8, 8),
)


@each_dtype
@pytest.mark.parametrize("children", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=readable_id)
def test_the_kernel_is_exact_on_small_integers(case: Case, children: int, dtype: torch.dtype) -> None:
    """Copies, pipeline, fragments, split, epilogue, a bias that is rounded once; the instruction is the emulator's."""
    weight = weight_of("random", case.n, case.k, children, dtype)
    x = integers(case.m, case.k, seed=4, dtype=dtype)
    for rows, bias in ((x, None), (33 * x, 5 * integers(children, case.n, seed=5, dtype=dtype))):
        # The second sums have more bits than the type.
        with on_numpy():
            y = sparse_tensor_core.semi_structured_matmul_sparse_tensor_core(
                rows, weight.values, weight.layout, bias, case.config
            )
        assert y.dtype == dtype
        exact = None if bias is None else bias.double()
        want = semi_structured_matmul(rows.double(), weight.values.double(), weight.layout, exact)
        assert torch.equal(y, want.to(dtype))


@pytest.mark.parametrize("children", [1, 2])
@pytest.mark.parametrize("case", CASES[:-1], ids=readable_id)
def test_the_traffic_lab_replays_the_kernels_accesses(case: Case, children: int) -> None:
    """Every program's copies and stores, in their order."""
    weight = weight_of("random", case.n, case.k, children)
    config = case.config or choose(SparseProblem(case.m, case.n, case.k, children), KNOWN[90])
    done: dict[tuple[int, int], list[tuple[bool, list[int]]]] = defaultdict(list)

    def note(machine: Machine, store: bool, where: Pointer, mask: object) -> None:
        offsets, taken = np.broadcast_arrays(where.offsets, mask)
        size = where.tensor.itemsize
        if taken.any():
            touched = (offsets[taken][:, None] * size + np.arange(size)).reshape(-1)
            done[machine.place].append((store, sorted(touched.tolist())))

    class Watched(Machine):
        def copy(self, shared: Shared, source: Pointer, mask: object = True) -> None:
            note(self, False, source, mask)
            super().copy(shared, source, mask)

        def store(self, target: Pointer, value: np.ndarray, mask: np.ndarray) -> None:
            note(self, True, target, mask)
            super().store(target, value, mask)

    with patch("gluon_numpy.Machine", Watched), on_numpy():
        sparse_tensor_core.semi_structured_matmul_sparse_tensor_core(
            integers(case.m, case.k, seed=4), weight.values, weight.layout, config=config
        )
    launch, *_ = sparse_launches(case.m, (case.n, case.k), children, config)
    assert sorted(done) == list(product(*map(range, launch.grid)))
    for place, touched in done.items():
        replayed = []
        for step in launch.program(*place):
            loaded = [[a for a in step if a.tensor == name and not a.store] for name in ("weights", "metadata", "x")]
            for together in filter(None, [*loaded, *([a] for a in step if a.store)]):
                offsets = np.concatenate([bytes_touched(access) for access in together])
                replayed.append((together[0].store, sorted(offsets.tolist())))
        assert touched == replayed


# Two children of a seed.


@each_dtype
@pytest.mark.parametrize(("n", "k"), [(1, 2), (7, 24), (40, 67), (136, 300)])
def test_metadata_of_a_hash_puts_the_packed_values_in_their_places(n: int, k: int, dtype: torch.dtype) -> None:
    """As the instruction reads the fragments with words of half a hash, they are the children's shares exactly."""
    labels, w = SeededLabels.of(5, (n, k), 2, (6, 256)), integers(n, k, seed=3, dtype=dtype)
    fragments = pack_seeded(w, labels)
    tiles, instructions = fragments.shape[1:3]
    assert 4 * fragments[0].numel() == tiles * 32 * instructions * 32  # bytes: half of 16-bit weights a child
    lane = np.arange(32)
    rows = (np.arange(tiles)[:, None, None] * 16 + lane % 4 // 2 * 8 + lane // 4).astype(np.int64)
    words = np.arange(instructions)[:, None]
    hashed = function.mixed(torch.from_numpy(labels.key + rows * function.ROW + words * function.COLUMN))
    metadata = gluon._metadata.fn(hashed.numpy().astype(np.uint32).view(np.int32) >> lane % 2 * 16)
    # Rows 2 g and 2 g + 1 of 16 are g and g + 8; an instruction's inputs are those of one word of 128 columns.
    row = np.arange(32).reshape(2, 8, 2).transpose(0, 2, 1).reshape(2, 16)
    quad, pair, column = np.ix_(range(8), range(2), range(2))
    places = (32 * (quad % 2 * 2 + pair) + quad // 2 * 2 + column).reshape(-1)
    for child, words_of in enumerate((metadata, metadata ^ 0x55555555)):
        dense = np.zeros((tiles, 32, instructions // 4, 128))
        for half in (0, 1):
            tile = dense_a(fragments[child, :, :, half].numpy(), words_of, 32, half, KINDS[dtype])
            for t in range(4):
                at = np.ix_(range(tiles), row[half], range(instructions // 4), 8 * t + places)
                dense[at] = tile[:, t::4].transpose(0, 2, 1, 3)
        dense = dense.reshape(tiles * 32, -1)
        meant = torch.where(labels.unpack() == child, w, 0).double().numpy()
        assert np.array_equal(dense[:n, :k], meant) and not dense[n:].any() and not dense[:, k:].any()


@each_dtype
@pytest.mark.parametrize("case", CASES, ids=readable_id)
def test_the_kernel_makes_the_metadata_of_a_seed(case: Case, dtype: torch.dtype) -> None:
    labels, w = SeededLabels.of(5, (case.n, case.k), 2, (6, 256)), integers(case.n, case.k, seed=3, dtype=dtype)
    x = integers(case.m, case.k, seed=4, dtype=dtype)
    for rows, bias in ((x, None), (33 * x, 5 * integers(2, case.n, seed=5, dtype=dtype))):
        with on_numpy():
            y = sparse_tensor_core.split_matmul_seeded(rows, w, labels, 2, bias, "relu", case.config)
        exact = None if bias is None else bias.double()
        want = split_matmul(rows.double(), w.double(), labels, 2, exact, "relu")
        assert y.dtype == dtype and torch.equal(y, want.to(dtype))


def test_a_layer_of_a_seed_on_sparse_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but its weight is kept, packed once for each version of it; gradients are those of other backends."""
    allow(monkeypatch, SPLIT_OF_SEED, "sparse_tensor_core")
    partition = Partition.seeded(24, 40, 2, 9)
    x, results = integers(5, 40, seed=1), []
    for backend in ("sparse_tensor_core", "eager"):
        layer = SplitLinear(partition, backend=backend).bfloat16()
        layer.set_matrix(integers(24, 40, seed=2))
        torch.nn.init.zeros_(layer.bias)
        leaf = x.clone().requires_grad_()
        with on_numpy(), patch.object(sparse_tensor_core, "pack_seeded", wraps=pack_seeded) as packer:
            y = layer(leaf)
            assert torch.equal(layer(x), y) and packer.call_count == (backend == "sparse_tensor_core")
        results.append([y, *torch.autograd.grad(y.sum(), [leaf, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _of_seed(alpha: int = 2, transposed: bool = False, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    labels = SeededLabels.of(1, (8, 16), alpha)
    x, w = integers(3, 16, dtype=dtype), integers(8, 16, dtype=dtype)
    if transposed:
        x, w, labels = integers(3, 8, dtype=dtype), w.T, labels.T
    return split_matmul(x, w, labels, alpha, backend="sparse_tensor_core")


@pytest.mark.parametrize(
    "case",
    [
        BadCall("cpu", _of_seed, UnsupportedError, ("'sparse_tensor_core'", "CUDA", "cpu")),
        BadCall("children", lambda: _of_seed(4), UnsupportedError, ("two children", "4")),
        BadCall("transposed", lambda: _of_seed(transposed=True), UnsupportedError, ("2:4 along", "transpose")),
        BadCall(
            "table",
            lambda: split_matmul(
                integers(3, 16), integers(8, 16), torch.zeros(8, 16).byte(), 2, backend="sparse_tensor_core"
            ),
            ValueError,
            ("triton, cpu, eager", "'sparse_tensor_core'"),
        ),
    ],
    ids=readable_id,
)
def test_what_a_seed_on_sparse_tensor_cores_refuses(case: BadCall) -> None:
    case.check()


@each_dtype
@pytest.mark.parametrize("children", [1, 2])
@pytest.mark.parametrize("case", [Case(5, 7, 24), Case(11, 67, 72)], ids=readable_id)
def test_dx_is_exact_too(case: Case, children: int, dtype: torch.dtype) -> None:
    """Of two children by sparse tensor cores: the transposed weight is 2:4 again."""
    weight = weight_of("random", case.n, case.k, children, dtype)
    dy = integers(case.m, children, case.n, seed=5, dtype=dtype)
    with on_numpy():
        dx = sparse_tensor_core.semi_structured_matmul_t_sparse_tensor_core(dy, weight.values, weight.layout)
    want = semi_structured_matmul_t(dy.double(), weight.values.double(), weight.layout)
    assert torch.equal(dx, want.to(dtype))


@pytest.mark.parametrize(
    ("form", "copied"), [("rows", False), ("shifted", True), ("odd", True), ("transposed", True), ("strided", True)]
)
def test_rows_that_lie_awkwardly_are_copied_and_others_are_not(form: str, copied: bool) -> None:
    weight, buffer = weight_of("random", 9, 128), integers(8, 272, seed=6)
    x = {
        "rows": buffer[:5, 8:136],
        "shifted": buffer[:5, 1:129],
        "odd": buffer.flatten()[: 5 * 276].view(5, 276)[:, :128],
        "transposed": buffer[:5, :128].T.contiguous().T,
        "strided": buffer[:5, :256:2],
    }[form]
    with on_numpy():
        y = sparse_tensor_core.semi_structured_matmul_sparse_tensor_core(x, weight.values, weight.layout)
    assert (aligned_pairs(x, 128).data_ptr() != x.data_ptr()) == copied
    assert torch.equal(y, semi_structured_matmul(x.double(), weight.values.double(), weight.layout).bfloat16())


def test_a_pipeline_that_reads_too_early_would_be_seen() -> None:
    weight, x = weight_of("random", 9, 256), integers(3, 256)
    with patch.object(Machine, "wait", lambda self, outstanding: None), on_numpy(), pytest.raises(ValueError):
        sparse_tensor_core.semi_structured_matmul_sparse_tensor_core(x, weight.values, weight.layout)


def test_a_weight_is_packed_once_for_each_version() -> None:
    weight, x = weight_of("random", 9, 64), integers(3, 64)
    run = sparse_tensor_core.semi_structured_matmul_sparse_tensor_core
    with patch.object(sparse_tensor_core, "pack_values", wraps=sparse_tensor_core.pack_values) as packer, on_numpy():
        run(x, weight.values, weight.layout)
        run(x[:2], weight.values, weight.layout)
        assert packer.call_count == 1
        weight.values.mul_(2)
        y = run(x, weight.values, weight.layout)
        assert packer.call_count == 2
    assert torch.equal(y, semi_structured_matmul(x.double(), weight.values.double(), weight.layout).bfloat16())
